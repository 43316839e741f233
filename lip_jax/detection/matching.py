"""Assignment of ground truth to anchors and proposals, by their overlap."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from lip_jax.detection.anchors import Preset
from lip_jax.ops import boxes as box_ops

BACKGROUND, BETWEEN, UNUSED = -1, -2, -3

_GTS_AT_A_TIME = 8


@dataclasses.dataclass(frozen=True)
class Rule:
  """Which overlaps, as intersection over union, make a box positive or background.

  `low_quality` is what happens to all boxes that share the best overlap of a ground truth, however
  low it is, so that every object trains something:

  - "none": nothing.
  - "own_best" (torchvision): each takes the ground truth that it overlaps most itself.
  - "override" (mmdetection 0.6): they take that ground truth, if its best overlap is `least` or
    more. The ground truth of a higher index overrides.
  """

  positive: float  # at least
  negative: float  # less
  low_quality: Literal["none", "own_best", "override"] = "none"
  least: float = 0.0
  inclusive: bool = False  # whether x2 and y2 are last pixels


# By what is matched ("rcnn": the proposals of the second stage) and preset.
RULES: dict[tuple[str, str], Rule] = {
  ("retinanet", "mmdet1"): Rule(0.5, 0.4, "override", 0.0, inclusive=True),
  ("retinanet", "torchvision"): Rule(0.5, 0.4, "own_best"),
  ("rpn", "mmdet1"): Rule(0.7, 0.3, "override", 0.3, inclusive=True),
  ("rpn", "torchvision"): Rule(0.7, 0.3, "own_best"),
  ("rcnn", "mmdet1"): Rule(0.5, 0.5, "override", 0.5, inclusive=True),
  ("rcnn", "torchvision"): Rule(0.5, 0.5),
}


def match(
  boxes: ArrayLike,
  gts: ArrayLike,
  gts_valid: ArrayLike,
  *,
  rule: Rule,
  usable: ArrayLike | None = None,
) -> jax.Array:
  """The ground truth of each box: [A] int32, an index into gts or what else becomes of it.

  That is -1 (`BACKGROUND`), -2 (`BETWEEN` the thresholds) or -3 (`UNUSED`). Of two ground truths
  with the same overlap a box takes the lower index. Without any, all is background.

  Memory is that of a few arrays of A, not of A x G. No gradient flows through.

  Args:
    boxes: [A, 4], x1, y1, x2, y2.
    gts: [G, 4], of one image, padded.
    gts_valid: [G] bool, False for padding, and for what should count as background (crowds).
    usable: [A] bool, False for boxes that take no part; None: all do.
  """
  boxes, gts = lax.stop_gradient((jnp.asarray(boxes), jnp.asarray(gts)))
  gts_valid = jnp.asarray(gts_valid, bool)
  usable = jnp.ones(len(boxes), bool) if usable is None else jnp.asarray(usable, bool)
  if not len(gts) or not len(boxes):
    return jnp.where(usable, BACKGROUND, UNUSED).astype(jnp.int32)

  best, best_gt, shared = _scan(boxes, gts, gts_valid, usable, rule)
  # Compared in the precision of the overlaps.
  found = jnp.where(best < rule.negative, BACKGROUND, BETWEEN)
  found = jnp.where(best >= rule.positive, best_gt, found)
  if rule.low_quality == "override":
    found = jnp.where(shared >= 0, shared, found)
  elif rule.low_quality == "own_best":
    found = jnp.where(shared >= 0, best_gt, found)
  return jnp.where(usable, found, UNUSED).astype(jnp.int32)


def match_proposals(
  proposals: ArrayLike,
  proposals_valid: ArrayLike,
  gts: ArrayLike,
  gts_valid: ArrayLike,
  *,
  preset: Preset,
) -> tuple[jax.Array, jax.Array]:
  """Candidates of the second stage and their ground truth: proposals, and the ground truth itself.

  Preset torchvision: proposals, then ground truth, matched alike. Preset mmdet1: ground truth, each
  its own match, then proposals, matched alone.

  Args:
    proposals: [P, 4].
    proposals_valid: [P] bool, False for padding.
    gts: [G, 4].
    gts_valid: [G] bool.

  Returns:
    (boxes [P + G, 4], match [P + G] as of `match`, -3 for padding).
  """
  rule = RULES["rcnn", preset]
  gts_valid, proposals_valid = jnp.asarray(gts_valid, bool), jnp.asarray(proposals_valid, bool)
  if preset == "torchvision":
    candidates = jnp.concatenate([jnp.asarray(proposals), jnp.asarray(gts)])
    usable = jnp.concatenate([proposals_valid, gts_valid])
    return candidates, match(candidates, gts, gts_valid, rule=rule, usable=usable)
  own = jnp.where(gts_valid, jnp.arange(len(gts_valid), dtype=jnp.int32), UNUSED)
  found = match(proposals, gts, gts_valid, rule=rule, usable=proposals_valid)
  candidates = jnp.concatenate([jnp.asarray(gts), jnp.asarray(proposals)])
  return candidates, jnp.concatenate([own, found])


def in_crowd(
  boxes: ArrayLike,
  crowds: ArrayLike,
  crowds_valid: ArrayLike,
  *,
  threshold: float = 0.5,
  inclusive: bool = False,
) -> jax.Array:
  """Which boxes lie in a crowd by more than a share of their area: [A] bool.

  What to take out of `usable`, so that objects nobody outlined are not trained to be background.
  mmdetection 0.6, and so the paper, counts such boxes as background.

  Args:
    boxes: [A, 4].
    crowds: [G, 4], of one image, padded.
    crowds_valid: [G] bool.
    threshold: the largest share that a box in use may have in one crowd.
    inclusive: whether x2 and y2 are last pixels.
  """
  boxes, crowds = lax.stop_gradient((jnp.asarray(boxes), jnp.asarray(crowds)))

  def add(found, crowd):
    outline, valid = crowd
    share = box_ops.coverage(boxes, outline[None], inclusive=inclusive)[:, 0]
    return found | (valid & (share > threshold)), None

  return lax.scan(add, jnp.zeros(len(boxes), bool), (crowds, jnp.asarray(crowds_valid, bool)))[0]


def _scan(boxes, gts, gts_valid, usable, rule):
  """(best overlap, its ground truth, last ground truth whose best overlap is shared or -1): [A].

  A box shares a ground truth's best overlap if the two numbers are equal. Computed twice, in two
  fusions of the compiler, they may differ in the last bit; so each block of overlaps is computed
  once, into the state of a loop of unknown length, and all comparisons read it from there.
  """
  size = min(_GTS_AT_A_TIME, len(gts))
  # A round more than there are blocks: each reads one block and computes the next.
  pad = -len(gts) % size + size
  gts = jnp.pad(gts, ((0, pad), (0, 0)))
  gts_valid = jnp.pad(gts_valid, (0, pad))
  count = jnp.where(gts_valid, jnp.arange(1, len(gts_valid) + 1, dtype=jnp.int32), 0).max()

  def overlaps(start):
    block, valid = (lax.dynamic_slice_in_dim(array, start, size) for array in (gts, gts_valid))
    found = box_ops.iou(block, boxes, inclusive=rule.inclusive)
    return jnp.where(valid[:, None] & usable[None, :], found, -1)

  def step(state):
    start, block, best, best_gt, shared = state
    block_best = block.max(axis=0)
    better = block_best > best
    best = jnp.where(better, block_best, best)
    best_gt = jnp.where(better, start + block.argmax(axis=0).astype(jnp.int32), best_gt)
    best_of_gt = block.max(axis=1, keepdims=True)
    ties = (block == best_of_gt) & (best_of_gt >= rule.least)
    index = start + jnp.arange(size, dtype=jnp.int32)[:, None]
    shared = jnp.maximum(shared, jnp.where(ties, index, -1).max(axis=0))
    return start + size, overlaps(start + size), best, best_gt, shared

  first = overlaps(0)
  nothing = jnp.full(len(boxes), -1, jnp.int32)
  state = (jnp.zeros((), jnp.int32), first, jnp.full(len(boxes), -1, first.dtype), nothing, nothing)
  _, _, best, best_gt, shared = lax.while_loop(lambda state: state[0] < count, step, state)
  return best, best_gt, shared
