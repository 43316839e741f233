"""TFRecord files read at random, by an index of where their records start.

The index of a file is made once, which takes a look at every record's header, and kept beside the
data in `.record_index/`, or in the user's cache directory where the data cannot be written. It is
used while the file's size and time of modification are what they were. Processes that make the same
indices at once share the work, as far as they see each other's; each index appears as a whole.
"""

import bisect
import hashlib
import itertools
import logging
import os
import random
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import google_crc32c
import numpy as np
from etils import epath
from tqdm import tqdm

from lip_jax.data import disk, tfrecord
from lip_jax.errors import UsageError

DIRECTORY = ".record_index"

_MAX_THREADS = 32  # they wait for the disk, or for the bucket

logger = logging.getLogger(__name__)


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
  paths = list(paths)
  pool = futures.ThreadPoolExecutor(min(_MAX_THREADS, len(paths)))
  try:
    found = dict(zip(paths, pool.map(_read_index, paths), strict=True))
    missing = [path for path, offsets in found.items() if offsets is None]
    if missing:
      directory = os.path.dirname(missing[0])
      how = ", which reads all of them" if "://" in directory else ""
      logger.info("indexing %d TFRecord files in %s, this once%s", len(missing), directory, how)
      # Processes that begin together meet different files.
      random.Random(os.urandom(8)).shuffle(missing)
      jobs = {pool.submit(_make_index, path): path for path in missing}
      lost = 0
      with tqdm(total=len(paths), desc="indexing", unit=" files", disable=None) as progress:
        progress.update(len(paths) - len(missing))
        for job in futures.as_completed(jobs):
          found[jobs[job]], kept = job.result()
          lost += not kept
          progress.update()
      if lost:
        logger.warning(
          "%d indices cannot be kept in %s, and will be made anew", lost, list(_places(missing[0]))
        )
  except tfrecord.CorruptFile as error:
    raise _damaged(error) from error
  finally:
    pool.shutdown(cancel_futures=True)
  return {path: offsets for path, offsets in found.items() if offsets is not None}


def _make_index(path: str) -> tuple[np.ndarray, bool]:
  """The offsets of a file, and whether they are kept."""
  known = _read_index(path)  # by now, of another process
  if known is not None:
    return known, True
  version = _version(path)
  offsets = tfrecord.record_offsets(path)
  data = _with_checksum(np.array([*version, *offsets.tolist()], "<i8").tobytes())
  for place in _places(path):
    try:
      _replace(place, data)
    except Exception as error:  # a bucket's clients have errors of their own
      logger.debug("cannot write %s: %s", place, error)
    else:
      return offsets, True
  return offsets, False


def _read_index(path: str) -> np.ndarray | None:
  """The offsets that are kept for a file; None if there are none of it as it is now."""
  version = None
  for place in _places(path):
    try:
      data = place.read_bytes()
    except Exception:  # not there, or out of reach
      continue
    if len(data) < 28 or len(data) % 8 != 4 or data != _with_checksum(data[4:]):
      continue  # damaged
    values = np.frombuffer(data[4:], "<i8")
    version = version or _version(path)
    if tuple(values[:2].tolist()) == version:
      return values[2:]
  return None


def _with_checksum(data: bytes) -> bytes:
  return google_crc32c.value(data).to_bytes(4, "little") + data


def _version(path: str) -> tuple[int, int]:
  """Size and time of modification."""
  if "://" in path:
    found = epath.Path(path).stat()
    return found.length, found.mtime
  status = os.stat(path)
  return status.st_size, status.st_mtime_ns


def _places(path: str) -> Iterator[epath.Path]:
  """Where the index of a file may be, the best first."""
  directory, name = os.path.split(path)
  yield epath.Path(directory) / DIRECTORY / name
  try:
    cache = disk.absolute(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  except UsageError:  # nobody's home
    return
  key = hashlib.sha256((path if "://" in path else os.path.realpath(path)).encode()).hexdigest()
  yield epath.Path(cache) / "lip_jax" / "record_index" / key


def _replace(place: epath.Path, data: bytes) -> None:
  """Writes a file so that others see all of it or nothing."""
  if "://" in str(place):
    place.write_bytes(data)
    return
  place.parent.mkdir(parents=True, exist_ok=True)
  part = place.with_name(f"{place.name}.{os.getpid()}.{threading.get_ident()}.part")
  try:
    part.write_bytes(data)
    os.replace(part, place)
  finally:
    part.unlink(missing_ok=True)


def _damaged(error: tfrecord.CorruptFile) -> UsageError:
  return UsageError(f"{error}; the file is damaged: copy or prepare it again")
