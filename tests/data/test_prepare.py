"""Preparation: from tar files, folders and TFRecord to ArrayRecord; interrupted and resumed."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds
from fixture_data import (
  SYNSETS,
  VALIDATION_LABELS,
  jpeg,
  tar_bytes,
  to_tfrecord,
  train_images,
  write_folder,
  write_tars,
)

from lip_jax.data import disk, imagenet, preprocess
from lip_jax.data.prepare.convert import convert_to_array_record
from lip_jax.data.prepare.folder import prepare_folder
from lip_jax.data.prepare.imagenet import prepare_imagenet
from lip_jax.data.prepare.labelled_images import shard_numbers
from lip_jax.data.source import open_split
from lip_jax.errors import UsageError

LISTS = {"synsets": SYNSETS, "validation_labels": VALIDATION_LABELS}


@pytest.fixture
def tars(tmp_path):
  return write_tars(tmp_path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A prepared data set, not to be changed: its directory and the root above it."""
  root = tmp_path_factory.mktemp("prepared")
  summary = prepare_imagenet(*write_tars(root), root / "data", num_shards=4, **LISTS)
  return root / "data" / "imagenet2012" / "5.1.0", root / "data", summary


def examples(name, split, root):
  source = open_split(name, split, str(root))
  return [source[k] for k in range(len(source))]


def prepare_and_find(tars, root):
  prepare_imagenet(*tars, root, num_shards=4, **LISTS)
  return root / "imagenet2012" / "5.1.0"


def contents(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


# ImageNet.


def test_imagenet_from_tar_files(prepared):
  _, root, summary = prepared
  assert summary.endswith("imagenet2012/5.1.0: train 30, validation 5 images in 5 files")
  source = open_split("imagenet2012", "train", str(root))
  assert source.class_names == SYNSETS
  found = {example["id"]: (example["image"], example["label"]) for example in source}
  images = train_images()
  assert found == {
    name: (data, label)
    for label, synset in enumerate(SYNSETS)
    for name, data in images[synset].items()
  }
  validation = examples("imagenet2012", "validation", root)
  assert {e["id"]: (e["image"], e["label"]) for e in validation} == {
    f"ILSVRC2012_val_{k:08d}.JPEG": (jpeg(1000 + k), SYNSETS.index(VALIDATION_LABELS[k - 1]))
    for k in range(1, 6)
  }


def test_shards_mix_classes(prepared):
  _, root, _ = prepared
  labels = [example["label"] for example in examples("imagenet2012", "train", root)]
  for shard in np.array_split(labels, 4):
    assert len(set(shard)) > 1


def test_tfds_reads_it(prepared):
  directory, _, _ = prepared
  info = tfds.builder_from_directory(directory).info
  assert info.full_name == "imagenet2012/5.1.0"
  assert info.splits["train"].num_examples == 30
  assert info.splits["train"].num_shards == 4
  assert info.splits["validation"].num_examples == 5
  assert info.supervised_keys == ("image", "label")
  data = tfds.builder_from_directory(directory).as_data_source("train")
  assert data[0]["image"].shape == (20, 26, 3)
  assert isinstance(data[0]["file_name"], bytes)
  # With the data set's own code, which checks its version.
  own = tfds.builder("imagenet2012", data_dir=directory.parent.parent)
  assert own.as_data_source("validation")[0]["image"].shape == (20, 26, 3)


class Imagenet2012(tfds.core.GeneratorBasedBuilder):
  """What TFDS itself would write of the same images: its keys are the file names too."""

  VERSION = tfds.core.Version("5.1.0")
  RELEASE_NOTES: ClassVar[dict[str, str]] = {}

  def _info(self):
    features = {
      "image": tfds.features.Image(encoding_format="jpeg"),
      "label": tfds.features.ClassLabel(names=SYNSETS),
      "file_name": tfds.features.Text(),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for label, images in train_images().items():
      for name, data in images.items():
        yield name, {"image": data, "label": label, "file_name": name}


def test_images_come_in_the_order_of_tfds(prepared, tmp_path):
  _, root, _ = prepared
  with tfds.core.registered.skip_registration():
    builder = Imagenet2012(data_dir=tmp_path)
    config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=4)
    builder.download_and_prepare(file_format="array_record", download_config=config)
  theirs = [example["file_name"].decode() for example in builder.as_data_source("train")]
  for split, names in (("train", theirs), ("train[:80%]", theirs[:24])):
    assert [e["id"] for e in examples("imagenet2012", split, root)] == names


def test_lists_of_imagenet_are_complete():
  synsets, labels = imagenet.synsets(), imagenet.validation_labels()
  assert len(set(synsets)) == 1000
  assert synsets == sorted(synsets)
  assert (synsets[0], synsets[999]) == ("n01440764", "n15075141")
  assert len(labels) == 50_000
  assert set(labels) == set(synsets)
  assert np.unique(labels, return_counts=True)[1].tolist() == [50] * 1000


def test_as_many_files_as_tfds_makes():
  class Split:
    def __init__(self, count, mean):
      self.names = range(count)
      self.sizes = np.full(count, mean)

  splits = {"train": Split(1_281_167, 114_000), "validation": Split(50_000, 133_000)}
  assert shard_numbers(splits, None) == {"train": 1024, "validation": 64}
  assert shard_numbers(splits, 256) == {"train": 256, "validation": 9}


def test_prepared_already(tars, tmp_path):
  options = {"num_shards": 2, **LISTS}
  prepare_imagenet(*tars, tmp_path / "data", **options)
  directory = tmp_path / "data" / "imagenet2012" / "5.1.0"
  before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
  assert "prepared already" in prepare_imagenet(*tars, tmp_path / "data", **options)
  assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before
  with pytest.raises(UsageError, match="shorter_side=None there, 16 asked for; delete it"):
    prepare_imagenet(*tars, tmp_path / "data", shorter_side=16, **options)
  (directory / "lip_jax.json").unlink()
  with pytest.raises(UsageError, match="not made by this command"):
    prepare_imagenet(*tars, tmp_path / "data", **options)


# Scaling.


def test_large_images_are_scaled_and_small_ones_kept(tmp_path):
  images = train_images(per_class=2)
  smooth = np.linspace(0, 255, 300 * 200 * 3).reshape(300, 200, 3).astype(np.uint8)
  large = tmp_path / "large"
  images["n00"]["n00_7.JPEG"] = simplejpeg.encode_jpeg(smooth, quality=98)
  images["n00"]["n00_8.JPEG"] = b"no image"
  tars = write_tars(tmp_path, images)
  summary = prepare_imagenet(*tars, large, shorter_side=64, quality=90, num_shards=1, **LISTS)
  assert "1 cannot be decoded and were kept as they are, such as n00_8.JPEG" in summary
  found = {e["id"]: e["image"] for e in examples("imagenet2012", "train", large)}
  scaled = preprocess.decode_jpeg(found.pop("n00_7.JPEG"))
  assert scaled.shape == (96, 64, 3)
  np.testing.assert_allclose(scaled.mean((0, 1)), smooth.mean((0, 1)), atol=2)
  for name, data in found.items():
    assert data == images[name[:3]][name]
  info = tfds.builder_from_directory(large / "imagenet2012" / "5.1.0").info
  assert "more than 64 pixels" in info.description
  assert "quality 90" in info.description


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"quality": 90}, "quality=90 is for images that are scaled; give shorter_side"),
    ({"shorter_side": 0}, "shorter_side=0, expected a positive"),
    ({"shorter_side": 64, "quality": 101}, "quality=101, expected 1 to 100"),
    ({"num_shards": 31}, "num_shards=31, expected 1 to 30"),
    ({"num_shards": 0}, "num_shards=0, expected 1 to 30"),
  ],
)
def test_options_that_cannot_be(tars, tmp_path, options, message):
  with pytest.raises(UsageError, match=message):
    prepare_imagenet(*tars, tmp_path / "data", **options, **LISTS)
  assert not (tmp_path / "data").exists()


# Tar files that are not what they should be.


def test_tar_files_that_are_damaged_or_others(tars, tmp_path):
  train, val = tars

  def error(train=train, val=val, **lists):
    with pytest.raises(UsageError) as caught:
      prepare_imagenet(train, val, tmp_path / "data", **{**LISTS, **lists})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()
    return str(caught.value)

  assert "there is no tar file '/nowhere.tar'" in error("/nowhere.tar")
  assert "copy it to a disk first" in error("gs://bucket/train.tar")
  assert "ILSVRC2012_val_00000003.JPEG; expected a tar file for each of 3" in error(val)
  assert "holds n00.tar; expected ILSVRC2012_val_00000001.JPEG to" in error(val=train)
  data = train.read_bytes()
  cut = tmp_path / "cut.tar"
  inner = tar_bytes(train_images()["n00"].items())
  overwritten = inner[:2560] + b"?" * 512 + inner[3072:]
  for damaged in (inner[:100], inner[:1000], inner[:2600], inner[:3200], overwritten):
    cut.write_bytes(tar_bytes([("n00.tar", damaged)]))
    assert "cut.tar, n00.tar is damaged or no uncompressed tar file" in error(cut)
  cut.write_bytes(data[: len(data) // 2])
  assert "damaged" in error(cut)
  cut.write_bytes(tar_bytes([("n00.tar", tar_bytes(train_images()["n00"].items()))]))
  assert "lacks 2 of 3 classes, the first is n02" in error(cut)
  cut.write_bytes(tar_bytes([("n00.tar", tar_bytes([]))]))
  assert "n00.tar in" in error(cut)
  cut.write_bytes(b"something else" * 1000)
  assert "no uncompressed tar file" in error(cut)
  cut.write_bytes(b"")
  assert "no uncompressed tar file" in error(cut)
  images = [(f"ILSVRC2012_val_{k:08d}.JPEG", jpeg(k)) for k in (1, 2, 5)]
  cut.write_bytes(tar_bytes(images))
  assert "holds 3 of 5 images; it is cut short" in error(val=cut)
  cut.write_bytes(tar_bytes([*images, images[0]]))
  assert "each once" in error(val=cut)
  twice = train_images()
  twice["n01"]["n00_3.JPEG"] = jpeg(0)
  train, val = write_tars(tmp_path, twice)
  with pytest.raises(UsageError, match=r"two images of the name n00_3\.JPEG"):
    prepare_imagenet(train, val, tmp_path / "data", **LISTS)


def test_whole_imagenet_is_counted(tmp_path, monkeypatch):
  # With ImageNet's own list of classes, all images have to be there.
  monkeypatch.setattr(imagenet, "synsets", lambda: SYNSETS)
  with pytest.raises(UsageError, match="holds 30 images, expected 1,281,167"):
    prepare_imagenet(*write_tars(tmp_path), tmp_path, validation_labels=VALIDATION_LABELS)


# Interruption.

PREPARE = """
import sys
from lip_jax.data.prepare.imagenet import prepare_imagenet
from fixture_data import SYNSETS, VALIDATION_LABELS
train, val, root = sys.argv[1:]
prepare_imagenet(
  train, val, root, num_shards=200, num_workers=2,
  synsets=SYNSETS, validation_labels=VALIDATION_LABELS,
)
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
  """More files than are written in an instant: the tar files, and what becomes of them."""
  root = tmp_path_factory.mktemp("many")
  tars = write_tars(root, train_images(per_class=600, height=8, width=8))
  prepare_imagenet(*tars, root, num_shards=200, **LISTS)
  return tars, contents(root / "imagenet2012" / "5.1.0")


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on(many, tmp_path, sign):
  tars, expected = many
  root = tmp_path / "data"
  work = root / "imagenet2012" / "incomplete.lip_5.1.0"
  path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
  for _ in range(5):  # on a busy machine it may be done before the signal arrives
    shutil.rmtree(root, ignore_errors=True)
    process = subprocess.Popen(
      [sys.executable, "-c", PREPARE, *map(str, tars), str(root)],
      stderr=subprocess.PIPE,
      env={**os.environ, "PYTHONPATH": path},
      text=True,
    )
    while process.poll() is None and len(list(work.glob("*.array_record-*-of-*[0-9]"))) < 5:
      time.sleep(0.002)
    process.send_signal(sign)
    error = process.communicate()[1]
    finished = sorted(work.glob("*.array_record-*-of-*[0-9]"))
    if process.returncode != 0 and len(finished) < 200:
      break
  assert process.returncode != 0, error
  # Nothing is where a data set would be, and what is there is whole.
  assert [entry.name for entry in work.parent.iterdir()] == [work.name]
  assert 5 <= len(finished) < 200
  if sign == signal.SIGINT:
    assert not list(work.glob("*.part"))
  # As if the machine had gone down: one file is there, but cut.
  os.truncate(finished[0], finished[0].stat().st_size // 2)
  kept = {file.name: file.stat().st_mtime_ns for file in finished[1:]}
  prepare_imagenet(*tars, root, num_shards=200, **LISTS)
  directory = root / "imagenet2012" / "5.1.0"
  assert [entry.name for entry in work.parent.iterdir()] == ["5.1.0"]
  for name, modified in kept.items():
    assert (directory / name).stat().st_mtime_ns == modified
  assert contents(directory) == expected


def test_a_run_that_was_begun_otherwise(tmp_path):
  tars = write_tars(tmp_path)
  to_tfrecord(prepare_and_find(tars, tmp_path / "tfrecord"))
  damaged = tmp_path / "tfrecord" / "imagenet2012" / "5.1.0"
  damaged /= "imagenet2012-train.tfrecord-00001-of-00004"
  damaged.write_bytes(damaged.read_bytes()[:-1])
  with pytest.raises(UsageError, match="ends within it"):
    convert_to_array_record("imagenet2012", tmp_path / "tfrecord", tmp_path / "data")
  assert (tmp_path / "data" / "imagenet2012" / "incomplete.lip_5.1.0").is_dir()
  with pytest.raises(UsageError, match="begun otherwise: made_from='tfrecord files' there"):
    prepare_imagenet(*tars, tmp_path / "data", **LISTS)


def test_two_at_once(tars, tmp_path):
  work = tmp_path / "data" / "imagenet2012" / "incomplete.lip_5.1.0"
  work.mkdir(parents=True)
  holder = f"is in use by process {os.getpid()} on "
  with disk.lock(work), pytest.raises(UsageError, match=holder):
    prepare_imagenet(*tars, tmp_path / "data", **LISTS)
  prepare_imagenet(*tars, tmp_path / "data", **LISTS)
  assert not (tmp_path / "data" / "imagenet2012" / "5.1.0" / ".lock").exists()


@pytest.mark.parametrize("fault", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EBADF])
def test_a_file_system_without_locks(tars, tmp_path, monkeypatch, caplog, fault):
  def flock(file, how):
    raise OSError(fault, os.strerror(fault))

  monkeypatch.setattr(fcntl, "flock", flock)
  assert "train 30" in prepare_imagenet(*tars, tmp_path / "data", **LISTS)
  assert "without locks" in caplog.text


@pytest.mark.parametrize("name", [" ", "cat ", "\u3000cat", "a\nb", "\r"])
def test_names_that_a_data_set_cannot_keep_are_refused(tmp_path, name):
  """They would be lost, and labels those of the classes behind them."""
  folder = write_folder(tmp_path / "images", per_class=1)
  for split in ("train", "validation"):
    (folder / split / "cat").rename(folder / split / name)
  with pytest.raises(UsageError, match=r"cannot keep the names .* rename their folders"):
    prepare_folder(folder, "pets", tmp_path / "data")
  assert not (tmp_path / "data").exists()


def test_names_are_refused_where_a_data_set_lies_already(tmp_path):
  folder = write_folder(tmp_path / "images", per_class=1)
  prepare_folder(folder, "pets", tmp_path / "data")
  for split in ("train", "validation"):
    (folder / split / "cat").rename(folder / split / "cat ")
  with pytest.raises(UsageError, match=r"cannot keep the names .* rename their folders"):
    prepare_folder(folder, "pets", tmp_path / "data")


def test_a_disk_that_is_too_small(tars, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
  with pytest.raises(UsageError, match=r"needs 0\.0 GB and there are 0\.0 GB free"):
    prepare_imagenet(*tars, tmp_path / "data", **LISTS)


def test_places_that_cannot_be_written(tars, tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UsageError, match="cannot write to"):
    prepare_imagenet(*tars, tmp_path / "file", **LISTS)
  with pytest.raises(UsageError, match="is a bucket: prepare the data set on a disk"):
    prepare_imagenet(*tars, "gs://bucket/data", **LISTS)


# Folders.


def test_folder_to_data_set(tmp_path):
  folder = write_folder(tmp_path / "images", splits=("train", "val"))
  summary = prepare_folder(folder, "pets", tmp_path / "data", num_shards=2)
  assert "pets/1.0.0: train 12, validation 12 images in 4 files" in summary
  assert "prepared already" in prepare_folder(folder, "pets", tmp_path / "data", num_shards=2)
  for split in ("train", "validation"):
    source = open_split("pets", split, str(tmp_path / "data"))
    original = open_split(f"folder:{folder}", split, None)
    assert source.class_names == original.class_names
    name = "val" if split == "validation" else split
    assert sorted((f"{name}/{e['id']}", e["label"], e["image"]) for e in source) == sorted(
      (e["id"], e["label"], e["image"]) for e in original
    )
  (folder / "train" / "cat" / "new.png").write_bytes(b"not empty")
  with pytest.raises(UsageError, match="files_sha256"):
    prepare_folder(folder, "pets", tmp_path / "data", num_shards=2)
  for name in ("Pets", "pets/small", "", "2pets"):
    with pytest.raises(UsageError, match="expected lower-case letters"):
      prepare_folder(folder, name, tmp_path / "data")


# TFRecord to ArrayRecord.


def test_convert_keeps_every_byte(prepared, tmp_path):
  directory, root, _ = prepared
  shutil.copytree(root, tmp_path / "tfrecord")
  to_tfrecord(tmp_path / "tfrecord" / "imagenet2012" / "5.1.0")
  summary = convert_to_array_record("imagenet2012", tmp_path / "tfrecord", tmp_path / "out")
  assert "imagenet2012/5.1.0: train 30, validation 5 images in 5 files" in summary
  found = contents(tmp_path / "out" / "imagenet2012" / "5.1.0")
  expected = contents(directory)
  for name, data in expected.items():
    if name not in ("dataset_info.json", "lip_jax.json"):
      assert found[name] == data
  assert set(found) == set(expected)
  for split in ("train", "validation"):
    assert examples("imagenet2012", split, tmp_path / "out") == examples(
      "imagenet2012", split, root
    )
  assert "prepared already" in convert_to_array_record(
    "imagenet2012", tmp_path / "tfrecord", tmp_path / "out"
  )
  assert tfds.builder_from_directory(
    tmp_path / "out" / "imagenet2012" / "5.1.0"
  ).info.features.keys() == {"image", "label", "file_name"}


def test_what_cannot_be_converted(prepared, tmp_path):
  _, root, _ = prepared
  with pytest.raises(UsageError, match="in ArrayRecord format already"):
    convert_to_array_record("imagenet2012", root, tmp_path / "out")
  with pytest.raises(UsageError, match="copy the data set to a disk"):
    convert_to_array_record("imagenet2012", "gs://bucket/data", tmp_path / "out")
  shutil.copytree(root, tmp_path / "tfrecord")
  directory = tmp_path / "tfrecord" / "imagenet2012" / "5.1.0"
  to_tfrecord(directory)
  with pytest.raises(UsageError, match="is the directory of the TFRecord files"):
    convert_to_array_record("imagenet2012", tmp_path / "tfrecord", tmp_path / "tfrecord")
  path = directory / "imagenet2012-train.tfrecord-00001-of-00004"
  data = path.read_bytes()
  for damage, message in (
    (data[:-7], r"train\.tfrecord-00001.*record 6: the file ends within it; copy it again"),
    (b"", "holds 0 records, expected 7"),
    (data + data, "holds 14 records, expected 7"),
    (data + bytes(4096), "record 7: its length has a wrong checksum"),
  ):
    path.write_bytes(damage)
    with pytest.raises(UsageError, match=message):
      convert_to_array_record("imagenet2012", tmp_path / "tfrecord", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/*/*.part"))
    assert not (tmp_path / "out" / "imagenet2012" / "5.1.0").exists()
  path.unlink()
  with pytest.raises(UsageError, match="tfrecord-00001-of-00004 is missing"):
    convert_to_array_record("imagenet2012", tmp_path / "tfrecord", tmp_path / "out")
  path.write_bytes(data)
  convert_to_array_record("imagenet2012", tmp_path / "tfrecord", tmp_path / "out")
