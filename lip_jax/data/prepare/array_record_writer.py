"""Writes TFDS data sets as ArrayRecord files: resumable, and nothing half-written in their place.

Everything is written to a directory beside the final one, `incomplete.lip_VERSION`, each file under
a temporary name that it loses when it is whole. When all files are there the directory is renamed.
An interrupted run leaves the directory with the files that were finished; the next one goes on.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from array_record.python import array_record_module
from tensorflow_datasets.core import constants as tfds_constants
from tqdm import tqdm

from lip_jax.data import disk
from lip_jax.errors import UsageError

# Beside the data set: what it was made from and how, so that another run can tell.
SETTINGS_FILENAME = "lip_jax.json"

_PART = ".part"
_READ_AT_ONCE = 16  # records
# One record to a chunk, as TFDS has it, which random access needs. Unlike TFDS's, not compressed:
# JPEGs do not get smaller, and reading takes twice as long.
_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file to be written: its name, its number of records, and what gives them, in order."""

  filename: str
  count: int
  records: Callable[[], Iterator[bytes]]


def dataset_directory(data_dir: str | Path | None, *parts: str) -> Path:
  """Where a data set goes: DIR/NAME/VERSION; None is $TFDS_DATA_DIR or ~/tensorflow_datasets.

  Raises:
    UsageError: `data_dir` is a bucket, or cannot be.
  """
  data_dir = data_dir or tfds_constants.DATA_DIR
  if "://" in os.fspath(data_dir):
    raise UsageError(
      f"{data_dir} is a bucket: prepare the data set on a disk, then copy it with "
      "`gcloud storage cp --recursive`"
    )
  return Path(disk.absolute(data_dir)).joinpath(*parts)


def made_from(directory: str) -> str | None:
  """What a data set was made from by this package, such as "image folder"."""
  if "://" in directory:
    return None
  return (_read_settings(Path(directory)) or {}).get("made_from")


def is_prepared(directory: Path, settings: dict[str, Any]) -> bool:
  """Whether a data set is there already, made in the same way.

  Raises:
    UsageError: a data set is there, but made otherwise.
  """
  if not directory.exists():
    return False
  if not (directory / tfds_constants.DATASET_INFO_FILENAME).exists():
    raise UsageError(f"{directory} exists but holds no data set; delete it, or write elsewhere")
  found = _read_settings(directory)
  if found == settings:
    return True
  changes = "it was not made by this command" if found is None else _differences(settings, found)
  raise UsageError(
    f"{directory} holds a data set already: {changes}; delete it, or write to another directory"
  )


@contextlib.contextmanager
def workspace(directory: Path, settings: dict[str, Any]) -> Iterator[Path]:
  """The directory to write to, for one process alone; renamed to `directory` at the end.

  An exception leaves it in its place.

  Raises:
    UsageError: it cannot be written, another process is at it, or it was begun with other settings.
  """
  work = directory.with_name(f"incomplete.lip_{directory.name}")
  with contextlib.ExitStack() as stack:
    try:
      work.mkdir(parents=True, exist_ok=True)
      stack.enter_context(disk.lock(work))
    except OSError as error:
      raise UsageError(f"cannot write to {work} ({error}); choose another directory") from error
    found = _read_settings(work)
    if found is not None and found != settings:
      raise UsageError(
        f"{work} was begun otherwise: {_differences(settings, found)}; use the same settings to go "
        "on, or delete it to start over"
      )
    for leftover in work.glob(f"*{_PART}"):
      leftover.unlink()
    _write_text(work / SETTINGS_FILENAME, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    yield work
    if directory.exists():  # another process was faster
      raise UsageError(f"{directory} exists by now; delete it or {work}")
    work.rename(directory)
    (directory / disk.LOCK).unlink(missing_ok=True)


def check_space(work: Path, needed: int) -> None:
  """Raises UsageError now, rather than after hours, if the disk will be full of `needed` bytes."""
  written = sum(path.stat().st_size for path in work.iterdir())
  free = shutil.disk_usage(work).free
  if needed - written > free:
    raise UsageError(
      f"{work} needs {(needed - written) / 1e9:,.1f} GB and there are {free / 1e9:,.1f} GB free; "
      "make room or choose another disk"
    )


def write_shards(work: Path, shards: Sequence[Shard], *, num_workers: int | None = None) -> None:
  """Writes ArrayRecord files, skipping those that are there and whole.

  Args:
    work: where to.
    shards: the files; their records are asked for in threads, one for each file at a time.
    num_workers: threads; None is one for each core, at most 16.

  Raises:
    UsageError: a file cannot be written or its source cannot be read, or gives another number of
      records than expected.
  """
  todo = [shard for shard in shards if not _is_whole(work / shard.filename, shard.count)]
  total = sum(shard.count for shard in shards)
  done = total - sum(shard.count for shard in todo)
  stop = threading.Event()
  pool = futures.ThreadPoolExecutor(num_workers or min(os.cpu_count() or 1, 16))
  with tqdm(total=total, initial=done, unit=" images", disable=None) as progress:
    jobs = [pool.submit(_write, work, shard, stop, progress) for shard in todo]
    try:
      for job in futures.as_completed(jobs):
        job.result()
    except (OSError, RuntimeError) as error:
      raise UsageError(
        f"cannot write {work}: {error}; mend that and run the same command again: it goes on "
        "where it stopped"
      ) from error
    finally:
      # After an error or an interrupt the threads end at their next record.
      stop.set()
      pool.shutdown(cancel_futures=True)


def count_records(path: Path) -> int:
  """Number of records in an ArrayRecord file.

  Raises:
    RuntimeError: the file is damaged or empty.
    OSError: there is no such file.
  """
  os.stat(path)
  reader = array_record_module.ArrayRecordReader(str(path))
  try:
    count = reader.num_records()
    if count == 0:
      reader.read([0])  # a damaged file seems empty, and says why when it is read
      raise RuntimeError("it holds no records")
    return count
  finally:
    reader.close()


def read_records(path: str) -> Iterator[bytes]:
  """Yields the records of an ArrayRecord file in order.

  Raises:
    RuntimeError: the file is damaged or empty.
    OSError: there is no such file.
  """
  count = count_records(Path(path))
  reader = array_record_module.ArrayRecordReader(path)
  try:
    for start in range(0, count, _READ_AT_ONCE):
      yield from reader.read(range(start, min(count, start + _READ_AT_ONCE)))
  finally:
    reader.close()


def summary(
  directory: Path, counts: Mapping[str, int], num_files: int, unreadable: Sequence[str] = ()
) -> str:
  """What was written, for people; `unreadable`: names of images that could not be scaled."""
  images = ", ".join(f"{split} {count:,}" for split, count in counts.items())
  text = f"{directory}: {images} images in {num_files:,} files"
  if unreadable:
    names = ", ".join(sorted(unreadable)[:5])
    text += f"; {len(unreadable)} cannot be decoded and were kept as they are, such as {names}"
  return text


class _Stopped(Exception):  # noqa: N818
  """Another thread failed, or the user interrupted."""


def _write(work: Path, shard: Shard, stop: threading.Event, progress: Any) -> None:
  part = work / (shard.filename + _PART)
  writer = array_record_module.ArrayRecordWriter(str(part), _OPTIONS)
  try:
    try:
      for record in shard.records():
        if stop.is_set():
          raise _Stopped
        writer.write(record)
        progress.update()
    finally:
      writer.close()
    if (count := count_records(part)) != shard.count:
      raise UsageError(f"{shard.filename} got {count} records, expected {shard.count}")
    _flush(part)
    part.rename(work / shard.filename)
  except BaseException:
    part.unlink(missing_ok=True)
    raise


def _is_whole(path: Path, count: int) -> bool:
  try:
    return count_records(path) == count
  except (OSError, RuntimeError):
    return False


def _flush(path: Path) -> None:
  """Sees to it that a crash of the machine after the rename leaves no empty file."""
  with open(path, "rb") as file:
    os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
  part = path.with_name(path.name + _PART)
  part.write_text(text, encoding="utf-8")
  part.rename(path)


def _read_settings(directory: Path) -> dict[str, Any] | None:
  path = directory / SETTINGS_FILENAME
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _differences(new: dict[str, Any], old: dict[str, Any]) -> str:
  return ", ".join(
    f"{key}={old.get(key)!r} there, {new.get(key)!r} asked for"
    for key in sorted(new | old)
    if new.get(key) != old.get(key)
  )
