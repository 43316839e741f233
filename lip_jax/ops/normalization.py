"""Normalization by mean and variance, with a gradient that keeps little and reads it once."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax

from lip_jax.ops.windows import accumulation_dtype


def moments(
  x: jax.Array,
  axes: tuple[int, ...],
  axis_name: tuple[str, ...] | None = None,
  mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Mean and biased variance in at least float32, with axes of size one for those averaged over.

  In one pass over bfloat16 and float16, as the mean of squares less the square of the mean, in
  float32. That costs the variance about 1e-6 of the square of the mean: nothing beside what such
  inputs were rounded by, but for those that are exact and nearly constant.

  Args:
    x: of any shape.
    axis_name: mesh axes to average over as well, inside `jax.shard_map`.
    mask: bool, broadcasts with x: what to average; None: everything.
  """
  dtype = accumulation_dtype(x)
  one_pass = x.dtype != dtype
  x = x.astype(dtype)
  mean = _average(x, axes, axis_name, mask)
  if one_pass:
    squares = _average(jnp.square(x), axes, axis_name, mask)
    return mean, jnp.maximum(squares - jnp.square(mean), 0)
  return mean, _average(jnp.square(x - mean), axes, axis_name, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 8))
def normalize(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
  dtype: Dtype,
  axes: tuple[int, ...],
  axis_name: tuple[str, ...] | None = None,
  mask: jax.Array | None = None,
  relu: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`apply_moments` of x by its own moments over `axes`, and these; with `relu` rectified.

  The gradient needs x [..., C], which the layer before has in memory anyway, and the statistics. It
  is that of the first result; nothing flows back through mean and variance as results. With a mask
  (see `moments`) only where it is True: what depends on y elsewhere counts as constant.

  Returns:
    (y, mean, variance), y of the given dtype, the latter two as those of `moments`.
  """
  return _fwd(x, scale, bias, epsilon, dtype, axes, axis_name, mask, relu)[0]


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


def _average(
  x: jax.Array,
  axes: tuple[int, ...],
  axis_name: tuple[str, ...] | None,
  mask: jax.Array | None,
) -> jax.Array:
  return _together(_where(mask, x).mean(axis=axes, keepdims=True), axes, axis_name, mask)


def _means(arrays: tuple[jax.Array, ...], axes: tuple[int, ...], at_once: bool) -> list[jax.Array]:
  """Means of each over axes that stay, with size one.

  At once, in one reduction: XLA for GPUs else writes what both have in common before it reads it,
  where these are means of single images.
  """
  if not at_once:
    return [a.mean(axis=axes, keepdims=True) for a in arrays]
  zeros = tuple(jnp.zeros((), a.dtype) for a in arrays)
  sums = lax.reduce(arrays, zeros, lambda a, b: tuple(map(jnp.add, a, b)), axes)
  pixels = math.prod(arrays[0].shape[axis] for axis in axes)
  return [jnp.expand_dims(a, axes) / pixels for a in sums]


def _together(
  mean: jax.Array,
  axes: tuple[int, ...],
  axis_name: tuple[str, ...] | None,
  mask: jax.Array | None,
) -> jax.Array:
  """Means over all devices, where the mask is True, from those on each, where it counts as zero."""
  if axis_name:
    mean = lax.pmean(mean, axis_name)
  if mask is None:
    return mean
  share = mask.mean(axis=axes, keepdims=True, dtype=mean.dtype)
  share = lax.pmean(share, axis_name) if axis_name else share
  return mean / jnp.where(share > 0, share, 1)


def _fwd(x, scale, bias, epsilon, dtype, axes, axis_name, mask=None, relu=False):
  mean, var = moments(x, axes, axis_name, mask)
  y = apply_moments(x, mean, var, scale, bias, epsilon, dtype)
  y = jax.nn.relu(y) if relu else y
  return (y, mean, var), (x, scale, bias, mean, var, mask)


def _bwd(epsilon, dtype, axes, axis_name, relu, residuals, cotangents):
  x, scale, bias, mean, var, mask = residuals
  (g, *_) = cotangents
  x, mean, var = not_before_on_cpu(g, x, mean, var)

  def passed(mean: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(gradient behind the ReLU, x_hat)."""
    x_hat = (x.astype(var.dtype) - mean) * lax.rsqrt(var + epsilon)
    if not relu:
      return _where(mask, g.astype(var.dtype)), x_hat
    positive = apply_moments(x, mean, var, scale, bias, epsilon, dtype) > 0
    return _where(mask, _where(positive, g).astype(var.dtype)), x_hat

  g1, x_hat = passed(mean)
  # Of these the gradients of scale and bias are made, too: XLA would read everything once more for
  # the latter, also where they were sums of sums, which it takes for one sum. relu: on GPUs.
  here = _means((g1, g1 * x_hat), axes, at_once=relu and len(axes) == 2)
  pixels = math.prod(x.shape[axis] for axis in axes)
  mean_g, mean_product = (_together(a, axes, axis_name, mask) for a in here)
  if relu:
    # Rectified again from the same, which XLA must not see: it would write the result for both.
    g1, x_hat = passed(mean + hidden_zero(mean_g))
  gain = lax.rsqrt(var + epsilon) * _last(scale, var)
  dx = _where(mask, input_gradient(g1, gain, mean_g, x_hat, mean_product))
  dbias, dscale = (pixels * a.sum(axis=tuple(range(x.ndim - 1))) for a in here)
  return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype), None


normalize.defvjp(_fwd, _bwd)


def input_gradient(
  g: jax.Array, gain: jax.Array, mean_g: jax.Array, x_hat: jax.Array, mean_product: jax.Array
) -> jax.Array:
  """Dx = gain (g - mean(g) - x_hat mean(g x_hat)): Ioffe and Szegedy 2015, section 3.

  With gain = scale / deviation. Of x_hat = (x - mean) / deviation, the division may be left to
  `mean_product`, twice then.
  """
  return gain * (g - mean_g - x_hat * mean_product)


def not_before(g: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """The arrays, but only once g is known.

  XLA would otherwise compute what a gradient needs of them alone in the forward pass, as soon as it
  can, and keep it until g is there. It drops `optimization_barrier` too early to prevent that.
  """
  if 0 in g.shape:
    return arrays
  # One number of each image, or group, so that nothing travels where these are on many devices.
  first = lax.slice(g, (0,) * g.ndim, (g.shape[0], *[1] * (g.ndim - 1)))
  zero = hidden_zero(first)

  def add(a: jax.Array) -> jax.Array:
    own = zero if a.shape[0] == g.shape[0] else lax.slice_in_dim(zero, 0, 1)
    return a + own.astype(a.dtype).reshape(own.shape[0], *[1] * (a.ndim - 1))

  return tuple(map(add, arrays))


def hidden_zero(a: jax.Array) -> jax.Array:
  """Zeros that XLA takes for something else, known once `a` is."""
  return jnp.minimum(jnp.abs(jnp.nan_to_num(a, nan=0, posinf=0, neginf=0)), 0)


def not_before_on_cpu(g: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """As `not_before` on CPUs; elsewhere XLA computes elementwise operations where they are used."""
  if explicit(g) or any(varying_axes(a) != varying_axes(g) for a in arrays):
    return arrays
  return lax.platform_dependent(
    g, *arrays, cpu=not_before, default=lambda g, *arrays: tuple(arrays)
  )


def explicit(a: jax.Array) -> bool:
  """Whether the sharding of `a` is part of its type (`jax.sharding.AxisType.Explicit`)."""
  return bool(jax.typeof(a).sharding.mesh.explicit_axes)


def varying_axes(a: jax.Array) -> frozenset[str]:
  """Mesh axes over which `a` differs, in `jax.shard_map` that checks it."""
  aval: Any = jax.typeof(a)
  kind = getattr(aval, "manual_axis_type", None)  # `vma` in other releases of JAX
  return aval.vma if kind is None else kind.varying


def varying_alike(x: jax.Array, *params: Any) -> Any:
  """Parameters that are the same on all devices, as such that are not where x is not.

  In `jax.shard_map`, where types tell; the transpose adds up their gradients over the devices.
  Nones stay.
  """

  def vary(param: jax.Array) -> jax.Array:
    axes = tuple(varying_axes(x) - varying_axes(param))
    return lax.pcast(param, axes, to="varying") if axes else param

  return jax.tree.map(vary, params)


def _where(mask: jax.Array | None, a: jax.Array) -> jax.Array:
  return a if mask is None else jnp.where(mask, a, jnp.zeros((), a.dtype))


def _last(a: jax.Array, like: jax.Array) -> jax.Array:
  """A with axes of size one in front, up to the rank of `like`."""
  return a.reshape((1,) * (like.ndim - a.ndim) + a.shape)
