"""The directory of a run: on a disk or, as gs://bucket/run, in a bucket.

Objects of a bucket can neither be appended to nor renamed, and there are no directories: what is
written here is written as a whole.
"""

import contextlib
import importlib.util
import os
import shutil
import time
import uuid
from pathlib import Path

import jax
from etils import epath

from lip_jax.data import disk
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError

PathLike = str | os.PathLike[str]

_EMULATOR = "STORAGE_EMULATOR_HOST"  # of Google's clients and gcsfs; needs no credentials
_LOCK_SECONDS = 10
_VISIBLE_SECONDS = 10  # what a shared file system may need to show a file of one host to the others


def in_bucket(path: PathLike) -> bool:
  """Whether `path` is a URL such as gs://bucket/run rather than a path on this machine."""
  return "://" in os.fspath(path)


def absolute(path: PathLike) -> epath.Path:
  """The absolute path without symbolic links and "~"; gs:// stays what it is.

  `resolve()` of `pathlib` and of `epath` would make a path on this machine of gs://bucket.

  Raises:
    UsageError: a URL that is not of the form gs://bucket/directory, or what reads it is missing.
  """
  text = os.fspath(path)
  if not in_bucket(text):
    return epath.Path(os.path.realpath(disk.absolute(text)))
  bucket = text.removeprefix("gs://").strip("/").partition("/")
  if not text.startswith("gs://") or not bucket[0] or not bucket[2]:
    raise UsageError(f"{text!r} is no directory that can be used: write gs://BUCKET/DIRECTORY")
  if importlib.util.find_spec("gcsfs") is None:
    raise UsageError(f"{text} is in a bucket: pip install 'lip-jax[gcs]' to use it")
  os.environ.setdefault("EPATH_USE_TF", "false")  # else an installed TensorFlow would read it
  _remember_no_listings()
  return epath.Path(text.rstrip("/"))


def read_text(path: epath.Path) -> str | None:
  """A file as text; None if it does not exist.

  Raises:
    UsageError: it, or the bucket that it is in, cannot be read.
  """
  try:
    return path.read_bytes().decode()
  except (FileNotFoundError, NotADirectoryError):
    return None
  except Exception as error:  # a bucket's clients have errors of their own
    if in_bucket(path):
      _check_credentials(path)
    raise UsageError(f"cannot read {path}: {reason(path, error)}") from error


def write_text(path: epath.Path, text: str) -> None:
  """Replaces a file: whoever reads it, at any moment, sees all of the old or of the new text."""
  if in_bucket(path):
    path.write_bytes(text.encode())  # objects appear when they are complete
    return
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  try:
    temporary.write_bytes(text.encode())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def check_access(directory: PathLike) -> epath.Path:
  """Makes the directory and proves that this process can write, read, list and delete in it.

  Returns:
    `absolute(directory)`.

  Raises:
    UsageError: it cannot; says why, and what to do.
  """
  path = absolute(directory)
  if in_bucket(path):
    _check_credentials(path)
  probe = path / f".lip_jax_{uuid.uuid4().hex}"
  try:
    path.mkdir(parents=True, exist_ok=True)
    write_text(probe, probe.name)
    try:
      if probe.read_bytes().decode() != probe.name or probe not in path.iterdir():
        raise OSError("what was written could not be read back")
    finally:
      probe.unlink()
  except Exception as error:  # a bucket's clients have errors of their own
    raise UsageError(f"cannot use {path}: {reason(path, error)}") from error
  return path


def _remember_no_listings() -> None:
  """Other processes, and TensorStore in this one, change a bucket without gcsfs's knowledge."""
  import fsspec.config

  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def lock(directory: epath.Path) -> contextlib.AbstractContextManager[None]:
  """Keeps a second run out of a directory, as `disk.lock`; in a bucket there are no locks."""
  if in_bucket(directory):
    return contextlib.nullcontext()
  return disk.lock(directory, seconds=_LOCK_SECONDS)


def _check_credentials(path: epath.Path) -> None:
  """Without credentials gcsfs would go on, as nobody, and be refused by a message of its own."""
  if os.environ.get(_EMULATOR):
    return
  import google.auth
  from google.auth.exceptions import GoogleAuthError

  try:
    google.auth.default()
  except GoogleAuthError:
    raise UsageError(
      f"cannot use {path}: no Google credentials found; on a Cloud VM give it a service account "
      "with access to the bucket, elsewhere run `gcloud auth application-default login` or set "
      "GOOGLE_APPLICATION_CREDENTIALS"
    ) from None


def reason(path: epath.Path, error: Exception) -> str:
  """What stood in the way of using a path, and what to do, in one line."""
  said = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
  if not in_bucket(path):
    name = f"{error.strerror}" if isinstance(error, OSError) and error.strerror else said
    return f"{name}; name a directory that can be written, or make room"
  bucket = str(path).removeprefix("gs://").partition("/")[0]
  if isinstance(error, FileNotFoundError):
    return (
      f"there is no bucket {bucket!r}; make it with `gcloud storage buckets create gs://{bucket}`"
    )
  if getattr(error, "code", None) in (401, 403) or str(error).startswith("Forbidden"):
    return (
      f"{said}; give this account the role Storage Object User (roles/storage.objectUser) on "
      f"bucket {bucket!r}"
    )
  return f"{said}; is the network up?"


def free_space(directory: Path | epath.Path) -> int | None:
  """Bytes free where `directory` is, or is to be; None in a bucket, which has no end."""
  if in_bucket(directory):
    return None
  place = Path(directory)
  while not place.exists():
    place = place.parent
  return shutil.disk_usage(place).free


def check_shared(workdir: epath.Path) -> None:
  """Raises UsageError, on all processes, if the workdir is not the same directory for all."""
  if jax.process_count() == 1:
    return
  mark = workdir / f".lip_jax_{sharding.gather(uuid.uuid4().hex)[0]}"
  if jax.process_index() == 0:
    write_text(mark, mark.name)
  sharding.gather(None)
  deadline = time.monotonic() + _VISIBLE_SECONDS
  while not (there := mark.exists()) and time.monotonic() < deadline:
    time.sleep(0.5)
  seen = sharding.gather(there)
  if jax.process_index() == 0:
    mark.unlink()
  if not all(seen):
    raise UsageError(
      f"{workdir} of process 0 is another directory than that of process {seen.index(False)}; "
      "--workdir has to be one that all hosts share, on a shared file system or gs://BUCKET/RUN"
    )
