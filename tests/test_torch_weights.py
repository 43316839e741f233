import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_weights import image, weight
from flax import nnx

import lip_jax
from lip_jax.errors import UsageError
from lip_jax.torch_weights import torch_names

DATA = Path(__file__).parent / "data"
REFERENCE = json.loads((DATA / "reference.json").read_text())["models"]


def abstract(name, **options):
  """The model without its weights: shapes only, and fast."""
  return nnx.eval_shape(lambda: lip_jax.create_model(name, rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize("name", ["lip_resnet50", "lip_densenet121"])
def test_reproduces_the_authors_network_at_224(name):
  model = abstract(name)
  lip_jax.load_torch_weights(
    model, {key: weight(key, tuple(shape)) for key, shape in REFERENCE[name]["state_dict"].items()}
  )
  model.eval()
  graph, state = nnx.split(model)
  spec = REFERENCE[name]["eval"]
  shape = (spec["batch"], 3, spec["size"], spec["size"])
  x = jnp.asarray(image(spec["image"], shape).transpose(0, 2, 3, 1))

  @jax.jit
  def run(state, x):
    model = nnx.merge(graph, state, copy=True)
    return model(x), model.features(x)

  logits, features = run(state, x)
  expected = np.load(DATA / f"{name}.npz")["logits"]
  np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
  ours = {"maxpool": "stem", "layer1": "c2", "layer2": "c3", "layer3": "c4", "layer4": "c5"}
  for stage, moments in REFERENCE[name].get("features", {}).items():
    feature = features[ours[stage]]
    n, c, height, width = moments["shape"]
    assert feature.shape == (n, height, width, c)
    np.testing.assert_allclose(feature.mean(), moments["mean"], rtol=1e-5)
    np.testing.assert_allclose(feature.std(ddof=1), moments["std"], rtol=1e-5)


@pytest.mark.parametrize("name", ["lip_resnet50", "lip_resnet101", "lip_densenet121"])
def test_names_and_shapes_are_the_authors(name):
  expected = {
    key: tuple(shape)
    for key, shape in REFERENCE[name]["state_dict"].items()
    if not key.endswith("num_batches_tracked")
  }
  ours = {}
  for key, variable in torch_names(abstract(name)):
    shape = variable.shape
    ours[key] = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
  assert ours == expected


def small_model():
  return lip_jax.create_model("resnet_small", width=2, num_classes=3, rngs=nnx.Rngs(0))


def small_state_dict():
  """Weights of the plain network under torchvision's names."""
  state_dict = {}
  for name, variable in torch_names(small_model()):
    shape = variable.shape
    if len(shape) == 4:
      shape = (shape[3], shape[2], *shape[:2])
    name = name.replace("downsample.conv.", "downsample.0.")
    name = name.replace("downsample.bn.", "downsample.1.")
    state_dict[name] = weight(name, shape[::-1] if len(shape) == 2 else shape)
  return state_dict


def test_torchvisions_names_for_plain_networks():
  state_dict = small_state_dict()
  assert {"layer2.0.conv2.weight", "layer2.0.downsample.0.weight"} <= set(state_dict)
  model = small_model()
  lip_jax.load_torch_weights(model, {f"module.{name}": v for name, v in state_dict.items()})
  np.testing.assert_array_equal(
    model.layer2[0].spatial.shortcut_conv.kernel[...],
    state_dict["layer2.0.downsample.0.weight"].transpose(2, 3, 1, 0),
  )
  np.testing.assert_array_equal(model.fc.kernel[...], state_dict["fc.weight"].T)
  np.testing.assert_array_equal(model.bn1.var[...], state_dict["bn1.running_var"])


def test_faults_are_listed_together_and_change_nothing():
  state_dict = small_state_dict()
  del state_dict["layer1.0.bn1.bias"]
  state_dict["layer9.weight"] = np.zeros(3)
  state_dict["fc.bias"] = np.zeros(4)
  model = small_model()
  before = nnx.to_pure_dict(nnx.state(model))
  with pytest.raises(UsageError) as caught:
    lip_jax.load_torch_weights(model, state_dict)
  message = str(caught.value)
  for part in (
    "3 faults",
    "missing layer1.0.bn1.bias",
    "unexpected layer9.weight",
    "shape of fc.bias is (4,), expected (3,)",
  ):
    assert part in message
  jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))
