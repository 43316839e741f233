"""Where in the image the pixels of a feature map lie.

With a 3x3 window, stride 2 and padding 1, output pixel i is centred on input pixel 2 i: after five
such layers the first pixel of a map still lies on the image's first pixel, not in the middle of its
first 32. A map that is stretched over the image is off by up to half a stride.
"""

from collections.abc import Iterator, Sequence
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

  stride: tuple[float, ...] = (1.0, 1.0)
  offset: tuple[float, ...] = (0.0, 0.0)

  def through(self, layer: Any) -> "Grid":
    """Grid of the output of a convolution or pooling whose input has this grid."""
    if isinstance(layer, LocalPool):
      window, stride, padding = layer.window, layer.stride, layer.padding
    else:
      window, stride = layer.kernel_size, layer.strides
      padding = tuple(before for before, _ in layer.padding)
    step = np.multiply(self.stride, pair("stride", stride))
    shift = (np.asarray(pair("window", window)) - 1) / 2 - pair("padding", padding)
    first = self.offset + np.multiply(self.stride, shift)
    return Grid(tuple(step.tolist()), tuple(first.tolist()))

  def centre(self, location: Sequence[int] | np.ndarray) -> tuple[float, ...]:
    """(row, column) of the image, in pixels, that map pixel `location` is centred on."""
    return tuple((self.offset + np.multiply(self.stride, location)).tolist())


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
  grid: Grid | None,
  size: tuple[int, int],
  method: Literal["linear", "nearest"] = "linear",
) -> np.ndarray:
  """Maps at the resolution of the image, each value at the place that it belongs to.

  Args:
    maps: [..., H', W'] -> [..., H, W] of the same dtype.
    grid: where they lie; None: they divide the image into equal cells.
    method: between the centres; beyond the outermost ones the map goes on as it ends.
  """
  values = np.asarray(maps)
  grid = grid or even_grid(values.shape[-2:], size)
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


def _walk(model: nnx.Module) -> Iterator[tuple[str, str, Grid]]:
  """("pool", path, grid of its input) and ("feature", name, grid), in the order of computation."""
  grid = Grid()
  for name, steps in _stages(model):
    for layer, *pools in steps:
      for path in pools:
        yield "pool", path, grid
      grid = grid.through(layer)
    yield "feature", name, grid


def _stages(model: nnx.Module) -> Iterator[tuple[str, list[Any]]]:
  """Name of each feature, and (layer that changes the grid, paths of the poolings there)."""
  if isinstance(model, ResNet):
    yield "stem", [(model.conv1,), (model.pool, "pool")]
    for stage in range(1, 5):
      steps: list[Any] = []
      for index, block in enumerate(getattr(model, f"layer{stage}")):
        path, spatial = f"layer{stage}.{index}", block.spatial
        if isinstance(spatial, PoolTransition):
          pools = (f"{path}.spatial.residual_pool", f"{path}.spatial.shortcut_pool")
          steps.append((spatial.residual_pool, *pools))
        else:
          steps.append((spatial.residual_conv,))
        if block.pool is not None:
          steps.append((block.pool, f"{path}.pool"))
      yield f"c{stage + 1}", steps
  elif isinstance(model, DenseNet):
    yield "stem", [(model.conv0,), (model.pool0, "pool0")]
    yield "c2", []
    for stage in range(1, 4):
      path = f"transition{stage}"
      yield f"c{stage + 2}", [(getattr(model, path).pool, f"{path}.pool")]
