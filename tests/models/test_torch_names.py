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
from lip_jax.models import abstract_model
from lip_jax.models.torch_names import torch_names

DATA = Path(__file__).parents[1] / "data"
REFERENCE = json.loads((DATA / "reference.json").read_text())["models"]


@pytest.mark.parametrize("name", ["lip_resnet50", "lip_densenet121"])
def test_reproduces_the_authors_network_at_224(name):
  model = abstract_model(name)
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
    return model(x), lip_jax.fold_batch_norm(model)(x), model.features(x)

  logits, folded, features = run(state, x)
  expected = np.load(DATA / f"{name}.npz")["logits"]
  for ours in (logits, folded):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
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
  for key, variable in torch_names(abstract_model(name)):
    shape = variable.shape
    ours[key] = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
  assert ours == expected


def torchvision_resnet(stage_sizes, convs, expansion):
  """Names and shapes of torchvision's ResNets, written down from its public documentation."""
  shapes = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
  features = 64
  for stage, blocks in enumerate(stage_sizes):
    width = 64 * 2**stage
    for block in range(blocks):
      name = f"layer{stage + 1}.{block}"
      out = width * expansion
      sizes = [features, *[width] * (convs - 1), out]
      for index in range(convs):
        side = 3 if convs == 2 or index == 1 else 1
        shapes[f"{name}.conv{index + 1}.weight"] = (sizes[index + 1], sizes[index], side, side)
        shapes |= norm(f"{name}.bn{index + 1}", sizes[index + 1])
      if block == 0 and (stage > 0 or features != out):
        shapes[f"{name}.downsample.0.weight"] = (out, features, 1, 1)
        shapes |= norm(f"{name}.downsample.1", out)
      features = out
  return {**shapes, "fc.weight": (1000, features), "fc.bias": (1000,)}


def torchvision_densenet(block_sizes, growth, features, *, dotted):
  """The same of its DenseNets; `dotted` as in its published weight files."""
  dot = "." if dotted else ""
  shapes = {"features.conv0.weight": (features, 3, 7, 7), **norm("features.norm0", features)}
  for index, layers in enumerate(block_sizes, start=1):
    for layer in range(1, layers + 1):
      name = f"features.denseblock{index}.denselayer{layer}"
      shapes |= norm(f"{name}.norm{dot}1", features)
      shapes[f"{name}.conv{dot}1.weight"] = (4 * growth, features, 1, 1)
      shapes |= norm(f"{name}.norm{dot}2", 4 * growth)
      shapes[f"{name}.conv{dot}2.weight"] = (growth, 4 * growth, 3, 3)
      features += growth
    if index < 4:
      name = f"features.transition{index}"
      shapes |= norm(f"{name}.norm", features)
      shapes[f"{name}.conv.weight"] = (features // 2, features, 1, 1)
      features //= 2
  shapes |= norm("features.norm5", features)
  return {**shapes, "classifier.weight": (1000, features), "classifier.bias": (1000,)}


def norm(name, features):
  kinds = ("weight", "bias", "running_mean", "running_var")
  return {f"{name}.{kind}": (features,) for kind in kinds} | {f"{name}.num_batches_tracked": ()}


TORCHVISION = {
  "resnet18": torchvision_resnet((2, 2, 2, 2), convs=2, expansion=1),
  "resnet34": torchvision_resnet((3, 4, 6, 3), convs=2, expansion=1),
  "resnet50": torchvision_resnet((3, 4, 6, 3), convs=3, expansion=4),
  "densenet121": torchvision_densenet((6, 12, 24, 16), 32, 64, dotted=False),
  "densenet161": torchvision_densenet((6, 12, 36, 24), 48, 96, dotted=False),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_plain_networks_have_torchvisions_names(name):
  model = abstract_model(name)
  shapes = TORCHVISION[name]
  lip_jax.load_torch_weights(model, {key: np.zeros(shape) for key, shape in shapes.items()})
  back = lip_jax.to_torch_state_dict(model)
  assert {key: value.shape for key, value in back.items()} == shapes


def test_names_of_torchvisions_published_densenets():
  shapes = torchvision_densenet((6, 12, 24, 16), 32, 64, dotted=True)
  state_dict = {key: weight(key, shape) for key, shape in shapes.items()}
  model = abstract_model("densenet121")
  lip_jax.load_torch_weights(model, state_dict)
  np.testing.assert_array_equal(
    model.denseblock2[3].conv2.kernel[...],
    state_dict["features.denseblock2.denselayer4.conv.2.weight"].transpose(2, 3, 1, 0),
  )


def small_model():
  return lip_jax.create_model("resnet_small", width=2, num_classes=3, rngs=nnx.Rngs(0))


def small_state_dict():
  """Weights of a small plain network under torchvision's names."""
  shapes = {key: value.shape for key, value in lip_jax.to_torch_state_dict(small_model()).items()}
  return {key: weight(key, shape) for key, shape in shapes.items()}


def test_a_prefix_and_what_lies_where():
  state_dict = small_state_dict()
  model = small_model()
  lip_jax.load_torch_weights(model, {f"module.{name}": v for name, v in state_dict.items()})
  np.testing.assert_array_equal(
    model.layer2[0].spatial.shortcut_conv.kernel[...],
    state_dict["layer2.0.downsample.0.weight"].transpose(2, 3, 1, 0),
  )
  np.testing.assert_array_equal(model.fc.kernel[...], state_dict["fc.weight"].T)
  np.testing.assert_array_equal(model.bn1.var[...], state_dict["bn1.running_var"])


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("lip_resnet_small", {"width": 2}),
    ("lip_resnet18", {"width": 2, "logit": "projection"}),
    ("resnet18", {"width": 2}),
    ("resnet50", {"width": 2, "stage_sizes": (1, 1, 1, 1), "pool": "dpp_full_asym"}),
    ("lip_densenet121", {"block_sizes": (1, 2, 1, 1), "growth": 2, "width": 4}),
    ("densenet121", {"block_sizes": (1, 2, 1, 1), "growth": 2, "width": 4, "pool": "exp"}),
  ],
  ids=str,
)
def test_there_and_back_is_exact(name, options):
  model = abstract_model(name, num_classes=3, logit_width=2, **options)
  shapes = {key: variable.shape for key, variable in torch_names(model)}
  zeros = {
    key: np.zeros((s[3], s[2], *s[:2]) if len(s) == 4 else s[::-1]) for key, s in shapes.items()
  }
  lip_jax.load_torch_weights(model, zeros)  # from shapes to arrays
  state_dict = {
    key: weight(key, value.shape) for key, value in lip_jax.to_torch_state_dict(model).items()
  }
  lip_jax.load_torch_weights(model, state_dict)
  back = lip_jax.to_torch_state_dict(model)
  assert back.keys() == state_dict.keys()
  for key, value in state_dict.items():
    np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_faults_are_listed_together_and_change_nothing():
  state_dict = small_state_dict()
  del state_dict["layer1.0.bn1.bias"]
  state_dict["layer9.weight"] = np.zeros(3)
  state_dict["fc.bias"] = np.zeros(4)
  state_dict["conv1.weight"] = np.zeros((2, 3, 7, 7))
  state_dict["module.bn1.bias"] = np.zeros(2)
  model = small_model()
  before = nnx.to_pure_dict(nnx.state(model))
  with pytest.raises(UsageError) as caught:
    lip_jax.load_torch_weights(model, state_dict)
  message = str(caught.value)
  for part in (
    "5 faults",
    "bn1.bias twice, the second time as module.bn1.bias",
    "shape of conv1.weight is (2, 3, 7, 7), expected (2, 3, 3, 3)",
    "missing layer1.0.bn1.bias",
    "unexpected layer9.weight",
    "shape of fc.bias is (4,), expected (3,)",
  ):
    assert part in message
  jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))
