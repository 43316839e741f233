"""Annotations of crowds: one box around many objects, none of which has its own."""

import jax
import jax.numpy as jnp
from jax import lax

from lip_jax.detection.matching import BACKGROUND, BETWEEN
from lip_jax.ops import boxes as box_ops

_COVERED = 0.5  # from this share of a box inside a crowd it is not background


def ignore_crowds(
  matches: jax.Array,
  boxes: jax.Array,
  crowds: jax.Array,
  crowds_valid: jax.Array,
  *,
  inclusive: bool,
) -> jax.Array:
  """Matches [A] in which background that lies in a crowd by half is `BETWEEN`, and trains nothing.

  Args:
    matches: [A], as `lip_jax.detection.matching.match` gives them without the crowds.
    boxes: [A, 4], what was matched.
    crowds: [M, 4].
    crowds_valid: [M] bool, False for padding.
    inclusive: whether x2 and y2 are last pixels.
  """

  def step(most, crowd):
    box, valid = crowd
    share = box_ops.coverage(boxes, box[None], inclusive=inclusive)[:, 0]
    return jnp.maximum(most, jnp.where(valid, share, 0)), None

  # One crowd at a time: as a matrix, shares of all anchors in all of them would be large.
  most, _ = lax.scan(step, jnp.zeros(len(boxes), boxes.dtype), (crowds, crowds_valid))
  return jnp.where((matches == BACKGROUND) & (most >= _COVERED), BETWEEN, matches)
