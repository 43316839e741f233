"""ResNeXts, and ResNets with deformable layers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_detection import DATA, nhwc
from fixture_detectors import image, weight
from flax import nnx

import lip_jax
from lip_jax.errors import UsageError
from lip_jax.models import abstract_model
from lip_jax.models.layers import DeformableConv
from lip_jax.models.torch_names import torch_names

BACKBONES = json.loads((DATA / "backbones.json").read_text())
TINY = {"width": 8, "stage_sizes": (1, 2, 2, 1), "num_classes": 3, "logit_width": 8}


def create(name, **options):
  return lip_jax.create_model(name, rngs=nnx.Rngs(0), **{**TINY, **options})


def images(size=64):
  return jnp.asarray(np.random.default_rng(0).standard_normal((2, size, size, 3)), jnp.float32)


@pytest.mark.parametrize("name", ["resnext101_64x4d", "lip_resnet101_md"])
def test_names_and_shapes_are_the_originals(name):
  expected = {
    key: tuple(shape)
    for key, shape in BACKBONES[name]["state_dict"].items()
    if not key.endswith("num_batches_tracked")
  }
  ours = {}
  for key, variable in torch_names(abstract_model(name, num_classes=0)):
    shape = variable.shape
    ours[key] = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
  if not name.startswith("lip"):
    ours = {
      key.replace("downsample.conv", "downsample.0").replace("downsample.bn", "downsample.1"): shape
      for key, shape in ours.items()
    }
  assert ours == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnext101_64x4d", "lip_resnet101_md"])
def test_features_are_the_originals(name, x64):
  spec, stored = BACKBONES[name], np.load(DATA / "backbones.npz")
  model = abstract_model(name, num_classes=0, dtype=jnp.float64)
  weights = {
    key: weight(key, tuple(shape), spec.get("rules", ()))
    for key, shape in spec["state_dict"].items()
  }
  lip_jax.load_torch_weights(model, weights)
  model.eval()
  graph, state = nnx.split(model)
  x = jnp.asarray(nhwc(image(spec["image"], *spec["size"])[None]), jnp.float64)
  features = jax.jit(lambda state, x: nnx.merge(graph, state, copy=True).features(x))(state, x)
  for stage in ("c2", "c3", "c4", "c5"):
    moments = spec["features"][stage]
    np.testing.assert_allclose(features[stage].mean(), moments["mean"], rtol=1e-8)
    step = 1 if stage == "c5" else 4
    channels = 16 if stage == "c5" else 32
    found = features[stage][0, ::step, ::step, ::channels].transpose(2, 0, 1)
    expected = stored[f"{name}/{stage}"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8 * np.abs(expected).max())


def test_deformable_layers_are_those_with_3x3_windows():
  model = abstract_model("lip_resnet101_md", num_classes=0)
  deformable = [part for _, part in nnx.iter_modules(model) if isinstance(part, DeformableConv)]
  assert len(deformable) == 27
  plain = abstract_model("resnet50", deformable_stages=("c5",))
  assert sum(isinstance(part, DeformableConv) for _, part in nnx.iter_modules(plain)) == 3


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("lip_resnet101_md", {}),
    ("resnet50", {"deformable_stages": ("c3", "c4", "c5")}),
    ("resnet18", {"deformable_stages": ("c4",)}),
    ("resnext50_32x4d", {"groups": 2, "group_width": 4, "deformable_stages": ("c4",)}),
  ],
  ids=["lip", "bottleneck", "basic", "groups"],
)
def test_offsets_of_zero_are_a_convolution(name, options):
  model = create(name, **options)
  plain = create(name, **{**options, "deformable_stages": ()})
  weights = lip_jax.to_torch_state_dict(model)
  offsets = [key for key in weights if "_offset." in key]
  assert offsets
  assert not any(weights[key].any() for key in offsets)
  lip_jax.load_torch_weights(
    plain, {key: value for key, value in weights.items() if key not in offsets}
  )
  model.eval(), plain.eval()

  @jax.jit
  def run(model, plain, x):
    return model(x), plain(x)

  ours, expected = run(model, plain, images())
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_offsets_learn():
  model = create("lip_resnet101_md")
  graph, params, others = nnx.split(model, nnx.Param, ...)

  @jax.jit
  def gradient(params):
    return jax.grad(
      lambda params: (nnx.merge(graph, params, others, copy=True)(images()) ** 2).sum()
    )(params)

  found = gradient(params)["layer2"][1]["spatial"]["residual_conv"]["offset"]
  assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"deformable_stages": ("c2",)}, "c3, c4, c5"),
    ({"groups": 3}, "cannot be divided into 3 groups"),
    ({"groups": 2, "block": "basic"}, "'bottleneck'"),
    ({"groups": 0}, "groups must be"),
  ],
)
def test_what_cannot_be(options, named):
  with pytest.raises(UsageError, match=named):
    abstract_model("resnet50", **{**TINY, **options})
