"""Class activation maps, effective receptive fields, and where maps lie in the image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import lip_jax
from lip_jax import visualize
from lip_jax.errors import UsageError
from lip_jax.visualize import Grid, to_input

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((3, 3, 3, 2))  # of signs that partly cancel in the pooling behind it


class Linear(nnx.Module):
  """3x3 convolution without padding, 2x2 average pooling, and a classifier."""

  def __init__(self):
    self.fc = nnx.Linear(2, 4, param_dtype=jnp.float64, dtype=jnp.float64, rngs=nnx.Rngs(0))
    self.fc.bias[...] = jnp.arange(4.0)

  def features(self, images):
    dimensions = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(images, KERNEL, (1, 1), "VALID", dimension_numbers=dimensions)
    return {"c5": nnx.avg_pool(x, (2, 2), (2, 2))}

  def __call__(self, images):
    return self.fc(self.features(images)["c5"].mean(axis=(1, 2)))


def kernel_of_both(weights):
  """What one pixel of the linear network's map multiplies the image by: [4, 4, 3]."""
  both = np.zeros((4, 4, 3))
  for row in range(2):
    for column in range(2):
      both[row : row + 3, column : column + 3] += KERNEL @ weights / 4
  return both


def test_maps_of_a_linear_network_are_weights_times_features(x64):
  images = RNG.standard_normal((2, 8, 10, 3))
  model = Linear()
  weights = np.asarray(model.fc.kernel[...])
  found = visualize.class_activation_maps(model, images, jnp.asarray([2, 3]))
  for number, label in enumerate((2, 3)):
    kernel = kernel_of_both(weights[:, label])
    expected = [
      [np.sum(images[number, r : r + 4, c : c + 4] * kernel) for c in (0, 2, 4, 6)]
      for r in (0, 2, 4)
    ]
    np.testing.assert_allclose(found.maps[number], expected, rtol=0, atol=1e-12)
  np.testing.assert_array_equal(found.classes, [2, 3])
  np.testing.assert_allclose(found.logits, model(images), rtol=0, atol=1e-12)


def test_fields_of_a_linear_network_are_its_kernels(x64):
  images = RNG.standard_normal((2, 8, 10, 3))
  places = np.array([[[0, 0], [2, 3]], [[1, 2], [0, 1]]])
  model = Linear()
  regions = visualize.attend(model, images, 1, places)
  kernel = np.abs(kernel_of_both(np.asarray(model.fc.kernel[:, 1]))).sum(axis=2)
  expected = np.zeros((2, 2, 8, 10))
  for (image, number), _ in np.ndenumerate(places[..., 0]):
    row, column = 2 * places[image, number]
    expected[image, number, row : row + 4, column : column + 4] = kernel / kernel.sum()
  np.testing.assert_allclose(regions.fields, expected, rtol=0, atol=1e-12)
  # Of features in place of a map: the sum over their channels.
  fields = visualize.effective_receptive_fields(lambda x: model.features(x)["c5"], images, [[1, 2]])
  kernel = np.abs(kernel_of_both(np.ones(2))).sum(axis=2)
  np.testing.assert_allclose(fields[1, 0, 2:6, 4:8], kernel / kernel.sum(), rtol=0, atol=1e-12)


def test_the_default_location_is_where_the_map_is_largest(x64):
  images = RNG.standard_normal((3, 8, 10, 3))
  regions = visualize.attend(Linear(), images)
  maps = np.asarray(regions.activation.maps)
  np.testing.assert_array_equal(regions.activation.classes, Linear()(images).argmax(axis=1))
  for one, (place,) in zip(maps, regions.locations, strict=True):
    assert one[tuple(place)] == one.max()
  np.testing.assert_allclose(np.asarray(regions.fields).sum(axis=(2, 3)), 1.0, atol=1e-12)


def test_nothing_moves_a_constant_map():
  images = jnp.ones((1, 4, 4, 3))
  fields = visualize.effective_receptive_fields(lambda x: 0 * x[..., 0], images, [[1, 1]])
  np.testing.assert_array_equal(fields, np.zeros((1, 1, 4, 4)))


def network(name, **options):
  """A network without negative weights: no ReLU is shut, and every gradient arrives."""
  model = lip_jax.create_model(name, num_classes=3, rngs=nnx.Rngs(0), **options)
  for _, variable in nnx.iter_graph(model):
    if isinstance(variable, nnx.Param):
      variable[...] = jnp.abs(variable[...])
  model.eval()
  return model


NETWORKS = [
  ("resnet_small", {"width": 2, "pool": "average"}),
  ("densenet121", {"width": 2, "growth": 2, "block_sizes": (1, 1, 1, 1), "pool": "average"}),
]


@pytest.mark.parametrize(("name", "options"), NETWORKS)
def test_networks(name, options):
  model = network(name, **options)
  images = jnp.asarray(RNG.uniform(0.5, 1, (1, 64, 64, 3)), jnp.float32)
  found = visualize.class_activation_maps(model, images)
  logits = np.asarray(visualize.predictor(model)(images))
  bias = np.asarray((model.fc if hasattr(model, "fc") else model.classifier).bias[...])
  labels = logits.argmax(axis=1)
  np.testing.assert_array_equal(found.classes, labels)
  mean = np.asarray(found.maps).mean(axis=(1, 2)) + bias[labels]
  np.testing.assert_allclose(mean, logits.max(axis=1), rtol=1e-5)

  # The pixels that a place sees lie around the pixel that its grid says.
  place = (3, 4)
  fields = jax.jit(
    lambda x: visualize.effective_receptive_fields(lambda y: model.features(y)["c3"], x, [place])
  )(images)
  rows, columns = np.nonzero(fields[0, 0])
  middle = ((rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2)
  grid = visualize.feature_grids(model)["c3"]
  assert middle == grid.centre(place)


def test_grids():
  three, two = lip_jax.lan.AveragePool(), lip_jax.lan.AveragePool(window=2, stride=2, padding=0)
  grid = Grid().through(three)
  assert grid == Grid((2, 2), (0, 0))
  assert grid.through(two).through(two) == Grid((8, 8), (3, 3))
  mixed = lip_jax.lan.AveragePool(window=(2, 3), stride=(2, 1), padding=(0, 0))
  assert Grid().through(mixed) == Grid((2, 1), (0.5, 1))
  # The second 2x2 window behind a stem of stride 2: half of a pixel of 2.
  dense = lip_jax.models.abstract_model("lip_resnet_small", width=2, structure="dense")
  assert visualize.layer_grids(dense)["layer3.0.pool"] == Grid((4, 4), (1, 1))
  assert visualize.feature_grids(dense)["c3"] == Grid((4, 4), (1, 1))
  assert visualize.layer_grids(Linear) == {}


def test_maps_land_on_their_pixels():
  grid = Grid((4, 2), (1.5, 0))
  rows, columns = 1.5 + 4 * np.arange(4.0), 2 * np.arange(3.0)
  placed = to_input(rows[:, None] + 100 * columns, grid, (16, 6))
  y, x = np.clip(np.arange(16.0), 1.5, 13.5), np.clip(np.arange(6.0), 0, 4)
  np.testing.assert_allclose(placed, y[:, None] + 100 * x, rtol=1e-12)
  nearest = to_input(np.arange(4.0)[:, None] + np.zeros((1, 3)), grid, (16, 6), "nearest")
  np.testing.assert_array_equal(nearest[:, 0], np.repeat(np.arange(4), 4))


def test_errors(x64):
  images = jnp.ones((2, 8, 8, 3))
  with pytest.raises(UsageError, match=r"class 4 is not .* expected 0 to 3"):
    visualize.class_activation_maps(Linear(), images, 4)
  with pytest.raises(UsageError, match="Conv has no class activation maps"):
    visualize.class_activation_maps(nnx.Conv(3, 3, (1, 1), rngs=nnx.Rngs(0)), images)
  with pytest.raises(ValueError, match="outside the map"):
    visualize.effective_receptive_fields(lambda x: x[..., 0], images, [[8, 0]])
  with pytest.raises(ValueError, match=r"\[L, 2\]"):
    visualize.effective_receptive_fields(lambda x: x[..., 0], images, [1, 2])
