"""Directories `<step>`, renamed and deleted so that none that is half there passes for whole.

A directory changes its name in one go; all else takes time, in which the process may be killed.
"""

import logging
import shutil
from pathlib import Path

from lip_jax.errors import UsageError

log = logging.getLogger("lip_jax")

_WRITING = "orbax-checkpoint-tmp"  # begins the suffix of what Orbax has not finished
_REPLACED = "replaced"  # suffix while another of the same step is being written
_DELETED = "deleted"


def steps_in(directory: Path) -> list[int]:
  """Steps that have a directory, ascending."""
  if not directory.is_dir():
    return []
  return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal())


def any_in(directory: Path) -> bool:
  """Whether there is a step's directory, be it one that is set aside."""
  return directory.is_dir() and any(
    entry.name.removesuffix(f".{_REPLACED}").isdecimal() for entry in directory.iterdir()
  )


def set_aside(path: Path) -> None:
  """Makes room for another directory of the same step; `clear_remains` decides between them."""
  if path.exists():
    path.rename(path.with_suffix(f".{_REPLACED}"))


def delete(path: Path) -> None:
  """Deletes a directory; it loses its name first."""
  doomed = path.with_suffix(f".{_DELETED}")
  if doomed.exists():
    shutil.rmtree(doomed)
  path.rename(doomed)
  shutil.rmtree(doomed)


def clear_remains(directory: Path) -> None:
  """Deletes what is half written or half deleted, and puts back what was not replaced after all.

  Args:
    directory: in which nothing is being written.
  """
  for entry in list(directory.iterdir()):
    step, _, suffix = entry.name.partition(".")
    if not step.isdecimal():
      continue
    if suffix.startswith(_WRITING) or suffix == _DELETED:
      shutil.rmtree(entry)
    elif suffix == _REPLACED:
      if (directory / step).exists():
        delete(entry)
      else:
        entry.rename(directory / step)


def move(path: Path, into: Path) -> Path:
  """Moves a directory into another one, under a name that is free there; returns the new path."""
  into.mkdir(exist_ok=True)
  place, number = into / path.name, 1
  while place.exists():
    number += 1
    place = into / f"{path.name}-{number}"
  return path.rename(place)


def check_readable(path: Path) -> None:
  """Raises the OSError of a file that cannot be opened, which Orbax would not always pass on."""
  for file in path.rglob("*"):
    if file.is_file():
      with file.open("rb") as opened:
        opened.read(1)


def check_room(directory: Path, size: int, count: int) -> None:
  """Warns if the disk has no room for the steps that are to lie in a directory.

  Args:
    directory: of the steps.
    size: bytes of each.
    count: how many there will be.

  Raises:
    UsageError: there is no room for a single one more.
  """
  there = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
  free = shutil.disk_usage(directory).free
  text = (
    f"{directory} has {free / 1e9:.3g} GB free; a checkpoint of this run takes "
    f"{size / 1e9:.3g} GB, and up to {count} of them lie there at a time"
  )
  if free < size:
    raise UsageError(f"{text}: make room, or take a --workdir on a larger disk")
  if free < size * count - there:
    log.warning("%s: make room, or saving will fail", text)
