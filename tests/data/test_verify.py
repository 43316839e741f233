"""Verification: a good data set passes, and every kind of damage is found and named."""

import json
import shutil

import numpy as np
import pytest
from fixture_data import (
  SYNSETS,
  VALIDATION_LABELS,
  jpeg,
  tar_bytes,
  to_tfrecord,
  write_folder,
  write_tars,
)

from lip_jax.data import imagenet
from lip_jax.data.prepare.folder import prepare_folder
from lip_jax.data.prepare.imagenet import prepare_imagenet
from lip_jax.data.prepare.verify import SAMPLE_EVERY, verify
from lip_jax.data.source import open_split
from lip_jax.errors import UsageError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  folder = tmp_path_factory.mktemp("original")
  # More than 64 KiB a file, below which ArrayRecord has but one block.
  images = write_folder(folder / "images", per_class=8, height=120, width=160)
  prepare_folder(images, "pets", folder / "data", num_shards=2)
  return folder / "data"


@pytest.fixture(params=["array_record", "tfrecord"])
def pets(request, original, tmp_path):
  """A copy of the data set, in each format: its root, its directory, and a file of it."""
  shutil.copytree(original, tmp_path / "data")
  directory = tmp_path / "data" / "pets" / "1.0.0"
  if request.param == "tfrecord":
    to_tfrecord(directory)
  return tmp_path / "data", directory, directory / f"pets-train.{request.param}-00001-of-00002"


def one_fault(root, **options):
  report = verify("pets", root, **options)
  assert not report.ok
  assert f"fault: {report.faults[0]}" in str(report)
  return " | ".join(report.faults)


@pytest.mark.parametrize("decode", ["all", "sample", "none"])
def test_a_good_data_set(pets, decode):
  root, directory, _ = pets
  report = verify("pets", root, decode=decode)
  assert report.ok, report.faults
  assert not report.notes
  train, validation = report.splits
  assert (train.name, train.found, train.expected, train.classes) == ("train", 24, 24, 3)
  assert (validation.name, validation.num_files) == ("validation", 2)
  assert train.num_bytes > 24 * 10_000
  assert train.decoded == {"all": 24, "sample": 2, "none": 0}[decode]
  assert str(report).startswith(f"pets in {directory}, 3 classes\n  train: 24 of 24 images of 3")
  assert str(report).endswith("all is well")


@pytest.mark.parametrize(
  "damage",
  [
    lambda data: b"",
    lambda data: data[: len(data) // 2],
    lambda data: data[:-1],
    lambda data: bytes(len(data)),
    lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    lambda data: data + bytes(100_000),
  ],
  ids=["empty", "half", "one byte less", "zeros", "padded with zeros", "zeros added"],
)
def test_damaged_files_are_named(pets, damage):
  root, _, path = pets
  path.write_bytes(damage(path.read_bytes()))
  faults = one_fault(root, decode="none")
  assert faults.startswith(f"train: {path.name} ")
  assert "is damaged after" in faults or "holds 0 records, expected 12" in faults


def test_missing_and_superfluous_files(pets):
  root, _, path = pets
  path.rename(path.with_name(path.name + ".part"))
  faults = one_fault(root)
  assert f"train: {path.name} is missing | train: 12 images, expected 24" in faults
  assert f"1 files belong to no split: {path.name}.part" in verify("pets", root).notes[0]


def test_files_in_each_others_place(pets):
  root, _, path = pets
  shutil.copyfile(str(path).replace("00001-of", "00000-of"), path)
  assert "12 images are there more than once: " in one_fault(root)


def test_counts_that_do_not_agree(pets):
  root, directory, path = pets
  info = directory / "dataset_info.json"
  values = json.loads(info.read_text())
  next(s for s in values["splits"] if s["name"] == "train")["shardLengths"] = ["12", "13"]
  info.write_text(json.dumps(values))
  faults = one_fault(root)
  assert f"train: {path.name} holds 12 records, expected 13" in faults
  assert "train: 24 images, expected 25" in faults


def test_labels_out_of_range_and_classes_without_images(pets):
  root, directory, _ = pets
  labels = directory / "label.labels.txt"
  labels.write_text("bird\ncat\n")
  features = directory / "features.json"
  features.write_text(features.read_text().replace('"numClasses": "3"', '"numClasses": "2"'))
  assert "train: 8 labels are not in 0 to 1: 2" in one_fault(root)
  labels.write_text("bird\ncat\ndog\ncow\n")
  features.write_text(features.read_text().replace('"numClasses": "2"', '"numClasses": "4"'))
  assert "train: no image of 1 classes: labels 3" in one_fault(root)


def test_names_that_were_lost_are_noticed_at_every_opening(pets):
  root, directory, _ = pets
  (directory / "label.labels.txt").write_text(" \nbird\ndog\n")
  for use in (verify, lambda name, root: open_split(name, "train", str(root))):
    with pytest.raises(UsageError, match="3 classes and 2 names"):
      use("pets", root)
  (directory / "label.labels.txt").write_text("bird\ncat\n")
  features = directory / "features.json"
  features.write_text(features.read_text().replace('"numClasses": "3"', '"numClasses": "2"'))
  source = open_split("pets", "train", str(root))
  with pytest.raises(UsageError, match=r"label 2 of dog/\d.jpg is beyond the 2 classes"):
    list(source)


def test_unreadable_images_are_named(tmp_path):
  folder = write_folder(tmp_path / "images", per_class=2 * SAMPLE_EVERY, height=8, width=8)
  whole = jpeg(0)
  broken = {"0": b"", "1": whole[: len(whole) // 2], "2": whole[:-60] + bytes(60), "3": b"text"}
  for name, data in broken.items():
    (folder / "train" / "cat" / f"{name}.jpg").write_bytes(data)
  # Damage in the middle, which nothing but decoding shows.
  middle = whole[:300] + bytes(200) + whole[500:]
  (folder / "train" / "dog" / "5.jpg").write_bytes(middle)
  prepare_folder(folder, "pets", tmp_path / "data", num_shards=1)
  for dataset, root in (("pets", tmp_path / "data"), (f"folder:{folder}", None)):
    none = verify(dataset, root, decode="none")
    assert [fault.count("cat/0.jpg") for fault in none.faults] == [1]
    sample = verify(dataset, root, decode="sample")
    for name in broken:
      assert sum(f"cat/{name}.jpg" in fault for fault in sample.faults) == 1
    everything = verify(dataset, root, decode="all")
    assert sum("dog/5.jpg" in fault for fault in everything.faults) == 1
    assert len(everything.faults) == 5
    assert everything.splits[0].decoded == 3 * 2 * SAMPLE_EVERY - 1
    assert sample.splits[0].decoded < everything.splits[0].decoded / 10


def test_many_unreadable_images_are_counted(tmp_path):
  folder = write_folder(tmp_path / "images", per_class=10)
  for path in (folder / "train").glob("*/*.jpg"):
    path.write_bytes(b"")
  report = verify(f"folder:{folder}", None)
  assert len(report.faults) == 11
  assert report.faults[-1] == "train: and 20 more unreadable images"


# ImageNet, which is held against what is known of it.


def prepare(tmp_path, train=None, lists=None):
  tars = write_tars(tmp_path, train)
  prepare_imagenet(*tars, tmp_path / "data", synsets=SYNSETS, validation_labels=lists)
  return verify("imagenet2012", tmp_path / "data")


def test_imagenet_is_counted_and_its_classes_compared(tmp_path):
  report = prepare(tmp_path, lists=VALIDATION_LABELS)
  faults = "\n".join(report.faults)
  assert "not those of ImageNet in TFDS's order: label 0 is n02, expected n01440764" in faults
  assert "train: 30 images, expected 1,281,167" in faults
  assert "validation: 5 images, expected 50,000" in faults
  assert "validation: 3 classes do not have 50 images: labels 0, 1, 2" in faults


def test_imagenets_labels_are_held_against_names(tmp_path, monkeypatch):
  synsets = ["n00000002", "n00000000", "n00000001"]
  official = [synsets[k % 3] for k in range(150)]
  monkeypatch.setattr(imagenet, "synsets", lambda: synsets)
  monkeypatch.setattr(imagenet, "validation_labels", lambda: official)
  monkeypatch.setattr(imagenet, "COUNTS", {"train": 6, "validation": 150})
  train = {name: {f"{name}_{k}.JPEG": jpeg(k) for k in range(2)} for name in synsets}
  good, bad = tmp_path / "good", tmp_path / "bad"
  for folder in (good, bad):
    folder.mkdir()
    write_tars(folder, train)
    images = [(f"ILSVRC2012_val_{k:08d}.JPEG", jpeg(k, 8, 8)) for k in range(1, 151)]
    (folder / "val.tar").write_bytes(tar_bytes(images))
  prepare_imagenet(good / "train.tar", good / "val.tar", good)
  report = verify("imagenet2012", good, decode="all")
  assert report.ok, str(report)
  # The classic mistake: labels of another numbering.
  order = np.roll(official, 1).tolist()
  prepare_imagenet(
    bad / "train.tar", bad / "val.tar", bad, synsets=sorted(synsets), validation_labels=order
  )
  faults = "\n".join(verify("imagenet2012", bad).faults)
  assert "label 0 is n00000000, expected n00000002" in faults
  assert "validation: 150 labels are wrong: " in faults


def test_what_cannot_be_verified(original):
  with pytest.raises(UsageError, match="decode='some', expected all, sample or none"):
    verify("pets", original, decode="some")
  with pytest.raises(UsageError, match="nothing to verify"):
    verify("fake", None)
  with pytest.raises(UsageError, match="unknown data set 'cows'"):
    verify("cows", original)
  with pytest.raises(UsageError, match="is a bucket: mount it"):
    verify("pets", "gs://bucket/data")
