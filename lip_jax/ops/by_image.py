"""Functions of images, on CPUs computed for a few at a time: what is between stays in the cache.

For networks in evaluation, as `lip_jax.ops.convolution`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lip_jax.ops.kernels.dispatch import symbolic
from lip_jax.ops.normalization import explicit, hidden_zero

# Bytes of images: what is computed of them is several times as large.
_AT_A_TIME = 4 << 20


def by_image(function: Callable[..., Any], images: tuple[jax.Array, ...], shared: Any) -> Any:
  """`function(*images, shared)`, in which every image stands for itself.

  On CPUs it gets its images out of memory, and never what XLA would compute them from: where
  several pixels of them are read for one result, as in a pooling, XLA computes them again for each.

  Args:
    images: [N, ...] each, of which few are taken at a time (`images_at_a_time` of the first).
    shared: arrays that all images need.

  Returns:
    What the function does, arrays [N, ...]. Divided over the devices of a mesh only inside of
    `jax.shard_map`.
  """
  first = images[0]
  if symbolic(first) or 0 in first.shape or explicit(first):
    return function(*images, shared)
  n, step = len(first), images_at_a_time(first)

  def on_cpu(images: tuple[jax.Array, ...], shared: Any) -> Any:
    if step >= n:
      return function(*map(_in_memory, images), shared)
    parts = [a.reshape(n // step, step, *a.shape[1:]) for a in images]
    y = lax.map(lambda part: function(*part, shared), parts)
    return jax.tree.map(lambda y: y.reshape(n, *y.shape[2:]), y)

  def elsewhere(images: tuple[jax.Array, ...], shared: Any) -> Any:
    return function(*images, shared)

  return lax.platform_dependent(images, shared, cpu=on_cpu, default=elsewhere)


def images_at_a_time(x: jax.Array) -> int:
  """How many of the images x, [N, ...], are computed together: a divisor of N.

  All of them rather than far fewer than would stay in the cache.
  """
  n, size = len(x), x.size * x.dtype.itemsize
  fit = max(1, n * _AT_A_TIME // max(1, size))
  return next((step for step in range(min(n, fit), fit // 4, -1) if n % step == 0), n)


@jax.custom_jvp
def _in_memory(x: jax.Array) -> jax.Array:
  """X. XLA drops `optimization_barrier` before it fuses, but not a loop, here of no turns."""
  turns = hidden_zero(lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())).astype(jnp.int32)
  return lax.fori_loop(0, turns, lambda _, x: x + 1, x)


_in_memory.defjvp(lambda primals, tangents: (_in_memory(*primals), *tangents))
