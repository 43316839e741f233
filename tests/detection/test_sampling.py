import functools

import jax
import numpy as np
import pytest
from fixture_detection import OPERATIONS, PRESETS, priority, reference

from lip_jax.detection.sampling import sample

TARGETS = OPERATIONS["targets"]
CASES = [case["name"] for case in TARGETS["cases"]]

sampled = jax.jit(sample, static_argnames=("size", "positive_fraction"))


def parts(found):
  """(positives, background) as lists, after a look at the rest."""
  indices, positive, valid = map(np.asarray, found)
  assert not indices[~valid].any()
  assert valid[: valid.sum()].all()
  assert positive[: positive.sum()].all()
  assert not positive[~valid].any()
  return indices[positive].tolist(), indices[valid & ~positive].tolist()


def loop_sample(matches, priorities, size, fraction):
  def smallest(candidates, limit):
    return sorted(sorted(candidates, key=lambda i: (priorities[i], i))[:limit])

  positive = smallest(np.flatnonzero(matches >= 0).tolist(), int(size * fraction))
  background = np.flatnonzero(matches == -1).tolist()
  return positive, smallest(background, size - len(positive))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["rpn", "rcnn"])
def test_equals_the_reference(kind, preset):
  arrays = reference("targets")
  size, fraction = TARGETS[f"{kind}_sample"]
  for case in CASES:
    matches = arrays[f"{case}/{kind}/{preset}/match"]
    priorities = priority(f"targets/{case}/{kind}/{preset}", len(matches))
    padded = (0, 0 if kind == "rpn" else 110 - len(matches))  # one compilation
    found = sampled(
      np.pad(matches, padded, constant_values=-3),
      np.pad(priorities, padded, constant_values=-9),
      size=size,
      positive_fraction=fraction,
    )
    names = (f"{case}/{kind}/{preset}/{group}" for group in ("positive", "negative"))
    assert parts(found) == tuple(arrays[name].tolist() for name in names), case


@pytest.mark.parametrize(
  ("size", "fraction"), [(8, 0.5), (16, 0.25), (60, 0.5), (7, 0.0), (5, 1.0)]
)
def test_equals_a_loop(size, fraction):
  """Ties, too few of either kind, more places than boxes."""
  for seed, share in enumerate((0.0, 0.1, 0.6, 1.0)):
    rng = np.random.default_rng(seed)
    matches = np.where(rng.uniform(size=40) < share, 3, rng.integers(-3, 0, 40))
    priorities = np.round(rng.normal(size=40), 1).astype(np.float32)
    found = sampled(matches, priorities, size=size, positive_fraction=fraction)
    assert found.indices.shape == (size,)
    assert parts(found) == loop_sample(matches, priorities, size, fraction)


def test_priorities_that_are_not_finite_are_last():
  matches = np.array([-2, 0, 0, -3, 0, -1])
  priorities = np.array([0, np.inf, np.nan, 0, 1, -np.inf], np.float32)
  found = sampled(matches, priorities, size=4, positive_fraction=0.5)
  assert parts(found) == ([1, 4], [5])


def test_of_nothing():
  assert parts(sampled(np.full(3, -2), np.zeros(3), size=4, positive_fraction=0.5)) == ([], [])
  empty = sampled(np.zeros(0, int), np.zeros(0), size=4, positive_fraction=0.5)
  assert parts(empty) == ([], [])


def test_vmap():
  rng = np.random.default_rng(0)
  matches, priorities = rng.integers(-3, 2, (3, 30)), rng.uniform(size=(3, 30))
  found = jax.vmap(functools.partial(sample, size=8, positive_fraction=0.5))(matches, priorities)
  for k in range(3):
    assert parts([one[k] for one in found]) == loop_sample(matches[k], priorities[k], 8, 0.5)
