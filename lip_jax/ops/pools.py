"""Poolings that average each window by a local importance: LIP's relatives, as pure functions.

The LAN family, local aggregation and normalization (equation 1 of Gao, Wang and Wu, "LIP: Local
Importance-based Pooling", ICCV 2019): y = sum(F(x) * x) / sum(F(x)) over each window, with an
importance F >= 0. The poolings differ in F alone: one for average pooling, exp(G(x)) with a learned
G for LIP (`lip_jax.lip_pool`). `lip_jax.lan` has the same as layers, which also give their
importance.

All take x [N, H, W, C] and `window=3`, `stride=2` and `padding=1` in pixels, ints or pairs (h, w),
and give [N, (H + 2 * padding - window) // stride + 1, (W + ...) // ... + 1, C] in the dtype of x;
sums run in float32 (float64 for float64 inputs). Positions outside the image belong to no window.
They raise ValueError for shapes, windows and paddings that do not fit, and TypeError for x that is
not floating point.
"""

import functools
from typing import Unpack

import jax
import jax.numpy as jnp
from jax import lax

from lip_jax.ops.lip_pool import lip_pool
from lip_jax.ops.windows import (
  Geometry,
  Windows,
  accumulation_dtype,
  check_array,
  check_shape,
  make_geometry,
  reduce_windows,
  tap,
  taps,
  window_sum,
)


def average_pool(x: jax.Array, **windows: Unpack[Windows]) -> jax.Array:
  """Mean over each window, of the positions inside the image: F = 1."""
  x = jnp.asarray(x)
  geometry = make_geometry(x, **windows)
  inside = jnp.ones((1, *x.shape[1:3], 1), accumulation_dtype(x))
  total = window_sum(x.astype(inside.dtype), geometry)
  return (total / window_sum(inside, geometry)).astype(x.dtype)


def max_pool(x: jax.Array, **windows: Unpack[Windows]) -> jax.Array:
  """Maximum over each window: the limit of F = exp(beta * x) as beta grows."""
  return reduce_windows(x, -jnp.inf, lax.max, make_geometry(x, **windows))


def strided_pool(x: jax.Array, **windows: Unpack[Windows]) -> jax.Array:
  """The central pixel of each window, (window - 1) // 2: F is one there and zero elsewhere.

  What a strided convolution does after the same convolution at every pixel.
  """
  x = jnp.asarray(x)
  geometry = make_geometry(x, **windows)
  if any(p > (k - 1) // 2 for k, p in zip(geometry.window, geometry.padding, strict=True)):
    raise ValueError(
      f"padding must be at most (window - 1) // 2 for the central pixel to lie inside the image; "
      f"got window {geometry.window} and padding {geometry.padding}"
    )
  (kh, kw) = geometry.window
  return tap(x, geometry, ((kh - 1) // 2, (kw - 1) // 2), 0.0)


def exp_pool(x: jax.Array, beta: jax.typing.ArrayLike, **windows: Unpack[Windows]) -> jax.Array:
  """F = exp(beta * x): average pooling at beta = 0, max pooling in the limit of a large beta.

  Beta is a number, or one per channel, [C], and may be learned.
  """
  check_array("x", x)
  dtype = accumulation_dtype(x)
  logits = _finite(_per_channel("beta", beta, x, dtype) * _finite(x.astype(dtype)))
  return lip_pool(_finite_if_light(x, logits), logits, **windows)


def soft_pool(x: jax.Array, **windows: Unpack[Windows]) -> jax.Array:
  """F = exp(x): SoftPool (Stergiou et al. 2021), which is LIP with G(x) = x."""
  logits = _finite(x)
  return lip_pool(_finite_if_light(x, logits), logits, **windows)


def lp_pool(x: jax.Array, p: float, **windows: Unpack[Windows]) -> jax.Array:
  """Power mean (mean(|x|^p))^(1 / p) over each window, p >= 1 (Sermanet et al. 2012).

  The mean of |x| at p = 1, the maximum of |x| in the limit of a large p. Its importance is
  F = |x|^(p - 1), normalized otherwise than the family's others: with n pixels in a window and
  q = p / (p - 1), y = sum(F |x|) / (n^(1 / p) * sum(F^q)^(1 / q)).
  """
  geometry = make_geometry(x, **windows)
  if p < 1:
    raise ValueError(f"p must be at least 1, got {p}")
  dtype = accumulation_dtype(x)
  magnitude = [jnp.abs(pixel) for pixel in taps(x.astype(dtype), geometry, 0.0)]
  # Relative to the window's largest value no power over- or underflows; the result does not
  # depend on what is divided by, so no gradient flows through it.
  largest = lax.stop_gradient(functools.reduce(jnp.maximum, magnitude))
  scale = jnp.where((largest == 0) | jnp.isinf(largest), 1, largest)
  total = functools.reduce(jnp.add, [(pixel / scale) ** p for pixel in magnitude])
  mean = total / window_sum(jnp.ones((1, *x.shape[1:3], 1), dtype), geometry)
  # In a window of zeros the root has no derivative; zero is the subgradient of smallest norm.
  root = jnp.where(largest == 0, 1, mean) ** (1 / p)
  return (jnp.where(largest == 0, 0, root) * scale).astype(x.dtype)


def detail_preserving_pool(
  x: jax.Array,
  alpha: jax.typing.ArrayLike = 1.0,
  lam: jax.typing.ArrayLike = 1.0,
  *,
  kernel: jax.Array | None = None,
  symmetric: bool = True,
  epsilon: float = 1e-3,
  **windows: Unpack[Windows],
) -> jax.Array:
  """Detail-preserving pooling: F grows with the distance to the window's linear down-scaling.

  F[p, q] = alpha + rho(x[q] - d[p]) for the pixels q of window p (Saeedan et al. 2018), where
  rho(t) = sqrt(t^2 + epsilon^2)^lam (symmetric) or sqrt(max(t, 0)^2 + epsilon^2)^lam (asymmetric),
  and d[p] is the mean of the window ("lite") or sum_q kernel[q] x[q] ("full"), zero outside the
  image. Average pooling at lam = 0.

  Args:
    x: [N, H, W, C], of magnitude below 1e18 in float32: differences are squared.
    alpha: share of average pooling, >= 0: a number, or one per channel, [C].
    lam: exponent lambda, >= 0: a number, or one per channel, [C].
    kernel: for the full form, [window_h, window_w, C].
    symmetric: whether pixels below d[p] count as details, too.
  """
  geometry = make_geometry(x, **windows)
  importance = detail_importance(x, alpha, lam, geometry, kernel, symmetric, epsilon)
  dtype = importance[0].dtype
  pixels = taps(x.astype(dtype), geometry, 0.0)
  weighted = [f * t for f, t in zip(importance, pixels, strict=True)]
  y = functools.reduce(jnp.add, weighted) / functools.reduce(jnp.add, importance)
  # Infinity less an infinite mean is no detail; the mean itself is what other poolings give.
  total = functools.reduce(jnp.add, pixels)
  return jnp.where(jnp.isinf(total), total, y).astype(x.dtype)


def detail_importance(
  x: jax.Array,
  alpha: jax.typing.ArrayLike,
  lam: jax.typing.ArrayLike,
  geometry: Geometry,
  kernel: jax.Array | None,
  symmetric: bool,
  epsilon: float,
) -> list[jax.Array]:
  """F of `detail_preserving_pool` for each tap of the window, up to a factor per window.

  These are window_h * window_w arrays [N, H', W', C], zero outside the image.
  """
  if epsilon <= 0:
    raise ValueError(f"epsilon must be positive, got {epsilon}")
  dtype = accumulation_dtype(x)
  pixels = taps(x.astype(dtype), geometry, 0.0)
  inside = taps(jnp.ones((1, *x.shape[1:3], 1), dtype), geometry, 0.0)
  if kernel is None:
    down = functools.reduce(jnp.add, pixels) / functools.reduce(jnp.add, inside)
  else:
    check_shape("kernel [window_h, window_w, C]", kernel, (*geometry.window, x.shape[3]), x)
    factors = kernel.astype(dtype).reshape(-1, 1, 1, 1, x.shape[3])
    down = functools.reduce(jnp.add, [f * t for f, t in zip(factors, pixels, strict=True)])
  exponent = _per_channel("lam", lam, x, dtype) / 2
  constant = _per_channel("alpha", alpha, x, dtype)
  log_rho = []
  for pixel, here in zip(pixels, inside, strict=True):
    detail = pixel - down if symmetric else jax.nn.relu(pixel - down)
    rho = exponent * jnp.log(detail * detail + epsilon**2)
    log_rho.append(jnp.where(here > 0, rho, -jnp.inf))
  # The window's largest weight is brought to about one: nothing overflows, and where alpha is zero
  # and all details are tiny the sum does not vanish. The factor cancels in the pooling.
  largest = lax.stop_gradient(functools.reduce(jnp.maximum, log_rho, jnp.log(constant)))
  # For alpha = 0 the factor may be beyond the dtype's range; then 0 * inf must not arise.
  factor = jnp.exp(jnp.minimum(-largest, jnp.log(jnp.finfo(dtype).max) / 2))
  return [
    here * (constant * factor + jnp.exp(rho - largest))
    for here, rho in zip(inside, log_rho, strict=True)
  ]


def _finite(logits: jax.Array) -> jax.Array:
  """Logits with the largest number for infinity, which so takes its window as a large number does.

  NaN stays.
  """
  largest = float(jnp.finfo(logits.dtype).max)
  return jnp.clip(logits, -largest, largest)


def _finite_if_light(x: jax.Array, logits: jax.Array) -> jax.Array:
  """The features without infinities that weigh nothing: zero times them is NaN."""
  return jnp.where(logits < 0, _finite(x), x)


def _per_channel(name: str, value: jax.typing.ArrayLike, x: jax.Array, dtype) -> jax.Array:
  """`value`, a number or [C], as an array that multiplies x [N, H, W, C]."""
  array = jnp.asarray(value, dtype)
  if array.shape not in ((), (1,), (x.shape[3],)):
    raise ValueError(
      f"{name} must be a number or one per channel, [{x.shape[3]}], got shape {array.shape}"
    )
  return array.reshape(1, 1, 1, -1)
