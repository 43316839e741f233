"""Directories `<step>`, renamed and deleted so that none that is half there passes for whole.

Everything takes time, in which the process may be killed. On a disk a directory changes its name in
one go: only a whole one is called `<step>`. In a bucket there are but objects, and nothing can be
renamed: a directory is whole as long as it has the object that is written last and deleted first.
"""

import concurrent.futures
import contextlib
import errno
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from lip_jax.errors import UsageError
from lip_jax.training import workdir as workdir_lib

log = logging.getLogger("lip_jax")

_WRITING = "orbax-checkpoint-tmp"  # begins the suffix of what Orbax has not finished, on a disk
_COMMIT = "commit_success.txt"  # what Orbax writes last, in a bucket
_REPLACED = "replaced"  # suffix while another of the same step is being written
_DELETED = "deleted"


class _Disk:
  """What is not whole has a suffix."""

  def prepare(self, directory: epath.Path) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=directory).close()

  def whole(self, directory: epath.Path) -> set[str]:
    """Names of what is whole."""
    if not directory.is_dir():
      return set()
    return {entry.name for entry in Path(directory).iterdir()} - set(self.remains(directory))

  def remains(self, directory: epath.Path) -> list[str]:
    """Names of what is half written or half deleted."""
    parts = {entry.name: entry.name.partition(".") for entry in Path(directory).iterdir()}
    return [
      name
      for name, (step, _, suffix) in parts.items()
      if step.isdecimal() and (suffix.startswith(_WRITING) or suffix == _DELETED)
    ]

  def rename(self, path: epath.Path, target: epath.Path) -> None:
    Path(target).parent.mkdir(exist_ok=True)
    Path(path).rename(target)

  def delete(self, path: epath.Path) -> None:
    """It loses its name first."""
    doomed = Path(path).with_suffix(f".{_DELETED}")
    if path.name != doomed.name:
      if doomed.exists():
        shutil.rmtree(doomed)
      Path(path).rename(doomed)
    shutil.rmtree(doomed)

  def check_readable(self, path: epath.Path) -> None:
    for file in Path(path).rglob("*"):
      if file.is_file():
        with file.open("rb") as opened:
          opened.read(1)


class _Bucket:
  """What is not whole lacks the last object. All errors are OSErrors that may pass."""

  def __init__(self):
    import fsspec

    self._files = fsspec.filesystem("gcs")

  def prepare(self, directory: epath.Path) -> None:
    workdir_lib.check_access(directory)

  def whole(self, directory: epath.Path) -> set[str]:
    return {name for name, objects in self._listed(directory).items() if _COMMIT in objects}

  def remains(self, directory: epath.Path) -> list[str]:
    return [
      name
      for name, objects in self._listed(directory).items()
      if name.partition(".")[0].isdecimal() and _COMMIT not in objects
    ]

  def rename(self, path: epath.Path, target: epath.Path) -> None:
    """Copies, within the service, what is then deleted: one of them is whole at any time."""
    others = [name for name in self._objects(path) if name != _COMMIT]
    with _plain_errors(target):
      self._files.copy(
        [f"{path}/{name}" for name in others], [f"{target}/{name}" for name in others]
      )
      self._files.cp_file(f"{path}/{_COMMIT}", f"{target}/{_COMMIT}")
    self.delete(path)

  def delete(self, path: epath.Path) -> None:
    others = [f"{path}/{name}" for name in self._objects(path) if name != _COMMIT]
    with _plain_errors(path), concurrent.futures.ThreadPoolExecutor(16) as threads:
      self._delete_object(f"{path}/{_COMMIT}")
      list(threads.map(self._delete_object, others))

  def _delete_object(self, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # also where an answer was lost, and asked again
      self._files.rm_file(path)

  def check_readable(self, path: epath.Path) -> None:
    """Only whether the service answers: of a single object its clients tell why they cannot."""
    self._objects(path)

  def _listed(self, directory: epath.Path) -> dict[str, set[str]]:
    """Objects of each directory in a directory, by name."""
    listed: dict[str, set[str]] = {}
    for path in self._objects(directory):
      name, slash, rest = path.partition("/")
      if slash:
        listed.setdefault(name, set()).add(rest)
    return listed

  def _objects(self, path: epath.Path) -> list[str]:
    """Names of all objects below, as the service knows them at this moment."""
    root = str(path).removeprefix("gs://") + "/"
    with _plain_errors(path):
      return [found.removeprefix(root) for found in self._files.find(str(path)) if found != root]


@contextlib.contextmanager
def _plain_errors(path: epath.Path) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # a bucket's clients have errors of their own
    raise OSError(errno.EIO, workdir_lib.reason(path, error)) from error


def _storage(path: epath.Path) -> _Disk | _Bucket:
  return _Bucket() if workdir_lib.in_bucket(path) else _Disk()


def prepare(directory: epath.Path) -> None:
  """Makes a directory of steps and clears its remains; nothing may be written in it meanwhile.

  Raises:
    OSError, UsageError: it cannot be written.
  """
  _storage(directory).prepare(directory)
  clear_remains(directory)


def steps_in(directory: epath.Path) -> list[int]:
  """Steps that have a whole directory, ascending."""
  return sorted(int(name) for name in _storage(directory).whole(directory) if name.isdecimal())


def any_in(directory: epath.Path) -> bool:
  """Whether there is a step's directory, be it one that is set aside."""
  names = _storage(directory).whole(directory)
  return any(name.removesuffix(f".{_REPLACED}").isdecimal() for name in names)


def set_aside(path: epath.Path) -> None:
  """Makes room for another directory of the same step; `clear_remains` decides between them."""
  storage = _storage(path)
  if path.name in storage.whole(path.parent):
    storage.rename(path, path.with_suffix(f".{_REPLACED}"))


def delete(path: epath.Path) -> None:
  """Deletes a directory, which is not whole from the first moment on."""
  _storage(path).delete(path)


def clear_remains(directory: epath.Path) -> None:
  """Deletes what is half written or half deleted, and puts back what was not replaced after all.

  Args:
    directory: in which nothing is being written.
  """
  storage = _storage(directory)
  for name in storage.remains(directory):
    storage.delete(directory / name)
  names = storage.whole(directory)
  for name in names:
    step, _, suffix = name.partition(".")
    if step.isdecimal() and suffix == _REPLACED:
      if step in names:
        storage.delete(directory / name)
      else:
        storage.rename(directory / name, directory / step)


def move(path: epath.Path, into: epath.Path) -> epath.Path:
  """Moves a directory into another one, under a name that is free there; returns the new path."""
  storage = _storage(path)
  taken = storage.whole(into)
  place, number = into / path.name, 1
  while place.name in taken:
    number += 1
    place = into / f"{path.name}-{number}"
  storage.rename(path, place)
  return place


def check_readable(path: epath.Path) -> None:
  """Raises the OSError of a file that cannot be opened, which Orbax would not always pass on."""
  _storage(path).check_readable(path)


def check_room(directory: epath.Path, size: int, count: int) -> None:
  """Warns if the disk has no room for the steps that are to lie in a directory.

  Args:
    directory: of the steps; in a bucket there is always room.
    size: bytes of each.
    count: how many there will be.

  Raises:
    UsageError: there is no room for a single one more.
  """
  if workdir_lib.in_bucket(directory):
    return
  there = sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())
  free = shutil.disk_usage(directory).free
  text = (
    f"{directory} has {free / 1e9:.3g} GB free; a checkpoint of this run takes "
    f"{size / 1e9:.3g} GB, and up to {count} of them lie there at a time"
  )
  if free < size:
    raise UsageError(f"{text}: make room, or take a --workdir on a larger disk")
  if free < size * count - there:
    log.warning("%s: make room, or saving will fail", text)
