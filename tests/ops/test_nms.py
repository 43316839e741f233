import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_detection import OPERATIONS, loop_iou, random_boxes, reference

from lip_jax.ops import nms as module
from lip_jax.ops.nms import nms

NMS = OPERATIONS["nms"]


compiled = jax.jit(nms, static_argnames=("limit", "inclusive"))


def kept(result):
  """Indices as a list, after a look at the padding."""
  indices, valid = map(np.asarray, result)
  count = valid.sum()
  assert valid[:count].all()
  assert not indices[count:].any()
  return indices[:count].tolist()


def loop_nms(boxes, scores, labels, threshold, limit, valid, inclusive):
  overlap = loop_iou(boxes, boxes, inclusive)
  found = []
  for i in sorted(np.flatnonzero(valid), key=lambda i: (-scores[i], i)):
    if all(labels[i] != labels[j] or not overlap[i, j] > threshold for j in found):
      found.append(int(i))
  return found[:limit]


@pytest.mark.parametrize("inclusive", [False, True], ids=["exact", "inclusive"])
@pytest.mark.parametrize("case", [case["name"] for case in NMS["cases"]])
def test_equals_the_reference(x64, case, inclusive):
  arrays = reference("nms")
  boxes, scores, labels = (arrays[f"{case}/{name}"] for name in ("boxes", "scores", "labels"))
  for dtype in (np.float64, np.float32):  # exact thresholds, ties: the same in both
    for threshold in NMS["thresholds"]:
      for kind, classes in (("all", np.zeros_like(labels)), ("per_class", labels)):
        found = compiled(
          boxes.astype(dtype),
          scores.astype(dtype),
          classes,
          threshold=threshold,
          limit=250,
          inclusive=inclusive,
        )
        geometry = "inclusive" if inclusive else "exact"
        expected = arrays[f"{case}/{geometry}/{threshold}/{kind}"]
        assert kept(found) == expected.tolist(), (dtype, threshold, kind)


@pytest.mark.parametrize("limit", [1, 12, 64, 70])
def test_equals_a_loop_over_tiles(x64, monkeypatch, limit):
  """Several tiles, which end in the middle of one, or are more than the limit needs."""
  monkeypatch.setattr(module, "_TILE", 16)
  few = jax.jit(functools.partial(nms, threshold=0.3, limit=limit))
  for seed in range(3):
    rng = np.random.default_rng(seed)
    boxes, scores = random_boxes(seed, 61, 60.0), np.round(rng.uniform(size=61), 1)
    labels, valid = rng.integers(0, 2, 61), rng.uniform(size=61) < 0.8
    found = few(boxes, scores, labels, valid=valid)
    assert kept(found) == loop_nms(boxes, scores, labels, 0.3, limit, valid, False)


def test_a_chain_of_boxes_each_overlapping_the_next():
  """The first suppresses the second, which then spares the third, and so on."""
  start = np.arange(40, dtype=np.float32)
  boxes = np.stack([start, 0 * start, start + 3, 0 * start + 1], axis=1)
  found = compiled(boxes, -start, threshold=0.4, limit=40)
  assert kept(found) == list(range(0, 40, 2))


def test_stops_once_enough_are_kept(monkeypatch):
  """Boxes beyond are not looked at: the loop's rounds are counted."""
  monkeypatch.setattr(module, "_TILE", 8)
  rounds = []
  monkeypatch.setattr(
    module, "_greedy", lambda alive, suppresses: jax.debug.callback(rounds.append, 1) or alive
  )
  boxes = np.arange(64, dtype=np.float32)[:, None] * 10 + np.array([[0, 0, 5, 5]], np.float32)
  for limit, valid, expected in ((10, 64, 2), (64, 64, 8), (64, 20, 3), (64, 0, 0)):
    rounds.clear()
    run = jax.jit(functools.partial(nms, threshold=0.5, limit=limit))
    found = run(boxes, np.ones(64, np.float32), valid=np.arange(64) < valid)
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert kept(found) == list(range(min(limit, valid)))
    assert len(rounds) == expected


def test_padding_changes_nothing():
  boxes, scores = random_boxes(0, 50).astype(np.float32), np.linspace(1, 0, 50, dtype=np.float32)
  alone = kept(compiled(boxes, scores, threshold=0.3, limit=60))
  place = np.sort(np.random.default_rng(0).permutation(300)[:50])
  padded, high = np.zeros((300, 4), np.float32), np.full(300, 2, np.float32)
  padded[place], high[place] = boxes, scores
  padded[-1], high[-1] = [-1e9, -1e9, 1e9, 1e9], np.inf
  valid = np.zeros(300, bool)
  valid[place] = True
  valid[-1] = False
  wanted = [place[i] for i in alone if place[i] != 299]
  assert kept(compiled(padded, high, threshold=0.3, limit=60, valid=valid)) == wanted


def test_scores_and_boxes_that_are_not_numbers():
  boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 9], [50, 50, 60, 60], [np.nan] * 4], np.float32)
  scores = np.array([np.nan, 0.5, -np.inf, 0.9], np.float32)
  # What has no score is no candidate; what has no place overlaps nothing.
  assert kept(compiled(boxes, scores, threshold=0.5, limit=4)) == [3, 1, 2]


def test_zeros_of_either_sign_tie():
  boxes = np.zeros((4, 4), np.float32)
  found = compiled(boxes, np.array([-0.0, 0.0, -0.0, 1e-9], np.float32), threshold=0.5, limit=4)
  assert kept(found) == [3, 0, 1, 2]


def test_boxes_without_area_stay():
  """Their IoU is 0 / 0."""
  points = np.zeros((3, 4), np.float32)
  assert kept(compiled(points, np.arange(3.0), threshold=0.0, limit=3)) == [2, 1, 0]
  assert kept(compiled(points, np.arange(3.0), threshold=0.0, limit=3, inclusive=True)) == [2]


def test_nothing_to_keep():
  boxes, scores = np.zeros((5, 4), np.float32), np.zeros(5, np.float32)
  assert kept(compiled(boxes, scores, threshold=0.5, limit=3, valid=np.zeros(5, bool))) == []
  assert kept(compiled(boxes[:0], scores[:0], threshold=0.5, limit=3)) == []
  assert compiled(boxes[:0], scores[:0], threshold=0.5, limit=3)[0].shape == (3,)


def test_vmap_over_images_that_need_different_numbers_of_rounds(monkeypatch):
  monkeypatch.setattr(module, "_TILE", 16)
  boxes = np.stack([random_boxes(seed, 60) for seed in range(3)]).astype(np.float32)
  scores = np.random.default_rng(0).uniform(size=(3, 60)).astype(np.float32)
  valid = np.arange(60)[None] < np.array([[60], [3], [0]])
  one = functools.partial(nms, threshold=0.4, limit=25)
  indices, ok = jax.jit(jax.vmap(lambda b, s, v: one(b, s, valid=v)))(boxes, scores, valid)
  for k in range(3):
    expected = loop_nms(boxes[k], scores[k], np.zeros(60), 0.4, 25, valid[k], False)
    assert kept((indices[k], ok[k])) == expected


def test_scores_of_other_boxes_are_an_error():
  with pytest.raises(ValueError, match=r"3 boxes and scores of shape \(4,\); expected \(3,\)"):
    nms(np.zeros((3, 4)), np.zeros(4), threshold=0.5, limit=2)


def test_no_gradient_flows_through():
  def kept_scores(scores):
    boxes = jnp.stack([scores, scores, scores + 2, scores + 2], axis=-1)
    indices, valid = nms(boxes, scores, threshold=0.5, limit=4)
    return jnp.where(valid, scores[indices], 0).sum()

  gradient = jax.jit(jax.grad(kept_scores))(jnp.array([5.0, 5.1, 9.0, 1.0]))
  np.testing.assert_array_equal(gradient, [0, 1, 1, 1])
