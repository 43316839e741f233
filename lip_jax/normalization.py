"""Normalization by mean and variance, with a gradient that keeps little and reads it once."""

import functools

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax

from lip_jax.windows import accumulation_dtype


def moments(
  x: jax.Array, axes: tuple[int, ...], axis_name: tuple[str, ...] | None = None
) -> tuple[jax.Array, jax.Array]:
  """Mean and biased variance in at least float32, with axes of size one for those averaged over.

  In one pass over bfloat16 and float16, as the mean of squares less the square of the mean: the
  rounding of such inputs is a greater error of the variance than the rounding of float32 sums.

  Args:
    x: of any shape.
    axes: to average over.
    axis_name: mesh axes to average over as well, inside `jax.shard_map`.
  """
  dtype = accumulation_dtype(x)
  one_pass = x.dtype != dtype
  x = x.astype(dtype)
  mean = _average(x, axes, axis_name)
  if one_pass:
    return mean, jnp.maximum(_average(jnp.square(x), axes, axis_name) - jnp.square(mean), 0)
  return mean, _average(jnp.square(x - mean), axes, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def normalize(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
  dtype: Dtype,
  axes: tuple[int, ...],
  axis_name: tuple[str, ...] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`apply_moments` of x by its own moments over `axes`, and these.

  The gradient needs x, which the layer before has in memory anyway, and the statistics. It is that
  of the first result; nothing flows back through mean and variance as results.

  Args:
    x: [..., C].
    scale: [C].
    bias: [C].
    epsilon: added to the variance.
    dtype: of the result.
    axes: as for `moments`.
    axis_name: as for `moments`.

  Returns:
    (y, mean, variance), the latter two as those of `moments`.
  """
  return _fwd(x, scale, bias, epsilon, dtype, axes, axis_name)[0]


def apply_moments(
  x: jax.Array,
  mean: jax.Array,
  var: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
  dtype: Dtype,
) -> jax.Array:
  """(x - mean) / sqrt(var + epsilon) * scale + bias, in the precision of the statistics."""
  gain = lax.rsqrt(var + epsilon) * _last(scale, var)
  y = (x.astype(var.dtype) - _last(mean, x)) * _last(gain, x) + _last(bias, x)
  return y.astype(dtype)


def _average(x: jax.Array, axes: tuple[int, ...], axis_name: tuple[str, ...] | None) -> jax.Array:
  local = x.mean(axis=axes, keepdims=True)
  return lax.pmean(local, axis_name) if axis_name else local


def _fwd(x, scale, bias, epsilon, dtype, axes, axis_name):
  mean, var = moments(x, axes, axis_name)
  y = apply_moments(x, mean, var, scale, bias, epsilon, dtype)
  return (y, mean, var), (x, scale, bias, mean, var)


def _bwd(epsilon, dtype, axes, axis_name, residuals, cotangents):
  """Ioffe and Szegedy 2015, section 3: dx = gain (g - mean(g) - x_hat mean(g x_hat))."""
  del dtype
  x, scale, bias, mean, var = residuals
  g = cotangents[0].astype(var.dtype)
  x, mean, var = not_before_on_cpu(g, x, mean, var)
  rstd = lax.rsqrt(var + epsilon)
  x_hat = (x.astype(var.dtype) - mean) * rstd
  mean_g, mean_product = (_average(a, axes, axis_name) for a in (g, g * x_hat))
  dx = rstd * _last(scale, var) * (g - mean_g - x_hat * mean_product)
  others = tuple(range(x.ndim - 1))
  dscale, dbias = (a.sum(axis=others) for a in (g * x_hat, g))
  return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


normalize.defvjp(_fwd, _bwd)


def not_before(g: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """The arrays, but only once g is known.

  XLA would otherwise compute what a gradient needs of them alone in the forward pass, as soon as it
  can, and keep it until g is there. It drops `optimization_barrier` too early to prevent that.
  """
  # One number of each image, or group, so that nothing travels where these are on many devices.
  first = lax.slice(g, (0,) * g.ndim, (len(g), *[1] * (g.ndim - 1)))
  zero = jnp.minimum(jnp.abs(first), 0)

  def add(a: jax.Array) -> jax.Array:
    own = zero if len(a) == len(g) else zero[:1]
    return a + own.astype(a.dtype).reshape(-1, *[1] * (a.ndim - 1))

  return tuple(map(add, arrays))


def not_before_on_cpu(g: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """As `not_before` on CPUs; elsewhere XLA computes elementwise operations where they are used."""
  return lax.platform_dependent(
    g, *arrays, cpu=not_before, default=lambda g, *arrays: tuple(arrays)
  )


def _last(a: jax.Array, like: jax.Array) -> jax.Array:
  """A with axes of size one in front, up to the rank of `like`."""
  return a.reshape((1,) * (like.ndim - a.ndim) + a.shape)
