"""Pallas kernels for TPU: one pass over x and the logits forward, one pass backward.

Inside a kernel the two axes of the window come first: arrays are [H, W, N, C], or [H, W, C, N]
where that wastes fewer lanes. Convolutions on TPU choose the same layouts, so that the
transposition costs nothing. A block is a piece of the image for 8 x 128 of the other two axes: one
vector register a pixel. Windows then are arithmetic between whole registers, at any stride.

Blocks overlap where windows do; each step of the grid reads its own block and what its windows
reach beyond it. All sums are in float32. The backward kernel computes each window's denominator and
result again rather than reading them, and gathers: each pixel adds up the windows it belongs to.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lip_jax.ops.kernels.gate import Affine, gate
from lip_jax.ops.kernels.tpu_blocks import Blocks, blocks_of, cost
from lip_jax.ops.windows import LOWEST_LOGIT, Geometry


def supports(x: jax.Array, h: jax.Array, geometry: Geometry) -> bool:
  """Whether the kernels can pool x, [N, H, W, C], by h of the same shape."""
  dtypes = (jnp.float32, jnp.bfloat16)
  return (
    x.shape == h.shape
    and x.dtype in dtypes
    and h.dtype in dtypes
    and x.size > 0
    and blocks_of(x, h, geometry, backward=True) is not None
    and blocks_of(x, h, geometry, backward=False) is not None
  )


def forward(
  x: jax.Array,
  h: jax.Array,
  affine: Affine | None,
  geometry: Geometry,
  shift: float | None,
  *,
  interpret: bool = False,
) -> jax.Array:
  """As `xla.forward`, without what its backward pass keeps; `interpret` runs without a TPU."""
  blocks = blocks_of(x, h, geometry, backward=False)
  assert blocks is not None, "the caller asks `supports`"
  rows, columns = blocks.rows, blocks.columns
  y_shape = (x.shape[0], rows.windows, columns.windows, x.shape[3])
  y = pl.pallas_call(
    functools.partial(_forward_kernel, blocks=blocks, gated=affine is not None, shift=shift),
    grid=blocks.grid,
    in_specs=[*[_pixels(blocks)] * 2, *[_per_channel(blocks)] * len(affine or ())],
    out_specs=pl.BlockSpec(
      (rows.units, columns.units, *blocks.tile), lambda a, b, i, j: (i, j, a, b)
    ),
    out_shape=jax.ShapeDtypeStruct([y_shape[axis] for axis in blocks.order], x.dtype),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 4),
    cost_estimate=cost(blocks, x, h, backward=False),
    interpret=interpret,
    name="lip_pool_forward",
  )(_turn(x, blocks), _turn(h, blocks), *_turn_statistics(affine or (), blocks))
  return _turn_back(y, blocks)


def backward(
  x: jax.Array,
  h: jax.Array,
  affine: Affine | None,
  g: jax.Array,
  geometry: Geometry,
  shift: float | None,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
  """As `xla.backward`, from the inputs alone."""
  blocks = blocks_of(x, h, geometry, backward=True)
  assert blocks is not None, "the caller asks `supports`"
  rows, columns = blocks.rows, blocks.columns
  gated = affine is not None
  block = (rows.units * rows.stride, columns.units * columns.stride, *blocks.tile)
  out = pl.BlockSpec(block, lambda a, b, i, j: (i, j, a, b))
  turned = [x.shape[axis] for axis in blocks.order]
  sums_shape = jax.ShapeDtypeStruct(turned[2:], jnp.float32)
  scratch = pltpu.VMEM((rows.needed, columns.needed, *blocks.tile), jnp.float32)
  results = pl.pallas_call(
    functools.partial(_backward_kernel, blocks=blocks, gated=gated, shift=shift),
    grid=blocks.grid,
    in_specs=[
      *[_pixels(blocks)] * 2,
      _windows(blocks),
      *[_per_channel(blocks)] * (3 if gated else 0),
    ],
    out_specs=[out, out, *[_per_channel(blocks)] * (2 if gated else 0)],
    out_shape=[
      jax.ShapeDtypeStruct(turned, x.dtype),
      jax.ShapeDtypeStruct(turned, h.dtype),
      *[sums_shape] * (2 if gated else 0),
    ],
    scratch_shapes=[scratch] * (2 if shift is not None else 3),
    compiler_params=pltpu.CompilerParams(
      # Sums are added up over the blocks of an image, in their order.
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
    ),
    cost_estimate=cost(blocks, x, h, backward=True),
    interpret=interpret,
    name="lip_pool_backward",
  )(_turn(x, blocks), _turn(h, blocks), _turn(g, blocks), *_turn_statistics(affine or (), blocks))
  dx, dh, *sums = results
  sums = _turn_statistics(sums, blocks)
  return _turn_back(dx, blocks), _turn_back(dh, blocks), (sums[0], sums[1]) if gated else None


def _forward_kernel(x_ref, h_ref, *refs, blocks: Blocks, gated: bool, shift: float | None):
  *affine_refs, y_ref = refs
  affine = [ref[...] for ref in affine_refs] if gated else None
  read = _reader(x_ref, h_ref, affine, blocks)

  def store(i, j, _largest, total, weighted):
    y_ref[i, j] = (weighted / total).astype(y_ref.dtype)

  _each_window(read, blocks, shift, store)


def _backward_kernel(x_ref, h_ref, g_ref, *refs, blocks: Blocks, gated: bool, shift: float | None):
  rows, columns = blocks.rows, blocks.columns
  kept = 2 if shift is not None else 3
  *others, dx_ref, dh_ref = refs[: -kept - 2] if gated else refs[:-kept]
  affine_refs, sum_refs = others, refs[-kept - 2 : -kept]
  a_ref, y_ref, *largest_ref = refs[-kept:]
  affine = [ref[...] for ref in affine_refs] if gated else None
  read = _reader(x_ref, h_ref, affine, blocks)
  i_step, j_step = pl.program_id(2), pl.program_id(3)
  row0 = i_step * rows.units + rows.first
  column0 = j_step * columns.units + columns.first
  g_row, g_column = (
    axis.units * step + axis.first - axis.window_start(step)
    for axis, step in ((rows, i_step), (columns, j_step))
  )

  def keep(i, j, largest, total, weighted):
    """What the pixels of this window need: a = g / den, y and the largest logit."""
    inside = (
      (row0 + i >= 0)
      & (row0 + i < rows.windows)
      & (column0 + j >= 0)
      & (column0 + j < columns.windows)
    )
    g = g_ref[_clip(i + g_row, g_ref.shape[0]), _clip(j + g_column, g_ref.shape[1])]
    # Windows that do not exist may have no pixel, and so no denominator.
    total = jnp.where(inside, total, 1.0)
    a_ref[i, j] = jnp.where(inside, g.astype(jnp.float32) / total, 0.0)
    y_ref[i, j] = jnp.where(inside, weighted / total, 0.0)
    if largest_ref:  # exp(l - m) must not overflow there
      largest_ref[0][i, j] = jnp.where(inside, largest, -LOWEST_LOGIT)

  _each_window(read, blocks, shift, keep)

  # Windows of the pixels (unit * stride + phase), as offsets to `unit`.
  offsets_h, offsets_w = rows.offsets(), columns.offsets()
  unrolled = max(d for d in range(1, 5) if columns.units % d == 0)
  zero = jnp.zeros(blocks.tile, jnp.float32)

  def pixel(unit_row, unit_column, r, q, sums):
    row, column = unit_row * rows.stride + r, unit_column * columns.stride + q
    x, h, logit, slope = read.pixel(
      row - rows.first * rows.stride + rows.padding,
      column - columns.first * columns.stride + columns.padding,
    )
    weight = None if shift is None else jnp.exp(logit - shift)
    dx, dlogit = zero, zero
    for i in offsets_h[r]:
      for j in offsets_w[q]:
        window = (unit_row + i - rows.first, unit_column + j - columns.first)
        share = a_ref[window]
        if weight is None:
          share *= jnp.exp(logit - largest_ref[0][window])
        dx += share
        dlogit += share * (x - y_ref[window])
    if weight is not None:
      dx, dlogit = dx * weight, dlogit * weight
    dx_ref[row, column] = dx.astype(dx_ref.dtype)
    if not gated:
      dh_ref[row, column] = dlogit.astype(dh_ref.dtype)
      return sums
    du = dlogit * slope
    dh_ref[row, column] = du.astype(dh_ref.dtype)
    # Blocks may reach beyond the image.
    inside = (i_step * rows.units * rows.stride + row < rows.size) & (
      j_step * columns.units * columns.stride + column < columns.size
    )
    du = jnp.where(inside, du, 0.0)
    return sums[0] + du, sums[1] + du * h

  def chunk(unit_row, index, sums):
    for unit in range(unrolled):
      for r in range(rows.stride):
        for q in range(columns.stride):
          sums = pixel(unit_row, index * unrolled + unit, r, q, sums)
    return sums

  sums = lax.fori_loop(
    0,
    rows.units,
    lambda row, sums: lax.fori_loop(
      0, columns.units // unrolled, lambda index, sums: chunk(row, index, sums), sums
    ),
    (zero, zero) if gated else (),
  )
  if gated:

    @pl.when((i_step == 0) & (j_step == 0))
    def _():
      for ref in sum_refs:
        ref[...] = zero

    for ref, total in zip(sum_refs, sums, strict=True):
      ref[...] += total


class _Reader(NamedTuple):
  """Pixels of a block, by their place relative to the first that its windows reach."""

  x_ref: Any
  h_ref: Any
  affine: Sequence[jax.Array] | None
  row: jax.Array  # of that first pixel in the block that was read
  column: jax.Array

  def pixel(self, row, column):
    """(x, h - mean, logit, derivative of the logit); h and derivative only with an affine.

    Places outside of what was read give some pixel of it.
    """
    place = (
      _clip(row + self.row, self.x_ref.shape[0]),
      _clip(column + self.column, self.x_ref.shape[1]),
    )
    x, h = (ref[place].astype(jnp.float32) for ref in (self.x_ref, self.h_ref))
    if self.affine is None:
      # -inf, of a mask, from itself would be NaN.
      return x, None, jnp.maximum(h, LOWEST_LOGIT), None
    mean, gain, bias = self.affine
    h -= mean
    logit, slope = gate(h * gain + bias)
    return x, h, logit, slope


def _reader(x_ref, h_ref, affine, blocks: Blocks) -> _Reader:
  row, column = (
    axis.origin(pl.program_id(number)) - axis.start(pl.program_id(number))
    for number, axis in ((2, blocks.rows), (3, blocks.columns))
  )
  return _Reader(x_ref, h_ref, affine, row, column)


def _each_window(
  read: _Reader, blocks: Blocks, shift: float | None, use: Callable[..., None]
) -> None:
  """Calls use(i, j, largest logit, sum of weights, sum of weights * x) for each window needed.

  A column of a window is summed once for all the windows of a chunk that it belongs to.
  """
  rows, columns = blocks.rows, blocks.columns
  chunks = pl.cdiv(columns.needed, 8)
  together = pl.cdiv(columns.needed, chunks)
  origin_row, origin_column = rows.origin(pl.program_id(2)), columns.origin(pl.program_id(3))

  def inside(i, first, t: int, c: int):
    """Whether the pixel is in the image; None where that is certain."""
    taps = [c - w * columns.stride for w in range(together)]
    conditions = []
    if rows.leaves(t):
      row = origin_row + i * rows.stride + t
      conditions.append((row >= 0) & (row < rows.size))
    if any(0 <= tap < columns.kernel and columns.leaves(tap) for tap in taps):
      column = origin_column + first * columns.stride + c
      conditions.append((column >= 0) & (column < columns.size))
    return functools.reduce(jnp.logical_and, conditions) if conditions else None

  def column_sums(i, first, c: int):
    """(Largest logit, sum of weights, sum of weights * x) of one column of pixels."""
    pixels = []
    for t in range(rows.kernel):
      x, _, logit, _ = read.pixel(i * rows.stride + t, first * columns.stride + c)
      pixels.append((x, logit, inside(i, first, t, c)))
    largest = None
    if shift is None:
      here = [a if ok is None else jnp.where(ok, a, LOWEST_LOGIT) for _, a, ok in pixels]
      largest = functools.reduce(jnp.maximum, here)
    weights = [jnp.exp(logit - (shift if largest is None else largest)) for _, logit, _ in pixels]
    weights = [
      weight if ok is None else jnp.where(ok, weight, 0.0)
      for weight, (_, _, ok) in zip(weights, pixels, strict=True)
    ]
    weighted = [weight * x for weight, (x, _, _) in zip(weights, pixels, strict=True)]
    return largest, functools.reduce(jnp.add, weights), functools.reduce(jnp.add, weighted)

  @pl.loop(0, rows.needed)
  def _(i):
    @pl.loop(0, chunks)
    def _(chunk):
      # The last chunk may begin within the one before it, and then computes some windows again.
      first = jnp.minimum(chunk * together, columns.needed - together)
      sums = {
        c: column_sums(i, first, c)
        for c in range((together - 1) * columns.stride + columns.kernel)
        if c % columns.stride < columns.kernel
      }
      for window in range(together):
        own = [sums[window * columns.stride + tap] for tap in range(columns.kernel)]
        largest = None
        if shift is None:
          largest = functools.reduce(jnp.maximum, [m for m, _, _ in own])
          scales = [jnp.exp(m - largest) for m, _, _ in own]
          own = [(m, s * t, s * w) for s, (m, t, w) in zip(scales, own, strict=True)]
        total = functools.reduce(jnp.add, [t for _, t, _ in own])
        weighted = functools.reduce(jnp.add, [w for _, _, w in own])
        use(i, first + window, largest, total, weighted)


def _clip(index, size: int):
  return jnp.clip(index, 0, size - 1)


def _turn(a: jax.Array, blocks: Blocks) -> jax.Array:
  # Without the barrier XLA writes arrays with other readers twice, as they are and turned.
  return lax.optimization_barrier(a).transpose(blocks.order)


def _turn_back(a: jax.Array, blocks: Blocks) -> jax.Array:
  return a.transpose([blocks.order.index(axis) for axis in range(4)])


def _turn_statistics(statistics: Sequence[jax.Array], blocks: Blocks) -> list[jax.Array]:
  """To the kernel, and back."""
  return [a.T if blocks.batch_last else a for a in statistics]


def _pixels(blocks: Blocks) -> pl.BlockSpec:
  """The pixels that the windows of a block reach."""
  rows, columns = blocks.rows, blocks.columns
  return _overlapping(blocks, (rows.extent, columns.extent), rows.start, columns.start)


def _windows(blocks: Blocks) -> pl.BlockSpec:
  """The windows that the pixels of a block belong to."""
  rows, columns = blocks.rows, blocks.columns
  sizes = (rows.windows_read, columns.windows_read)
  return _overlapping(blocks, sizes, rows.window_start, columns.window_start)


def _overlapping(
  blocks: Blocks, sizes: tuple[int, int], row: Callable[..., Any], column: Callable[..., Any]
) -> pl.BlockSpec:
  tile = blocks.tile

  def start(number: int, axis: int):
    # Mosaic has to see that it lies on a register's edge: the only tile may be of any size.
    return number * tile[axis] if blocks.tiles[axis] > 1 else 0

  return pl.BlockSpec(
    tuple(pl.Element(size) for size in (*sizes, *tile)),
    lambda a, b, i, j: (row(i), column(j), start(a, 0), start(b, 1)),
  )


def _per_channel(blocks: Blocks) -> pl.BlockSpec:
  return pl.BlockSpec(blocks.tile, lambda a, b, i, j: (a, b))
