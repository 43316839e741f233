import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lip_jax.ops.images import normalize


@pytest.mark.parametrize(("shape", "channels"), [((2, 3, 5), 3), ((4, 4), 1), ((1, 2, 2, 3), 4)])
def test_images_lose_the_mean_and_the_deviation_of_each_channel(shape, channels):
  images = np.random.default_rng(0).integers(0, 256, (*shape, channels), np.uint8)
  mean, std = 100 + np.arange(channels), 50.0 - np.arange(channels)
  ours = jax.jit(lambda x: normalize(x, list(mean), tuple(std)))(images)
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(ours, (images - mean) / std, rtol=1e-6)
