"""The order of training: which image is at which position of the endless stream."""

import functools
from collections.abc import Callable

import grain
import numpy as np

# Below this Grain's order takes more than 10 us an image.
_FEW = 10_000


def shuffled(count: int, seed: int) -> Callable[[int], int]:
  """Image at each position of an endless stream in which every epoch is another order of all.

  The order of grain.MapDataset.range(count).seed(seed).shuffle().repeat(), for less time. Grain
  computes each place on its own, which needs no memory, but takes long for few images; those have a
  permutation.
  """
  if count < _FEW:
    # Threads may be at work in two epochs at once.
    permutation = functools.lru_cache(maxsize=4)(
      lambda epoch: np.random.default_rng((seed, epoch)).permutation(count)
    )
    return lambda position: int(permutation(position // count)[position % count])

  (derived,) = np.random.SeedSequence((seed, 1)).generate_state(1).tolist()

  def at(position: int) -> int:
    epoch, place = divmod(position, count)
    return grain.experimental.index_shuffle(
      place, max_index=count - 1, seed=(derived + epoch) % 2**32, rounds=4
    )

  return at
