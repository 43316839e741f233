"""Non-maximum suppression in tiles, with fixed shapes."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from lip_jax.ops import whole
from lip_jax.ops.boxes import iou

_TILE = 256  # boxes at a time


def nms(
  boxes: ArrayLike,
  scores: ArrayLike,
  labels: ArrayLike | None = None,
  *,
  threshold: float,
  limit: int,
  valid: ArrayLike | None = None,
  inclusive: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Indices of the boxes that no better box of their class overlaps by more than the threshold.

  Greedy, from the highest score down; of equal scores the lower index goes first. An IoU equal to
  the threshold (in the dtype of the boxes) does not suppress, nor does one of 0 / 0 or NaN.

  The boxes are taken in tiles, until `limit` are kept or none is left: memory grows with
  N + tile * limit, and so does time when few are wanted. No gradient flows through.

  Args:
    boxes: [N, 4], x1, y1, x2, y2.
    scores: [N]. Boxes whose score is NaN are left out.
    labels: [N] integers, the classes, compared as they are; None: all are of one class.
    threshold: the largest IoU that two kept boxes of one class may have.
    valid: [N] bool, False for padding, which is neither kept nor suppresses; None: all count.
    inclusive: whether x2 and y2 are last pixels.

  Returns:
    (indices [limit] int32 by decreasing score, valid [limit] bool). Indices that are not valid are
    0 and come last.

  Raises:
    ValueError: boxes and scores that do not match.
  """
  boxes, scores = lax.stop_gradient((jnp.asarray(boxes), jnp.asarray(scores)))
  count = len(boxes)
  if scores.shape != (count,):
    raise ValueError(f"{count} boxes and scores of shape {scores.shape}; expected ({count},)")
  labels = jnp.zeros(count, jnp.int32) if labels is None else jnp.asarray(labels)
  usable = ~jnp.isnan(scores)
  if valid is not None:
    usable &= jnp.asarray(valid)
  rules = {"threshold": threshold, "limit": limit, "inclusive": inclusive}
  return whole.call("nms", functools.partial(_nms, **rules), boxes, scores, labels, usable, **rules)


def _nms(boxes, scores, labels, usable, *, threshold, limit, inclusive):
  """`nms` of boxes that are usable."""
  count = len(boxes)
  if not count:
    return jnp.zeros(limit, jnp.int32), jnp.zeros(limit, bool)
  size = min(_TILE, count)
  # Padding takes the places of boxes that are not usable, after those that are.
  order = jnp.pad(_by_decreasing_score(scores, usable), (0, -count % size))
  boxes = boxes.astype(jnp.promote_types(boxes.dtype, jnp.float32))
  found, kept = _suppress(
    boxes, labels, order, usable.sum(dtype=jnp.int32), size, min(limit, count), threshold, inclusive
  )
  found = jnp.pad(found, (0, limit - len(found)))
  return found, jnp.arange(limit, dtype=jnp.int32) < kept


def _by_decreasing_score(scores: jax.Array, usable: jax.Array) -> jax.Array:
  """Indices of usable boxes by decreasing score, lower index first, then those of all others."""
  scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
  index = jnp.arange(len(scores), dtype=jnp.int32)
  return lax.sort((~usable, -scores, index), num_keys=2, is_stable=True)[-1]


def _suppress(boxes, labels, order, usable, size, capacity, threshold, inclusive):
  """The greedy pass over tiles of boxes in order -> (indices [capacity], how many are kept)."""
  threshold = jnp.asarray(threshold, boxes.dtype)
  earlier = jnp.tri(size, k=-1, dtype=bool)  # [i, j]: j comes before i

  def overlaps(a, a_labels, b, b_labels):
    same = a_labels[:, None] == b_labels[None, :]
    return (iou(a, b, inclusive=inclusive) > threshold) & same

  def unfinished(state):
    start, kept, *_ = state
    return (start < usable) & (kept < capacity)

  def step(state):
    start, kept, kept_boxes, kept_labels, found = state
    tile_order = lax.dynamic_slice_in_dim(order, start, size)
    tile, tile_labels = boxes[tile_order], labels[tile_order]
    by_kept = overlaps(tile, tile_labels, kept_boxes, kept_labels)
    by_kept &= (jnp.arange(capacity) < kept)[None, :]
    alive = (start + jnp.arange(size, dtype=jnp.int32) < usable) & ~by_kept.any(axis=1)
    alive = _greedy(alive, overlaps(tile, tile_labels, tile, tile_labels) & earlier)
    place = jnp.where(alive, kept + jnp.cumsum(alive, dtype=jnp.int32) - 1, capacity)
    kept_boxes = kept_boxes.at[place].set(tile, mode="drop")
    kept_labels = kept_labels.at[place].set(tile_labels, mode="drop")
    found = found.at[place].set(tile_order, mode="drop")
    kept = jnp.minimum(kept + alive.sum(dtype=jnp.int32), capacity)
    return start + size, kept, kept_boxes, kept_labels, found

  zero = jnp.zeros((), jnp.int32)
  empty = (
    jnp.zeros((capacity, 4), boxes.dtype),
    jnp.zeros(capacity, labels.dtype),
    jnp.zeros(capacity, jnp.int32),
  )
  _, kept, _, _, found = lax.while_loop(unfinished, step, (zero, zero, *empty))
  return found, kept


def _greedy(alive: jax.Array, suppresses: jax.Array) -> jax.Array:
  """Which of a tile's boxes stay, [T]: those that none that stays before them suppresses.

  Repeats the rule for all boxes at once until nothing changes. After k rounds the first k boxes are
  right, and so is whatever depends on a chain of at most k.

  Args:
    alive: [T] bool, the candidates.
    suppresses: [T, T] bool, [i, j]: box j comes before i and overlaps it too much.
  """

  def step(state):
    stays, _ = state
    return alive & ~(suppresses & stays[None, :]).any(axis=1), stays

  def changed(state):
    return (state[0] != state[1]).any()

  return lax.while_loop(changed, step, step((alive, alive)))[0]
