"""The order of training: which image is at which position of the endless stream."""

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

# Below this Grain's order takes more than 10 us an image.
_FEW = 10_000


class Order(Protocol):
  """Which images are at the positions of a stream, and which of several transforms each takes."""

  identity: dict[str, Any]
  """What decides on the order, JSON."""

  def group(self, position: int) -> int:
    """Number of the transform; the same at all positions of a global batch."""

  def candidates(self, position: int) -> Iterator[int]:
    """The image, then each that may stand in for it, all of its group."""


class Shuffled:
  """Every epoch is another order of all images; epochs follow each other inside a batch."""

  def __init__(self, count: int, seed: int):
    self.identity = {"num_examples": count, "seed": seed}
    self._count = count
    self._image_at = _shuffled(count, seed)

  def group(self, position: int) -> int:
    """The only one."""
    return 0

  def candidates(self, position: int) -> Iterator[int]:
    """The image, then the others in the source's order."""
    first = self._image_at(position)
    return itertools.chain(range(first, self._count), range(first))


class ShuffledGroups:
  """Batches of one group each: an epoch has all images, and has whole batches of every group.

  The images of a group are shuffled and, to fill its last batch, repeated; then the batches of all
  groups are shuffled. Every epoch has as many batches, and is a function of (seed, epoch) alone.
  """

  def __init__(self, groups: Sequence[np.ndarray], batch_size: int, seed: int):
    """`groups`: the images of each, int [n] in increasing order; not all are empty."""
    self.identity = {"num_examples": [len(group) for group in groups], "seed": seed}
    self._groups = groups
    self._batch_size = batch_size
    self._seed = seed
    self._num_batches = [-(-len(group) // batch_size) for group in groups]
    self.epoch_size = sum(self._num_batches) * batch_size
    # Threads may be at work in two epochs at once.
    self._epoch = functools.lru_cache(maxsize=3)(self._make_epoch)

  def group(self, position: int) -> int:
    """That of the batch."""
    epoch, place = divmod(position, self.epoch_size)
    return int(self._epoch(epoch)[0][place // self._batch_size])

  def candidates(self, position: int) -> Iterator[int]:
    """The image, then the others of its group, in the source's order."""
    epoch, place = divmod(position, self.epoch_size)
    groups, batches = self._epoch(epoch)
    row, column = divmod(place, self._batch_size)
    images = self._groups[groups[row]]
    first = int(batches[row, column])
    for place in itertools.chain(range(first, len(images)), range(first)):
      yield int(images[place])

  def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(group of each batch, places in the group [batches, batch size])."""
    rng = np.random.default_rng((self._seed, 3, epoch))
    batches = [
      np.resize(rng.permutation(len(group)), (count, self._batch_size))
      for group, count in zip(self._groups, self._num_batches, strict=True)
      if count
    ]
    order = rng.permutation(sum(self._num_batches))
    groups = np.repeat(np.arange(len(self._groups)), self._num_batches)
    return groups[order], np.concatenate(batches)[order]


class InOrder:
  """Every image once, group by group in the source's order, in whole batches.

  The last batch of a group is filled up with positions that have no image.
  """

  def __init__(self, groups: Sequence[Sequence[int] | np.ndarray], batch_size: int):
    self.identity: dict[str, Any] = {}
    self._batch_size = batch_size
    self._groups = groups
    batches = [-(-len(group) // batch_size) for group in groups]
    self._ends = list(itertools.accumulate(batches))
    self.num_batches = self._ends[-1]

  def group(self, position: int) -> int:
    """That of the batch."""
    return bisect.bisect_right(self._ends, position // self._batch_size)

  def candidates(self, position: int) -> Iterator[int]:
    """The image, or none."""
    group = self.group(position)
    first = self._ends[group - 1] * self._batch_size if group else 0
    images = self._groups[group]
    return iter([int(images[position - first])] if position - first < len(images) else [])


def _shuffled(count: int, seed: int) -> Callable[[int], int]:
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
