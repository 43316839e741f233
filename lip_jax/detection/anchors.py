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
    dtype: jax.typing.DTypeLike = np.float32,
  ) -> np.ndarray:
    """All anchors of a batch: [A, 4], x1, y1, x2, y2 in pixels.

    Constants of a program, as shapes are: TPU programs that put them together compile for minutes.

    Args:
      dtype: of the result; whole numbers, exact in float32.

    Raises:
      UsageError: as many grids as levels are expected.
    """
    found = [
      (np.concatenate([starts, starts], axis=-1)[:, None] + self.cell(level)).reshape(-1, 4)
      for level, starts in enumerate(self._starts(padded, grids))
    ]
    return np.concatenate(found).astype(dtype)

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
    """
    starts = np.repeat(np.concatenate(self._starts(padded, grids)), self.per_cell, axis=0)
    if self.preset == "torchvision":
      return jnp.ones(len(starts), bool)
    height, width = jnp.asarray(size)[0], jnp.asarray(size)[1]
    bottom, right = (-(-side // DIVISOR) * DIVISOR for side in (height, width))
    mask = (jnp.asarray(starts[:, 0]) < right) & (jnp.asarray(starts[:, 1]) < bottom)
    if self.whole:
      boxes = self.boxes(padded, grids, np.int32)
      mask &= (boxes[:, :2] >= 0).all(axis=1)
      mask &= (boxes[:, 2] < width) & (boxes[:, 3] < height)
    return mask

  def _starts(self, padded, grids) -> list[np.ndarray]:
    """First pixels (x, y) of each level's cells: [rows * columns, 2] int32."""
    if len(grids) != len(self.strides):
      raise UsageError(
        f"{len(grids)} grids for anchors of {len(self.strides)} levels; expected one for each"
      )
    found = []
    for stride, grid in zip(self.strides, grids, strict=True):
      steps = [
        stride if self.preset == "mmdet1" else p // n for p, n in zip(padded, grid, strict=True)
      ]
      y, x = (axis.ravel() * step for axis, step in zip(np.indices(grid), steps, strict=True))
      found.append(np.stack([x, y], axis=-1).astype(np.int32))
    return found


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
