"""The authors' network from a file of theirs, compiled as a user's process compiles it."""

from pathlib import Path

TESTS = Path(__file__).parents[1]

CODE = f"""
import collections, json, sys, tempfile
sys.path.insert(0, {str(TESTS)!r})
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from fixture_weights import image, weight
import lip_jax
from lip_jax.export.torch_convert import convert_weights

spec = json.load(open({str(TESTS / "data" / "reference.json")!r}))["models"]["lip_resnet50"]
weights = {{k: weight(k, tuple(s)) for k, s in spec["state_dict"].items()}}
with tempfile.TemporaryDirectory() as folder:
  try:  # as the authors' files are, where PyTorch is installed to write one
    import torch
    file = folder + "/lip_resnet50.pth"
    tensors = collections.OrderedDict((k, torch.tensor(v)) for k, v in weights.items())
    torch.save(tensors, file)
  except ImportError:
    file = folder + "/lip_resnet50.npz"
    np.savez(file, **weights)
  convert_weights(file, folder + "/out", model="lip_resnet50")
  model, config = lip_jax.load(folder + "/out")
assert config["class_names"][0] == "tench, Tinca tinca"
graph, state = nnx.split(model)
size = spec["eval"]["size"]
x = image(spec["eval"]["image"], (spec["eval"]["batch"], 3, size, size)).transpose(0, 2, 3, 1)
logits = jax.jit(lambda s, x: nnx.merge(graph, s, copy=True)(x))(state, jnp.asarray(x))
expected = np.load({str(TESTS / "data" / "lip_resnet50.npz")!r})["logits"]
print(np.abs(logits - expected).max() / np.abs(expected).max())
"""


def test_lip_resnet50_gives_the_authors_logits(training):
  """The other tests compile with less effort (conftest.py), which could hide a difference."""
  done = training.run_code(CODE)
  assert done.returncode == 0, done.stderr
  assert float(done.stdout) < 2e-5
