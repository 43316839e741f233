import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lip_jax
from lip_jax.models import padding
from lip_jax.models.layers import BatchNorm

SMALL = {"num_classes": 3, "stage_sizes": (1, 2, 1, 1), "width": 8}
NETWORKS = {
  "bottleneck": ("resnet50", {**SMALL, "stem": "small"}),
  "basic": ("resnet18", {**SMALL, "stem": "small"}),
  "lip": ("lip_resnet50", {**SMALL, "stem": "small", "logit_width": 4}),
  "dense structure": ("resnet50", {**SMALL, "stem": "small", "pool": "max", "structure": "dense"}),
  "densenet": ("densenet121", {"num_classes": 3, "block_sizes": (1, 1, 1, 2), "width": 8}),
}


def network(name, **options):
  """Its statistics, scales and offsets are random."""
  architecture, given = NETWORKS[name]
  model = lip_jax.create_model(architecture, rngs=nnx.Rngs(0), **given, **options)
  rng = np.random.default_rng(0)
  for _, module in nnx.iter_modules(model):
    if isinstance(module, BatchNorm):
      for array in (module.scale, module.bias, module.mean, module.var):
        array.set_value(jnp.asarray(rng.uniform(0.5, 1.5, array.shape), jnp.float32))
  return model


def norms(model):
  return sum(type(module) is BatchNorm for _, module in nnx.iter_modules(model))


def images(size=32):
  return jnp.asarray(np.random.default_rng(1).standard_normal((2, size, size, 3)), jnp.float32)


def logits(model, x):
  graph, state = nnx.split(model)
  return jax.jit(lambda state: nnx.merge(graph, state)(x))(state)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_logits_from_fewer_layers(name):
  model = network(name)
  model.eval()
  before = jax.tree.map(jnp.copy, nnx.state(model))
  plain, folded = (lip_jax.fold_batch_norm(model, for_cpu=for_cpu) for for_cpu in (False, True))
  # What stays stands before a ReLU and a convolution (DenseNet), or behind no convolution.
  assert norms(folded) == {"densenet": 5 + 3 + 1, "dense structure": 0}.get(name, 0)
  x = images(64 if name == "densenet" else 32)
  expected = logits(model, x)
  for one, bound in ((plain, 1e-6), (folded, 2e-6)):
    np.testing.assert_allclose(
      logits(one, x), expected, rtol=0, atol=bound * np.abs(expected).max()
    )
  jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def test_batch_norms_in_training_stay_unless_they_are_frozen():
  model = network("basic")
  assert norms(lip_jax.fold_batch_norm(model)) == norms(model) > 0
  frozen = network("basic", bn_frozen=True)
  folded = lip_jax.fold_batch_norm(frozen)
  assert norms(folded) == 0
  sizes = jnp.asarray([[32, 16], [32, 32]])
  with padding.masked(sizes, (32, 32)):
    expected, found = frozen.features(images()), folded.features(images())
  for name, features in found.items():
    largest = np.abs(expected[name]).max()
    np.testing.assert_allclose(features, expected[name], rtol=0, atol=1e-5 * largest)
    assert not features[0, :, features.shape[2] // 2 :].any()


def test_a_convolution_with_a_bias_and_one_that_is_something_else():
  model = network("basic")
  model.eval()
  block = model.layer1[0]
  block.conv2.bias = nnx.Param(jnp.arange(8.0))
  block.conv2.use_bias = True
  block.spatial.residual_conv = nnx.Sequential(block.spatial.residual_conv)
  folded = lip_jax.fold_batch_norm(model)
  assert norms(folded) == 1
  expected = logits(model, images())
  np.testing.assert_allclose(logits(folded, images()), expected, rtol=0, atol=1e-5)
