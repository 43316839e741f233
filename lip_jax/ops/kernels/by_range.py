"""`lip_pool` in plain XLA by a look at its logits, for CPUs.

Where all logits lie within 80 of each other, one shift for all gives what one for each window does,
up to rounding, in less time; else the safe form computes what it always does.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lip_jax.ops.kernels import xla
from lip_jax.ops.windows import Geometry

# exp(+-40) leaves room in float32 for sums of products of features and gradients of this size.
_SPREAD = 80.0
_BOUND = 1e9


class Windows(NamedTuple):
  """`xla.Windows`, and what was taken from all logits, as [N, 1, 1, C]; NaN: the largest.

  Where that is known `largest` repeats it, so that the safe gradient holds in any case.
  """

  y: jax.Array
  largest: jax.Array
  total: jax.Array
  shift: jax.Array


def forward(x: jax.Array, h: jax.Array, geometry: Geometry) -> Windows:
  """Pools x, [N, H, W, C], by logits h as `xla.forward` without a shift."""
  logits = h.astype(jnp.promote_types(h.dtype, jnp.float32))
  low, high = logits.min(initial=jnp.inf), logits.max(initial=-jnp.inf)

  def one_shift(x, h, middle):
    y, _, total = xla.forward(x, h, None, geometry, middle)[1]
    # Not by `broadcast_to`, of which JAX would not know that it is spread over devices as y is.
    largest = jnp.zeros_like(total) + middle.astype(total.dtype)
    return Windows(y, largest, total, largest[:, :1, :1])

  # NaN and infinity are not within, so that the safe form says what becomes of them.
  within = (high - low <= _SPREAD) & (_largest(x) <= _BOUND)
  safe = lambda x, h, _: safe_forward(x, h, geometry)  # noqa: E731
  return lax.cond(within, one_shift, safe, x, h, low + (high - low) / 2)


def safe_forward(x: jax.Array, h: jax.Array, geometry: Geometry) -> Windows:
  """As `forward`, each window by its own largest logit."""
  y, largest, total = xla.forward(x, h, None, geometry, None)[1]
  assert largest is not None  # without a shift
  return Windows(y, largest, total, total[:, :1, :1] * jnp.nan)


def backward(
  x: jax.Array, h: jax.Array, windows: Windows, g: jax.Array, geometry: Geometry
) -> tuple[jax.Array, jax.Array]:
  """Gradients of `forward` with respect to x and the logits, given that of y, g [N, H', W', C]."""
  largest = _largest(g)
  scale = jnp.minimum(_BOUND / largest, 1)  # gradients are linear in g

  def one_shift(x, h, windows, g):
    kept = (windows.y, None, windows.total)
    gradients = xla.backward(x, h, None, kept, g * scale, geometry, windows.shift)[:2]
    return tuple((a / scale).astype(a.dtype) for a in gradients)

  within = jnp.isfinite(windows.shift).all() & jnp.isfinite(largest)
  safe = functools.partial(safe_backward, geometry=geometry)
  return lax.cond(within, one_shift, safe, x, h, windows, g)


def safe_backward(
  x: jax.Array, h: jax.Array, windows: Windows, g: jax.Array, geometry: Geometry
) -> tuple[jax.Array, jax.Array]:
  """As `backward`, by each window's `largest`."""
  return xla.backward(x, h, None, windows[:3], g, geometry, None)[:2]


def _largest(a: jax.Array) -> jax.Array:
  return jnp.abs(a).max(initial=0).astype(jnp.float32)
