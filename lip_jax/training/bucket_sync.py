"""Files that grow, kept in a bucket, where nothing can be appended to."""

import concurrent.futures
import logging
import os
import tempfile
import time
from pathlib import Path

from etils import epath

log = logging.getLogger("lip_jax")


class BucketSync:
  """A local directory whose files are copied to a bucket, in the background.

  Those that have changed are written as a whole, every `seconds` at most. A copy that fails is
  reported, keeps nobody waiting, and is made up for by the next one. What was in the bucket
  before, and is not in the local directory, stays.
  """

  def __init__(self, remote: epath.Path, *, seconds: float = 60.0):
    self._remote = remote
    self._seconds = seconds
    self._directory = tempfile.TemporaryDirectory(prefix="lip_jax_")
    self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="lip-bucket-sync")
    self._copying: concurrent.futures.Future[None] | None = None
    self._copied: dict[Path, tuple[int, int]] = {}
    self._last = time.monotonic()

  @property
  def local(self) -> Path:
    """The local directory; it is deleted by `close`."""
    return Path(self._directory.name)

  def due(self) -> bool:
    """Whether the time for another copy has come, and the one before it is done."""
    under_way = self._copying is not None and not self._copying.done()
    return not under_way and time.monotonic() - self._last >= self._seconds

  def start(self) -> concurrent.futures.Future[None]:
    """Starts to copy, after what is being copied, and does not wait."""
    self._last = time.monotonic()
    self._copying = self._thread.submit(self._copy)
    return self._copying

  def flush(self) -> None:
    """Copies and waits until everything is in the bucket, or has been reported."""
    self.start().result()

  def close(self) -> None:
    """Copies the last changes, and deletes the local directory."""
    self.flush()
    self._thread.shutdown()
    self._directory.cleanup()

  def _copy(self) -> None:
    for path in filter(Path.is_file, sorted(self.local.rglob("*"))):
      status = path.stat()
      version = (status.st_size, status.st_mtime_ns)  # taken before its content
      if self._copied.get(path) == version:
        continue
      target = self._remote / os.path.relpath(path, self.local)
      try:
        target.write_bytes(path.read_bytes())
        self._copied[path] = version
      except Exception as error:  # whatever the bucket's client raises: training goes on
        log.warning("cannot write %s, will try again: %s", target, error)
