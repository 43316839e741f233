import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lip_jax
from lip_jax import visualize
from lip_jax.models.logit_modules import GATE
from lip_jax.ops.windows import make_geometry, taps


def small(**options):
  model = lip_jax.create_model(
    "lip_resnet_small", width=4, logit_width=4, num_classes=3, rngs=nnx.Rngs(0), **options
  )
  model.eval()
  return model


@pytest.fixture(scope="module")
def model():
  return small()


@pytest.fixture(scope="module")
def trained(model):
  """A stem that finds some pixels more important than others."""
  trained = nnx.clone(model)
  kernel = trained.pool.logits.conv.kernel
  kernel[...] = jnp.asarray(np.random.default_rng(1).standard_normal(kernel.shape), jnp.float32)
  return trained


def images(n=2):
  return jnp.asarray(np.random.default_rng(0).standard_normal((n, 32, 32, 3)), jnp.float32)


def test_one_map_for_each_lip_layer_at_its_resolution(model):
  maps = visualize.importance_maps(model, images())
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


def test_maps_are_the_mean_of_exp_of_the_gated_logits(trained):
  logits = trained.pool.logits
  x = images()
  stem = nnx.relu(trained.bn1(trained.conv1(x)))
  gated = GATE / (1 + np.exp(-np.asarray(logits.norm(logits.conv(stem)), np.float64)))
  expected = np.exp(gated).mean(axis=3)
  expected /= expected.mean(axis=(1, 2), keepdims=True)
  maps = visualize.importance_maps(trained, x)
  np.testing.assert_allclose(maps["pool"], expected, rtol=1e-3)


def test_window_importance_sums_to_one_and_is_what_the_layer_pools_with(trained):
  x = images()
  importance = visualize.window_importance(trained, x)
  assert len(importance) == 7
  for shares in importance.values():
    assert (shares >= 0).all()
    np.testing.assert_allclose(shares.sum(axis=3), 1.0, rtol=1e-6)
  stem = nnx.relu(trained.bn1(trained.conv1(x)))
  pixels = jnp.stack(taps(stem, make_geometry(stem, 3, 2, 1), 0.0), axis=3)
  pooled = (importance["pool"] * pixels).sum(axis=3)
  np.testing.assert_allclose(pooled, trained.pool(stem), rtol=1e-4, atol=1e-5)
  assert importance["pool"].std() > 0.05


def test_pixel_importance_is_the_geometric_mean_of_the_layers(model):
  maps = {
    "pool": jnp.full((1, 32, 32), 2.0),
    "layer2.0.spatial.residual_pool": jnp.full((1, 16, 16), 8.0),
    "layer2.0.spatial.shortcut_pool": jnp.full((1, 16, 16), 1e6),  # does not count
  }
  found = visualize.pixel_importance(maps, model, (32, 32))
  np.testing.assert_allclose(found, np.full((1, 32, 32), 4.0), rtol=1e-6)
  maps["pool"] = maps["pool"].at[0, 6, 10].set(200.0)
  found = visualize.pixel_importance(maps, model, (32, 32))
  np.testing.assert_allclose(found[0, 6, 10], 40.0, rtol=1e-6)
  assert visualize.pixel_importance({}, model, (32, 32)) is None


def test_the_picture_is_a_png(trained, tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  path = tmp_path / "importance.png"
  assert visualize.draw_importance(
    trained, pixels, lambda x: jnp.asarray(x / 255, jnp.float32), path
  )
  assert path.read_bytes().startswith(b"\x89PNG")


def test_a_figure_as_an_array():
  curve = visualize.Curve("LIP", "", [0, 1], [0, 1])
  figure = visualize.curves_figure([visualize.Plot("title", "x", "y", [curve])])
  array = visualize.figure_to_array(figure)
  width, height = figure.get_size_inches() * figure.dpi
  assert (array.dtype, array.shape) == (np.uint8, (round(height), round(width), 3))
  assert (array == (0x00, 0x72, 0xB2)).all(axis=2).any()  # the line


def test_a_dollar_sign_in_a_name_is_no_formula(tmp_path):
  images, maps, name = np.zeros((1, 8, 8, 3), np.uint8), np.ones((1, 8, 8)), r"$\frac{$"
  column = visualize.Column(name, maps, maps, maps[:, None], np.zeros((1, 1, 2)), [name])
  visualize.save_figure(visualize.comparison_figure(images, [column], [name]), tmp_path / "a.svg")
  plot = visualize.Plot("title", "x", "y", [visualize.Curve(name, "", [1, 2], [1, 2])])
  visualize.save_figure(visualize.curves_figure([plot]), tmp_path / "b.svg")
  assert all(name in (tmp_path / file).read_text() for file in ("a.svg", "b.svg"))


def test_names_in_any_script_are_drawn_without_a_warning(tmp_path):
  """Warnings are errors here, and no font for these need be installed."""
  name = "貓 گربه बिल्ली 고양이 🐈"
  plot = visualize.Plot(name, "x", "y", [visualize.Curve(name, "", [1, 2], [1, 2])])
  figure = visualize.curves_figure([plot])
  visualize.save_figure(figure, tmp_path / "a.png")
  assert visualize.figure_to_array(figure).min() < 200
  boxes = visualize.Boxes(np.array([[2.0, 2, 30, 30]]), np.array([0]), np.array([0.9]))
  picture = visualize.Picture(name, np.zeros((64, 64, 3), np.uint8), {name: boxes})
  visualize.save_figure(visualize.boxes_figure([picture], [name]), tmp_path / "b.png")
  assert (tmp_path / "b.png").stat().st_size > 1000


def test_a_network_without_lip_has_nothing_to_draw(tmp_path):
  pixels = np.zeros((1, 32, 32, 3), np.uint8)
  path = tmp_path / "x.png"
  model = small(pool="max")
  assert not visualize.draw_importance(model, pixels, lambda x: jnp.asarray(x, jnp.float32), path)
  assert not path.exists()
