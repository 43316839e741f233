"""Where in the image the pixels of a feature map lie.

With a 3x3 window, stride 2 and padding 1, output pixel i is centred on input pixel 2 i: after five
such layers the first pixel of a map still lies on the image's first pixel, not in the middle of its
first 32. A map that is stretched over the image is off by up to half a stride.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from lip_jax.models.densenet import DenseNet
from lip_jax.models.downsample import PoolTransition
from lip_jax.models.lan import LocalPool
from lip_jax.models.resnet import ResNet
from lip_jax.ops.windows import pair


class Grid(NamedTuple):
  """Map pixel (i, j) is centred on image pixel (offset + stride * (i, j)); pairs (h, w)."""

  stride: tuple[float, float] = (1.0, 1.0)
  offset: tuple[float, float] = (0.0, 0.0)

  def through(self, layer: Any) -> "Grid":
    """Grid of the output of a convolution or pooling whose input has this grid."""
    window, stride, padding = _windows(layer)
    step = tuple(s * d for s, d in zip(self.stride, stride, strict=True))
    first = tuple(
      o + s * ((k - 1) / 2 - p)
      for o, s, k, p in zip(self.offset, self.stride, window, padding, strict=True)
    )
    return Grid((step[0], step[1]), (first[0], first[1]))

  def centre(self, location: tuple[int, int]) -> tuple[float, float]:
    """(row, column) of the image, in pixels, that map pixel `location` is centred on."""
    row, column = (o + s * i for o, s, i in zip(self.offset, self.stride, location, strict=True))
    return row, column


def even_grid(map_size: tuple[int, ...], image_size: tuple[int, ...]) -> Grid:
  """The grid of a map that divides the image into equal cells: where nothing better is known."""
  height, width = (n / m for n, m in zip(image_size, map_size, strict=True))
  return Grid((height, width), ((height - 1) / 2, (width - 1) / 2))


def feature_grids(model: nnx.Module) -> dict[str, Grid]:
  """Grids of what `model.features` gives: "stem", "c2" to "c5"; empty for a network of others."""
  return {name: grid for kind, name, grid in _walk(model) if kind == "feature"}


def layer_grids(model: nnx.Module) -> dict[str, Grid]:
  """Grids of what each pooling layer pools, by the layer's path; empty for a network of others."""
  return {name: grid for kind, name, grid in _walk(model) if kind == "pool"}


def to_input(
  maps: jax.Array | np.ndarray,
  grid: Grid,
  size: tuple[int, int],
  method: Literal["linear", "nearest"] = "linear",
) -> np.ndarray:
  """Maps at the resolution of the image, each value at the place that it belongs to.

  Args:
    maps: [..., H', W'] -> [..., H, W] of the same dtype.
    method: between the centres; beyond the outermost ones the map goes on as it ends.
  """
  values = np.asarray(maps)
  rows, columns = (
    _weights(m, n, stride, offset, method)
    for m, n, stride, offset in zip(values.shape[-2:], size, *grid, strict=True)
  )
  return (rows @ values @ columns.T).astype(values.dtype)


def _weights(count: int, size: int, stride: float, offset: float, method: str) -> np.ndarray:
  """[size, count]: the share of each map pixel in each image pixel, along one axis."""
  place = np.clip((np.arange(size) - offset) / stride, 0, count - 1)
  if method == "nearest":
    place = np.floor(place + 0.5)
  return np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(count)))


def _windows(layer: Any) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
  """Window, stride and padding of a pooling or convolution of ours."""
  if isinstance(layer, LocalPool):
    window, stride, padding = layer.window, layer.stride, layer.padding
    return pair("window", window), pair("stride", stride), pair("padding", padding)
  (top, _), (left, _) = layer.padding
  return pair("kernel_size", layer.kernel_size), pair("strides", layer.strides), (top, left)


def _walk(model: nnx.Module) -> Iterator[tuple[str, str, Grid]]:
  """("pool", path, grid of its input) and ("feature", name, grid), in the order of computation."""
  if isinstance(model, ResNet):
    yield from _walk_resnet(model)
  elif isinstance(model, DenseNet):
    yield from _walk_densenet(model)


def _walk_resnet(model: ResNet) -> Iterator[tuple[str, str, Grid]]:
  grid = Grid().through(model.conv1)
  yield "pool", "pool", grid
  grid = grid.through(model.pool)
  yield "feature", "stem", grid
  for stage in range(1, 5):
    for index, block in enumerate(getattr(model, f"layer{stage}")):
      path, spatial = f"layer{stage}.{index}", block.spatial
      if isinstance(spatial, PoolTransition):
        yield "pool", f"{path}.spatial.residual_pool", grid
        yield "pool", f"{path}.spatial.shortcut_pool", grid
        grid = grid.through(spatial.residual_pool)
      else:
        grid = grid.through(spatial.residual_conv)
      if block.pool is not None:
        yield "pool", f"{path}.pool", grid
        grid = grid.through(block.pool)
    yield "feature", f"c{stage + 1}", grid


def _walk_densenet(model: DenseNet) -> Iterator[tuple[str, str, Grid]]:
  grid = Grid().through(model.conv0)
  yield "pool", "pool0", grid
  grid = grid.through(model.pool0)
  yield "feature", "stem", grid
  for stage in range(4):
    if stage > 0:
      pool = getattr(model, f"transition{stage}").pool
      yield "pool", f"transition{stage}.pool", grid
      grid = grid.through(pool)
    yield "feature", f"c{stage + 2}", grid
