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
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lip_jax.ops.kernels.gate import Affine, gate
from lip_jax.ops.windows import LOWEST_LOGIT, Geometry, phase_offsets

# Of the 16 MiB that a kernel has on every generation; the rest is for the compiler's own use.
_VMEM = 12 * 2**20


class _Axis(NamedTuple):
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


class _Plan(NamedTuple):
  """How a pooling is cut into blocks."""

  batch_last: bool  # [H, W, C, N] instead of [H, W, N, C]
  tile: tuple[int, int]  # of the last two axes
  tiles: tuple[int, int]  # how many
  rows: _Axis
  columns: _Axis

  @property
  def grid(self) -> tuple[int, int, int, int]:
    return (*self.tiles, self.rows.steps, self.columns.steps)


def supports(x: jax.Array, h: jax.Array, geometry: Geometry) -> bool:
  """Whether the kernels can pool x, [N, H, W, C], by h of the same shape."""
  dtypes = (jnp.float32, jnp.bfloat16)
  return (
    x.shape == h.shape
    and x.dtype in dtypes
    and h.dtype in dtypes
    and x.size > 0
    and _plan(x, h, geometry, backward=True) is not None
    and _plan(x, h, geometry, backward=False) is not None
  )


def traffic(
  shape: tuple[int, int, int, int], dtype: Any, geometry: Geometry, *, backward: bool
) -> int:
  """Bytes that a kernel moves between memory and chip, by its blocks.

  Args:
    shape: of x and the logits, [N, H, W, C].
    dtype: of both.
    geometry: of the pooling.
    backward: of the kernel for the gradient.

  Raises:
    ValueError: a shape that the kernels do not support.
  """
  itemsizes = (jnp.dtype(dtype).itemsize,) * 2
  plan = _best_plan(tuple(shape), itemsizes, geometry, backward)
  if plan is None:
    raise ValueError(f"no block of an image of {shape} fits the chip")
  return _bytes(plan, itemsizes, backward)


def forward(
  x: jax.Array,
  h: jax.Array,
  affine: Affine | None,
  geometry: Geometry,
  shift: float | None,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Pools x, [N, H, W, C], into [N, H', W', C].

  Args:
    x: features, bfloat16 or float32.
    h: logits; with `affine` what they are computed from.
    affine: of the instance norm before the gate, or None.
    geometry: of the pooling.
    shift: what to subtract from all logits; None: each window's largest.
    interpret: run on any platform, slowly.
  """
  plan = _plan(x, h, geometry, backward=False)
  assert plan is not None, "the caller asks `supports`"
  rows, columns = plan.rows, plan.columns
  height, width = rows.windows, columns.windows
  shape = _turned((x.shape[0], height, width, x.shape[3]), plan)
  y = pl.pallas_call(
    functools.partial(_forward_kernel, plan=plan, gated=affine is not None, shift=shift),
    grid=plan.grid,
    in_specs=[
      _pixels(plan),
      _pixels(plan),
      *[_per_channel(plan)] * (0 if affine is None else 3),
    ],
    out_specs=pl.BlockSpec(
      (rows.units, columns.units, *plan.tile), lambda a, b, i, j: (i, j, a, b)
    ),
    out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 4),
    cost_estimate=_cost(plan, x, h, backward=False),
    interpret=interpret,
    name="lip_pool_forward",
  )(_turn(x, plan), _turn(h, plan), *_turn_affine(affine, plan))
  return _turn_back(y, plan)


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
  """Gradients of `forward`, given that of its result, g [N, H', W', C].

  Returns:
    (dx, dh, sums): gradients with respect to x and to the logits; with `affine` dh is with respect
    to what the gate gets, and sums are those of dh and of dh * (h - mean) over the pixels of each
    channel of each image, [N, C] float32; None without.
  """
  plan = _plan(x, h, geometry, backward=True)
  assert plan is not None, "the caller asks `supports`"
  rows, columns = plan.rows, plan.columns
  gated = affine is not None
  block = (rows.units * rows.stride, columns.units * columns.stride, *plan.tile)
  out = pl.BlockSpec(block, lambda a, b, i, j: (i, j, a, b))
  turned = _turned(x.shape, plan)
  sums_shape = jax.ShapeDtypeStruct(turned[2:], jnp.float32)
  scratch = pltpu.VMEM((rows.needed, columns.needed, *plan.tile), jnp.float32)
  results = pl.pallas_call(
    functools.partial(_backward_kernel, plan=plan, gated=gated, shift=shift),
    grid=plan.grid,
    in_specs=[
      _pixels(plan),
      _pixels(plan),
      _windows(plan),
      *[_per_channel(plan)] * (3 if gated else 0),
    ],
    out_specs=[out, out, *[_per_channel(plan)] * (2 if gated else 0)],
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
    cost_estimate=_cost(plan, x, h, backward=True),
    interpret=interpret,
    name="lip_pool_backward",
  )(_turn(x, plan), _turn(h, plan), _turn(g, plan), *_turn_affine(affine, plan))
  dx, dh, *sums = results
  back = (lambda s: s.T) if plan.batch_last else (lambda s: s)
  return (
    _turn_back(dx, plan),
    _turn_back(dh, plan),
    (back(sums[0]), back(sums[1])) if gated else None,
  )


def _forward_kernel(x_ref, h_ref, *refs, plan: _Plan, gated: bool, shift: float | None):
  *affine_refs, y_ref = refs
  affine = [ref[...] for ref in affine_refs] if gated else None
  read = _reader(x_ref, h_ref, affine, plan)

  def store(i, j, _largest, total, weighted):
    y_ref[i, j] = (weighted / total).astype(y_ref.dtype)

  _each_window(read, plan, shift, store)


def _backward_kernel(x_ref, h_ref, g_ref, *refs, plan: _Plan, gated: bool, shift: float | None):
  rows, columns = plan.rows, plan.columns
  kept = 2 if shift is not None else 3
  *others, dx_ref, dh_ref = refs[: -kept - 2] if gated else refs[:-kept]
  affine_refs, sum_refs = others, refs[-kept - 2 : -kept]
  a_ref, y_ref, *largest_ref = refs[-kept:]
  affine = [ref[...] for ref in affine_refs] if gated else None
  read = _reader(x_ref, h_ref, affine, plan)
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

  _each_window(read, plan, shift, keep)

  # Windows of the pixels (unit * stride + phase), as offsets to `unit`.
  offsets_h, offsets_w = rows.offsets(), columns.offsets()
  unrolled = max(d for d in range(1, 5) if columns.units % d == 0)
  zero = jnp.zeros(plan.tile, jnp.float32)

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


def _reader(x_ref, h_ref, affine, plan: _Plan) -> _Reader:
  row, column = (
    axis.origin(pl.program_id(number)) - axis.start(pl.program_id(number))
    for number, axis in ((2, plan.rows), (3, plan.columns))
  )
  return _Reader(x_ref, h_ref, affine, row, column)


def _each_window(read: _Reader, plan: _Plan, shift: float | None, use: Callable[..., None]) -> None:
  """Calls use(i, j, largest logit, sum of weights, sum of weights * x) for each window needed.

  A column of a window is summed once for all the windows of a chunk that it belongs to.
  """
  rows, columns = plan.rows, plan.columns
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


def _turned(shape: Sequence[int], plan: _Plan) -> tuple[int, ...]:
  n, height, width, c = shape
  return (height, width, c, n) if plan.batch_last else (height, width, n, c)


def _turn(a: jax.Array, plan: _Plan) -> jax.Array:
  # Without the barrier XLA writes arrays with other readers twice, as they are and turned.
  a = lax.optimization_barrier(a)
  return a.transpose((1, 2, 3, 0) if plan.batch_last else (1, 2, 0, 3))


def _turn_back(a: jax.Array, plan: _Plan) -> jax.Array:
  return a.transpose((3, 0, 1, 2) if plan.batch_last else (2, 0, 1, 3))


def _turn_affine(affine: Affine | None, plan: _Plan) -> list[jax.Array]:
  return [] if affine is None else [a.T if plan.batch_last else a for a in affine]


def _pixels(plan: _Plan) -> pl.BlockSpec:
  """The pixels that the windows of a block reach."""
  rows, columns = plan.rows, plan.columns
  return _overlapping(plan, (rows.extent, columns.extent), rows.start, columns.start)


def _windows(plan: _Plan) -> pl.BlockSpec:
  """The windows that the pixels of a block belong to."""
  rows, columns = plan.rows, plan.columns
  sizes = (rows.windows_read, columns.windows_read)
  return _overlapping(plan, sizes, rows.window_start, columns.window_start)


def _overlapping(
  plan: _Plan, sizes: tuple[int, int], row: Callable[..., Any], column: Callable[..., Any]
) -> pl.BlockSpec:
  tile = plan.tile

  def start(number: int, axis: int):
    # Mosaic has to see that it lies on a register's edge: the only tile may be of any size.
    return number * tile[axis] if plan.tiles[axis] > 1 else 0

  return pl.BlockSpec(
    tuple(pl.Element(size) for size in (*sizes, *tile)),
    lambda a, b, i, j: (row(i), column(j), start(a, 0), start(b, 1)),
  )


def _per_channel(plan: _Plan) -> pl.BlockSpec:
  return pl.BlockSpec(plan.tile, lambda a, b, i, j: (a, b))


def _plan(x: jax.Array, h: jax.Array, geometry: Geometry, *, backward: bool) -> _Plan | None:
  itemsizes = (x.dtype.itemsize, h.dtype.itemsize)
  return _best_plan(tuple(x.shape), itemsizes, geometry, backward)


@functools.lru_cache
def _best_plan(
  shape: tuple[int, ...], itemsizes: tuple[int, int], geometry: Geometry, backward: bool
) -> _Plan | None:
  """The plan that moves least, of those that fit the memory of the chip; None if none does."""
  n, height, width, c = shape
  batch_last = _padded(c, n) < _padded(n, c)
  a, b = (c, n) if batch_last else (n, c)
  tile = (a if a % 8 else 8, b if b % 128 else 128)
  best = None
  for rows in _axes(0, height, geometry, backward):
    for columns in _axes(1, width, geometry, backward):
      plan = _Plan(batch_last, tile, (a // tile[0], b // tile[1]), rows, columns)
      if _memory(plan, itemsizes, backward) > _VMEM:
        continue
      key = (_bytes(plan, itemsizes, backward), rows.steps * columns.steps)
      if best is None or key < best[0]:
        best = key, plan
  return best and best[1]


def _padded(a: int, b: int) -> int:
  """Elements that [a, b] takes in registers of 8 x 128."""
  return pl.cdiv(a, 8) * 8 * pl.cdiv(b, 128) * 128


def _axes(number: int, size: int, geometry: Geometry, backward: bool) -> list[_Axis]:
  """Ways to cut an axis into blocks of about equal size."""
  kernel, stride, padding = (value[number] for value in geometry)
  windows = geometry.output_size((size, size))[number]
  axis = _Axis(size, windows, kernel, stride, padding, 1, 1, 0, 1)
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


def _block_sizes(plan: _Plan, backward: bool) -> tuple[int, int, int, int]:
  """Pixels read, windows read, pixels or windows written, and windows kept for a block."""
  rows, columns = plan.rows, plan.columns
  read, units = rows.extent * columns.extent, rows.units * columns.units
  if not backward:
    return read, 0, units, 0
  return (
    read,
    rows.windows_read * columns.windows_read,
    units * rows.stride * columns.stride,
    rows.needed * columns.needed,
  )


def _memory(plan: _Plan, itemsizes: tuple[int, int], backward: bool) -> int:
  """Bytes on the chip: two buffers for what travels, and what the kernel keeps."""
  of_x, of_h = itemsizes
  read, windows, written, kept = _block_sizes(plan, backward)
  travels = read * (of_x + of_h) + windows * of_x + written * (of_x + (of_h if backward else 0))
  return _padded(*plan.tile) * (2 * travels + 3 * 4 * kept)


def _bytes(plan: _Plan, itemsizes: tuple[int, int], backward: bool) -> int:
  """Bytes between memory and chip, by the blocks; statistics per channel are left out."""
  of_x, of_h = itemsizes
  rows, columns = plan.rows, plan.columns
  read, windows, _, _ = _block_sizes(plan, backward)
  steps = rows.steps * columns.steps
  out = rows.size * columns.size if backward else rows.windows * columns.windows
  moved = steps * (read * (of_x + of_h) + windows * of_x) + out * (of_x + of_h * backward)
  return moved * math.prod(plan.tile) * math.prod(plan.tiles)


def _cost(plan: _Plan, x: jax.Array, h: jax.Array, *, backward: bool) -> pl.CostEstimate:
  """What the compiler counts for the kernel, which it does not look into."""
  windows = x.shape[0] * x.shape[3] * plan.rows.windows * plan.columns.windows
  taps = plan.rows.kernel * plan.columns.kernel
  return pl.CostEstimate(
    flops=windows * taps * (10 if backward else 4),
    transcendentals=windows * taps * (2 if backward else 1),
    bytes_accessed=_bytes(plan, (x.dtype.itemsize, h.dtype.itemsize), backward),
  )
