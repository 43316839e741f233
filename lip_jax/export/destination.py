"""Where a file or folder is to be written: whether that may be, and all of it or nothing."""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import safetensors

from lip_jax.errors import UsageError


def check_file(path: Path, *, overwrite: bool) -> None:
  """Raises UsageError if a file may not be written to `path`."""
  _check_local(path)
  if path.is_dir():
    raise UsageError(f"{path} is a folder; name a file")
  if path.exists() and not overwrite:
    raise UsageError(f"{path} exists; choose another file, or say to overwrite it")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """A path beside `path` to write a file or folder to, which takes its place at the end.

  If the block fails, what it has written is removed, and `path` is as it was.

  Raises:
    UsageError: the place cannot be written.
  """
  _check_local(path)
  path = path.resolve()
  mark = uuid.uuid4().hex[:8]
  temporary, old = path.with_name(f".{mark}.{path.name}"), path.with_name(f".{mark}.old")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield temporary
    if path.is_dir():  # a folder cannot be renamed over one that is not empty
      path.rename(old)
    os.replace(temporary, path)
  except (OSError, safetensors.SafetensorError) as error:
    raise UsageError(
      f"cannot write {path} ({error}); choose another place, or make room there"
    ) from error
  finally:
    if old.exists() and not path.exists():
      old.rename(path)
    for leftover in (temporary, old):
      if leftover.is_dir():
        shutil.rmtree(leftover)
      elif leftover.exists():
        leftover.unlink()


def _check_local(path: Path) -> None:
  if re.match(r"\w+:/", str(path)):
    raise UsageError(f"{path} is not a local path; write to a local one and copy it from there")
