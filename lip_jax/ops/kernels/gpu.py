"""`lip_pool` as Pallas kernels for NVIDIA GPUs, compiled by Triton: one pass forward, one backward.

A program takes a block of channels of one image, a few windows side by side, one lane each, and
walks down the image. Each input row is read once by a program and reduced, along the window's
width, to partial sums; those of the rows that the next windows share are kept in registers. Lanes
cannot see each other's registers, so pixels that neighbouring windows share are loaded by each of
them, from the first-level cache. Rows between two programs come from the second-level cache.

Backward each lane owns a cell of stride x stride pixels, those that windows and their neighbours
above and to the left share, and gathers their gradients: it recomputes those windows' y and
denominators from the inputs. Nothing is kept from the forward pass, and every sum has a fixed
order, so results are the same from run to run.

With `affine` the inputs h are to be normalized instead of logits: u = (h - mean) * gain + bias, and
the weight is exp(12 sigmoid(u) - 6), which never reaches memory.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lip_jax.ops.kernels.gate import GATE, MIDDLE, Affine
from lip_jax.ops.windows import LOWEST_LOGIT, Geometry, phase_offsets

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_LARGEST_WINDOW = 5  # the code of a window's pixels is unrolled
_MOST_WINDOWS = 9  # of one pixel, whose sums are kept in registers

_WARPS = 4
_CHANNELS = 64  # of a program: 128 bytes in bfloat16, a line of the cache
_ROWS = 8  # of windows that a program walks down, at most: it reads one row in 2 * 8 twice
_PROGRAMS = 2048  # are wanted, to have several on each of a large GPU's 132 processors

_TINY = 1e-37  # keeps the denominator of a window that does not exist from being zero


class _Tiling(NamedTuple):
  """How an image is divided among programs."""

  rows: int  # of windows or cells, walked down one after the other
  columns: int  # of windows or cells, a power of two
  channels: int  # a power of two
  blocks: tuple[int, int, int]  # programs along height, width and channels


class _Partial(NamedTuple):
  """Sums over a window or one row of it, [columns, channels]."""

  largest: Any  # logit, which is subtracted before exp; None: `shift` is
  weighted: jax.Array  # sum of x exp(l - largest)
  total: jax.Array  # sum of exp(l - largest)


class _Window(NamedTuple):
  """What the gradients of a window's pixels need of it, [columns, channels]."""

  largest: Any  # as in `_Partial`
  y: jax.Array
  a: jax.Array  # g / denominator; zero for a window that does not exist


class _Pixels(NamedTuple):
  """One pixel for each lane, as loaded, [columns, channels]."""

  x: jax.Array
  h: jax.Array
  inside: jax.Array  # bool: whether it is a pixel of the image


class _Image(NamedTuple):
  """The part of the inputs that a program works on."""

  x: Any  # reference to [N, H, W, C]
  h: Any
  affine: Affine | None  # float32, [1, channels]
  shift: float | None
  fast: bool  # the processor's own exp2 and reciprocal: 2 units of float32 off, a few instructions
  number: jax.Array  # of the image
  channels: jax.Array  # their numbers, [1, channels]

  @property
  def one_shift(self) -> bool:
    """Whether all windows subtract the same from their logits."""
    return self.affine is not None or self.shift is not None

  def load(self, row: jax.Array, columns: jax.Array) -> _Pixels:
    place, inside = _place(self.x, self.number, row, columns, self.channels)
    x, h = (plgpu.load(ref.at[place], mask=inside, other=0.0) for ref in (self.x, self.h))
    return _Pixels(x, h, inside)

  def logits(self, pixels: _Pixels) -> jax.Array:
    """Without `affine`."""
    # Also -inf, of a mask, becomes finite.
    return jnp.where(
      pixels.inside, jnp.maximum(pixels.h.astype(jnp.float32), LOWEST_LOGIT), LOWEST_LOGIT
    )

  def centred(self, pixels: _Pixels) -> jax.Array:
    """With `affine`: h - mean."""
    assert self.affine is not None
    return pixels.h.astype(jnp.float32) - self.affine.mean

  def gate(self, pixels: _Pixels) -> tuple[jax.Array, jax.Array]:
    """With `affine`: the weight exp(12 sigmoid(u) - 6) and the derivative of 12 sigmoid(u)."""
    assert self.affine is not None
    u = self.centred(pixels) * self.affine.gain + self.affine.bias
    # The logit is 12 up to rounding from u = 80 on, where exp(u) does not overflow yet.
    e = self.exp(jnp.minimum(u, 80.0))
    p = self.inverse(1 + e)  # sigmoid(-u); sigmoid(u) is e * p, with its small values exact
    return jnp.where(pixels.inside, self.exp(MIDDLE - GATE * p), 0.0), GATE * (e * p) * p

  def weights(self, pixels: _Pixels) -> jax.Array:
    """Exp(l - shift)."""
    if self.affine is not None:
      return self.gate(pixels)[0]
    assert self.shift is not None
    return self.exp(self.logits(pixels) - self.shift)

  def sums(self, pixels: list[_Pixels], windows: list[list[int]]) -> list[_Partial]:
    """For each window the sums over those of the pixels that it lists."""
    xs = [p.x.astype(jnp.float32) for p in pixels]
    if self.one_shift:
      weights = [self.weights(p) for p in pixels]
      return [
        _Partial(None, _add(weights[i] * xs[i] for i in window), _add(weights[i] for i in window))
        for window in windows
      ]
    partials, logits = [], [self.logits(p) for p in pixels]
    for window in windows:
      largest = functools.reduce(jnp.maximum, [logits[i] for i in window])
      parts = [(self.exp(logits[i] - largest), xs[i]) for i in window]
      partials.append(_Partial(largest, _add(w * x for w, x in parts), _add(w for w, _ in parts)))
    return partials

  def join(self, parts: list[_Partial]) -> _Partial:
    """Sums over the rows of a window from those over each row."""
    if parts[0].largest is None:
      return _Partial(None, _add(p.weighted for p in parts), _add(p.total for p in parts))
    largest = functools.reduce(jnp.maximum, [part.largest for part in parts])
    scaled = [(self.exp(part.largest - largest), part) for part in parts]
    weighted = _add(scale * part.weighted for scale, part in scaled)
    return _Partial(largest, weighted, _add(scale * part.total for scale, part in scaled))

  def exp(self, x: jax.Array) -> jax.Array:
    if not self.fast:
      return jnp.exp(x)
    return _instruction("ex2.approx.ftz.f32", x * math.log2(math.e))

  def inverse(self, x: jax.Array) -> jax.Array:
    """1 / x for x >= 1e-37, and 0 for infinity."""
    return _instruction("rcp.approx.ftz.f32", x) if self.fast else 1 / x


def supports(x: jax.Array, h: jax.Array, geometry: Geometry) -> bool:
  """Whether `forward` and `backward` can do these shapes and dtypes."""
  overlap = math.prod(max(_windows_of(geometry, axis)) for axis in (0, 1))
  return (
    x.shape == h.shape
    and x.size > 0
    and x.dtype in _DTYPES
    and h.dtype in _DTYPES
    and max(geometry.window) <= _LARGEST_WINDOW
    and overlap <= _MOST_WINDOWS
  )


@functools.partial(jax.jit, static_argnames=("geometry", "shift", "interpret"))
def forward(
  x: jax.Array,
  h: jax.Array,
  affine: Affine | None,
  geometry: Geometry,
  shift: float | None,
  *,
  interpret: bool = False,
) -> jax.Array:
  """As `xla.forward`, without what its backward pass keeps; `interpret` runs without a GPU."""
  n, height, width, c = x.shape
  size = geometry.output_size((height, width))
  tiling = _tiling(n, size, c, per_thread=16 // max(x.dtype.itemsize, h.dtype.itemsize))
  return _call(
    functools.partial(_forward_kernel, geometry=geometry, shift=shift),
    (x, h, *(affine or ())),
    jax.ShapeDtypeStruct((n, *size, c), x.dtype),
    n,
    tiling,
    interpret,
  )


@functools.partial(jax.jit, static_argnames=("geometry", "shift", "interpret"))
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
  n, height, width, c = x.shape
  # Cell i owns the pixels from i * stride - padding on: the first `stride` pixels of window i.
  cells = [(s - 1 + p) // t + 1 for s, t, p in zip((height, width), *geometry[1:], strict=True)]
  tiling = _tiling(n, (cells[0], cells[1]), c, per_thread=4)
  results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, h)]
  if affine is not None:
    blocks = tiling.blocks[0] * tiling.blocks[1]
    results += 2 * [jax.ShapeDtypeStruct((n, blocks, c), jnp.float32)]
  dx, dh, *partial = _call(
    functools.partial(_backward_kernel, geometry=geometry, shift=shift),
    (x, h, *(affine or ()), g),
    results,
    n,
    tiling,
    interpret,
  )
  sums = [part.sum(axis=1) for part in partial]
  return dx, dh, (sums[0], sums[1]) if sums else None


def _tiling(n: int, size: tuple[int, int], c: int, per_thread: int) -> _Tiling:
  elements = _WARPS * 32 * per_thread
  channels = min(pl.next_power_of_2(c), _CHANNELS)
  columns = min(pl.next_power_of_2(size[1]), elements // channels)
  channels = min(pl.next_power_of_2(c), elements // columns)
  across = pl.cdiv(size[1], columns) * pl.cdiv(c, channels)
  down = pl.cdiv(size[0], _ROWS)
  while n * down * across < _PROGRAMS and size[0] > 2 * down:
    down *= 2
  rows = pl.cdiv(size[0], down)
  blocks = (pl.cdiv(size[0], rows), pl.cdiv(size[1], columns), pl.cdiv(c, channels))
  return _Tiling(rows, columns, channels, blocks)


def _call(kernel, arguments, results, n: int, tiling: _Tiling, interpret: bool):
  # Inputs of 16 bits leave little time for each element, and the interpreter has no instructions.
  fast = not interpret and all(a.dtype.itemsize == 2 for a in arguments[:2])
  return pl.pallas_call(
    functools.partial(kernel, fast=fast, tiling=tiling),
    out_shape=results,
    # One axis: the others of a CUDA grid end at 65,535. Neighbours share what the cache holds.
    grid=(n * math.prod(tiling.blocks),),
    compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
    interpret=interpret,
  )(*arguments)


def _forward_kernel(
  x, h, *refs, geometry: Geometry, shift: float | None, fast: bool, tiling: _Tiling
):
  *affine, y = refs
  (kh, kw), (sh, sw), (ph, pw) = geometry
  image, first_row, columns, _ = _program(x, h, affine, shift, fast, tiling)

  def row_sums(row):
    pixels = [image.load(row, columns * sw - pw + tap) for tap in range(kw)]
    return image.sums(pixels, [list(range(kw))])[0]

  kept = max(kh - sh, 0)  # rows that a window shares with the next
  start = first_row * sh - ph

  def step(index, shared):
    out = first_row + index
    top = out * sh - ph
    rows = [*shared, *(row_sums(top + tap) for tap in range(kept, kh))]
    window = image.join(rows)
    place, inside = _place(y, image.number, out, columns, image.channels)
    mean = window.weighted * image.inverse(jnp.maximum(window.total, _TINY))
    plgpu.store(y.at[place], mean.astype(y.dtype), mask=inside)
    return tuple(rows[kh - kept :])

  lax.fori_loop(0, tiling.rows, step, tuple(row_sums(start + tap) for tap in range(kept)))


def _backward_kernel(
  x, h, *refs, geometry: Geometry, shift: float | None, fast: bool, tiling: _Tiling
):
  affine_refs = refs[:3] if len(refs) > 3 else ()
  g, dx, dh, *sums_refs = refs[len(affine_refs) :]
  (kh, kw), (sh, sw), (ph, pw) = geometry
  image, first_row, columns, block = _program(x, h, affine_refs, shift, fast, tiling)
  counts_h, counts_w = _windows_of(geometry, 0), _windows_of(geometry, 1)
  up, left = max(counts_h), max(counts_w)
  # Pixels of a row that a lane reads, from the first of its leftmost window on, and those of them
  # that belong to each of its windows: cell j lies in the windows j, j - 1, ...
  first_tap = -(left - 1) * sw
  taps = range(first_tap, kw)
  members = [[tap - j * sw - first_tap for tap in range(kw)] for j in range(left)]
  kept = max(kh - sh, 0)

  def load_row(row, offsets):
    return [image.load(row, columns * sw - pw + tap) for tap in offsets]

  def windows(rows: list[list[_Partial]], number) -> tuple[_Window, ...]:
    """The windows of row `number`, from the sums over their pixel rows."""
    made = []
    for j in range(left):
      joined = image.join([row[j] for row in rows])
      place, inside = _place(g, image.number, number, columns - j, image.channels)
      gradient = plgpu.load(g.at[place], mask=inside, other=0.0).astype(jnp.float32)
      inverse = image.inverse(jnp.maximum(joined.total, _TINY))
      made.append(_Window(joined.largest, joined.weighted * inverse, gradient * inverse))
    return tuple(made)

  def step(index, carry):
    above, shared, sums = carry
    cell = first_cell + index
    top = cell * sh - ph
    loaded = {tap: load_row(top + tap, taps) for tap in range(kept, kh)}  # all under way at once
    own = {
      r: loaded[r][-first_tap:] if r in loaded else load_row(top + r, range(min(sw, kw)))
      for r in range(min(sh, kh))
    }
    rows = [*shared, *(image.sums(loaded[tap], members) for tap in range(kept, kh))]
    containing = (windows(rows, cell), *above)
    for r in range(sh):
      row = jnp.where(index < up - 1, -1, top + r)  # the first cells belong to the program above
      for q in range(sw):
        theirs = [containing[i][j] for i in range(counts_h[r]) for j in range(counts_w[q])]
        place, inside = _place(dx, image.number, row, columns * sw - pw + q, image.channels)
        if theirs:
          pixel_dx, pixel_dh, terms = _gradients(image, own[r][q], theirs)
          sums = tuple(
            total + jnp.where(inside, term, 0.0) for total, term in zip(sums, terms, strict=True)
          )
        else:  # between windows
          pixel_dx = pixel_dh = jnp.zeros(inside.shape, jnp.float32)
        plgpu.store(dx.at[place], pixel_dx.astype(dx.dtype), mask=inside)
        plgpu.store(dh.at[place], pixel_dh.astype(dh.dtype), mask=inside)
    return containing[: up - 1], tuple(map(tuple, rows[kh - kept :])), sums

  # The windows above the first cells are made on the way, from rows that two programs read.
  first_cell = first_row - (up - 1)
  start = first_cell * sh - ph
  shared = tuple(tuple(image.sums(load_row(start + i, taps), members)) for i in range(kept))
  zero = jnp.zeros((tiling.columns, tiling.channels), jnp.float32)
  none = _Window(None if image.one_shift else zero - LOWEST_LOGIT, zero, zero)
  carry = ((left * (none,),) * (up - 1), shared, len(sums_refs) * (zero,))
  *_, sums = lax.fori_loop(0, tiling.rows + up - 1, step, carry)
  for total, ref in zip(sums, sums_refs, strict=True):
    channels = image.channels.reshape(tiling.channels)
    inside = channels < ref.shape[2]
    plgpu.store(ref.at[image.number, block, channels], total.sum(axis=0), mask=inside)


def _gradients(image: _Image, pixels: _Pixels, windows: list[_Window]):
  """Gradients of one pixel for each lane: (dx, dl or du, terms of the sums over the pixels)."""
  x = pixels.x.astype(jnp.float32)
  if not image.one_shift:
    logits = image.logits(pixels)
    shares = [image.exp(logits - window.largest) * window.a for window in windows]
    return _add(shares), _add(s * (x - w.y) for s, w in zip(shares, windows, strict=True)), ()
  share = _add(window.a for window in windows)
  change = _add(window.a * (x - window.y) for window in windows)
  if image.affine is None:
    weight = image.weights(pixels)
    return weight * share, weight * change, ()
  weight, slope = image.gate(pixels)
  du = weight * change * slope
  return weight * share, du, (du, du * image.centred(pixels))


def _program(x, h, affine_refs, shift: float | None, fast: bool, tiling: _Tiling):
  """What this program works on: (image, first row, its columns, its number within the image)."""
  index = pl.program_id(0)
  down, across, channel_blocks = tiling.blocks
  index, channel_block = index // channel_blocks, index % channel_blocks
  index, block = index // (down * across), index % (down * across)
  channels = channel_block * tiling.channels + jnp.arange(tiling.channels, dtype=jnp.int32)
  affine = None
  if affine_refs:
    inside = channels < x.shape[3]
    affine = Affine(
      *(plgpu.load(ref.at[index, channels], mask=inside, other=0.0)[None] for ref in affine_refs)
    )
  image = _Image(x, h, affine, shift, fast, index, channels[None])
  first_column = block % across * tiling.columns
  columns = (first_column + jnp.arange(tiling.columns, dtype=jnp.int32))[:, None]
  return image, block // across * tiling.rows, columns, block


def _place(ref, index, row, columns, channels):
  """Indices of a row of lanes in `ref`, and which of them exist, [columns, channels]."""
  _, height, width, c = ref.shape
  inside = (row >= 0) & (row < height) & (columns >= 0) & (columns < width)
  # A negative index would count from the end where the kernel is interpreted.
  place = index, jnp.where(row < 0, height, row), jnp.where(columns < 0, width, columns), channels
  shape = columns.shape[0], channels.shape[1]
  if c % shape[1] == 0:
    return place, jnp.broadcast_to(inside, shape)
  return place, inside & (channels < c)


def _windows_of(geometry: Geometry, axis: int) -> list[int]:
  """How many windows hold each pixel of a cell along an axis: its own, and those before it."""
  window, stride = geometry.window[axis], geometry.stride[axis]
  return [len(offsets) for offsets in phase_offsets(window, stride, 0)]


def _instruction(name: str, x: jax.Array) -> jax.Array:
  """Of the processor, on each float32 of x."""
  like = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
  (result,) = plgpu.elementwise_inline_asm(
    f"{name} $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=like
  )
  return result


def _add(terms):
  return functools.reduce(jnp.add, terms)
