"""TFRecord files read at random, by an index of where their records start.

The index of a file is made once, which takes a look at every record's header.
"""

import bisect
import itertools
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lip_jax.data import tfrecord
from lip_jax.data.file_index import FileIndex
from lip_jax.errors import UsageError

_INDEX = FileIndex(
  "record_index",
  lambda path: np.array(tfrecord.record_offsets(path), "<i8").tobytes(),
  "TFRecord files",
)


class FilePart(NamedTuple):
  """Records of one file: those from `skip` to `skip` + `take`."""

  path: str
  skip: int
  take: int


class TFRecordFiles(Sequence[bytes]):
  """The records of (parts of) TFRecord files, by their indices; threads may read at once."""

  def __init__(self, parts: Sequence[FilePart]):
    self._parts = list(parts)
    self._ends = list(itertools.accumulate(part.take for part in parts))
    self._offsets: dict[str, np.ndarray] = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index):
    """Reads one record.

    Raises:
      UsageError: the file is damaged.
    """
    self.open()
    k = bisect.bisect_right(self._ends, index)
    path, skip, take = self._parts[k]
    number = skip + take - (self._ends[k] - index)
    try:
      return tfrecord.read_record(path, self._offsets[path], number)
    except tfrecord.CorruptFile as error:
      raise _damaged(error) from error

  def open(self) -> None:
    """Finds or makes the indices of all files; without it, the first record that is read does.

    Raises:
      UsageError: a file is damaged, or has too few records.
    """
    with self._lock:
      if self._offsets:
        return
      offsets = find_offsets({part.path for part in self._parts})
      for path, skip, take in self._parts:
        count = len(offsets[path]) - 1
        if count < skip + take:
          raise UsageError(
            f"{path} holds {count} records, expected {skip + take}; the file is damaged: copy or "
            "prepare it again"
          )
      self._offsets = offsets


def find_offsets(paths: Iterable[str]) -> dict[str, np.ndarray]:
  """Record offsets of TFRecord files, as `tfrecord.record_offsets` has them, each made but once.

  Raises:
    UsageError: a file is damaged.
  """
  try:
    found = _INDEX.find(paths)
  except tfrecord.CorruptFile as error:
    raise _damaged(error) from error
  return {path: np.frombuffer(offsets, "<i8") for path, offsets in found.items()}


def _damaged(error: tfrecord.CorruptFile) -> UsageError:
  return UsageError(f"{error}; the file is damaged: copy or prepare it again")
