"""What every task does with the pixels of images."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """(images - mean) / std: RGB [..., H, W, 3], 0 to 255 -> float32; mean and std of R, G and B."""
  shape = (1,) * (images.ndim - 1) + (3,)
  shift, scale = (jnp.asarray(value, jnp.float32).reshape(shape) for value in (mean, std))
  return (images.astype(jnp.float32) - shift) / scale
