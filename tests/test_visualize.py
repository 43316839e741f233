import jax.numpy as jnp
import numpy as np
from flax import nnx

import lip_jax
from lip_jax import visualize
from lip_jax.logit_modules import GATE


def small(**options):
  model = lip_jax.create_model(
    "lip_resnet_small", width=4, logit_width=4, num_classes=3, rngs=nnx.Rngs(0), **options
  )
  model.eval()
  return model


def images(n=2):
  return jnp.asarray(np.random.default_rng(0).standard_normal((n, 32, 32, 3)), jnp.float32)


def test_one_map_for_each_lip_layer_at_its_resolution():
  maps = visualize.importance_maps(small(), images())
  assert {name: importance.shape for name, importance in maps.items()} == {
    "pool": (2, 32, 32),
    **{
      f"layer{stage}.0.spatial.{branch}_pool": (2, size, size)
      for stage, size in ((2, 16), (3, 8), (4, 4))
      for branch in ("residual", "shortcut")
    },
  }
  for importance in maps.values():  # at the start everything is equally important
    np.testing.assert_allclose(importance, 1.0, rtol=1e-6)


def test_maps_are_the_mean_of_exp_of_the_gated_logits():
  model = small()
  logits = model.pool.logits
  kernel = logits.conv.kernel
  kernel[...] = jnp.asarray(np.random.default_rng(1).standard_normal(kernel.shape), jnp.float32)
  x = images()
  stem = nnx.relu(model.bn1(model.conv1(x)))
  gated = GATE / (1 + np.exp(-np.asarray(logits.norm(logits.conv(stem)), np.float64)))
  expected = np.exp(gated).mean(axis=3)
  expected /= expected.mean(axis=(1, 2), keepdims=True)
  maps = visualize.importance_maps(model, x)
  np.testing.assert_allclose(maps["pool"], expected, rtol=1e-3)


def test_the_picture_is_a_png(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
  path = tmp_path / "importance.png"
  assert visualize.draw_importance(
    small(), pixels, lambda x: jnp.asarray(x / 255, jnp.float32), path
  )
  assert path.read_bytes().startswith(b"\x89PNG")


def test_a_network_without_lip_has_nothing_to_draw(tmp_path):
  pixels = np.zeros((1, 32, 32, 3), np.uint8)
  path = tmp_path / "x.png"
  model = small(pool="max")
  assert not visualize.draw_importance(model, pixels, lambda x: jnp.asarray(x, jnp.float32), path)
  assert not path.exists()
