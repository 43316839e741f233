"""The gate at the end of a logit module, as kernels compute it: logits = 12 * sigmoid(u)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# "a sigmoid function with a fixed amplification coefficient": exp(12) bounds the ratio of the most
# to the least important pixel (section 3.3).
GATE = 12.0

# What to subtract from all logits.
MIDDLE = GATE / 2


class Affine(NamedTuple):
  """Instance norm with known statistics: u = (h - mean) * gain + bias, each [N, C] float32."""

  mean: jax.Array
  gain: jax.Array
  bias: jax.Array


def gate(u: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The logit and its derivative.

  By the hyperbolic tangent, which is one operation on accelerators: sigmoid(u) = (1 + tanh(u/2))/2.
  """
  t = jnp.tanh(u / 2)
  return MIDDLE * (1 + t), MIDDLE / 2 * (1 - t * t)
