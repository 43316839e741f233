import functools

import jax
import numpy as np
import pytest
from fixture_detection import OPERATIONS, PRESETS, loop_iou, random_boxes, reference

from lip_jax.detection import matching
from lip_jax.detection.anchors import ANCHORS
from lip_jax.detection.matching import RULES, Rule, match, match_proposals
from lip_jax.ops import boxes

TARGETS = OPERATIONS["targets"]
CASES = [case["name"] for case in TARGETS["cases"]]
PADDED = tuple(TARGETS["padded"])
MOST = 9  # ground truths, padded

encode = jax.jit(functools.partial(boxes.encode, stds=(1, 1, 1, 1)), static_argnames="inclusive")
matched = jax.jit(match, static_argnames="rule")
matched_proposals = jax.jit(match_proposals, static_argnames="preset")


def padded_truth(case):
  """(gts [MOST, 4], valid [MOST]), crowds and padding not valid; the latter overlaps anchors."""
  arrays = reference("targets")
  gts, crowd = arrays[f"{case}/gts"], arrays[f"{case}/crowd"]
  padding = np.tile([[0.0, 0, 31, 31]], (MOST - len(gts), 1))
  valid = np.concatenate([~crowd, np.zeros(len(padding), bool)])
  return np.concatenate([gts, padding]), valid


def loop_match(boxes, gts, valid, rule, usable):
  """One box and one ground truth at a time."""
  overlap = loop_iou(boxes, gts, rule.inclusive)
  truth = [g for g in range(len(gts)) if valid[g]]
  found, own = np.full(len(boxes), -1), np.full(len(boxes), -1)
  for a in range(len(boxes)):
    if not truth:
      continue
    own[a] = max(truth, key=lambda g, a=a: (overlap[a, g], -g))
    best = overlap[a, own[a]]
    found[a] = own[a] if best >= rule.positive else -1 if best < rule.negative else -2
  for g in truth:
    if rule.low_quality == "none" or not usable.any():
      break
    best = overlap[usable, g].max()
    for a in np.flatnonzero((overlap[:, g] == best) & (best >= rule.least)):
      found[a] = g if rule.low_quality == "override" else own[a]
  return np.where(usable, found, -3)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["retinanet", "rpn"])
def test_anchors_equal_the_reference(x64, kind, preset, dtype):
  arrays, anchors, rule = reference("targets"), ANCHORS[kind, preset], RULES[kind, preset]
  grids = [tuple(-(-side // stride) for side in PADDED) for stride in anchors.strides]
  candidates = anchors.boxes(PADDED, grids, dtype)
  usable = anchors.usable(TARGETS["size"], PADDED, grids)
  for case in CASES:
    gts, valid = padded_truth(case)
    found = np.asarray(matched(candidates, gts.astype(dtype), valid, rule=rule, usable=usable))
    np.testing.assert_array_equal(found, arrays[f"{case}/{kind}/{preset}/match"], err_msg=case)
    deltas = encode(candidates, gts[found], inclusive=rule.inclusive)[found >= 0][:300]
    np.testing.assert_allclose(deltas, arrays[f"{case}/{kind}/{preset}/deltas"], atol=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_proposals_equal_the_reference(x64, preset):
  arrays = reference("targets")
  for case in CASES:
    gts, valid = padded_truth(case)
    proposals = np.zeros((100, 4))
    count = len(arrays[f"{case}/proposals"])
    proposals[:count] = arrays[f"{case}/proposals"]
    candidates, found = map(
      np.asarray,
      matched_proposals(proposals, np.arange(100) < count, gts, valid, preset=preset),
    )
    used = found != matching.UNUSED
    truth = slice(MOST) if preset == "mmdet1" else slice(100, None)
    np.testing.assert_array_equal(used[truth], valid)
    np.testing.assert_array_equal(candidates[truth], gts)
    np.testing.assert_array_equal(found[used], arrays[f"{case}/rcnn/{preset}/match"], err_msg=case)


@pytest.mark.parametrize("rule", RULES.values(), ids=map("-".join, RULES))
def test_equals_a_loop(x64, rule):
  """Boxes off the grid of pixels, whose overlaps tie in all bits; more than one block of them."""
  for seed in range(2):
    rng = np.random.default_rng(seed)
    candidates, gts = random_boxes(seed, 150) / 3, random_boxes(seed + 10, 19) / 3
    candidates[:19:2] = gts[::2] + 0.1
    candidates[20:40:2] = gts[:10] - 0.1
    valid, usable = rng.uniform(size=19) < 0.7, rng.uniform(size=150) < 0.7
    found = matched(candidates, gts, valid, rule=rule, usable=usable)
    np.testing.assert_array_equal(found, loop_match(candidates, gts, valid, rule, usable))


@pytest.mark.parametrize("preset", PRESETS)
def test_of_nothing(preset):
  rule = RULES["retinanet", preset]
  candidates, gts = random_boxes(0, 20), random_boxes(1, 3)
  usable, everything, none = np.arange(20) < 15, np.ones(3, bool), np.zeros(3, bool)
  background = np.where(usable, -1, -3)
  for truth, valid in ((gts, none), (gts[:0], none[:0])):
    found = matched(candidates, truth, valid, rule=rule, usable=usable)
    np.testing.assert_array_equal(found, background)
  unused = np.zeros(20, bool)
  assert (matched(candidates, gts, everything, rule=rule, usable=unused) == -3).all()
  assert matched(candidates[:0], gts, everything, rule=rule).shape == (0,)


def test_truth_without_a_place_matches_nothing_above_the_threshold():
  gts = np.array([[np.nan] * 4, [5, 5, 5, 5], [0, 0, 20, 20]], np.float32)
  candidates = np.array([[0, 0, 20, 20], [0, 0, 19, 20], [50, 50, 60, 60]], np.float32)
  found = matched(candidates, gts, np.ones(3, bool), rule=Rule(0.5, 0.4))
  np.testing.assert_array_equal(found, [2, 2, -1])


def test_boxes_in_a_crowd():
  crowds = np.array([[0, 0, 20, 20], [40, 0, 60, 20], [0, 0, 99, 99]], np.float32)
  candidates = np.array(
    [[0, 0, 10, 10], [15, 0, 25, 10], [14, 0, 24, 10], [45, 5, 50, 9], [70, 70, 80, 80]],
    np.float32,
  )
  valid = np.array([True, True, False])
  found = jax.jit(matching.in_crowd)(candidates, crowds, valid)
  np.testing.assert_array_equal(found, [True, False, True, True, False])
  assert not matching.in_crowd(candidates, crowds[:0], valid[:0]).any()


def test_vmap_over_images_with_few_and_many_boxes():
  candidates = random_boxes(0, 50).astype(np.float32)
  gts = np.stack([random_boxes(seed, 20) for seed in range(3)]).astype(np.float32)
  valid = np.arange(20)[None] < np.array([[20], [2], [0]])
  rule = RULES["retinanet", "mmdet1"]
  one = functools.partial(match, rule=rule)
  together = jax.jit(jax.vmap(one, (None, 0, 0)))(candidates, gts, valid)
  for k in range(3):
    expected = loop_match(candidates, gts[k], valid[k], rule, np.ones(50, bool))
    np.testing.assert_array_equal(together[k], expected)


def test_memory_does_not_grow_with_the_ground_truth():
  """What one image of 800 x 1344 needs: anchors of all levels and 100 ground truths."""

  def temporaries(count):
    shapes = [((200_000, 4), np.float32), ((count, 4), np.float32), ((count,), bool)]
    arguments = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    lowered = matched.lower(*arguments, rule=RULES["retinanet", "mmdet1"])
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert temporaries(96) < 1.05 * temporaries(16)
