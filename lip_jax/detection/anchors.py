"""Anchors of RetinaNet and of region proposal networks, in two conventions.

Preset "torchvision": exact boxes around the cells' first pixels, as far apart as the padded image
divided by the grid. Preset "mmdet1", of mmdetection 0.6: inclusive boxes around the cells' centres,
a stride apart, of which only some are used.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lip_jax.errors import UsageError

Preset = Literal["mmdet1", "torchvision"]

DIVISOR = 32  # an image's own padding is to the next multiple


@dataclasses.dataclass(frozen=True)
class Anchors:
  """Boxes of fixed shapes at each cell of a pyramid's levels.

  In the order of levels, then rows, columns, ratios, sizes.
  """

  strides: tuple[int, ...]  # of the levels, in pixels
  sizes: tuple[tuple[float, ...], ...]  # of each level: square roots of the areas, in pixels
  preset: Preset
  whole: bool = False  # mmdet1: use only anchors that lie inside the image
  ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width

  @property
  def per_cell(self) -> int:
    """How many each cell has, the same on all levels."""
    return len(self.ratios) * len(self.sizes[0])

  def cell(self, level: int) -> np.ndarray:
    """Those of a level's first cell, rounded to pixels, half to even: [per_cell, 4] float64."""
    root = np.sqrt(np.asarray(self.ratios, np.float64))[:, None]
    sizes = np.asarray(self.sizes[level], np.float64)[None, :]
    width, height = (sizes / root).ravel(), (sizes * root).ravel()
    if self.preset == "mmdet1":
      centre, right, below = 0.5 * (self.strides[level] - 1), 0.5 * (width - 1), 0.5 * (height - 1)
    else:
      centre, right, below = 0.0, 0.5 * width, 0.5 * height
    return np.round(
      np.stack([centre - right, centre - below, centre + right, centre + below], axis=-1)
    )

  def boxes(
    self,
    padded: tuple[int, int],
    grids: Sequence[tuple[int, int]],
    dtype: jax.typing.DTypeLike = jnp.float32,
  ) -> jax.Array:
    """All anchors of a batch: [A, 4], x1, y1, x2, y2 in pixels.

    Args:
      padded: height and width of the batch's images, with padding.
      grids: rows and columns of each level.
      dtype: of the result; whole numbers, exact in float32.

    Raises:
      UsageError: as many grids as levels are expected.
    """
    found = []
    for level, (rows, columns) in enumerate(self._checked(grids)):
      down, right = self._steps(level, padded, (rows, columns))
      cell = jnp.asarray(self.cell(level), dtype)
      y = jnp.arange(rows, dtype=dtype)[:, None, None] * down
      x = jnp.arange(columns, dtype=dtype)[None, :, None] * right
      shape = (rows, columns, len(cell))
      shifted = [
        jnp.broadcast_to(cell[:, axis][None, None, :] + start, shape).ravel()
        for axis, start in enumerate((x, y, x, y))
      ]
      found.append(jnp.stack(shifted, axis=-1))
    return jnp.concatenate(found)

  def usable(
    self, size: ArrayLike, padded: tuple[int, int], grids: Sequence[tuple[int, int]]
  ) -> jax.Array:
    """Which anchors take part for one image: [A] bool.

    Preset mmdet1: those of cells that start inside the image's own padding to a multiple of 32, so
    that none depends on the batch; with `whole`, of these the ones inside the image. Preset
    torchvision: all.

    Args:
      size: [2], height and width of the image without padding.
      padded: as for `boxes`.
      grids: rows and columns of each level.
    """
    count = sum(rows * columns for rows, columns in self._checked(grids)) * self.per_cell
    if self.preset == "torchvision":
      return jnp.ones(count, bool)
    height, width = jnp.asarray(size)[0], jnp.asarray(size)[1]
    bottom, right = (-(-side // DIVISOR) * DIVISOR for side in (height, width))
    found = []
    for stride, (rows, columns) in zip(self.strides, grids, strict=True):
      inside = (jnp.arange(rows) * stride < bottom)[:, None, None] & (
        jnp.arange(columns) * stride < right
      )[None, :, None]
      found.append(jnp.broadcast_to(inside, (rows, columns, self.per_cell)).ravel())
    mask = jnp.concatenate(found)
    if self.whole:
      boxes = self.boxes(padded, grids)
      mask &= (boxes[:, 0] >= 0) & (boxes[:, 1] >= 0)
      mask &= (boxes[:, 2] < width) & (boxes[:, 3] < height)
    return mask

  def _steps(self, level, padded, grid):
    if self.preset == "mmdet1":
      return self.strides[level], self.strides[level]
    return tuple(pixels // cells for pixels, cells in zip(padded, grid, strict=True))

  def _checked(self, grids):
    if len(grids) != len(self.strides):
      raise UsageError(
        f"{len(grids)} grids for anchors of {len(self.strides)} levels; expected one for each"
      )
    return grids


def _octaves(size: float, whole: bool) -> tuple[float, ...]:
  sizes = [size * 2 ** (third / 3) for third in range(3)]
  return tuple(math.floor(one) if whole else one for one in sizes)


_RETINANET, _RPN = (8, 16, 32, 64, 128), (4, 8, 16, 32, 64)

# Of the papers' detectors (Lin et al., ICCV 2017; Lin et al., CVPR 2017), by detector and preset.
ANCHORS: dict[tuple[str, str], Anchors] = {
  ("retinanet", "mmdet1"): Anchors(
    _RETINANET, tuple(_octaves(4 * stride, whole=False) for stride in _RETINANET), "mmdet1"
  ),
  ("retinanet", "torchvision"): Anchors(
    _RETINANET, tuple(_octaves(4 * stride, whole=True) for stride in _RETINANET), "torchvision"
  ),
  ("rpn", "mmdet1"): Anchors(_RPN, tuple((8 * stride,) for stride in _RPN), "mmdet1", whole=True),
  ("rpn", "torchvision"): Anchors(_RPN, tuple((8 * stride,) for stride in _RPN), "torchvision"),
}
