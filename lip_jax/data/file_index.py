"""What is worked out of data files once, and kept: a few bytes for each file.

It is kept beside the data in a hidden directory, or in the user's cache directory where the data
cannot be written, and is used while the file's size and time of modification are what they were.
Processes that make the same at once share the work, as far as they see each other's; each result
appears as a whole.
"""

import hashlib
import logging
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

import google_crc32c
import numpy as np
from etils import epath
from tqdm import tqdm

from lip_jax.data import disk
from lip_jax.errors import UsageError

_MAX_THREADS = 32  # they wait for the disk, or for the bucket

logger = logging.getLogger(__name__)


class FileIndex:
  """One kind of result.

  Args:
    kind: name of the directories in which results are kept.
    make: the result for a file; threads call it, each for another.
    files: what the files are called, for people.
  """

  def __init__(self, kind: str, make: Callable[[str], bytes], files: str):
    self._kind = kind
    self._make = make
    self._files = files

  def find(self, paths: Iterable[str]) -> dict[str, bytes]:
    """The results for files, each made but once.

    Raises:
      Exception: the first that making one raised.
    """
    paths = list(paths)
    pool = futures.ThreadPoolExecutor(min(_MAX_THREADS, len(paths)))
    try:
      found = dict(zip(paths, pool.map(self._read, paths), strict=True))
      missing = [path for path, result in found.items() if result is None]
      if missing:
        directory = os.path.dirname(missing[0])
        how = ", which reads all of them" if "://" in directory else ""
        logger.info("indexing %d %s in %s, this once%s", len(missing), self._files, directory, how)
        # Processes that begin together meet different files.
        random.Random(os.urandom(8)).shuffle(missing)
        jobs = {pool.submit(self._make_and_keep, path): path for path in missing}
        lost = 0
        with tqdm(total=len(paths), desc="indexing", unit=" files", disable=None) as progress:
          progress.update(len(paths) - len(missing))
          for job in futures.as_completed(jobs):
            found[jobs[job]], kept = job.result()
            lost += not kept
            progress.update()
        if lost:
          places = list(self._places(missing[0]))
          logger.warning("%d indices cannot be kept in %s, and will be made anew", lost, places)
    finally:
      pool.shutdown(cancel_futures=True)
    return {path: result for path, result in found.items() if result is not None}

  def _make_and_keep(self, path: str) -> tuple[bytes, bool]:
    """The result for a file, and whether it is kept."""
    known = self._read(path)  # by now, of another process
    if known is not None:
      return known, True
    version = _version(path)
    result = self._make(path)
    data = _with_checksum(np.array(version, "<i8").tobytes() + result)
    for place in self._places(path):
      try:
        _replace(place, data)
      except Exception as error:  # a bucket's clients have errors of their own
        logger.debug("cannot write %s: %s", place, error)
      else:
        return result, True
    return result, False

  def _read(self, path: str) -> bytes | None:
    """The result that is kept for a file; None if there is none of it as it is now."""
    version = None
    for place in self._places(path):
      try:
        data = place.read_bytes()
      except Exception:  # not there, or out of reach
        continue
      if len(data) < 20 or data != _with_checksum(data[4:]):
        continue  # damaged
      version = version or _version(path)
      if tuple(np.frombuffer(data[4:20], "<i8").tolist()) == version:
        return data[20:]
    return None

  def _places(self, path: str) -> Iterator[epath.Path]:
    """Where the result for a file may be, the best first."""
    directory, name = os.path.split(path)
    yield epath.Path(directory) / f".{self._kind}" / name
    try:
      cache = disk.absolute(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    except UsageError:  # nobody's home
      return
    key = hashlib.sha256((path if "://" in path else os.path.realpath(path)).encode()).hexdigest()
    yield epath.Path(cache) / "lip_jax" / self._kind / key


def _with_checksum(data: bytes) -> bytes:
  return google_crc32c.value(data).to_bytes(4, "little") + data


def _version(path: str) -> tuple[int, int]:
  """Size and time of modification."""
  if "://" in path:
    found = epath.Path(path).stat()
    return found.length, found.mtime
  status = os.stat(path)
  return status.st_size, status.st_mtime_ns


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
