"""Networks of other depths, widths and image sizes than the fixtures', against PyTorch."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_weights import image, weight
from flax import nnx

import lip_jax
from lip_jax.models import abstract_model

pytest.importorskip("torch")
import torch
import torch_reference

DATA = Path(__file__).parents[1] / "data"
REFERENCE = json.loads((DATA / "reference.json").read_text())["models"]
NETWORKS = {"resnet": torch_reference.ResNet, "densenet": torch_reference.DenseNet}


def reference(name):
  return next(network for key, network in NETWORKS.items() if key in name)


@pytest.mark.parametrize("name", ["lip_resnet50", "lip_densenet121"])
def test_the_reference_is_the_authors_network(name):
  spec = REFERENCE[name]["eval"]
  shapes = REFERENCE[name]["state_dict"]
  network = reference(name)({key: weight(key, tuple(shape)) for key, shape in shapes.items()})
  x = image(spec["image"], (spec["batch"], 3, spec["size"], spec["size"]))
  logits = network(torch.as_tensor(x)).numpy()
  expected = np.load(DATA / f"{name}.npz")["logits"]
  np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
  ("name", "options", "size"),
  [
    ("lip_resnet50", {"stage_sizes": (1, 2, 1, 3), "width": 16, "logit_width": 64}, (97, 130)),
    ("lip_resnet101", {"stage_sizes": (1, 1, 3, 1), "width": 8, "logit_width": 256}, (63, 64)),
    ("lip_densenet169", {"block_sizes": (1, 3, 2, 1), "growth": 8, "width": 16}, (75, 98)),
    (
      "lip_densenet161",
      {"block_sizes": (2, 1, 1, 2), "growth": 12, "width": 24, "logit_width": 64},
      (64, 111),
    ),
    ("lip_resnet34", {"stage_sizes": (1, 2, 1, 1), "width": 16, "logit_width": 32}, (65, 94)),
    ("resnet18", {"stage_sizes": (1, 1, 2, 1), "width": 8}, (97, 64)),
    ("resnet50", {"stage_sizes": (1, 2, 1, 1), "width": 8}, (64, 71)),
    ("densenet121", {"block_sizes": (1, 2, 1, 1), "growth": 8, "width": 16}, (66, 97)),
  ],
  ids=str,
)
def test_equals_pytorch_in_float64(name, options, size, training, x64):
  """The parity test's weights and inputs are made as the fixtures' are."""
  dtype = jnp.float64
  model = abstract_model(name, num_classes=11, dtype=dtype, **options)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nnx.state(model))
  nnx.update(model, zeros)
  shapes = {key: value.shape for key, value in lip_jax.to_torch_state_dict(model).items()}
  weights = {key: weight(key, shape).astype(np.float64) for key, shape in shapes.items()}
  lip_jax.load_torch_weights(model, weights)
  model.train() if training else model.eval()
  graph, state = nnx.split(model)
  x = image(f"parity/{name}", (4, 3, *size)).astype(np.float64)
  run = jax.jit(lambda state, x: nnx.merge(graph, state, copy=True)(x))
  logits = run(state, jnp.asarray(x.transpose(0, 2, 3, 1)))
  expected = reference(name)(weights, training=training)(torch.as_tensor(x)).numpy()
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
