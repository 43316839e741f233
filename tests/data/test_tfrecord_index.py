"""TFRecord files read at random: their index, its place and its age; damage; buckets."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import fixture_numbered
import numpy as np
import pytest

from lip_jax.data import tfrecord, tfrecord_index
from lip_jax.data.pipeline import eval_batches, train_loader
from lip_jax.data.transforms import EvalCrop, TrainCrop
from lip_jax.errors import UsageError

LENGTHS = (9, 1, 14, 3, 10)  # 37: uneven files
COUNT = sum(LENGTHS)


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "lip_jax" / "record_index"


@pytest.fixture
def folder(tmp_path, cache):
  folder = tmp_path / "data"
  folder.mkdir()
  fixture_numbered.write(folder, LENGTHS)
  return folder


def kept(folder):
  return sorted(path for path in (folder / ".record_index").glob("*"))


def labels_of(folder):
  source = fixture_numbered.open_tfrecord(folder)
  return [example["label"] for example in source]


def count_scans(monkeypatch):
  """Paths of the files of which an index is made from now on."""
  scanned, offsets_of = [], tfrecord.record_offsets
  monkeypatch.setattr(
    tfrecord, "record_offsets", lambda path: scanned.append(path) or offsets_of(path)
  )
  return scanned


def test_an_index_is_made_once_and_kept_beside_the_data(folder, cache, monkeypatch, caplog):
  scanned = count_scans(monkeypatch)
  with caplog.at_level(logging.INFO):
    assert labels_of(folder) == list(range(COUNT))
  assert sorted(scanned) == [str(file.path) for file in fixture_numbered.files(folder)]
  assert [path.name for path in kept(folder)] == [Path(path).name for path in sorted(scanned)]
  assert f"indexing 5 TFRecord files in {folder}, this once" in caplog.text
  assert not cache.exists()
  del scanned[:]
  caplog.clear()
  assert labels_of(folder) == list(range(COUNT))
  assert not scanned
  assert not caplog.records


@pytest.mark.parametrize("change", ["longer", "as long, later", "another"])
def test_an_index_of_another_file_is_not_used(folder, monkeypatch, change):
  labels_of(folder)
  path = Path(fixture_numbered.files(folder)[2].path)
  status = path.stat()
  if change == "longer":
    path.write_bytes(path.read_bytes() * 2)
  elif change == "as long, later":
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
  else:
    other = Path(fixture_numbered.files(folder)[0].path)
    index = folder / ".record_index"
    shutil.copyfile(index / other.name, index / path.name)
  scanned = count_scans(monkeypatch)
  assert labels_of(folder) == list(range(COUNT))
  assert scanned == [str(path)]


@pytest.mark.parametrize(
  "damage",
  [
    lambda data: b"",
    lambda data: data[:-3],
    lambda data: data[:-12],
    lambda data: data[:30] + bytes([data[30] ^ 1]) + data[31:],
    lambda data: bytes(len(data)),
  ],
)
def test_a_damaged_index_is_made_anew(folder, monkeypatch, damage):
  labels_of(folder)
  path = kept(folder)[2]
  whole = path.read_bytes()
  path.write_bytes(damage(whole))
  scanned = count_scans(monkeypatch)
  assert labels_of(folder) == list(range(COUNT))
  assert len(scanned) == 1
  assert path.read_bytes() == whole


def test_where_the_data_cannot_be_written_it_is_kept_in_the_cache(folder, cache, monkeypatch):
  (folder / ".record_index").touch()  # no directory can be made here, by root neither
  scanned = count_scans(monkeypatch)
  assert labels_of(folder) == list(range(COUNT))
  assert len(list(cache.iterdir())) == len(scanned) == len(LENGTHS)
  assert labels_of(folder) == list(range(COUNT))
  assert len(scanned) == len(LENGTHS)


def test_where_nothing_can_be_written_it_is_made_each_time(folder, cache, caplog):
  (folder / ".record_index").touch()
  cache.parent.parent.write_text("a file")
  assert labels_of(folder) == list(range(COUNT))
  (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
  assert "5 indices cannot be kept" in record.getMessage()


MAKE = r"""
import os, sys, time
import fixture_numbered
from lip_jax.data import tfrecord
offsets_of = tfrecord.record_offsets
def slow(path):
  os.write(1, b"scanning\n")
  time.sleep(float(sys.argv[2]))
  return offsets_of(path)
tfrecord.record_offsets = slow
source = fixture_numbered.open_tfrecord(sys.argv[1])
print([example["label"] for example in source] == list(range(len(source))))
"""


def start(folder, seconds):
  here = str(Path(__file__).parents[1])
  path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
  return subprocess.Popen(
    [sys.executable, "-c", MAKE, str(folder), str(seconds)],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
    text=True,
  )  # fmt: skip


def test_processes_that_start_together_and_one_that_is_killed(tmp_path, cache, monkeypatch):
  fixture_numbered.write(tmp_path, [1] * 40)
  victim = start(tmp_path, 60)  # killed at the first file
  assert victim.stdout.readline() == "scanning\n"
  victim.send_signal(signal.SIGKILL)
  victim.communicate()
  processes = [start(tmp_path, 0.01) for _ in range(2)]
  outputs = [process.communicate(timeout=120) for process in processes]
  assert [output.splitlines()[-1] for output, _ in outputs] == ["True", "True"], outputs
  assert len(kept(tmp_path)) == 40  # and nothing half-written
  scanned = count_scans(monkeypatch)
  assert labels_of(tmp_path) == list(range(40))
  assert not scanned


def test_threads_make_it_once(folder, monkeypatch):
  scanned = count_scans(monkeypatch)
  source = fixture_numbered.open_tfrecord(folder)
  threads = [threading.Thread(target=source.__getitem__, args=(k,)) for k in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(scanned) == len(LENGTHS)


# Damage.


def test_damaged_files_are_named_at_once(folder):
  path = Path(fixture_numbered.files(folder)[2].path)
  data = path.read_bytes()
  for damage, message in (
    (data[:-100], "record 13: the file ends within it; the file is damaged"),
    (data[: tfrecord.record_offsets(str(path))[5]], "holds 5 records, expected 14"),
    (b"", "holds 0 records, expected 14"),
    (data + bytes(512), "record 14: its length has a wrong checksum; the file is damaged"),
  ):
    path.write_bytes(damage)
    source = fixture_numbered.open_tfrecord(folder)
    with pytest.raises(UsageError, match=f"{path}.* {message}"):
      source[0]
    with (
      train_loader(source, TrainCrop(8), global_batch_size=8, seed=0) as loader,
      pytest.raises(UsageError, match=message),
    ):
      next(loader)
    with pytest.raises(UsageError, match=message):
      list(eval_batches(source, EvalCrop(8), global_batch_size=8))


@pytest.mark.parametrize(
  ("place", "message"),
  [
    (300, "record 0: its bytes have a wrong checksum; the file is damaged"),
    (3, "record 0: its length has a wrong checksum"),
  ],
)
def test_damage_inside_a_record_is_noticed_when_it_is_read(folder, place, message):
  path = Path(fixture_numbered.files(folder)[2].path)
  source = fixture_numbered.open_tfrecord(folder)
  source[0]
  status = path.stat()
  data = bytearray(path.read_bytes())
  data[place] ^= 1
  path.write_bytes(data)
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
  assert source[9]["label"] == 9
  with pytest.raises(UsageError, match=f"{path}, {message}"):
    source[10]


def test_a_file_that_is_replaced_meanwhile(folder):
  source = fixture_numbered.open_tfrecord(folder)
  source[0]
  first, _, third, *_ = fixture_numbered.files(folder)
  shutil.copyfile(first.path, third.path)
  with pytest.raises(UsageError, match=f"{third.path}, record 12: "):
    source[22]


# Buckets.


def test_a_bucket_is_read_at_random_and_keeps_the_index(folder, bucket, cache, monkeypatch):
  import fsspec

  url = f"{bucket}/numbered"
  for file in fixture_numbered.files(folder):
    data = Path(file.path).read_bytes()
    # Not in one request, of which the emulator loses a last "\r".
    fsspec.filesystem("gcs").pipe_file(f"{url}/{Path(file.path).name}", data, chunksize=len(data))
  parts = [
    tfrecord_index.FilePart(f"{url}/{Path(file.path).name}", 0, file.take)
    for file in fixture_numbered.files(folder)
  ]
  scanned = count_scans(monkeypatch)
  for _ in range(2):
    files = tfrecord_index.TFRecordFiles(parts)
    source = fixture_numbered.open_records(url, files)
    order = np.random.default_rng(0).permutation(COUNT).tolist()
    assert [source[k]["label"] for k in order] == order
    assert sorted(scanned) == [part.path for part in parts]
  assert not cache.exists()
