"""Images as detectors take them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lip_jax.ops import images as image_ops


def normalize(
  images: jax.Array, sizes: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """(images - mean) / std, float32 [N, H, W, C], and zero where an image has ended.

  Args:
    images: [N, H, W, C], 0 to 255.
    sizes: [N, 2], height and width of each image, which lies top left.
  """
  rows, columns = (
    jnp.arange(images.shape[axis])[None] < sizes[:, axis - 1][:, None] for axis in (1, 2)
  )
  mask = rows[:, :, None, None] & columns[:, None, :, None]
  return jnp.where(mask, image_ops.normalize(images, mean, std), 0)
