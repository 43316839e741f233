"""How the TPU kernels cut images into blocks: of the ways that fit the chip, what moves least."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lip_jax.ops.windows import Geometry, phase_offsets

# Of the 16 MiB that a kernel has on every generation; the rest is for the compiler's own use.
_VMEM = 12 * 2**20


class Axis(NamedTuple):
  """Blocks along the height or the width: `units` windows, or groups of `stride` pixels, each."""

  size: int  # pixels
  windows: int
  kernel: int
  stride: int
  padding: int
  units: int  # of a block
  steps: int  # blocks
  first: int  # first window that a block needs, relative to its first unit
  needed: int  # windows that it needs, some of which do not exist

  @property
  def extent(self) -> int:
    """Pixels that are read for a block."""
    return min(self.size, (self.needed - 1) * self.stride + self.kernel)

  @property
  def windows_read(self) -> int:
    """Windows that are read for a block."""
    return min(self.windows, self.needed)

  def origin(self, step):
    """First pixel that the windows of a block reach; may lie outside the image."""
    return (step * self.units + self.first) * self.stride - self.padding

  def start(self, step):
    """First pixel that is read: blocks at the borders are moved inside the image."""
    return jnp.clip(self.origin(step), 0, self.size - self.extent)

  def window_start(self, step):
    """First window that is read, likewise."""
    return jnp.clip(step * self.units + self.first, 0, self.windows - self.windows_read)

  def leaves(self, tap: int) -> bool:
    """Whether this pixel of a window lies outside the image in any of them."""
    return tap < self.padding or (self.windows - 1) * self.stride - self.padding + tap >= self.size

  def offsets(self) -> list[list[int]]:
    """Windows of a pixel, relative to its group."""
    return phase_offsets(self.kernel, self.stride, self.padding)


class Blocks(NamedTuple):
  """How a pooling is cut into blocks."""

  batch_last: bool  # [H, W, C, N] instead of [H, W, N, C]
  tile: tuple[int, int]  # of the last two axes
  tiles: tuple[int, int]  # how many
  rows: Axis
  columns: Axis

  @property
  def order(self) -> tuple[int, int, int, int]:
    """Of the axes N, H, W and C in the kernel."""
    return (1, 2, 3, 0) if self.batch_last else (1, 2, 0, 3)

  @property
  def grid(self) -> tuple[int, int, int, int]:
    return (*self.tiles, self.rows.steps, self.columns.steps)


def blocks_of(x: jax.Array, h: jax.Array, geometry: Geometry, *, backward: bool) -> Blocks | None:
  """Blocks to pool x, [N, H, W, C], by h of the same shape; None if no block fits the chip."""
  return _best(tuple(x.shape), (x.dtype.itemsize, h.dtype.itemsize), geometry, backward)


def traffic(
  shape: tuple[int, int, int, int], dtype: Any, geometry: Geometry, *, backward: bool
) -> int:
  """Bytes that a kernel moves between memory and chip, for x and logits of this shape and dtype.

  Raises:
    ValueError: a shape that the kernels do not support.
  """
  itemsizes = (jnp.dtype(dtype).itemsize,) * 2
  blocks = _best(tuple(shape), itemsizes, geometry, backward)
  if blocks is None:
    raise ValueError(f"no block of an image of {shape} fits the chip")
  return _bytes(blocks, itemsizes, backward)


@functools.lru_cache
def _best(
  shape: tuple[int, ...], itemsizes: tuple[int, int], geometry: Geometry, backward: bool
) -> Blocks | None:
  """The blocks that move least, of those that fit the memory of the chip; None if none does."""
  n, height, width, c = shape
  batch_last = _padded(c, n) < _padded(n, c)
  a, b = (c, n) if batch_last else (n, c)
  tile = (a if a % 8 else 8, b if b % 128 else 128)
  best = None
  for rows in _axes(0, height, geometry, backward):
    for columns in _axes(1, width, geometry, backward):
      blocks = Blocks(batch_last, tile, (a // tile[0], b // tile[1]), rows, columns)
      if _memory(blocks, itemsizes, backward) > _VMEM:
        continue
      key = (_bytes(blocks, itemsizes, backward), rows.steps * columns.steps)
      if best is None or key < best[0]:
        best = key, blocks
  return best and best[1]


def _padded(a: int, b: int) -> int:
  """Elements that [a, b] takes in registers of 8 x 128."""
  return pl.cdiv(a, 8) * 8 * pl.cdiv(b, 128) * 128


def _axes(number: int, size: int, geometry: Geometry, backward: bool) -> list[Axis]:
  """Ways to cut an axis into blocks of about equal size."""
  kernel, stride, padding = (value[number] for value in geometry)
  windows = geometry.output_size((size, size))[number]
  axis = Axis(size, windows, kernel, stride, padding, 1, 1, 0, 1)
  first = last = 0
  count = windows
  if backward:
    offsets = [offset for phase in axis.offsets() for offset in phase]
    first, last = min(offsets), max(offsets)
    count = pl.cdiv(size, stride)
  units = sorted({pl.cdiv(count, steps) for steps in range(1, count + 1)})
  return [
    axis._replace(units=u, steps=pl.cdiv(count, u), first=first, needed=u + last - first)
    for u in units
  ]


def _block_sizes(blocks: Blocks, backward: bool) -> tuple[int, int, int, int]:
  """Pixels read, windows read, pixels or windows written, and windows kept for a block."""
  rows, columns = blocks.rows, blocks.columns
  read, units = rows.extent * columns.extent, rows.units * columns.units
  if not backward:
    return read, 0, units, 0
  return (
    read,
    rows.windows_read * columns.windows_read,
    units * rows.stride * columns.stride,
    rows.needed * columns.needed,
  )


def _memory(blocks: Blocks, itemsizes: tuple[int, int], backward: bool) -> int:
  """Bytes on the chip: two buffers for what travels, and what the kernel keeps."""
  of_x, of_h = itemsizes
  read, windows, written, kept = _block_sizes(blocks, backward)
  travels = read * (of_x + of_h) + windows * of_x + written * (of_x + (of_h if backward else 0))
  return _padded(*blocks.tile) * (2 * travels + 3 * 4 * kept)


def _bytes(blocks: Blocks, itemsizes: tuple[int, int], backward: bool) -> int:
  """Bytes between memory and chip, by the blocks; statistics per channel are left out."""
  of_x, of_h = itemsizes
  rows, columns = blocks.rows, blocks.columns
  read, windows, _, _ = _block_sizes(blocks, backward)
  steps = rows.steps * columns.steps
  out = rows.size * columns.size if backward else rows.windows * columns.windows
  moved = steps * (read * (of_x + of_h) + windows * of_x) + out * (of_x + of_h * backward)
  return moved * math.prod(blocks.tile) * math.prod(blocks.tiles)


def cost(blocks: Blocks, x: jax.Array, h: jax.Array, *, backward: bool) -> pl.CostEstimate:
  """What the compiler counts for the kernel, which it does not look into."""
  windows = x.shape[0] * x.shape[3] * blocks.rows.windows * blocks.columns.windows
  taps = blocks.rows.kernel * blocks.columns.kernel
  return pl.CostEstimate(
    flops=windows * taps * (10 if backward else 4),
    transcendentals=windows * taps * (2 if backward else 1),
    bytes_accessed=_bytes(blocks, (x.dtype.itemsize, h.dtype.itemsize), backward),
  )
