"""Where images come from: TFRecord files, folders, fake data; splits of them; errors."""

import importlib.util
import pathlib
import subprocess
import sys
from typing import ClassVar

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from fixture_data import SYNSETS, VALIDATION_LABELS, jpeg, to_tfrecord, write_folder, write_tars
from tensorflow_datasets.proto import tf_example_pb2

from lip_jax.data import preprocess, tfrecord
from lip_jax.data.pipeline import eval_batches, train_loader
from lip_jax.data.prepare.imagenet import prepare_imagenet
from lip_jax.data.records import ImageLabelParser
from lip_jax.data.source import open_split
from lip_jax.data.transforms import EvalCrop, TrainCrop
from lip_jax.errors import UsageError


def prepare(folder, root, num_shards=4):
  train, val = write_tars(folder)
  prepare_imagenet(
    train, val, root, synsets=SYNSETS, validation_labels=VALIDATION_LABELS, num_shards=num_shards
  )
  return root / "imagenet2012" / "5.1.0"


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
  """The same data set in both formats."""
  folder = tmp_path_factory.mktemp("tars")
  roots = {name: str(folder / name) for name in ("array_record", "tfrecord")}
  prepare(folder, folder / "array_record")
  to_tfrecord(prepare(folder, folder / "tfrecord"))
  return roots


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write_folder(tmp_path_factory.mktemp("folder"), splits=("train", "val"))


def tfrecord_files(roots):
  directory = pathlib.Path(roots["tfrecord"]) / "imagenet2012" / "5.1.0"
  return sorted(str(path) for path in directory.glob("*-train.tfrecord-*"))


# TFRecord.


@pytest.mark.parametrize(
  "split", ["train", "validation", "train[:99%]", "train[9:22]", "train[20:]+validation[:2]"]
)
def test_tfrecord_gives_the_same_examples_as_array_record(roots, split):
  array_record = open_split("imagenet2012", split, roots["array_record"])
  tfrecords = open_split("imagenet2012", split, roots["tfrecord"])
  assert tfrecords.name == array_record.name == f"imagenet2012 {split}"
  assert tfrecords.class_names == array_record.class_names == SYNSETS
  assert tfrecords.num_classes == 3
  assert len(tfrecords) == len(array_record)
  assert list(tfrecords) == list(array_record)
  count = len(tfrecords)
  for index in (-1, count):
    with pytest.raises(IndexError, match=f"has {count} images, not an image {index}"):
      tfrecords[index]


def test_both_formats_train_on_the_same_batches(roots):
  transform = TrainCrop((12, 16), (0.3, 1.0))
  batches = []
  for root in roots.values():
    source = open_split("imagenet2012", "train", root)
    with train_loader(source, transform, global_batch_size=8, seed=0) as loader:
      batches.append([next(loader) for _ in range(6)])
  for one, other in zip(*batches, strict=True):
    for key in ("image", "label"):
      np.testing.assert_array_equal(one[key], other[key])


def test_grain_reads_the_same_records(roots):
  for path in tfrecord_files(roots):
    records = list(grain.experimental.TFRecordIterDataset(path))
    assert records == list(tfrecord.read_records(path))
    offsets = tfrecord.record_offsets(path)
    assert records == [
      tfrecord.read_record(path, offsets, number) for number in range(len(offsets) - 1)
    ]


def test_nothing_imports_tensorflow(roots, folder):
  code = f"""
import sys
from lip_jax.data.source import open_split
for dataset, root in (("imagenet2012", {roots["tfrecord"]!r}),
                      ("imagenet2012", {roots["array_record"]!r}),
                      ("folder:{folder}", None), ("fake:10", None)):
  open_split(dataset, "train[:99%]", root)[0]
assert "tensorflow" not in sys.modules
"""
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr


def test_a_record_that_is_no_example(roots):
  record = next(tfrecord.read_records(tfrecord_files(roots)[0]))
  features = tfds.builder_from_directory(f"{roots['tfrecord']}/imagenet2012/5.1.0").info.features
  parse = ImageLabelParser(dict(features), "imagenet2012")
  assert parse(record)["id"].endswith(".JPEG")
  for damaged in (b"", b"\xff" * 40, record[:100], b"\0" * len(record)):
    with pytest.raises(preprocess.CorruptImage, match="the record is no example"):
      parse(damaged)


class Names:
  """A parser of another task, which wants no labels."""

  class_names: ClassVar[list[str]] = []

  def __init__(self, features, dataset):
    assert {"image", "file_name"} <= set(features)
    assert dataset == "imagenet2012"

  def __call__(self, record):
    features = tf_example_pb2.Example.FromString(record).features.feature
    return {"name": features["file_name"].bytes_list.value[0]}


class NameAndNoise:
  """A transform of another task: arrays of other names, shapes and types."""

  shapes: ClassVar = {"name": ((2, 8), np.uint8), "noise": ((3,), np.float64)}

  def __call__(self, example, rng, out):
    out["name"][...] = np.frombuffer(example["name"][:8], np.uint8)
    out["noise"][...] = rng.random(3)


def test_another_task_brings_a_parser_and_a_transform(roots):
  source = open_split("imagenet2012", "train", roots["tfrecord"], parser=Names)
  assert set(source[0]) == {"name"}
  with train_loader(source, NameAndNoise(), global_batch_size=6, seed=0) as loader:
    batches = [next(loader) for _ in range(3)]
  for batch in batches:
    assert {key: (a.shape, a.dtype) for key, a in batch.items()} == {
      "name": ((6, 2, 8), np.uint8),
      "noise": ((6, 3), np.float64),
    }
  noise = np.concatenate([batch["noise"] for batch in batches])
  assert len(np.unique(noise)) == noise.size  # each position has a generator of its own
  (batch,) = eval_batches(source, NameAndNoise(), global_batch_size=32)
  assert [name[0].tobytes() for name in batch["name"][:30]] == [e["name"][:8] for e in source]
  assert batch["mask"].sum() == 30
  assert not batch["noise"][30:].any()


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda data: data[:-5], "record 7: the file ends within it"),
    (lambda data: data[:5], "record 0: the file ends before it"),
    (lambda data: data[:3000] + bytes(len(data) - 3000), "its bytes have a wrong checksum"),
    (lambda data: bytes(len(data)), "record 0: its length has a wrong checksum"),
    (lambda data: data + bytes(512), "record 8: its length has a wrong checksum"),
  ],
)
def test_damaged_tfrecord_files(roots, tmp_path, damage, message):
  path = tmp_path / "file"
  path.write_bytes(damage(pathlib.Path(tfrecord_files(roots)[0]).read_bytes()))
  with pytest.raises(tfrecord.CorruptFile, match=message):
    list(tfrecord.read_records(str(path)))


# Folders.


def test_folder(folder):
  source = open_split(f"folder:{folder}", "train", None)
  assert source.class_names == ["bird", "cat", "dog"]
  assert source.num_classes == 3
  assert source.directory == str(folder)
  examples = [source[k] for k in range(len(source))]
  expected = {
    f"train/{name}/{k}.jpg": (label, jpeg(10 * label + k))
    for label, name in enumerate(source.class_names)
    for k in range(4)
  }
  assert {e["id"]: (e["label"], e["image"]) for e in examples} == expected
  # Not class after class: a part of the split has images of several.
  assert len({e["label"] for e in examples[:4]}) > 1
  assert source.describe(2) == f"folder:{folder} train image 2 ({examples[2]['id']})"


@pytest.mark.parametrize("split", ["validation", "val"])
def test_folder_called_val_is_the_validation_split(folder, split):
  source = open_split(f"folder:{folder}", split, None)
  assert len(source) == 12
  assert source[0]["id"].startswith("val/")


def test_splits_of_a_folder(folder):
  def ids(split):
    source = open_split(f"folder:{folder}", split, None)
    return [source[k]["id"] for k in range(len(source))]

  train, validation = ids("train"), ids("validation")
  assert ids("train[:50%]") + ids("train[50%:]") == train
  assert ids("train[2:5]+validation[-3:]") == train[2:5] + validation[-3:]


def test_a_folder_feeds_training_and_evaluation(folder):
  source = open_split(f"folder:{folder}", "train", None)
  with train_loader(source, TrainCrop(16), global_batch_size=12, seed=0) as loader:
    assert sorted(next(loader)["label"]) == sorted([0, 1, 2] * 4)
  (batch,) = eval_batches(source, EvalCrop(16), global_batch_size=12)
  np.testing.assert_array_equal(batch["label"], [source[k]["label"] for k in range(12)])


def test_folders_that_cannot_be_used(tmp_path):
  def error(path, split="train"):
    with pytest.raises(UsageError) as caught:
      open_split(f"folder:{path}", split, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)

  assert "there is no folder" in error(tmp_path / "none")
  assert "no class folders" in error(tmp_path)
  (tmp_path / "train").mkdir()
  (tmp_path / "train" / "0.jpg").write_bytes(jpeg(0))
  assert "expected DIR/train/CLASS/IMAGE.jpg" in error(tmp_path)
  (tmp_path / "train" / "cat").mkdir()
  assert "is not an image: train/0.jpg; expected" in error(tmp_path)
  (tmp_path / "train" / "0.jpg").rename(tmp_path / "train" / "cat" / "0.jpg")
  (tmp_path / "train" / "dog").mkdir()
  assert "classes without images: train/dog;" in error(tmp_path)
  for name in ("notes.txt", "0.tif", ".DS_Store"):
    (tmp_path / "train" / "dog" / name).touch()
  assert "is not an image: train/dog/0.tif, train/dog/notes.txt; expected" in error(tmp_path)
  for name in ("notes.txt", "0.tif"):
    (tmp_path / "train" / "dog" / name).unlink()
  (tmp_path / "train" / "dog" / "1.JPEG").write_bytes(jpeg(1))
  assert len(open_split(f"folder:{tmp_path}", "train", None)) == 2
  assert "no split 'validation'" in error(tmp_path, "validation")
  assert "no split 'test'; it has train. Rename" in error(tmp_path, "test")
  assert "is empty" in error(tmp_path, "train[:0]")
  assert "is not on a disk" in error("gs://bucket/images")


# Fake data.


def test_fake_data_has_the_shape_of_imagenet():
  assert len(open_split("fake", "train", None)) == 1_281_167
  assert len(open_split("fake", "train[:99%]", None)) == 1_268_355
  source = open_split("fake", "validation", None)
  assert len(source) == 50_000
  assert source.num_classes == 1000
  example = source[1234]
  assert example["label"] == 234
  assert example["id"] == "validation/0001234"
  assert preprocess.decode_jpeg(example["image"]).shape == (375, 500, 3)
  sizes = [len(source[k]["image"]) for k in range(8)]
  assert 80_000 < np.mean(sizes) < 120_000
  assert source[3]["image"] is source[11]["image"]  # not made anew each time
  assert len({source[k]["image"] for k in range(8)}) == 8


def test_fake_data_of_another_size():
  source = open_split("fake:1003", "train[3:]", None)
  assert len(source) == 1000
  assert source[0]["id"] == "train/0000003"
  assert len(open_split("fake:1003", "validation", None)) == 1003
  for dataset in ("fake:", "fake:0", "fake:many"):
    with pytest.raises(UsageError, match="expected fake, or fake:N"):
      open_split(dataset, "train", None)
  with pytest.raises(UsageError, match=r"no split 'test'.* train, validation"):
    open_split("fake", "test", None)


# What is damaged or out of reach.


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_missing_files_are_noticed_at_the_start(tmp_path, file_format):
  directory = prepare(tmp_path, tmp_path / "root")
  if file_format == "tfrecord":
    to_tfrecord(directory)
  missing = f"imagenet2012-train.{file_format}-00002-of-00004"
  (directory / missing).unlink()
  with pytest.raises(UsageError, match=f"lacks 1 of 4 files, the first is {missing}"):
    open_split("imagenet2012", "train", str(tmp_path / "root"))
  assert len(open_split("imagenet2012", "train[:10]", str(tmp_path / "root"))) == 10


def test_damaged_array_record_file_is_said_to_be_so(tmp_path):
  directory = prepare(tmp_path, tmp_path / "root", num_shards=1)
  path = directory / "imagenet2012-train.array_record-00000-of-00001"
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  source = open_split("imagenet2012", "train", str(tmp_path / "root"))
  with pytest.raises(UsageError, match=r"cannot read image 3 .*; `lip-jax data verify` says which"):
    source[3]


def test_a_data_set_cannot_have_modules_imported(tmp_path, monkeypatch):
  directory = prepare(tmp_path, tmp_path / "root", num_shards=1)
  (tmp_path / "evil_features.py").write_text("open('executed', 'w').close()\n")
  monkeypatch.syspath_prepend(tmp_path)  # as the current directory is, in a notebook
  monkeypatch.chdir(tmp_path)
  path = directory / "features.json"
  good = path.read_text()
  path.write_text(good.replace("tensorflow_datasets.core.features.text_feature", "evil_features"))
  with pytest.raises(UsageError, match=r"names the class 'evil_features.Text', .* run code"):
    open_split("imagenet2012", "train", str(tmp_path / "root"))
  assert not (tmp_path / "executed").exists()
  path.write_text(good[:-9])
  with pytest.raises(UsageError, match=r"features.json is damaged"):
    open_split("imagenet2012", "train", str(tmp_path / "root"))


def test_buckets_need_an_extra(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find(name)
  )
  with pytest.raises(UsageError, match=r"install lip-jax\[gcs\].*gcsfuse"):
    open_split("imagenet2012", "train", "gs://bucket/data")


def test_other_buckets_are_refused():
  with pytest.raises(UsageError, match="only gs:// can be read"):
    open_split("imagenet2012", "train", "s3://bucket/data")
