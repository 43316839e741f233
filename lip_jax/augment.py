"""What happens to images on the device, inside the training and evaluation steps."""

import jax
import jax.numpy as jnp

from lip_jax.config import Data


def normalize(images: jax.Array, data: Data) -> jax.Array:
  """uint8 RGB images [N, H, W, 3] -> float32, by the mean and deviation of the data set."""
  mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in (data.mean, data.std))
  return (images.astype(jnp.float32) - mean) / std


def random_flip(images: jax.Array, key: jax.Array) -> jax.Array:
  """Images [N, H, W, C], each mirrored left to right with probability 1/2."""
  mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
  return jnp.where(mirrored, images[:, :, ::-1], images)
