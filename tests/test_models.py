import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lip_jax
from lip_jax import downsample
from lip_jax.errors import UsageError


def count(model):
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def abstract(name, **options):
  """The model without its weights: shapes only, and fast."""
  return nnx.eval_shape(lambda: lip_jax.create_model(name, rngs=nnx.Rngs(0), **options))


def images(n=2, size=32, seed=0):
  shape = (n, size, size, 3) if isinstance(size, int) else (n, *size, 3)
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
  ("name", "options", "expected"),
  [
    ("lip_resnet50", {}, 23_864_232),
    ("lip_resnet50", {"logit_width": 64}, 23_244_968),
    ("lip_resnet50", {"logit_width": 256}, 25_766_312),
    ("resnet50", {}, 25_557_032),  # torchvision's
  ],
)
def test_parameter_counts(name, options, expected):
  assert count(abstract(name, **options)) == expected


@pytest.mark.parametrize("name", ["lip_resnet50", "resnet50"])
def test_features_have_the_named_strides(name):
  model = abstract(name)
  shapes = jax.eval_shape(
    lambda model, x: model.features(x), model, jax.ShapeDtypeStruct((2, 224, 192, 3), jnp.float32)
  )
  for level, channels in (("c2", 256), ("c3", 512), ("c4", 1024), ("c5", 2048)):
    stride = 2 ** int(level[1])
    assert shapes[level].shape == (2, 224 // stride, 192 // stride, channels)


def test_every_name_builds_and_gives_float32_logits():
  assert {"lip_resnet50", "resnet50", "lip_resnet_small", "resnet_small"} <= set(
    lip_jax.list_models()
  )
  for name in lip_jax.list_models():
    model = abstract(name, num_classes=7, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    logits = jax.eval_shape(lambda model, x: model(x), model, x)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}


def with_pool(pool, logit="bottleneck"):
  """A small network; all its weights that the average-pooled network has too are equal to its."""
  options = {"num_classes": 10, "width": 4, "logit_width": 4}
  model = lip_jax.create_model("resnet_small", pool=pool, logit=logit, rngs=nnx.Rngs(0), **options)
  average = lip_jax.create_model("resnet_small", pool="average", rngs=nnx.Rngs(1), **options)
  ours = dict(nnx.to_flat_state(nnx.state(model)))
  for path, variable in nnx.to_flat_state(nnx.state(average)):
    if ours[path].shape == variable.shape:
      variable.set_value(ours[path][...])
  return model, average


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("logit", ["projection", "bottleneck"])
def test_lip_networks_start_as_average_pooling(logit, mode):
  model, average = with_pool("lip", logit)
  assert count(model) > count(average)
  outputs = []
  for network in (model, average):
    getattr(network, mode)()
    graph, state = nnx.split(network)
    outputs.append(
      jax.jit(lambda s, x, graph=graph: nnx.merge(graph, s, copy=True)(x))(state, images())
    )
  np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)


def test_networks_differ_in_their_poolings_alone():
  """Strided, average, max and LIP: the same convolutions everywhere but where they down-sample."""
  shapes = {}
  for pool in downsample.POOLS:
    state = nnx.state(abstract("resnet_small", pool=pool))
    shapes[pool] = {
      ".".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(state)
    }
  assert shapes["average"] == shapes["max"]
  different = {
    path
    for pool in ("strided", "lip")
    for path in shapes["average"].keys() | shapes[pool].keys()
    if shapes["average"].get(path) != shapes[pool].get(path)
  }
  assert different
  assert all(path.startswith("pool.") or ".0.spatial." in path for path in different)


def test_a_downsampling_block_shares_the_trunk_that_its_input_feeds():
  """Figure 4: one trunk for the LIP of the residual branch and that of the shortcut."""
  model = lip_jax.create_model("lip_resnet_small", width=4, num_classes=3, rngs=nnx.Rngs(0))
  transition = model.layer2[0].spatial
  x, h = images(1, 8)[..., :1] * jnp.ones((1, 1, 1, 16)), jnp.ones((1, 8, 8, 8))
  for pool in (transition.residual_pool, transition.shortcut_pool):
    kernel = pool.logits.conv.kernel
    kernel[...] = jnp.asarray(np.random.default_rng(1).standard_normal(kernel.shape), jnp.float32)
  with downsample.record_logits() as records:
    transition(x, h)
  shared = transition.trunk(x)
  assert [layer for layer, _ in records] == [transition.residual_pool, transition.shortcut_pool]
  for layer, logits in records:
    np.testing.assert_allclose(logits, layer.logits(shared), rtol=1e-5, atol=1e-5)


def test_odd_and_non_square_images():
  model = lip_jax.create_model("lip_resnet_small", width=4, num_classes=3, rngs=nnx.Rngs(0))
  model.eval()
  assert model(images(1, (37, 51))).shape == (1, 3)


def test_lip_layer_in_a_users_own_model():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
      self.pool = lip_jax.LIP(lip_jax.Projection(8, 8, rngs=rngs))

    def __call__(self, x):
      return self.pool(nnx.relu(self.conv(x)))

  net = Net(nnx.Rngs(0))
  x = images(2, 16)
  np.testing.assert_allclose(
    net(x), lip_jax.average_pool(nnx.relu(net.conv(x))), rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"name": "resnet51"}, "unknown model 'resnet51'; choose one of .*resnet50"),
    ({"logits": "x"}, "unknown option logits for .* valid options: .*logit, logit_width"),
    ({"pool": "lipp"}, "unknown pool 'lipp'; choose one of strided, average, max, lip"),
    ({"logit": "x"}, "unknown logit 'x'; choose one of projection, bottleneck"),
    ({"stem": "x"}, "unknown stem 'x'; choose one of imagenet, small"),
    ({"stage_sizes": (1, 2)}, "four positive numbers"),
    ({"logit_width": 0}, "logit_width must be positive, got 0"),
    ({"bn_group_size": -8}, "bn_group_size must be positive"),
  ],
)
def test_errors_name_what_exists(arguments, message):
  with pytest.raises(UsageError, match=message):
    lip_jax.create_model(**{"name": "lip_resnet_small", "rngs": nnx.Rngs(0), **arguments})


def test_images_of_the_wrong_shape():
  model = lip_jax.create_model("resnet_small", width=4, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"\[N, H, W, 3\], got shape \(3, 8, 8\)"):
    model(jnp.zeros((3, 8, 8)))


def test_core_imports_with_jax_flax_and_numpy_alone():
  """None of the libraries that only training needs is imported by the package or its models."""
  code = """
import sys, flax.nnx
before = set(sys.modules)
import lip_jax, lip_jax.visualize
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
outside = roots - sys.stdlib_module_names - {"lip_jax", "jax", "flax", "numpy"}
assert not outside, outside
"""
  subprocess.run([sys.executable, "-c", code], check=True)


def test_import_time_is_close_to_that_of_flax():
  """Median of several processes, lip_jax against flax.nnx; at most 1.5 times as long."""

  def seconds(module):
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)

  pairs = [(seconds("flax.nnx"), seconds("lip_jax")) for _ in range(5)]
  assert np.median([ours for _, ours in pairs]) < 1.5 * np.median([flax for flax, _ in pairs])
