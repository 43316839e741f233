"""Parameters, multiply-adds and FLOPs, against counts by hand and the paper's figures."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lip_jax import list_models
from lip_jax.errors import UsageError
from lip_jax.models import abstract_model, cost, lan, layers
from lip_jax.models.logit_modules import Projection
from lip_jax.ops import convolution
from lip_jax.tools import paper
from lip_jax.tools.cost import costs, default_names


class Net(nnx.Module):
  """Calls `forward(parts, images)`."""

  def __init__(self, forward, **parts):
    self.parts = nnx.Dict(parts)
    self.forward = forward

  def __call__(self, images):
    return self.forward(self.parts, images)


def conv(in_features, out_features, kernel, **options):
  return nnx.Conv(in_features, out_features, kernel, rngs=nnx.Rngs(0), **options)


def count(forward, image_size=8, **parts):
  return cost.multiply_adds(Net(forward, **parts), image_size)


def test_convolutions_by_hand():
  def first(parts, x):
    return parts.a(x)

  # 8 x 8 outputs of 5 channels, each of 3 x 3 x 3 products; with stride 2 there are 4 x 4.
  assert count(first, a=conv(3, 5, (3, 3))) == 8 * 8 * 5 * 3 * 3 * 3
  assert count(first, a=conv(3, 5, (3, 3), strides=2)) == 4 * 4 * 5 * 3 * 3 * 3
  assert count(first, a=conv(3, 5, (3, 1), padding="VALID")) == 6 * 8 * 5 * 3 * 3
  # Each of three groups sees one channel.
  grouped = conv(3, 6, (3, 3), feature_group_count=3)
  assert count(first, a=grouped) == 8 * 8 * 6 * 3 * 3


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_forms_for_platforms_cost_what_the_convolutions_do(platform, monkeypatch):
  """Zeros between groups, and beside an image's channels, are no work of the network."""
  monkeypatch.setattr(convolution, "targets", lambda: {platform})
  make = layers.LayerFactory(jnp.float32, nnx.Rngs(0))
  images, groups = make.conv(3, 8, 7, 2), make.conv(8, 6, 3, groups=2)
  expected = 16 * 16 * (8 * 7 * 7 * 3 + 6 * 3 * 3 * 4)
  assert count(lambda parts, x: parts.b(parts.a(x)), 32, a=images, b=groups) == expected


def test_matrix_products_by_hand():
  linear = nnx.Linear(3, 7, rngs=nnx.Rngs(0))
  assert count(lambda parts, x: parts.a(x.mean(axis=(1, 2))), a=linear) == 3 * 7
  assert count(lambda parts, x: parts.a(x), a=linear) == 8 * 8 * 3 * 7
  # Batched: 8 products of [8, 3] and [3, 8].
  assert count(lambda parts, x: x[0] @ x[0].swapaxes(1, 2)) == 8 * 8 * 8 * 3


def test_nothing_else_counts():
  def forward(parts, x):
    x = nnx.relu(x) * 2 + jnp.exp(x)
    return (x - x.mean()) / jnp.sqrt(x.var()) + jax.lax.reduce_window(
      x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"
    )

  assert count(forward) == 0


def test_flops_by_hand():
  """The multiply-adds; two per batch-norm value; one per value of ReLU, and pooled."""
  pixels = 8 * 8

  def flops(forward, **parts):
    return cost.flops(Net(forward, **parts), 8)

  convolution, norm = conv(3, 5, (1, 1)), layers.BatchNorm(3)
  assert flops(lambda parts, x: parts.a(x), a=convolution) == pixels * 3 * 5
  assert flops(lambda parts, x: parts.a(x), a=norm) == 2 * pixels * 3
  assert flops(lambda parts, x: nnx.relu(parts.a(x)), a=convolution) == pixels * (3 * 5 + 5)
  for pool in (lan.AveragePool(), lan.MaxPool()):
    assert flops(lambda parts, x: parts.a(x), a=pool) == pixels * 3
  assert flops(lambda parts, x: x.mean(axis=(1, 2))) == pixels * 3
  assert flops(lambda parts, x: parts.a(x), a=layers.InstanceNorm(3)) == 0
  lip = lan.LIP(Projection(3, 3, rngs=nnx.Rngs(0)))
  assert flops(lambda parts, x: parts.a(x), a=lip) == pixels * 3 * 3


def test_programs_inside_programs():
  linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
  once = 8 * 8 * 3 * 3

  def twice(f):
    return lambda x: f(f(x))

  @jax.custom_vjp
  def custom(x, kernel):
    return x @ kernel

  custom.defvjp(lambda x, kernel: (x @ kernel, None), lambda _, g: (g, None))

  def scanned(parts, x):
    return jax.lax.scan(lambda x, _: (parts.a(x), None), x, length=5)[0]

  def branches(parts, x):
    return jax.lax.cond(x.sum() > 0, twice(parts.a), parts.a, x)

  def platforms(parts, x):
    return jax.lax.platform_dependent(x, cpu=parts.a, default=parts.a)

  def loop(parts, x):
    return jax.lax.while_loop(lambda x: x.sum() < 1, parts.a, x)

  assert count(lambda parts, x: jax.jit(parts.a)(x), a=linear) == once
  assert count(lambda parts, x: jax.checkpoint(twice(parts.a))(x), a=linear) == 2 * once
  assert count(lambda parts, x: custom(x, parts.a.kernel[...]), a=linear) == once
  assert count(scanned, a=linear) == 5 * once
  assert count(branches, a=linear) == 2 * once
  assert count(platforms, a=linear) == once
  with pytest.raises(ValueError, match="fixed number of rounds"):
    count(loop, a=linear)


def test_the_model_is_left_as_it_is():
  linear = nnx.Linear(3, 7, rngs=nnx.Rngs(0))
  kernel = linear.kernel[...].copy()
  assert count(lambda parts, x: parts.a(x), a=linear) == 8 * 8 * 3 * 7
  assert (linear.kernel[...] == kernel).all()
  model = abstract_model("lip_resnet_small", width=4)
  before = nnx.split(model)
  assert cost.multiply_adds(model, 32) > 0
  assert nnx.split(model) == before
  assert not model.bn1.use_running_average


@functools.cache
def one(name, image_size=224):
  (result,) = costs([name], image_size)
  return result


def resnet(blocks, width=64, size=56):
  """Multiply-adds of a plain bottleneck ResNet at 224, layer by layer."""
  total, features = 112 * 112 * 64 * 7 * 7 * 3, 64
  for stage, number in enumerate(blocks):
    inner, outer = width * 2**stage, 4 * width * 2**stage
    for index in range(number):
      halves = stage > 0 and index == 0
      before, size = size, size // 2 if halves else size
      total += before**2 * features * inner + size**2 * inner * (9 * inner + outer)
      if index == 0:
        total += size**2 * features * outer
      features = outer
  return total + features * 1000


def densenet(blocks, growth=32, features=64, size=56):
  """Multiply-adds of a plain DenseNet-BC at 224, layer by layer."""
  total = 112 * 112 * features * 7 * 7 * 3
  for index, number in enumerate(blocks):
    if index > 0:
      total += size**2 * features * (features // 2)
      features, size = features // 2, size // 2
    for _ in range(number):
      total += size**2 * 4 * growth * (features + 9 * growth)
      features += growth
  return total + features * 1000


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("resnet50", resnet((3, 4, 6, 3))),
    ("resnet101", resnet((3, 4, 23, 3))),
    ("densenet121", densenet((6, 12, 24, 16))),
  ],
)
def test_plain_networks_layer_by_layer(name, expected):
  assert one(name).multiply_adds == expected


def test_the_logit_modules_of_a_lip_resnet50():
  """What LIP adds to average pooling: the modules' convolutions, at the size that they pool."""
  stem = 112**2 * 9 * 64 * 64
  stages = sum(
    size**2 * (inputs * 128 + 9 * 128 * 128 + 128 * (branch + inputs))
    for size, inputs, branch in ((56, 256, 128), (28, 512, 256), (14, 1024, 512))
  )
  average = one("table1_average").multiply_adds
  assert one("lip_resnet50").multiply_adds == average + stem + stages


def test_the_cost_grows_with_the_image():
  small, large = (one("resnet_small", size).multiply_adds for size in (32, 64))
  classifier = 512 * 1000
  assert large - classifier == 4 * (small - classifier)


def test_the_logit_modules_of_a_projection():
  """One 1x1 convolution each: of the stem's features, and twice of a block's input."""
  stem = 112**2 * 64 * 64
  stages = sum(
    size**2 * k * (b + k) for size, k, b in ((56, 256, 128), (28, 512, 256), (14, 1024, 512))
  )
  average = one("table1_average").multiply_adds
  assert one("table1_lip_projection").multiply_adds == average + stem + stages


@pytest.mark.parametrize(
  ("name", "parameters"),
  [
    ("table1_strided", 25_557_032),
    ("table1_lip_projection", 24_878_504),
    ("table1_lip_bottleneck64", 23_244_968),
    ("table1_lip_bottleneck128", 23_864_232),
    ("table1_lip_bottleneck256", 25_766_312),
    ("table4_lip_resnet101", 42_856_360),
    ("table4_densenet121", 7_978_856),
    ("table4_lip_densenet121", 8_690_920),
  ],
)
def test_parameters(name, parameters):
  assert one(name).parameters == parameters


@pytest.mark.parametrize("name", default_names()[len(list_models()) :])
def test_the_papers_figures(name):
  """FLOPs to 1 %, parameters to the digits that are printed, but for one row."""
  ours, printed = one(name), paper.NETWORKS[name].printed
  assert ours.flops / 1e9 == pytest.approx(printed["flops_g"], rel=0.01)
  # docs/paper_vs_code.md has the forms that were tried.
  expected = 24.9 if name == "table1_lip_projection" else printed["parameters_m"]
  assert round(ours.parameters / 1e6, 1) == expected


def test_faults_are_named():
  with pytest.raises(UsageError, match=r"'resnet51'.* resnet50,.*table1_average"):
    costs(["resnet50", "resnet51"])
  with pytest.raises(UsageError, match="image_size must be positive, got 0"):
    one("resnet50", 0)
  with pytest.raises(UsageError, match="cannot take images of 1 px"):
    one("densenet121", 1)
