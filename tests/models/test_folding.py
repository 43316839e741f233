import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import lip_jax
from lip_jax.distributed import sharding
from lip_jax.models import padding
from lip_jax.models.lan import LIP, record_logits
from lip_jax.models.layers import BatchNorm
from lip_jax.models.logit_modules import Projection

SMALL = {"num_classes": 3, "stage_sizes": (1, 2, 1, 1), "width": 8}
NETWORKS = {
  "bottleneck": ("resnet50", {**SMALL, "stem": "small"}),
  "basic": ("resnet18", {**SMALL, "stem": "small"}),
  "lip": ("lip_resnet50", {**SMALL, "stem": "small", "logit_width": 4}),
  "dense structure": ("resnet50", {**SMALL, "stem": "small", "pool": "max", "structure": "dense"}),
  "densenet": ("densenet121", {"num_classes": 3, "block_sizes": (1, 1, 1, 2), "width": 8}),
}


def network(name, **options):
  """Its statistics, scales and offsets are random, and so are logits of importance."""
  architecture, given = NETWORKS[name]
  model = lip_jax.create_model(architecture, rngs=nnx.Rngs(0), **given, **options)
  rng = np.random.default_rng(0)
  for _, module in nnx.iter_modules(model):
    if isinstance(module, BatchNorm):
      for array in (module.scale, module.bias, module.mean, module.var):
        array.set_value(jnp.asarray(rng.uniform(0.5, 1.5, array.shape), jnp.float32))
    if isinstance(module, Projection):
      kernel = module.conv.kernel
      kernel.set_value(jnp.asarray(rng.standard_normal(kernel.shape), jnp.float32))
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


def test_a_lip_network_in_parts_and_where_it_is_computed_whole():
  """Few images at a time, or all where logits are recorded, or images end within the batch."""
  model = network("lip")
  model.eval()
  x = jax.random.normal(jax.random.key(0), (6, 96, 96, 3))
  sizes = jnp.asarray([[96, 64]] * 6)

  def run(model):
    graph, state = nnx.split(model)

    def every_way(state):
      network = nnx.merge(graph, state)
      with record_logits() as records:
        y = network(x)
      with padding.masked(sizes, (96, 96)):
        masked = network(x)
      return network(x), masked, y, [logits for _, logits in records]

    return jax.tree.leaves(jax.jit(every_way)(state))

  expected, found = run(model), run(lip_jax.fold_batch_norm(model))
  assert len(expected) == 3 + 7
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=3e-5 * np.abs(other).max())
  assert np.abs(expected[0] - expected[1]).max() > 1e-2 * np.abs(expected[0]).max()


def folded_lip(kernel_size=1):
  """A LIP layer for 32 channels from 8, in evaluation, and its folded copy, as graph and state."""
  features = 32 if kernel_size > 1 else 8
  layer = LIP(Projection(features, 32, kernel_size=kernel_size, rngs=nnx.Rngs(0)))
  kernel = layer.logits.conv.kernel
  kernel.set_value(jax.random.normal(jax.random.key(0), kernel.shape) / 4)
  layer.eval()
  return nnx.split(layer), nnx.split(lip_jax.fold_batch_norm(layer))


def features(n, channels):
  return jax.random.normal(jax.random.key(channels), (n, 96, 95, channels))


@pytest.mark.parametrize(("n", "kernel_size"), [(1, 1), (6, 1), (6, 3), (7, 1)])
def test_a_lip_layer_pools_few_images_at_a_time(n, kernel_size):
  """In a loop, or a single one out of memory, which one of no turns sees to; the same gradients."""
  x = features(n, 32)
  inputs = (x,) if kernel_size > 1 else (x, features(n, 8))
  found = []
  for graph, state in folded_lip(kernel_size):

    def gradients(state, *inputs, graph=graph):
      y, vjp = jax.vjp(lambda state, *inputs: nnx.merge(graph, state)(*inputs), state, *inputs)
      return y, vjp(y)

    program = jax.jit(gradients).lower(state, *inputs).compile()
    found.append((" while(" in program.as_text(), jax.tree.leaves(program(state, *inputs))))
  (plain, expected), (folded, leaves) = found
  assert folded
  assert not plain
  for one, other in zip(leaves, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_a_folded_lip_layer_under_vmap_and_on_a_mesh():
  (graph, state), (folded, folded_state) = folded_lip()
  inputs = features(32, 32), features(32, 8)
  expected = jax.jit(lambda *inputs: nnx.merge(graph, state)(*inputs))(*inputs)

  def run(state, *inputs):
    return nnx.merge(folded, state)(*inputs)

  mesh = sharding.make_mesh()
  split = jax.device_put(inputs, sharding.over_batch(mesh))
  rows = sharding.over_batch(mesh).spec
  specs = {"in_specs": (PartitionSpec(), rows, rows), "out_specs": rows}
  y = jax.jit(jax.shard_map(run, mesh=mesh, **specs))(folded_state, *split)
  np.testing.assert_allclose(y, expected, rtol=0, atol=4e-6)
  split = jax.device_put([a[:8] for a in inputs], sharding.over_batch(mesh))
  np.testing.assert_allclose(jax.jit(run)(folded_state, *split), expected[:8], rtol=0, atol=4e-6)
  groups = [a.reshape(2, 16, *a.shape[1:]) for a in inputs]
  y = jax.jit(jax.vmap(run, in_axes=(None, 0, 0)))(folded_state, *groups)
  np.testing.assert_allclose(y.reshape(expected.shape), expected, rtol=0, atol=4e-6)
