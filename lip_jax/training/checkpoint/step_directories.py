"""Directories `<step>`: which are finished checkpoints, and how they go.

On a disk Orbax gives a directory its name when it is finished; in a bucket, where nothing can be
renamed, it writes a last object. What is to be deleted becomes unfinished first, so that a process
that is killed meanwhile leaves nothing that passes for whole.
"""

from typing import Any

from etils import epath

from lip_jax.training.workdir import in_bucket

_UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's suffix on a disk
_COMMIT = "commit_success.txt"  # Orbax's last object in a bucket


def steps_in(directory: epath.Path) -> list[int]:
  """Steps that have a finished checkpoint, ascending."""
  finished = _finished(directory)
  return sorted(int(name) for name, done in finished.items() if done and name.isdecimal())


def delete(path: epath.Path) -> None:
  """Deletes a checkpoint, which is unfinished from the first moment on."""
  if in_bucket(path):
    (path / _COMMIT).unlink(missing_ok=True)
  else:
    path = path.rename(path.with_name(path.name + _UNFINISHED))
  path.rmtree()


def clear_unfinished(directory: epath.Path) -> None:
  """Deletes what a save or a deletion has left half done; nothing may be under way."""
  for name, done in _finished(directory).items():
    if not done and name.partition(".")[0].isdecimal():
      (directory / name).rmtree()


def move(path: epath.Path, into: epath.Path) -> epath.Path:
  """Moves a checkpoint into another directory, under a name that is free there.

  In a bucket, where this means to copy, a whole one is at either place at any time.

  Returns:
    The new path.
  """
  taken = _finished(into)
  names = [path.name, *(f"{path.name}-{number}" for number in range(2, len(taken) + 3))]
  place = into / next(name for name in names if name not in taken)
  if in_bucket(path):
    _objects().copy(f"{path}/", f"{place}/", recursive=True)
    delete(path)
  else:
    into.mkdir(exist_ok=True)
    path.rename(place)
  return place


def _finished(directory: epath.Path) -> dict[str, bool]:
  """Names in a directory, and whether each is what it was to become."""
  if not in_bucket(directory):
    entries = directory.iterdir() if directory.is_dir() else []
    return {entry.name: _UNFINISHED not in entry.name for entry in entries}
  # Not by asking for each: to gcsfs nothing exists while the service does not answer. Nor by
  # Orbax's list of steps, which takes more rights than to read and write objects.
  root = str(directory).removeprefix("gs://") + "/"
  there = {path.removeprefix(root) for path in _objects().find(str(directory))}
  names = {path.partition("/")[0] for path in there}
  return {name: f"{name}/{_COMMIT}" in there for name in names}


def _objects() -> Any:
  import fsspec

  return fsspec.filesystem("gcs")
