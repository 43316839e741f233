"""`lip_pool`, and the same fused with the end of a logit module.

Equation 5 of Gao, Wang and Wu, "LIP: Local Importance-based Pooling", ICCV 2019, as pure functions.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lip_jax.ops.kernels import dispatch, gate
from lip_jax.ops.normalization import apply_moments, moments, varying_alike
from lip_jax.ops.windows import (
  Geometry,
  IntOrPair,
  accumulation_dtype,
  check_array,
  check_logits,
  check_shape,
  make_geometry,
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
    padding: pixels added on each side, likewise; at most window // 2.
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

  Windows, implementation and errors are those of `lip_pool`.

  Args:
    x: features that are pooled, [N, H, W, C], floating point.
    features: of the logit module before its instance norm, [N, H, W, C], floating point.
    scale: of the instance norm, [C].
    bias: of the instance norm, [C].
  """
  geometry = make_geometry(x, window, stride, padding)
  check_array("features", features)
  check_shape("features", features, x.shape, x)
  return _fused(x, features, None, scale, bias, epsilon, geometry, implementation)


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

  The features are computed again for the gradient rather than kept. What is predicted from is
  `source`, [N, H, W, S], floating point; `kernel` is [1, 1, S, C].
  """
  geometry = make_geometry(x, window, stride, padding)
  check_array("source", source)
  check_shape("source", source, (*x.shape[:3], source.shape[3]), x)
  check_shape("kernel", kernel, (1, 1, source.shape[3], x.shape[3]), x)
  return _fused(x, source, kernel, scale, bias, epsilon, geometry, implementation)


def _fused(x, source, kernel, scale, bias, epsilon, geometry, implementation) -> jax.Array:
  check_shape("scale", scale, x.shape[3:], x)
  check_shape("bias", bias, x.shape[3:], x)
  features = source if kernel is None else jax.ShapeDtypeStruct(x.shape, source.dtype)
  _check_implementation(implementation, x, features, geometry)
  if implementation == "reference":
    features = dispatch.project(source, kernel)
    mean, var = moments(features, (1, 2))
    u = apply_moments(features, mean, var, scale, bias, epsilon, mean.dtype)
    return _reference(x, gate.GATE * jax.nn.sigmoid(u), geometry)
  params = varying_alike(x, kernel, scale, bias)
  return dispatch.gated_lip_pool(x, source, *params, epsilon, geometry, implementation)


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


@functools.partial(jax.jit, static_argnums=2)
def _reference(x: jax.Array, logits: jax.Array, geometry: Geometry) -> jax.Array:
  dtype = accumulation_dtype(x, logits)
  importance = jnp.exp(logits.astype(dtype))
  weighted = window_sum(x.astype(dtype) * importance, geometry)
  return (weighted / window_sum(importance, geometry)).astype(x.dtype)
