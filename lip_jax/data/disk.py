"""Paths as people give them, and locks on what is being written."""

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lip_jax.errors import UsageError, printable

LOCK = ".lock"
# What the names of data sets begin with that lie where their users put them.
FOLDER = "folder:"  # an image folder
COCO = "coco:"  # an annotation file and the folder of its images: see `coco_places`

_TAKEN = (errno.EAGAIN, errno.EACCES)  # by another; anything else: there are no locks here

log = logging.getLogger("lip_jax")


def absolute(path: str | os.PathLike[str]) -> str:
  """An absolute path, with "~" replaced; a URL as it is.

  Raises:
    UsageError: nothing says where "~" is, or the path is not UTF-8, which most libraries need.
  """
  text = os.fspath(path)
  if "://" in text:
    return text
  found = os.path.expanduser(text)
  if text.split(os.sep)[0] == "~" and (found == text or not os.environ.get("HOME", "HOME")):
    raise UsageError(
      f"{text}: nothing says where the home directory is; set HOME, or name another directory"
    )
  if not is_utf8(text):
    raise UsageError(f"the path {printable(text)} is not UTF-8; rename it, or take another")
  return os.path.abspath(found)


def coco_places(dataset: str) -> tuple[str, str] | None:
  """The annotation file and the folder of "coco:ANNOTATIONS.json@IMAGES"; None for other names."""
  match = re.fullmatch(re.escape(COCO) + r"(.+?\.json)@(.+)", dataset)
  return None if match is None else (match[1], match[2])


def located(dataset: str) -> str:
  """The name of a data set with absolute paths; one that has no paths as it is."""
  if dataset.startswith(FOLDER):
    return FOLDER + absolute(dataset.removeprefix(FOLDER))
  places = coco_places(dataset)
  return dataset if places is None else COCO + "@".join(map(absolute, places))


def anywhere(dataset: str) -> str:
  """The name of a data set without its paths: it is known by what it holds, wherever it lies."""
  return next((kind for kind in (FOLDER, COCO) if dataset.startswith(kind)), dataset)


def is_utf8(name: str) -> bool:
  """Whether the bytes of a file's name are; Python reads others as lone surrogates."""
  return not any("\ud800" <= character <= "\udfff" for character in name)


@contextlib.contextmanager
def lock(directory: str | os.PathLike[str], *, seconds: float = 0) -> Iterator[None]:
  """Keeps other processes out of a directory for the time of a `with`.

  The lock ends with the process, however that ends, and leaves nothing in the directory. On a file
  system that has no locks there is none, and a warning.

  Args:
    seconds: to wait for one who has it, and may be about to end.

  Raises:
    UsageError: another process has the lock; names it.
  """
  path, deadline = Path(directory) / LOCK, time.monotonic() + seconds
  while True:
    before = path.exists()
    with open(path, "a+", encoding="utf-8") as file:
      file.seek(0)
      old = file.read(200)
      if _take(file.fileno(), directory):
        if not _is_at(file.fileno(), path):
          continue  # of one who had it, and has deleted it meanwhile
        try:
          _write(file, f"process {os.getpid()} on {socket.gethostname()}\n")
          yield
        finally:
          # What refuses to start changes nothing: not even what a killed process left here.
          _write(file, old if before else "")
          if not before:
            path.unlink(missing_ok=True)
        return
    if time.monotonic() > deadline:
      raise UsageError(
        f"{directory} is in use by {old.strip() or 'another process'}; wait until that has ended, "
        "end it, or take another directory"
      )
    time.sleep(0.2)


def _take(file: int, directory: str | os.PathLike[str]) -> bool:
  """Takes the lock on an open file; False if another process has it."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in _TAKEN:
      return False
    log.warning(
      "%s is on a file system without locks (%s): see that no other process writes there",
      directory,
      error.strerror,
    )
  return True


def _is_at(file: int, path: Path) -> bool:
  try:
    return os.path.samestat(os.fstat(file), os.stat(path))
  except FileNotFoundError:
    return False


def _write(file: TextIO, text: str) -> None:
  file.truncate(0)
  file.write(text)
  file.flush()
