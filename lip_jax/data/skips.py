"""Images that training had to leave out: which, and in which batch first."""

import logging
import threading
from collections.abc import Callable, Sequence

from lip_jax.data.preprocess import CorruptImage

logger = logging.getLogger(__name__)


class Skips:
  """Indices of skipped images, known to all threads; each is logged once."""

  def __init__(self, describe: Callable[[int], str]):
    self._describe = describe
    self._first: dict[int, int] = {}  # index of the image -> batch
    self._restored = 0
    self._lock = threading.Lock()

  def note(self, index: int, batch: int, error: CorruptImage) -> None:
    """Remembers that a batch did without an image."""
    with self._lock:
      known = index in self._first
      # Threads work ahead and not in order.
      self._first[index] = min(batch, self._first.get(index, batch))
    if not known:
      logger.warning("skipped unreadable %s: %s", self._describe(index), error)

  def restore(self, indices: Sequence[int], count: int) -> None:
    """Takes over what an earlier run skipped: some of the images, and the number of all."""
    with self._lock:
      self._first |= dict.fromkeys(indices, -1)
      self._restored = max(self._restored, count)

  def before(self, batch: int) -> tuple[list[int], int]:
    """(those that batches before this one skipped, in order; their number, with restored ones)."""
    with self._lock:
      indices = sorted(index for index, first in self._first.items() if first < batch)
      return indices, max(len(indices), self._restored)

  @property
  def names(self) -> tuple[str, ...]:
    """Of all images that are known."""
    with self._lock:
      indices = sorted(self._first)
    return tuple(map(self._describe, indices))
