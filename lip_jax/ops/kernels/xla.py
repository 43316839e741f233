"""`lip_pool` in plain XLA with a hand-derived gradient, for every platform.

The safe form. Each window o subtracts its own largest logit m_o before exp, so nothing overflows
and the largest weight is exactly one. The backward pass keeps y_o, m_o and the denominator
den_o = sum_i exp(l_i - m_o), a quarter of the input's size each at stride 2, and recomputes exp:
  dx_i = sum_o exp(l_i - m_o) g_o / den_o,
  dl_i = sum_o exp(l_i - m_o) g_o / den_o (x_i - y_o),
gathered by each input pixel i from the windows o that contain it. (One log-sum-exp instead of m
and den would lose three digits where logits are as large as 1e4.)
"""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lip_jax.ops.kernels.gate import Affine, gate
from lip_jax.ops.windows import (
  Geometry,
  accumulation_dtype,
  phase_offsets,
  taps,
  window_sum,
  window_sum_transpose,
)

# (y, largest logit or None, denominator), each [N, H', W', C].
Windows = tuple[jax.Array, jax.Array | None, jax.Array]


def forward(
  x: jax.Array,
  h: jax.Array,
  affine: Affine | None,
  geometry: Geometry,
  shift: float | jax.Array | None,
) -> tuple[jax.Array, Windows]:
  """Pools x, [N, H, W, C].

  Args:
    h: logits, [N, H, W, C] or [N, H, W, 1]; with `affine` what they are computed from.
    affine: of the instance norm before the gate, or None.
    shift: what to subtract from all logits, a number or [N, 1, 1, C]; None: each window's largest.

  Returns:
    [N, H', W', C] in the dtype of x, and for the backward pass the same in the dtype of the sums,
    each window's largest logit (None with a shift) and its denominator.
  """
  dtype = accumulation_dtype(x, h)
  pool = _per_platform(_forward_slices, _forward_sums, shift)
  y, largest, total = pool(x.astype(dtype), _logits(h, affine, dtype)[0], geometry, shift)
  return y.astype(x.dtype), (y, largest, total)


def backward(
  x: jax.Array,
  h: jax.Array,
  affine: Affine | None,
  windows: Windows,
  g: jax.Array,
  geometry: Geometry,
  shift: float | jax.Array | None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
  """Gradients of `forward`, given that of its result, g [N, H', W', C].

  Returns:
    (dx, dh, sums): gradients with respect to x and to the logits; with `affine` dh is with respect
    to what the gate gets, and sums are those of dh and of dh * (h - mean) over the pixels of each
    channel of each image, [N, C]; None without.
  """
  y, largest, total = windows
  dtype = y.dtype
  logits, slope = _logits(h, affine, dtype)
  pool = _per_platform(_backward_slices, _backward_sums, shift)
  dx, dh = pool(x.astype(dtype), logits, y, largest, g.astype(dtype) / total, geometry, shift)
  dx = dx.astype(x.dtype)
  if affine is None:
    return dx, dh.astype(h.dtype), None
  du = dh * slope
  centred = h.astype(dtype) - affine.mean[:, None, None]
  return dx, du.astype(h.dtype), (du.sum(axis=(1, 2)), (du * centred).sum(axis=(1, 2)))


def _logits(h: jax.Array, affine: Affine | None, dtype) -> tuple[jax.Array, jax.Array | None]:
  """Logits and, with an affine, their derivative by what the gate gets."""
  h = h.astype(dtype)
  if affine is None:
    return h, None
  mean, gain, bias = (statistic.astype(dtype)[:, None, None] for statistic in affine)
  return gate((h - mean) * gain + bias)


def _per_platform(slices: Callable, sums: Callable, shift: float | jax.Array | None) -> Callable:
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
  if shift is not None:
    weight = jnp.exp(logits - shift)
    weight, weighted = _computed_once(weight, x * weight)
    total = functools.reduce(jnp.add, taps(weight, geometry, 0.0))
    return functools.reduce(jnp.add, taps(weighted, geometry, 0.0)) / total, None, total
  xs = taps(x, geometry, 0.0)
  ls = taps(logits, geometry, -math.inf)
  (largest,) = _computed_once(functools.reduce(jnp.maximum, ls))
  weights = [jnp.exp(tap - largest) for tap in ls]
  total = functools.reduce(jnp.add, weights)
  y = functools.reduce(jnp.add, [a * w for a, w in zip(xs, weights, strict=True)]) / total
  return y, largest, total


def _backward_slices(x, logits, y, largest, a, geometry, shift):
  """(dx, dlogits) from a = g / den.

  Pixels of equal phase modulo the stride see their windows at equal offsets, so each phase is a sum
  of shifted slices of the small arrays.
  """
  n, height, width, c = x.shape
  (_, (sh, sw), _) = geometry
  rows, columns = -(-height // sh), -(-width // sw)
  # Windows of the pixels (row * stride + phase), as offsets to `row`.
  offsets_h, offsets_w = (phase_offsets(*axis) for axis in zip(*geometry, strict=True))
  margin_h = _margins(offsets_h, rows, y.shape[1])
  margin_w = _margins(offsets_w, columns, y.shape[2])
  margins = ((0, 0), margin_h, margin_w, (0, 0))
  grow = ((0, 0), (0, rows * sh - height), (0, columns * sw - width), (0, 0))
  if largest is None:
    # As `_backward_sums`, with S in two steps, along the width and then the height.
    both = _computed_once(jnp.pad(a, margins), jnp.pad(a * y, margins))
    both = _computed_once(*(_all_phases(b, 2, offsets_w, margin_w[0], columns) for b in both))
    of_a, of_ay = (_all_phases(b, 1, offsets_h, margin_h[0], rows) for b in both)
    x, weights = (
      jnp.pad(array, grow).reshape(n, rows, sh, columns, sw, array.shape[3])
      for array in (x, jnp.exp(logits - shift))
    )
    dx, dl = weights * of_a, weights * (x * of_a - of_ay)
    if logits.shape[3] != c:
      dl = dl.sum(axis=5, keepdims=True)
    return tuple(
      d.reshape(n, rows * sh, columns * sw, d.shape[5])[:, :height, :width] for d in (dx, dl)
    )

  y, a = jnp.pad(y, margins), jnp.pad(a, margins)
  # A window that does not exist weighs exp(-inf) = 0.
  largest = jnp.pad(largest, margins, constant_values=math.inf)

  def windows(array, i, j):
    top, left = margin_h[0] + i, margin_w[0] + j
    return lax.slice(array, (0, top, left, 0), (n, top + rows, left + columns, array.shape[3]))

  x, logits = jnp.pad(x, grow), jnp.pad(logits, grow)
  phases = []
  for r, q in itertools.product(range(sh), range(sw)):
    x_phase, l_phase = x[:, r::sh, q::sw], logits[:, r::sh, q::sw]
    dx, dl = jnp.zeros_like(x_phase), jnp.zeros_like(x_phase)
    for i, j in itertools.product(offsets_h[r], offsets_w[q]):
      weighted = jnp.exp(l_phase - windows(largest, i, j)) * windows(a, i, j)
      dx += weighted
      dl += weighted * (x_phase - windows(y, i, j))
    if logits.shape[3] != c:
      dl = dl.sum(axis=3, keepdims=True)
    phases.append((dx, dl))

  def interleave(phases):
    channels = phases[0].shape[3]
    stacked = jnp.stack(phases).reshape(sh, sw, n, rows, columns, channels)
    full = stacked.transpose(2, 3, 0, 4, 1, 5).reshape(n, rows * sh, columns * sw, channels)
    return full[:, :height, :width]

  return tuple(map(interleave, zip(*phases, strict=True)))


def _all_phases(array, axis, offsets, low, count):
  """Sums of windows along an axis, for the pixels of each phase, which become an axis behind it.

  Adds the small array of each offset to all phases at once that have it.
  """
  total, phases = jnp.zeros((), array.dtype), jnp.arange(len(offsets))
  for offset in sorted(set(itertools.chain(*offsets))):
    # Computed, as an array that is given would be an argument, and `custom_partitioning` has none.
    has = [phases == index for index, phase in enumerate(offsets) if offset in phase]
    belongs = functools.reduce(jnp.logical_or, has).astype(array.dtype)
    part = lax.slice_in_dim(array, low + offset, low + offset + count, axis=axis)
    trailing = (1,) * (array.ndim - axis - 1)
    total += jnp.expand_dims(part, axis + 1) * belongs.reshape((1,) * (axis + 1) + (-1, *trailing))
  return total


def _computed_once(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """The arrays; on CPUs they go to memory, where XLA would compute them again for each user.

  Elsewhere memory is what is short. One barrier each: JAX 0.12 cannot transpose one of several
  arrays that do not all depend on what is differentiated by.
  """
  return lax.platform_dependent(
    *arrays,
    cpu=lambda *a: tuple(map(lax.optimization_barrier, a)),
    default=lambda *a: a,
  )


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
