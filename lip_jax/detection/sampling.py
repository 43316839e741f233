"""Samples of matched boxes that a loss is computed from, chosen by priorities."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from lip_jax.detection.matching import BACKGROUND


class Sample(NamedTuple):
  """Boxes of one image: positives by index, then background by index, then padding."""

  indices: jax.Array  # [size] int32, 0 where not valid
  positive: jax.Array  # [size] bool
  valid: jax.Array  # [size] bool


def sample(
  matches: ArrayLike, priorities: ArrayLike, *, size: int, positive_fraction: float
) -> Sample:
  """The positives with the smallest priorities, and as many of the background as fill the sample.

  A pure function: random samples come of random priorities. Equal priorities go by index.

  Args:
    matches: [A], as `lip_jax.detection.matching.match` gives them.
    priorities: [A] floating point.
    size: how many boxes are taken, if there are as many.
    positive_fraction: share of `size` that is positive at most.
  """
  matches, priorities = jnp.asarray(matches), lax.stop_gradient(jnp.asarray(priorities))
  count = len(matches)
  most = min(int(size * positive_fraction), count)
  positive = _smallest(matches >= 0, priorities, most)
  background = _smallest(matches == BACKGROUND, priorities, min(size, count))
  room = size - (positive < count).sum()
  background = jnp.where(jnp.arange(len(background)) < room, background, count)
  # Sorted by group, then index: the background's follow all of the positives'.
  keys = jnp.concatenate([jnp.where(positive < count, positive, 2 * count), background + count])
  keys = jnp.pad(keys, (0, max(0, size - len(keys))), constant_values=2 * count)
  keys = jnp.sort(keys)[:size]
  valid = keys < 2 * count
  return Sample(jnp.where(valid, keys % max(count, 1), 0), keys < count, valid)


def _smallest(candidates: jax.Array, priorities: jax.Array, limit: int) -> jax.Array:
  """Indices of the candidates with the smallest priorities, in their order; [limit], then A."""
  largest = jnp.finfo(priorities.dtype).max  # also in place of infinity, which is for the others
  priorities = jnp.where(priorities <= largest, priorities, largest)
  _, index = lax.top_k(jnp.where(candidates, -priorities, -jnp.inf), limit)
  return jnp.where(jnp.arange(limit) < candidates.sum(), index, len(candidates))
