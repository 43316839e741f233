"""The authors' network, compiled as a user's process compiles it."""

from pathlib import Path

TESTS = Path(__file__).parents[1]

CODE = f"""
import json, sys
sys.path.insert(0, {str(TESTS)!r})
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from fixture_weights import image, weight
import lip_jax

spec = json.load(open({str(TESTS / "data" / "reference.json")!r}))["models"]["lip_resnet50"]
model = nnx.eval_shape(lambda: lip_jax.create_model("lip_resnet50", rngs=nnx.Rngs(0)))
lip_jax.load_torch_weights(model, {{k: weight(k, tuple(s)) for k, s in spec["state_dict"].items()}})
model.eval()
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
