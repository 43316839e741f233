"""Images as networks take them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """(images - mean) / std, of images [..., H, W, C], 0 to 255, and C means and deviations.

  In float32.
  """
  shape = (1,) * (images.ndim - 1) + (-1,)
  means, deviations = (jnp.asarray(value, jnp.float32).reshape(shape) for value in (mean, std))
  return (images.astype(jnp.float32) - means) / deviations
