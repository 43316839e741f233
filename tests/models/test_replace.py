import dataclasses
import doctest
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lip_jax
from lip_jax.errors import UsageError
from lip_jax.models import replace
from lip_jax.models.lan import LIP
from lip_jax.models.replace import LIPConv, Replacement, replace_downsampling

IMAGES = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)


def pixels(shape=IMAGES.shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def pool(window=2, stride=2, padding="VALID", function=nnx.max_pool):
  return functools.partial(
    function, window_shape=(window, window), strides=(stride, stride), padding=padding
  )


def conv(in_features, out_features, kernel_size=3, strides=1, **options):
  """A convolution with weights that are quick to make."""

  def init(_, shape, dtype):
    return 0.3 * pixels(shape, dtype)

  size = (kernel_size, kernel_size)
  return nnx.Conv(
    in_features, out_features, size, strides, kernel_init=init, rngs=nnx.Rngs(0), **options
  )


class DocumentedCNN(nnx.Module):
  """The network of flax's MNIST tutorial, narrower: one pooling attribute, called twice."""

  def __init__(self, pools=("avg_pool", "avg_pool")):
    rngs = nnx.Rngs(0)
    self.conv1 = conv(1, 4)
    self.batch_norm1 = nnx.BatchNorm(4, rngs=rngs)
    self.dropout1 = nnx.Dropout(rate=0.025)
    self.conv2 = conv(4, 8)
    self.batch_norm2 = nnx.BatchNorm(8, rngs=rngs)
    for name in pools:
      setattr(self, name, pool(function=nnx.avg_pool))
    self.pools = pools
    self.linear = nnx.Linear(7 * 7 * 8, 10, kernel_init=nnx.initializers.ones, rngs=rngs)

  def __call__(self, x, rngs=None):
    x = nnx.relu(self.batch_norm1(self.dropout1(self.conv1(x), rngs=rngs)))
    x = getattr(self, self.pools[0])(x)
    x = getattr(self, self.pools[1])(nnx.relu(self.batch_norm2(self.conv2(x))))
    return self.linear(x.reshape(x.shape[0], -1))


DIGITS = jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)


def test_one_attribute_with_two_numbers_of_channels_is_left_alone():
  model = DocumentedCNN()
  before = model.avg_pool
  (change,) = replace_downsampling(model, (DIGITS, nnx.Rngs(dropout=0)), rngs=nnx.Rngs(0))
  assert change == Replacement(
    "avg_pool",
    "avg_pool 2x2, stride 2",
    None,
    "called with 4 and 8 channels; give each call its own attribute",
  )
  assert model.avg_pool is before
  assert str(change).startswith("avg_pool: avg_pool 2x2, stride 2, left alone: called with 4 and 8")


def test_two_attributes_are_swapped_and_start_as_the_same_average_pooling():
  model = DocumentedCNN(("pool_b", "pool_a"))
  model.eval()
  x = pixels(DIGITS.shape)
  expected = jax.jit(nnx.clone(model))(x)
  changes = replace_downsampling(model, DIGITS, rngs=nnx.Rngs(0))
  assert [(c.path, c.after) for c in changes] == [  # as they are called
    ("pool_b", "LIP 2x2, stride 2"),
    ("pool_a", "LIP 2x2, stride 2"),
  ]
  assert isinstance(model.pool_a, LIP)
  np.testing.assert_allclose(jax.jit(nnx.clone(model))(x), expected, rtol=1e-5, atol=1e-5)


class Block(nnx.Module):
  def __init__(self, in_features, out_features, strides, dtype):
    self.conv1 = conv(in_features, out_features, strides=strides, dtype=dtype)
    self.shortcut = conv(in_features, out_features, 1, strides, padding="VALID", dtype=dtype)

  def __call__(self, x):
    return nnx.relu(self.shortcut(x) + self.conv1(x))


class ResNet(nnx.Module):
  """Stem with max pooling, two blocks of which the second one is strided, and a head."""

  def __init__(self, dtype=jnp.float32):
    self.stem = conv(3, 6, strides=2, dtype=dtype)
    self.pool = pool(3, 2, ((1, 1), (1, 1)))
    self.blocks = nnx.List([Block(6, 6, 1, dtype), Block(6, 8, (2, 2), dtype)])
    self.head = conv(8, 5, 1, dtype=dtype)

  def __call__(self, x):
    x = self.pool(nnx.relu(self.stem(x)))
    for block in self.blocks:
      x = block(x)
    return self.head(x).mean(axis=(1, 2))


def averaging(model):
  """The same network by hand, with average pooling and convolutions at stride 1."""
  model = nnx.clone(model)
  model.pool = lip_jax.average_pool
  block = model.blocks[1]
  for name in ("conv1", "shortcut"):
    at_stride_1 = getattr(block, name)
    at_stride_1.strides = 1
    setattr(block, name, nnx.Sequential(lip_jax.average_pool, at_stride_1))
  return model


class One(nnx.Module):
  """A single layer."""

  def __init__(self, layer):
    self.layer = layer

  def __call__(self, x, **options):
    return self.layer(x, **options)


def train(model, x):
  """Two steps of gradient descent: outputs before each, and gradients, as nested dicts."""
  graphdef, state = nnx.split(model)

  @jax.jit
  def step(state):
    def loss(state):
      y = nnx.merge(graphdef, state)(x)
      return jnp.square(y - 1).mean(), y

    gradient, y = jax.grad(loss, has_aux=True)(state)
    return jax.tree.map(lambda a, b: a - 1e-2 * b, state, gradient), gradient, y

  state, *first = step(state)
  _, *second = step(state)
  return first, second


def test_a_residual_network_starts_as_average_pooling_and_trains():
  model = ResNet()
  weights = {
    id(p): np.asarray(p[...]) for _, p in nnx.iter_graph(model) if isinstance(p, nnx.Param)
  }
  x = pixels()
  expected = jax.jit(averaging(model))(x)
  stem, first = model.stem, model.blocks[1].conv1
  changes = replace_downsampling(model, IMAGES, rngs=nnx.Rngs(0))
  assert [dataclasses.astuple(c) for c in changes] == [
    ("stem", "Conv 3x3, stride 2", None, "reads the image itself (3 channels)"),
    ("pool", "max_pool 3x3, stride 2", "LIP 3x3, stride 2", None),
    ("blocks.1.shortcut", "Conv 1x1, stride 2", "LIP 3x3, stride 2, then Conv 1x1, stride 1", None),
    ("blocks.1.conv1", "Conv 3x3, stride 2", "LIP 3x3, stride 2, then Conv 3x3, stride 1", None),
  ]
  assert model.stem is stem
  assert isinstance(model.blocks[1].conv1, LIPConv)
  assert model.blocks[1].conv1.conv is first
  kept = {id(p): p[...] for _, p in nnx.iter_graph(model) if id(p) in weights}
  assert kept.keys() == weights.keys()
  for key, value in kept.items():
    np.testing.assert_array_equal(value, weights[key])

  (gradient, y), (_, later) = train(model, x)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
  block = gradient["blocks"][1]
  for pooling in (gradient["pool"], block["conv1"]["pool"], block["shortcut"]["pool"]):
    assert np.abs(pooling["logits"]["conv"]["kernel"][...]).max() > 0
  assert np.abs(later - expected).max() > 1e-4


def test_bottleneck_logits_start_as_average_pooling_and_train():
  model = One(pool(3, 2, "SAME"))
  x = pixels((2, 8, 8, 4))
  replace_downsampling(model, x, logit="bottleneck", logit_width=6, rngs=nnx.Rngs(0))
  assert model.layer.logits.trunk.conv1.kernel.shape == (1, 1, 4, 6)
  (first, y), (second, _) = train(model, x)
  np.testing.assert_allclose(y, lip_jax.average_pool(x), rtol=1e-5, atol=1e-5)
  assert np.abs(first["layer"]["logits"]["projection"]["conv"]["kernel"][...]).max() > 0
  # Its first layers learn once the last one is no longer zero.
  assert np.abs(second["layer"]["logits"]["trunk"]["conv1"]["kernel"][...]).max() > 0


def test_layers_compute_in_the_dtype_that_they_are_called_with():
  model = ResNet(jnp.bfloat16)
  images = jax.ShapeDtypeStruct(IMAGES.shape, jnp.bfloat16)
  replace_downsampling(model, images, rngs=nnx.Rngs(0))
  lip = model.blocks[1].conv1.pool
  assert lip.logits.conv.dtype == jnp.bfloat16
  assert lip.logits.conv.kernel.dtype == jnp.float32
  y = jax.eval_shape(model, images)
  assert y.dtype == jnp.bfloat16


class Plain(nnx.Module):
  """Pools in every kind of container; one module in two places."""

  def __init__(self):
    self.tuple = (pool(), nnx.relu)
    self.dict = {"down": pool(3, 2, "SAME"), "up": 1}
    self.data = nnx.data([conv(5, 5), pool(3, 2)])
    self.static = nnx.static(pool())
    block = nnx.Sequential(conv(5, 5, strides=2), nnx.Sequential(nnx.relu, pool()))
    self.first = block
    self.second = block
    self.unused = nnx.List([pool()])

  def __call__(self, x):
    for layer in self.tuple:
      x = layer(x)
    x = self.dict["down"](x)
    for layer in self.data:
      x = layer(x)
    return self.second(self.first(self.static(x)))


def test_layers_in_containers_and_shared_modules():
  model = Plain()
  images = jax.ShapeDtypeStruct((1, 268, 260, 5), jnp.float32)
  shape = jax.eval_shape(nnx.clone(model), images)
  changes = replace_downsampling(model, images, rngs=nnx.Rngs(0))
  assert [(c.path, c.reason) for c in changes] == [
    ("tuple.0", None),
    ("dict.down", None),
    ("data.1", None),
    ("static", None),
    ("first.layers.0", None),
    ("first.layers.1.layers.1", None),
    ("unused.0", "not called with this example"),
  ]
  graphdef, state = nnx.split(model)
  assert jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x), state, images) == shape
  assert model.first is model.second
  assert isinstance(model.first.layers[0], LIPConv)
  again = replace_downsampling(model, images, rngs=nnx.Rngs(0))
  assert [c.path for c in again] == ["unused.0"]


class Twice(nnx.Module):
  """One convolution under two names."""

  def __init__(self):
    self.one = conv(8, 8, strides=2)
    self.other = self.one

  def __call__(self, x):
    return self.other(self.one(x))


def test_a_convolution_under_two_names_stays_one():
  model = Twice()
  images = jax.ShapeDtypeStruct((1, 9, 9, 8), "float32")
  (change,) = replace_downsampling(model, images, rngs=nnx.Rngs(0))
  assert (change.path, change.reason) == ("one", None)
  assert model.one is model.other
  assert jax.eval_shape(nnx.clone(model), images).shape == (1, 3, 3, 8)


class Transformed(One):
  """Calls its layer inside of transformations of its own."""

  @nnx.jit
  def __call__(self, x):
    return nnx.remat(lambda layer, x: layer(x))(self.layer, x)


def test_layers_inside_transformations():
  images = jax.ShapeDtypeStruct((1, 8, 8, 8), "float32")
  model = Transformed(One(pool()))
  (change,) = replace_downsampling(model, images, rngs=nnx.Rngs(0))
  assert (change.path, change.reason) == ("layer.layer", None)
  model = Transformed(nnx.Sequential(conv(8, 8, strides=2), nnx.BatchNorm(8, rngs=nnx.Rngs(0))))
  (change,) = replace_downsampling(model, images, rngs=nnx.Rngs(0))
  assert (change.path, change.reason) == ("layer.layers.0", None)


def swap_one(layer, *shape, dtype=jnp.float32):
  model = One(layer)
  (change,) = replace_downsampling(model, jax.ShapeDtypeStruct(shape, dtype), rngs=nnx.Rngs(0))
  return model.layer, change


@pytest.mark.parametrize("function", [nnx.max_pool, nnx.avg_pool])
@pytest.mark.parametrize(
  ("window", "stride", "padding", "size", "expected"),
  [
    (2, 2, "VALID", (8, 7), (0, 0)),
    (2, 2, "SAME", (8, 7), (0, 1)),
    (3, 2, "SAME", (8, 7), (1, 1)),
    (3, 2, "VALID", (8, 7), (0, 0)),
    (3, 2, ((0, 1), (0, 1)), (8, 8), (1, 1)),
    (5, 2, ((2, 2), (1, 1)), (9, 9), (2, 1)),
    (7, 4, ((3, 3), (3, 3)), (8, 8), (3, 3)),
    (3, 3, "SAME", (9, 7), (0, 1)),
  ],
)
def test_padding_of_lip_keeps_the_output_size(function, window, stride, padding, size, expected):
  layer = pool(window, stride, padding, function)
  lip, _ = swap_one(layer, 1, *size, 2)
  assert (lip.window, lip.stride) == ((window, window), (stride, stride))
  assert lip.padding == expected
  x = pixels((1, *size, 2))
  assert jax.eval_shape(lip, x).shape == jax.eval_shape(layer, x).shape


def test_windows_cover_the_stride():
  lip, change = swap_one(pool(1, 2), 1, 7, 8, 2)
  assert (lip.window, lip.padding) == ((3, 3), (1, 1))
  assert change.after == "LIP 3x3, stride 2"
  module, change = swap_one(conv(8, 8, 5, strides=(4, 1)), 1, 15, 8, 8)
  assert (module.pool.window, module.pool.padding) == ((5, 1), (2, 0))
  assert change.before == "Conv 5x5, stride 4x1"
  assert change.after == "LIP 5x1, stride 4x1, then Conv 5x5, stride 1"


@pytest.mark.parametrize(
  ("layer", "shape", "dtype", "reason"),
  [
    (conv(8, 8, 2, 2, padding="VALID"), (1, 8, 8, 8), "float32", "3x3 instead of 4x4; padding="),
    (conv(4, 8, 3, 2), (1, 8, 8, 4), "float32", r"reads the image itself \(4 channels\)"),
    (conv(8, 8, 3, 2), (8, 8, 8), "float32", r"called with float32\[8, 8, 8\]; LIP pools images"),
    (pool(), (8, 8, 8), "float32", "LIP pools images"),
    (pool(), (1, 8, 8, 8), "int32", "called with int32; LIP pools floating point"),
    (pool(2, 2, ((2, 2), (2, 2))), (1, 8, 8, 8), "float32", "no padding of LIP, at most 1 on each"),
    (
      functools.partial(nnx.avg_pool, window_shape=(2,), strides=(2,)),
      (1, 8, 8),
      "float32",
      "LIP pools images",
    ),
  ],
)
def test_what_cannot_become_lip_is_left_alone(layer, shape, dtype, reason):
  kept, change = swap_one(layer, *shape, dtype=dtype)
  assert kept is layer
  assert change.after is None
  assert re.search(reason, change.reason)


class WithOptions(One):
  def __call__(self, x):
    return self.layer(x, padding="SAME")


def test_further_arguments_in_the_call_leave_a_layer_alone():
  (change,) = replace_downsampling(
    WithOptions(pool()), jax.ShapeDtypeStruct((1, 8, 8, 8), "float32"), rngs=nnx.Rngs(0)
  )
  assert change.reason == "called with more arguments than the features"


def test_skip_leaves_layers_alone():
  model = ResNet()
  changes = replace_downsampling(
    model, IMAGES, skip=lambda path, layer: isinstance(layer, nnx.Conv), rngs=nnx.Rngs(0)
  )
  assert [c.path for c in changes if c.after] == ["pool"]
  assert {c.reason for c in changes if not c.after} == {"skip said so"}
  assert model.blocks[1].conv1.strides == (2, 2)


class Functional(nnx.Module):
  def __call__(self, x):
    return nnx.max_pool(x, (2, 2), strides=(2, 2))


class LooksAtItsLayer(One):
  def __call__(self, x):
    assert self.layer.in_features == 8  # works with a convolution, not with what replaces it
    return self.layer(x)


@pytest.mark.parametrize(
  ("model", "options", "message"),
  [
    (Functional(), {}, r"Functional has no attribute that is .* self.pool = functools.partial\("),
    (One(pool(2, 1)), {}, "with strides above 1"),
    (conv(8, 8, strides=2), {}, "Conv has no attribute"),
    (nnx.relu, {}, "must be a flax.nnx.Module, got"),
    (One(pool()), {"logit": "gate"}, "unknown logit 'gate'; choose one of projection, bottleneck"),
    (One(pool()), {"logit_width": 8}, "a projection has no width"),
    (One(pool()), {"example": "images"}, "must be an array, .* got 'images'"),
    (One(pool()), {"example": (IMAGES, IMAGES)}, r"example float32\[2, 16, 16, 3\], float32"),
    (
      LooksAtItsLayer(conv(8, 8, strides=2)),
      {"example": jax.ShapeDtypeStruct((1, 8, 8, 8), "float32")},
      "does not work with LIP in place of layer: .* skip=lambda path",
    ),
  ],
)
def test_errors_say_what_was_given_and_expected(model, options, message):
  with pytest.raises(UsageError, match=message):
    replace_downsampling(model, **{"example": IMAGES, "rngs": nnx.Rngs(0), **options})
  if isinstance(model, LooksAtItsLayer):  # and the model is as it was
    assert isinstance(model.layer, nnx.Conv)
    assert model.layer.strides == 2


def test_the_example_in_the_documentation():
  result = doctest.testmod(replace)
  assert result.attempted >= 7
  assert result.failed == 0
