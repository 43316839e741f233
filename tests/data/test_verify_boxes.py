"""Verification of images with boxes: what is counted, and what is a fault."""

import fixture_boxes
import pytest
from PIL import Image

from lip_jax import cli
from lip_jax.data.prepare.cluttered_digits import ClutteredDigits
from lip_jax.data.prepare.verify import verify
from lip_jax.errors import UsageError


def test_a_good_annotation_file_and_its_numbers(tmp_path, capsys):
  dataset = fixture_boxes.write(tmp_path, count=9)
  assert cli.main(["data", "verify", dataset, "--decode", "all"]) == 0
  out = capsys.readouterr().out
  assert f"{dataset} in {tmp_path}/images, 2 classes\n  all: 9 of 9 images of 2 classes" in out
  assert "9 decoded" in out
  assert "note: all: 9 boxes, 0 of them crowds; at most 1 in an image: image" in out
  assert "all is well" in out


def test_everything_strange_is_counted(tmp_path):
  values = fixture_boxes.content(9)
  values["categories"].append({"id": 3, "name": "cow"})
  annotations = values["annotations"]
  annotations[1]["iscrowd"] = 1
  annotations[2]["bbox"] = [1, 1, 9, 0]
  annotations[3]["area"] = -1
  annotations[4]["bbox"] = [500, 1, 9, 9]
  annotations += [{**annotations[5], "id": 20 + k} for k in range(3)] + [annotations[5]]
  del annotations[0]
  dataset = fixture_boxes.write(tmp_path, values)
  exif = Image.Exif()
  exif[0x0112] = 8
  path = tmp_path / "images" / "6.jpg"
  Image.open(path).save(path, exif=exif)
  result = verify(dataset, None)
  assert result.ok, str(result)
  assert len(result.notes) == 7
  notes = "\n".join(result.notes)
  for expected in (
    "all: 12 boxes, 1 of them crowds; at most 5 in an image: image ",
    "all: 1 ids of annotations are there more than once",
    "all: 1 images have no boxes\n",
    "all: 4 images have no boxes to learn",
    "all: 3 boxes are degenerate or outside their image: image ",
    "all: 1 classes have no boxes: cow",
    "all: 1 images have an EXIF orientation, which is ignored: image ",
  ):
    assert expected in notes + "\n"
  for name in ("(2.jpg)", "(3.jpg)", "(4.jpg)", "(5.jpg)", "(6.jpg)"):
    assert name in notes


def test_faults_of_images_are_named(tmp_path):
  values = fixture_boxes.content(9)
  values["images"][3]["width"] = 65
  dataset = fixture_boxes.write(tmp_path, values)
  (tmp_path / "images" / "1.jpg").unlink()
  (tmp_path / "images" / "2.jpg").write_bytes(b"")
  data = (tmp_path / "images" / "5.jpg").read_bytes()
  (tmp_path / "images" / "5.jpg").write_bytes(data[: len(data) // 2])
  result = verify(dataset, None, decode="sample")
  assert len(result.faults) == 4
  faults = "\n".join(result.faults)
  assert "(1.jpg): No such file" in faults
  assert "(2.jpg): " in faults
  assert "(3.jpg) has 64x33 pixels as stored, its boxes are of 65x33" in faults
  assert "(5.jpg): " in faults
  assert result.splits[0].found == 5


def test_each_split_that_has_a_file_is_verified(tmp_path):
  for split, first in (("train", 0), ("val", 100)):
    dataset = fixture_boxes.write(tmp_path, fixture_boxes.content(4, first), split=split)
  assert [split.name for split in verify(dataset, None).splits] == ["train", "val"]
  (tmp_path / "val.json").write_text("[]")
  result = verify(dataset, None)
  assert [split.name for split in result.splits] == ["train"]
  assert "val: annotation file" in result.faults[0]
  with pytest.raises(UsageError, match="there is no annotation file"):
    verify(f"coco:{tmp_path}/none/{{split}}.json@{tmp_path}", None)


def test_tfds(tmp_path, monkeypatch):
  fixture_boxes.Coco(config="2017", data_dir=tmp_path).download_and_prepare(
    file_format="array_record"
  )
  result = verify("coco/2017", tmp_path, decode="all")
  assert result.ok, str(result)
  assert [(split.name, split.found, split.classes) for split in result.splits] == [
    ("train", 23, 22), ("validation", 9, 8),
  ]  # fmt: skip
  assert "validation: 8 boxes, 1 of them crowds; at most 1 in an image" in result.notes[4]
  assert "validation: 1 images have no boxes" in result.notes

  (config,) = (c for c in ClutteredDigits.BUILDER_CONFIGS if c.name == "detect_small")
  monkeypatch.setattr(config, "num_train", 120)
  monkeypatch.setattr(config, "num_validation", 2)
  ClutteredDigits(config="detect_small", data_dir=tmp_path).download_and_prepare(
    file_format="array_record"
  )
  result = verify("cluttered_digits/detect_small", tmp_path)
  assert result.splits[0].found == 120
  assert any("train: " in note and " boxes, 0 of them crowds" in note for note in result.notes)
