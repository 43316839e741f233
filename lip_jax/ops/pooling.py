"""The LAN family: poolings that average each window by a local importance, as pure functions.

Local aggregation and normalization (equation 1 of Gao, Wang and Wu, "LIP: Local Importance-based
Pooling", ICCV 2019): y = sum(F(x) * x) / sum(F(x)) over each window, with an importance F >= 0.
The poolings differ in F alone: one for average pooling, exp(G(x)) with a learned G for LIP.
`lip_jax.lan` has the same as layers, which also give their importance.

All take x [N, H, W, C] and `window`, `stride` and `padding` in pixels, ints or pairs (h, w), and
give [N, (H + 2 * padding - window) // stride + 1, (W + ...) // ... + 1, C] in the dtype of x; sums
run in float32 (float64 for float64 inputs). Positions outside the image belong to no window. They
raise ValueError for shapes, windows and paddings that do not fit, and TypeError for x that is not
floating point.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lip_jax.ops.kernels import dispatch, gate
from lip_jax.ops.normalization import apply_moments, moments, varying_alike
from lip_jax.ops.windows import (
  Geometry,
  IntOrPair,
  accumulation_dtype,
  check_array,
  check_logits,
  make_geometry,
  taps,
  window_sum,
)

Implementation = Literal["auto", "reference", "xla", "pallas"]

IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)


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
  """Computes `sum(x * exp(logits)) / sum(exp(logits))` over each window (equation 5 of the paper).

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
    window: height and width of the window in pixels, an int or a pair (h, w). Meant for small ones:
      the code of a window's pixels is unrolled (see `lip_jax.adaptive_lip_pool` for large ones).
    stride: distance between windows in pixels, an int or a pair (h, w).
    padding: pixels added on each side, an int or a pair (h, w); at most window // 2.
    implementation: "auto" (the best for the platform), "xla" (numerically safe, hand-derived
      gradient), "pallas" (the kernels for TPU and NVIDIA GPUs, which "auto" takes there; elsewhere
      the former is interpreted, slowly, for tests) or "reference" (plain window sums of the
      exponentials and autodiff; overflows for logits above 88).
    logit_range: (low, high), a promise that every logit lies between the two, at most 80 apart. A
      fixed shift then replaces each window's maximum, which saves a pass; the result is the same up
      to rounding. Logits that break the promise can overflow.

  Returns:
    [N, (H + 2 * padding - window) // stride + 1, (W + ...) // ... + 1, C], in the dtype of x.

  Raises:
    ValueError: shapes that do not match, padding above window // 2, an image smaller than the
      window, an unknown implementation, one that does not support the arrays, or a logit_range that
      is reversed or too wide.
    TypeError: x or logits that are not floating point.
  """
  geometry = make_geometry(x, window, stride, padding)
  check_logits(x, logits)
  _check_implementation(implementation, x, logits, geometry)
  shift = _fixed_shift(logit_range)
  if implementation == "reference":
    return _reference(x, logits, geometry)
  return dispatch.lip_pool(x, logits, geometry, shift, implementation)


def gated_lip_pool(
  x: jax.Array,
  features: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  *,
  epsilon: float = 1e-5,
  window: IntOrPair = 3,
  stride: IntOrPair = 2,
  padding: IntOrPair = 1,
  implementation: Implementation = "auto",
) -> jax.Array:
  """`lip_pool` by logits 12 * sigmoid(InstanceNorm(features)), without the logits in memory.

  The tail of the paper's logit modules (section 3.3) and the pooling as one operation: what it
  keeps for the gradient are its arguments and the statistics of the features. Logits are never
  rounded to the dtype of the features, whose bfloat16 would change importances by 3 %.

  Args:
    x: features that are pooled, [N, H, W, C], floating point.
    features: of the logit module before its instance norm, [N, H, W, C], floating point.
    scale: of the instance norm, [C].
    bias: of the instance norm, [C].
    epsilon: added to the variance.
    window: as for `lip_pool`.
    stride: as for `lip_pool`.
    padding: as for `lip_pool`.
    implementation: as for `lip_pool`.

  Returns:
    [N, (H + 2 * padding - window) // stride + 1, (W + ...) // ... + 1, C], in the dtype of x.

  Raises:
    ValueError: as `lip_pool`, and for features, scale or bias whose shape does not fit x.
    TypeError: x or features that are not floating point.
  """
  geometry = make_geometry(x, window, stride, padding)
  check_array("features", features)
  _check_shape("features", features, x.shape, x)
  _check_norm(scale, bias, x)
  _check_implementation(implementation, x, features, geometry)
  if implementation == "reference":
    return _gated_reference(x, features, scale, bias, epsilon, geometry)
  scale, bias = varying_alike(x, scale, bias)
  return dispatch.gated_lip_pool(x, features, scale, bias, epsilon, geometry, implementation)


def projected_lip_pool(
  x: jax.Array,
  source: jax.Array,
  kernel: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  *,
  epsilon: float = 1e-5,
  window: IntOrPair = 3,
  stride: IntOrPair = 2,
  padding: IntOrPair = 1,
  implementation: Implementation = "auto",
) -> jax.Array:
  """`gated_lip_pool` by features = source * kernel, a 1x1 convolution.

  The features are computed again for the gradient rather than kept.

  Args:
    x: features that are pooled, [N, H, W, C], floating point.
    source: what the importance is predicted from, [N, H, W, S], floating point.
    kernel: of the convolution, [1, 1, S, C].
    scale: of the instance norm, [C].
    bias: of the instance norm, [C].
    epsilon: added to the variance.
    window: as for `lip_pool`.
    stride: as for `lip_pool`.
    padding: as for `lip_pool`.
    implementation: as for `lip_pool`.

  Returns:
    [N, (H + 2 * padding - window) // stride + 1, (W + ...) // ... + 1, C], in the dtype of x.

  Raises:
    ValueError: as `lip_pool`, and for other arrays whose shape does not fit x.
    TypeError: x or source that are not floating point.
  """
  geometry = make_geometry(x, window, stride, padding)
  check_array("source", source)
  _check_shape("source", source, (*x.shape[:3], source.shape[3]), x)
  _check_shape("kernel", kernel, (1, 1, source.shape[3], x.shape[3]), x)
  _check_norm(scale, bias, x)
  of_features = jax.ShapeDtypeStruct(x.shape, source.dtype)
  _check_implementation(implementation, x, of_features, geometry)
  if implementation == "reference":
    features = dispatch.project(source, kernel)
    return _gated_reference(x, features, scale, bias, epsilon, geometry)
  kernel, scale, bias = varying_alike(x, kernel, scale, bias)
  return dispatch.projected_lip_pool(
    x, source, kernel, scale, bias, epsilon, geometry, implementation
  )


def average_pool(
  x: jax.Array, *, window: IntOrPair = 3, stride: IntOrPair = 2, padding: IntOrPair = 1
) -> jax.Array:
  """Mean over each window, of the positions inside the image: F = 1."""
  x = jnp.asarray(x)
  geometry = make_geometry(x, window, stride, padding)
  inside = jnp.ones((1, *x.shape[1:3], 1), accumulation_dtype(x))
  total = window_sum(x.astype(inside.dtype), geometry)
  return (total / window_sum(inside, geometry)).astype(x.dtype)


def max_pool(
  x: jax.Array, *, window: IntOrPair = 3, stride: IntOrPair = 2, padding: IntOrPair = 1
) -> jax.Array:
  """Maximum over each window: the limit of F = exp(beta * x) as beta grows."""
  (kh, kw), (sh, sw), (ph, pw) = make_geometry(x, window, stride, padding)
  return lax.reduce_window(
    x,
    np.asarray(-np.inf, x.dtype),
    lax.max,
    (1, kh, kw, 1),
    (1, sh, sw, 1),
    ((0, 0), (ph, ph), (pw, pw), (0, 0)),
  )


def strided_pool(
  x: jax.Array, *, window: IntOrPair = 3, stride: IntOrPair = 2, padding: IntOrPair = 1
) -> jax.Array:
  """The central pixel of each window, (window - 1) // 2: F is one there and zero elsewhere.

  What a strided convolution does after the same convolution at every pixel.
  """
  x = jnp.asarray(x)
  geometry = make_geometry(x, window, stride, padding)
  if any(p > (k - 1) // 2 for k, p in zip(geometry.window, geometry.padding, strict=True)):
    raise ValueError(
      f"padding must be at most (window - 1) // 2 for the central pixel to lie inside the image; "
      f"got window {geometry.window} and padding {geometry.padding}"
    )
  rows, columns = (
    slice((k - 1) // 2 - p, (k - 1) // 2 - p + (out - 1) * s + 1, s)
    for k, s, p, out in zip(*geometry, geometry.output_size((x.shape[1], x.shape[2])), strict=True)
  )
  # Not by indexing, which is a gather where the number of images is a symbol (`jax.export`).
  return lax.slice(
    x,
    (0, rows.start, columns.start, 0),
    (x.shape[0], rows.stop, columns.stop, x.shape[3]),
    (1, rows.step, columns.step, 1),
  )


def exp_pool(
  x: jax.Array,
  beta: jax.typing.ArrayLike,
  *,
  window: IntOrPair = 3,
  stride: IntOrPair = 2,
  padding: IntOrPair = 1,
) -> jax.Array:
  """F = exp(beta * x): average pooling at beta = 0, max pooling in the limit of a large beta.

  Args:
    x: [N, H, W, C].
    beta: a number, or one per channel, [C]; may be learned.
    window: in pixels.
    stride: in pixels.
    padding: in pixels.
  """
  check_array("x", x)
  dtype = accumulation_dtype(x)
  logits = _per_channel("beta", beta, x, dtype) * x.astype(dtype)
  return lip_pool(x, logits, window=window, stride=stride, padding=padding)


def soft_pool(
  x: jax.Array, *, window: IntOrPair = 3, stride: IntOrPair = 2, padding: IntOrPair = 1
) -> jax.Array:
  """F = exp(x): SoftPool (Stergiou et al. 2021), which is LIP with G(x) = x."""
  return lip_pool(x, x, window=window, stride=stride, padding=padding)


def lp_pool(
  x: jax.Array,
  p: float,
  *,
  window: IntOrPair = 3,
  stride: IntOrPair = 2,
  padding: IntOrPair = 1,
) -> jax.Array:
  """Power mean (mean(|x|^p))^(1 / p) over each window (Sermanet et al. 2012).

  The mean of |x| at p = 1, the maximum of |x| in the limit of a large p. Its importance is
  F = |x|^(p - 1), normalized otherwise than the family's others: with n pixels in a window and
  q = p / (p - 1), y = sum(F |x|) / (n^(1 / p) * sum(F^q)^(1 / q)).

  Args:
    x: [N, H, W, C]; signs are lost.
    p: at least 1.
    window: in pixels.
    stride: in pixels.
    padding: in pixels.
  """
  geometry = make_geometry(x, window, stride, padding)
  if p < 1:
    raise ValueError(f"p must be at least 1, got {p}")
  dtype = accumulation_dtype(x)
  magnitude = [jnp.abs(tap) for tap in taps(x.astype(dtype), geometry, 0.0)]
  # Relative to the window's largest value no power over- or underflows; the result does not
  # depend on what is divided by, so no gradient flows through it.
  largest = lax.stop_gradient(functools.reduce(jnp.maximum, magnitude))
  scale = jnp.where(largest > 0, largest, 1)
  total = functools.reduce(jnp.add, [(tap / scale) ** p for tap in magnitude])
  mean = total / window_sum(jnp.ones((1, *x.shape[1:3], 1), dtype), geometry)
  # In a window of zeros the root has no derivative; zero is the subgradient of smallest norm.
  root = jnp.where(largest > 0, mean, 1) ** (1 / p)
  return (jnp.where(largest > 0, root, 0) * scale).astype(x.dtype)


def detail_preserving_pool(
  x: jax.Array,
  alpha: jax.typing.ArrayLike = 1.0,
  lam: jax.typing.ArrayLike = 1.0,
  *,
  kernel: jax.Array | None = None,
  symmetric: bool = True,
  epsilon: float = 1e-3,
  window: IntOrPair = 3,
  stride: IntOrPair = 2,
  padding: IntOrPair = 1,
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
    epsilon: keeps rho differentiable.
    window: in pixels.
    stride: in pixels.
    padding: in pixels.
  """
  geometry = make_geometry(x, window, stride, padding)
  importance = detail_importance(x, alpha, lam, geometry, kernel, symmetric, epsilon)
  dtype = importance[0].dtype
  weighted = [f * t for f, t in zip(importance, taps(x.astype(dtype), geometry, 0.0), strict=True)]
  y = functools.reduce(jnp.add, weighted) / functools.reduce(jnp.add, importance)
  return y.astype(x.dtype)


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

  Returns:
    window_h * window_w arrays [N, H', W', C], zero outside the image.
  """
  if epsilon <= 0:
    raise ValueError(f"epsilon must be positive, got {epsilon}")
  dtype = accumulation_dtype(x)
  pixels = taps(x.astype(dtype), geometry, 0.0)
  inside = taps(jnp.ones((1, *x.shape[1:3], 1), dtype), geometry, 0.0)
  if kernel is None:
    down = functools.reduce(jnp.add, pixels) / functools.reduce(jnp.add, inside)
  else:
    if kernel.shape != (*geometry.window, x.shape[3]):
      raise ValueError(
        f"kernel must be [window_h, window_w, C] = {(*geometry.window, x.shape[3])}, got "
        f"{tuple(kernel.shape)}"
      )
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


def _per_channel(name: str, value: jax.typing.ArrayLike, x: jax.Array, dtype) -> jax.Array:
  """`value`, a number or [C], as an array that multiplies x [N, H, W, C]."""
  array = jnp.asarray(value, dtype)
  if array.shape not in ((), (1,), (x.shape[3],)):
    raise ValueError(
      f"{name} must be a number or one per channel, [{x.shape[3]}], got shape {array.shape}"
    )
  return array.reshape(1, 1, 1, -1)


def _check_norm(scale: jax.Array, bias: jax.Array, x: jax.Array) -> None:
  _check_shape("scale", scale, x.shape[3:], x)
  _check_shape("bias", bias, x.shape[3:], x)


def _check_shape(name: str, array: jax.Array, shape: tuple[int, ...], x: jax.Array) -> None:
  if array.shape != shape:
    raise ValueError(
      f"{name} must be {tuple(shape)} for x {tuple(x.shape)}; got {tuple(array.shape)}"
    )


def _check_implementation(
  implementation: str,
  x: jax.Array,
  logits: jax.Array | jax.ShapeDtypeStruct,
  geometry: Geometry,
) -> None:
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"unknown implementation {implementation!r}; choose one of "
      + ", ".join(map(repr, IMPLEMENTATIONS))
    )
  if implementation == "pallas" and not dispatch.supports(x, logits, geometry):
    raise ValueError(
      f"implementation='pallas' does not support x {x.dtype}{list(x.shape)} with logits "
      f"{logits.dtype}{list(logits.shape)} and {geometry}: its kernels need float32, bfloat16 or "
      "float16, one logit for each channel, and rows that fit the chip; take 'auto'"
    )


def _fixed_shift(logit_range: tuple[float, float] | None) -> float | None:
  """Middle of the range: what to subtract from every logit before exp."""
  if logit_range is None:
    return None
  if not isinstance(logit_range, (tuple, list)) or len(logit_range) != 2:
    raise ValueError(f"logit_range must be a pair (low, high), got {logit_range!r}")
  low, high = map(float, logit_range)
  if not 0 <= high - low <= 80:
    raise ValueError(
      f"logit_range must be (low, high), at most 80 apart, got {logit_range}; leave it "
      "out for logits of any size"
    )
  return (low + high) / 2


def _gated_reference(
  x: jax.Array,
  features: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
  geometry: Geometry,
) -> jax.Array:
  mean, var = moments(features, (1, 2))
  u = apply_moments(features, mean, var, scale, bias, epsilon, mean.dtype)
  return _reference(x, gate.GATE * jax.nn.sigmoid(u), geometry)


@functools.partial(jax.jit, static_argnums=2)
def _reference(x: jax.Array, logits: jax.Array, geometry: Geometry) -> jax.Array:
  dtype = accumulation_dtype(x, logits)
  importance = jnp.exp(logits.astype(dtype))
  weighted = window_sum(x.astype(dtype) * importance, geometry)
  return (weighted / window_sum(importance, geometry)).astype(x.dtype)
