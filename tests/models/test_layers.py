import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lip_jax.models import layers, padding
from lip_jax.models.logit_modules import Bottleneck, BottleneckTrunk, Projection


def normal(seed, *shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def test_batch_norm_normalizes_each_group_by_itself():
  norm = layers.BatchNorm(3, group_size=4)
  x = normal(0, 8, 5, 5, 3) * jnp.arange(1, 9.0).reshape(8, 1, 1, 1)
  y = norm(x)
  for start in (0, 4):
    alone = layers.BatchNorm(3)
    np.testing.assert_allclose(y[start : start + 4], alone(x[start : start + 4]), atol=1e-5)
    group = np.asarray(y[start : start + 4])
    np.testing.assert_allclose(group.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(group.std(axis=(0, 1, 2)), 1, atol=1e-4)


def test_batch_norm_follows_the_groups_mean_and_unbiased_variance():
  norm = layers.BatchNorm(3, group_size=4, momentum=0.9)
  x = np.asarray(normal(0, 8, 5, 5, 3)) * 3 + 1
  norm(jnp.asarray(x))
  groups = x.reshape(2, 4 * 5 * 5, 3)
  np.testing.assert_allclose(norm.mean[...], 0.1 * groups.mean(axis=1).mean(axis=0), rtol=1e-5)
  expected = 0.9 + 0.1 * groups.var(axis=1, ddof=1).mean(axis=0)
  np.testing.assert_allclose(norm.var[...], expected, rtol=1e-5)
  norm.eval()
  y = norm(jnp.asarray(x[:3]))  # any batch size in evaluation
  scale = 1 / np.sqrt(np.asarray(norm.var[...]) + 1e-5)
  np.testing.assert_allclose(y, (x[:3] - np.asarray(norm.mean[...])) * scale, rtol=1e-4, atol=1e-5)


def test_batch_norm_names_the_group_size_that_does_not_fit():
  with pytest.raises(ValueError, match="multiple of 4, got 6 images; change the batch size or bn_"):
    layers.BatchNorm(3, group_size=4)(jnp.zeros((6, 2, 2, 3)))


@pytest.mark.parametrize("groups", [(), (2,)])
def test_frozen_batch_norm_trains_by_its_running_statistics(groups):
  norm = layers.BatchNorm(3, frozen=True, epsilon=0.0, group_size=4)
  scale, bias, mean, var = np.float32([[1, -2, 0.5], [0, 1, -1], [1, 2, 3], [4, 1, 9]])
  norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
  for variable, value in ((norm.mean, mean), (norm.var, var)):
    variable.set_value(jnp.tile(value, (*groups, 1)))  # in training there may be one for each group
  norm.train()
  graph, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)

  def run(params, x):
    norm = nnx.merge(graph, params, stats, copy=True)
    return norm(x), nnx.state(norm, nnx.BatchStat)

  x, g = np.asarray(normal(0, 6, 5, 4, 3)) * 3 + 1, np.asarray(normal(1, 6, 5, 4, 3))
  y, vjp, after = jax.vjp(run, params, jnp.asarray(x), has_aux=True)
  of_params, dx = vjp(jnp.asarray(g))
  x_hat = (x - mean) / np.sqrt(var)
  np.testing.assert_allclose(y, x_hat * scale + bias, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dx, g * scale / np.sqrt(var), rtol=1e-5)
  np.testing.assert_allclose(of_params["scale"][...], (g * x_hat).sum(axis=(0, 1, 2)), rtol=1e-4)
  np.testing.assert_allclose(of_params["bias"][...], g.sum(axis=(0, 1, 2)), rtol=1e-4)
  jax.tree.map(np.testing.assert_array_equal, after, stats)
  norm.eval()
  np.testing.assert_array_equal(norm(jnp.asarray(x)), y)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_norms_keep_float32_statistics_under_bfloat16(mode):
  """Eval with float32 running statistics differs from one with statistics cast to bfloat16."""
  norm = layers.BatchNorm(4, dtype=jnp.bfloat16)
  norm.mean[...] = jnp.asarray([100.1, 100.2, 100.3, 100.4])
  getattr(norm, mode)()
  x = normal(0, 16, 4, 4, 4, dtype=jnp.bfloat16) + jnp.bfloat16(100)
  y = norm(x)
  assert y.dtype == jnp.bfloat16
  for variable in (norm.scale, norm.bias, norm.mean, norm.var):
    assert variable.dtype == jnp.float32
  wide = np.asarray(x, np.float64)
  if mode == "eval":
    expected = (wide - np.asarray([100.1, 100.2, 100.3, 100.4])) / np.sqrt(1 + 1e-5)
  else:
    expected = (wide - wide.mean(axis=(0, 1, 2))) / np.sqrt(wide.var(axis=(0, 1, 2)) + 1e-5)
  np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0.004, atol=1e-4)


def test_instance_norm_normalizes_each_channel_of_each_image():
  norm = layers.InstanceNorm(3)
  norm.scale[...], norm.bias[...] = jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([0.0, 1.0, -1.0])
  x = np.asarray(normal(0, 2, 6, 5, 3)) * 4 + 7
  expected = (x - x.mean(axis=(1, 2), keepdims=True)) / np.sqrt(
    x.var(axis=(1, 2), keepdims=True) + 1e-5
  ) * np.asarray([1.0, 2.0, 3.0]) + np.asarray([0.0, 1.0, -1.0])
  np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_relu_has_the_gradient_of_relu(dtype):
  x = jnp.concatenate([normal(0, 99), jnp.asarray([0.0, -0.0, jnp.inf, -jnp.inf])]).astype(dtype)
  weights = normal(1, len(x)).astype(dtype)
  y, vjp = jax.vjp(layers.relu, x)
  expected, expected_vjp = jax.vjp(nnx.relu, x)
  np.testing.assert_array_equal(y, expected)
  np.testing.assert_array_equal(*vjp(weights), *expected_vjp(weights))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [layers.BatchNorm, layers.InstanceNorm])
def test_norm_with_relu_has_the_gradients_of_both(x64, kind, masked):
  norm = kind(3, dtype=jnp.float64)
  norm.scale[...], norm.bias[...] = jnp.asarray([1.0, -2.0, 0.5]), jnp.asarray([0.0, 0.3, -0.1])
  graph, params, rest = nnx.split(norm, nnx.Param, ...)
  x, g = normal(0, 4, 6, 6, 3, dtype=jnp.float64), normal(1, 4, 6, 6, 3, dtype=jnp.float64)
  sizes = jnp.asarray([[6, 6], [4, 5], [6, 3], [1, 1]]) if masked else None

  def results(relu):
    def apply(params, x):
      norm = nnx.merge(graph, params, rest, copy=True)
      with padding.masked(sizes, (6, 6)) if masked else contextlib.nullcontext():
        return norm(x, relu=True) if relu else nnx.relu(norm(x))

    y, vjp = jax.vjp(apply, params, x)
    return y, *vjp(g)

  for one, other in zip(*map(jax.tree.leaves, (results(True), results(False))), strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * float(jnp.abs(other).max()))


def test_instance_norm_of_a_constant_is_its_bias():
  norm = layers.InstanceNorm(2)
  norm.bias[...] = jnp.asarray([0.5, -2.0])
  x = jnp.full((1, 7, 7, 2), 2.0)
  y, vjp = jax.vjp(norm, x)
  np.testing.assert_allclose(y, jnp.broadcast_to(norm.bias[...].reshape(1, 1, 1, 2), y.shape))
  assert np.isfinite(vjp(y)[0]).all()


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_convolution_pads_as_pytorch_does(kernel_size, stride, size):
  torch = pytest.importorskip("torch")
  make = layers.LayerFactory(jnp.float32, nnx.Rngs(0))
  conv = make.conv(3, 4, kernel_size, stride)
  x = normal(0, 2, *size, 3)
  theirs = torch.nn.functional.conv2d(
    torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy()),
    torch.from_numpy(np.asarray(conv.kernel[...]).transpose(3, 2, 0, 1).copy()),
    stride=stride,
    padding=kernel_size // 2,
  )
  np.testing.assert_allclose(conv(x), theirs.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "make",
  [
    lambda rngs: Projection(6, 4, rngs=rngs),
    lambda rngs: Projection(6, 4, kernel_size=3, rngs=rngs),
    lambda rngs: Bottleneck(6, 4, width=8, rngs=rngs),
  ],
)
def test_logit_modules_start_constant_and_stay_in_their_range(make):
  module = make(nnx.Rngs(0))
  x = normal(0, 2, 9, 8, 6)
  np.testing.assert_array_equal(module(x), np.full((2, 9, 8, 4), 6.0))
  last = module.projection if isinstance(module, Bottleneck) else module
  last.conv.kernel[...] = 100 * normal(1, *last.conv.kernel.shape)
  last.norm.scale[...] = jnp.full((4,), 50.0)
  logits = np.asarray(module(x))
  low, high = module.logit_range
  assert logits.min() >= low
  assert logits.max() <= high
  assert logits.max() - logits.min() > 6


def test_bottleneck_is_trunk_then_projection():
  module = Bottleneck(6, 4, width=8, rngs=nnx.Rngs(0))
  assert isinstance(module.trunk, BottleneckTrunk)
  trunk = module.trunk
  x = normal(0, 2, 5, 5, 6)
  h = nnx.relu(trunk.norm1(trunk.conv1(x)))
  h = nnx.relu(trunk.norm2(trunk.conv2(h)))
  np.testing.assert_allclose(trunk(x), h, rtol=1e-5, atol=1e-6)
  assert trunk.conv1.kernel.shape == (1, 1, 6, 8)
  assert trunk.conv2.kernel.shape == (3, 3, 8, 8)
