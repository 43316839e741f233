"""Local importance-based pooling as a pure function of features and logits.

Source: Gao, Wang and Wu, "LIP: Local Importance-based Pooling", ICCV 2019, equation 6.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Implementation = Literal["auto", "reference", "xla"]
IntOrPair = int | tuple[int, int]

IMPLEMENTATIONS = ("auto", "reference", "xla")


class Geometry(NamedTuple):
  """Window, stride and padding of a pooling, each as a (height, width) pair."""

  window: tuple[int, int]
  stride: tuple[int, int]
  padding: tuple[int, int]

  def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
    """Output (height, width) for an input (height, width)."""
    height, width = (
      (n + 2 * p - k) // s + 1
      for n, k, s, p in zip(size, self.window, self.stride, self.padding, strict=True)
    )
    return height, width


def lip_pool(
  x: jax.Array,
  logits: jax.Array,
  *,
  window: IntOrPair = 3,
  stride: IntOrPair = 2,
  padding: IntOrPair = 1,
  implementation: Implementation = "auto",
  logit_range: tuple[float, float] | None = None,
) -> jax.Array:
  """Computes `sum(x * exp(logits)) / sum(exp(logits))` over each window (equation 6 of the paper).

  Constant logits give average pooling, `logits=x` gives SoftPool, and `logits=beta * x` approaches
  max pooling as beta grows. Positions outside the image count as logits of minus infinity: they
  belong to no average.

  Sums run in float32 (float64 for float64 inputs) and are cast once, at the end. The result and
  both gradients are finite for logits of magnitude up to 1e4 in float32, bfloat16 and float16, and
  every x whose sum over a window is finite. Gradients are reverse mode (`jax.grad`, `jax.vjp`);
  `implementation="reference"` also allows forward mode.

  Args:
    x: features, [N, H, W, C], floating point.
    logits: logarithms of the importance, [N, H, W, C], or [N, H, W, 1] to share one map among all
      channels; floating point.
    window: height and width of the window in pixels, an int or a pair (h, w).
    stride: distance between windows in pixels, an int or a pair (h, w).
    padding: pixels added on each side, an int or a pair (h, w); at most window // 2.
    implementation: "auto" (the best for the platform), "xla" (numerically safe, hand-derived
      gradient) or "reference" (plain window sums of the exponentials and autodiff; overflows for
      logits above 88).
    logit_range: (low, high), a promise that every logit lies between the two, at most 80 apart. A
      fixed shift then replaces each window's maximum, which saves a pass; the result is the same up
      to rounding. Logits that break the promise can overflow.

  Returns:
    [N, (H + 2 * padding - window) // stride + 1, (W + ...) // ... + 1, C], in the dtype of x.

  Raises:
    ValueError: shapes that do not match, padding above window // 2, an image smaller than the
      window, an unknown implementation, or a logit_range that is reversed or too wide.
    TypeError: x or logits that are not floating point.
  """
  geometry = _check(x, logits, window, stride, padding)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"unknown implementation {implementation!r}; choose one of "
      + ", ".join(map(repr, IMPLEMENTATIONS))
    )
  shift = _fixed_shift(logit_range)
  if implementation == "reference":
    return _reference(x, logits, geometry)
  return _lip_pool(x, logits, geometry, shift)


def average_pool(
  x: jax.Array, *, window: IntOrPair = 3, stride: IntOrPair = 2, padding: IntOrPair = 1
) -> jax.Array:
  """Mean over each window, of the positions inside the image: `lip_pool` with constant logits.

  Args and errors are those of `lip_pool`: x [N, H, W, C] -> [N, H', W', C] in the dtype of x.
  """
  x = jnp.asarray(x)
  geometry = _geometry(x, window, stride, padding)
  inside = jnp.ones((1, *x.shape[1:3], 1), accumulation_dtype(x))
  total = window_sum(x.astype(inside.dtype), geometry)
  return (total / window_sum(inside, geometry)).astype(x.dtype)


def max_pool(
  x: jax.Array, *, window: IntOrPair = 3, stride: IntOrPair = 2, padding: IntOrPair = 1
) -> jax.Array:
  """Maximum over each window: the limit of `lip_pool` with logits beta * x as beta grows.

  Args and errors are those of `lip_pool`: x [N, H, W, C] -> [N, H', W', C] in the dtype of x.
  """
  (kh, kw), (sh, sw), (ph, pw) = _geometry(x, window, stride, padding)
  return lax.reduce_window(
    x,
    np.asarray(-np.inf, x.dtype),
    lax.max,
    (1, kh, kw, 1),
    (1, sh, sw, 1),
    ((0, 0), (ph, ph), (pw, pw), (0, 0)),
  )


def _check(x, logits, window, stride, padding) -> Geometry:
  """Geometry of a `lip_pool` whose arguments are valid; raises otherwise."""
  geometry = _geometry(x, window, stride, padding)
  _check_array("logits", logits)
  if logits.shape[:3] != x.shape[:3] or logits.shape[3] not in (1, x.shape[3]):
    raise ValueError(
      f"logits must have the shape of x, {tuple(x.shape)}, or one channel, "
      f"{(*x.shape[:3], 1)}; got {tuple(logits.shape)}"
    )
  return geometry


def _check_array(name: str, array: jax.Array) -> None:
  if array.ndim != 4:
    raise ValueError(f"{name} must be [N, H, W, C], got shape {tuple(array.shape)}")
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise TypeError(
      f"{name} must be floating point, got {array.dtype}; cast it first, for example "
      f"{name}.astype(jnp.float32)"
    )


def _geometry(x: jax.Array, window: IntOrPair, stride: IntOrPair, padding: IntOrPair) -> Geometry:
  """Geometry of a pooling of x whose arguments are valid; raises otherwise."""
  _check_array("x", x)
  geometry = Geometry(_pair("window", window), _pair("stride", stride), _pair("padding", padding))
  if min(geometry.window) < 1 or min(geometry.stride) < 1:
    raise ValueError(f"window and stride must be at least 1, got {window} and {stride}")
  for k, p in zip(geometry.window, geometry.padding, strict=True):
    if not 0 <= p <= k // 2:
      raise ValueError(
        f"padding must be between 0 and window // 2 = {k // 2} for window {k}, got {p}"
      )
  if min(geometry.output_size((x.shape[1], x.shape[2]))) < 1:
    raise ValueError(
      f"window {geometry.window} does not fit into an image of {tuple(x.shape[1:3])} with padding "
      f"{geometry.padding}"
    )
  return geometry


def _pair(name: str, value: IntOrPair) -> tuple[int, int]:
  pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
  if len(pair) != 2 or not all(isinstance(v, (int, np.integer)) for v in pair):
    raise ValueError(f"{name} must be an int or a pair (h, w) of ints, got {value!r}")
  return int(pair[0]), int(pair[1])


def _fixed_shift(logit_range: tuple[float, float] | None) -> float | None:
  """Middle of the range: what to subtract from every logit before exp."""
  if logit_range is None:
    return None
  if not isinstance(logit_range, (tuple, list)) or len(logit_range) != 2:
    raise ValueError(f"logit_range must be a pair (low, high), got {logit_range!r}")
  low, high = logit_range
  if not 0 <= high - low <= 80:
    raise ValueError(
      f"logit_range must be (low, high), at most 80 apart, got {logit_range}; leave it "
      "out for logits of any size"
    )
  return (low + high) / 2


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
  """float64 if any input is, float32 otherwise."""
  return functools.reduce(jnp.promote_types, (a.dtype for a in arrays), jnp.dtype(jnp.float32))


def window_sum(x: jax.Array, geometry: Geometry) -> jax.Array:
  """Sum of x, [N, H, W, C], over each window; positions outside the image count as zero."""
  (kh, kw), (sh, sw), (ph, pw) = geometry
  return lax.reduce_window(
    x,
    np.zeros((), x.dtype),
    lax.add,
    (1, kh, kw, 1),
    (1, sh, sw, 1),
    ((0, 0), (ph, ph), (pw, pw), (0, 0)),
  )


def window_sum_transpose(
  g: jax.Array, geometry: Geometry, input_size: tuple[int, int]
) -> jax.Array:
  """Transpose of `window_sum`: each of the input pixels sums the windows that it belongs to.

  A gather: one `reduce_window` over the base-dilated g.

  Args:
    g: [N, H', W', C], a value per window.
    geometry: of the window sum.
    input_size: (H, W).

  Returns:
    [N, H, W, C].
  """
  pads = []
  for n, m, k, s, p in zip(input_size, g.shape[1:3], *geometry, strict=True):
    dilated = (m - 1) * s + 1
    low = k - 1 - p
    pads.append((low, n + k - 1 - low - dilated))
  (kh, kw), (sh, sw), _ = geometry
  return lax.reduce_window(
    g,
    np.zeros((), g.dtype),
    lax.add,
    (1, kh, kw, 1),
    (1, 1, 1, 1),
    ((0, 0), *pads, (0, 0)),
    base_dilation=(1, sh, sw, 1),
  )


@functools.partial(jax.jit, static_argnums=2)
def _reference(x: jax.Array, logits: jax.Array, geometry: Geometry) -> jax.Array:
  dtype = accumulation_dtype(x, logits)
  importance = jnp.exp(logits.astype(dtype))
  weighted = window_sum(x.astype(dtype) * importance, geometry)
  return (weighted / window_sum(importance, geometry)).astype(x.dtype)


# The safe form. Each window o subtracts its own largest logit m_o before exp, so nothing overflows
# and the largest weight is exactly one. The backward pass keeps y_o, m_o and the denominator
# den_o = sum_i exp(l_i - m_o), a quarter of the input's size each at stride 2, and recomputes exp:
#   dx_i = sum_o exp(l_i - m_o) g_o / den_o,
#   dl_i = sum_o exp(l_i - m_o) g_o / den_o (x_i - y_o),
# gathered by each input pixel i from the windows o that contain it. (One log-sum-exp instead of m
# and den would lose three digits where logits are as large as 1e4.)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _lip_pool(
  x: jax.Array, logits: jax.Array, geometry: Geometry, shift: float | None
) -> jax.Array:
  return _lip_pool_fwd(x, logits, geometry, shift)[0]


@functools.partial(jax.jit, static_argnums=(2, 3))  # one program where there is no jit around
def _lip_pool_fwd(x, logits, geometry, shift):
  dtype = accumulation_dtype(x, logits)
  forward = _per_platform(_forward_slices, _forward_sums, shift)
  y, largest, total = forward(x.astype(dtype), logits.astype(dtype), geometry, shift)
  return y.astype(x.dtype), (x, logits, y, largest, total)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _lip_pool_bwd(geometry, shift, residuals, g):
  x, logits, y, largest, total = residuals
  dtype = y.dtype
  backward = _per_platform(_backward_slices, _backward_sums, shift)
  dx, dlogits = backward(
    x.astype(dtype), logits.astype(dtype), y, largest, g.astype(dtype) / total, geometry, shift
  )
  return dx.astype(x.dtype), dlogits.astype(logits.dtype)


_lip_pool.defvjp(_lip_pool_fwd, _lip_pool_bwd)


def _per_platform(slices: Callable, sums: Callable, shift: float | None) -> Callable:
  """`slices` everywhere but on TPU, where strided slices are slow: there `sums`, where it is safe.

  Window sums need one shift for all windows, so only a known range of logits allows them.
  """
  if shift is None:
    return slices

  def call(*args):
    *arrays, geometry, fixed = args
    return lax.platform_dependent(
      *arrays,
      tpu=lambda *a: sums(*a, geometry, fixed),
      default=lambda *a: slices(*a, geometry, fixed),
    )

  return call


def _forward_slices(x, logits, geometry, shift):
  """(y, largest logit, denominator) per window, from its taps as strided slices that XLA fuses."""
  xs = _taps(x, geometry, 0.0)
  ls = _taps(logits, geometry, -math.inf)
  largest = None if shift is not None else functools.reduce(jnp.maximum, ls)
  weights = [jnp.exp(tap - (shift if largest is None else largest)) for tap in ls]
  total = functools.reduce(jnp.add, weights)
  y = functools.reduce(jnp.add, [a * w for a, w in zip(xs, weights, strict=True)]) / total
  return y, largest, total


def _taps(a: jax.Array, geometry: Geometry, outside: float) -> list[jax.Array]:
  """The window_h * window_w strided slices of `a`, each with one pixel of every window."""
  n, height, width, c = a.shape
  (kh, kw), (sh, sw), (ph, pw) = geometry
  out_h, out_w = geometry.output_size((height, width))
  a = jnp.pad(a, ((0, 0), (ph, ph), (pw, pw), (0, 0)), constant_values=outside)
  return [
    lax.slice(
      a,
      (0, i, j, 0),
      (n, i + (out_h - 1) * sh + 1, j + (out_w - 1) * sw + 1, c),
      (1, sh, sw, 1),
    )
    for i in range(kh)
    for j in range(kw)
  ]


def _backward_slices(x, logits, y, largest, a, geometry, shift):
  """(dx, dlogits) from a = g / den.

  Pixels of equal phase modulo the stride see their windows at equal offsets, so each phase is a sum
  of shifted slices of the small arrays.
  """
  n, height, width, _ = x.shape
  (kh, kw), (sh, sw), (ph, pw) = geometry
  rows, columns = -(-height // sh), -(-width // sw)
  # Windows of the pixels (row * stride + phase), as offsets to `row`.
  offsets_h = [[(r + ph - t) // sh for t in range(kh) if (r + ph - t) % sh == 0] for r in range(sh)]
  offsets_w = [[(r + pw - t) // sw for t in range(kw) if (r + pw - t) % sw == 0] for r in range(sw)]
  margin_h = _margins(offsets_h, rows, y.shape[1])
  margin_w = _margins(offsets_w, columns, y.shape[2])
  margins = ((0, 0), margin_h, margin_w, (0, 0))
  y, a = jnp.pad(y, margins), jnp.pad(a, margins)
  if largest is not None:  # a window that does not exist weighs exp(-inf) = 0
    largest = jnp.pad(largest, margins, constant_values=math.inf)
  grow = ((0, 0), (0, rows * sh - height), (0, columns * sw - width), (0, 0))
  x, logits = jnp.pad(x, grow), jnp.pad(logits, grow)

  def windows(array, i, j):
    top, left = margin_h[0] + i, margin_w[0] + j
    return lax.slice(array, (0, top, left, 0), (n, top + rows, left + columns, array.shape[3]))

  dx_phases, dl_phases = [], []
  for r in range(sh):
    for q in range(sw):
      x_phase, l_phase = x[:, r::sh, q::sw], logits[:, r::sh, q::sw]
      dx, dl = jnp.zeros_like(x_phase), jnp.zeros_like(x_phase)
      for i in offsets_h[r]:
        for j in offsets_w[q]:
          subtracted = shift if largest is None else windows(largest, i, j)
          weighted = jnp.exp(l_phase - subtracted) * windows(a, i, j)
          dx += weighted
          dl += weighted * (x_phase - windows(y, i, j))
      if logits.shape[3] != x.shape[3]:
        dl = dl.sum(axis=3, keepdims=True)
      dx_phases.append(dx)
      dl_phases.append(dl)

  def interleave(phases):
    channels = phases[0].shape[3]
    stacked = jnp.stack(phases).reshape(sh, sw, n, rows, columns, channels)
    full = stacked.transpose(2, 3, 0, 4, 1, 5).reshape(n, rows * sh, columns * sw, channels)
    return full[:, :height, :width]

  return interleave(dx_phases), interleave(dl_phases)


def _margins(offsets: list[list[int]], size: int, windows: int) -> tuple[int, int]:
  """How far the offsets reach before the first and beyond the last window."""
  flat = [o for phase in offsets for o in phase]
  return max(0, -min(flat)), max(0, max(flat) + size - windows)


def _forward_sums(x, logits, geometry, shift):
  importance = jnp.exp(logits - shift)
  total = window_sum(importance, geometry)
  return window_sum(x * importance, geometry) / total, None, total


def _backward_sums(x, logits, y, largest, a, geometry, shift):
  """Dx = exp(l) S(a), dl = exp(l) (x S(a) - S(a y)) with a = g / den, S the transposed sum."""
  del largest  # there is one shift for all windows
  size = x.shape[1:3]
  importance = jnp.exp(logits - shift)
  dx = importance * window_sum_transpose(a, geometry, size)
  dlogits = x * dx - importance * window_sum_transpose(a * y, geometry, size)
  if logits.shape[3] != x.shape[3]:
    dlogits = dlogits.sum(axis=3, keepdims=True)
  return dx, dlogits
