"""Sources of images with boxes: COCO's JSON, TFDS, digits; what is wrong with annotations."""

import io
import json
import pathlib

import fixture_boxes
import numpy as np
import pytest
from fixture_data import to_tfrecord
from PIL import Image

from lip_jax.data import coco_categories
from lip_jax.data.boxes import COCO_AREA_LIMITS, open_boxes
from lip_jax.data.prepare.cluttered_digits import ClutteredDigits
from lip_jax.data.prepare.verify import verify
from lip_jax.errors import UsageError


@pytest.fixture(scope="module", params=["array_record", "tfrecord"])
def coco_dir(request, tmp_path_factory):
  root = tmp_path_factory.mktemp(request.param)
  builder = fixture_boxes.Coco(config="2017", data_dir=root)
  builder.download_and_prepare(file_format="array_record")
  if request.param == "tfrecord":
    to_tfrecord(pathlib.Path(builder.data_dir))
  return str(root)


def by_id(source):
  return {example["image_id"]: example for example in source}


# TFDS.


def test_coco_of_tfds(coco_dir):
  source = open_boxes("coco/2017", "validation", coco_dir)
  assert (len(source), source.num_classes, source.annotations) == (9, 80, None)
  assert source.category_ids == list(coco_categories.IDS)
  assert source.area_limits == COCO_AREA_LIMITS == (1024, 9216)
  np.testing.assert_array_equal(
    source.image_sizes(), [fixture_boxes.SIZES[k % 7] for k in range(9)]
  )
  for k, example in enumerate(source):
    height, width = fixture_boxes.SIZES[k % 7]
    data, (x, y, w, h) = fixture_boxes.picture(k, height, width)
    assert (example["image"], example["image_id"]) == (data, 1000 + k)
    assert example["id"] == f"{1000 + k:012d}.jpg"
    if k == 5:
      assert example["boxes"].shape == (0, 4)
      continue
    np.testing.assert_array_equal(example["boxes"], np.float32([[x, y, x + w, y + h]]))
    assert example["boxes"].dtype == np.float32
    assert example["labels"].tolist() == [79 - k]
    assert example["crowd"].tolist() == [k == 4]
    assert example["areas"].tolist() == [w * h // 2]
  assert source.describe(3) == "coco/2017 validation image 3 (000000001003.jpg)"


def test_the_boxes_of_tfds_are_read_once_and_parts_of_splits_have_theirs(coco_dir, monkeypatch):
  whole = open_boxes("coco/2017", "train", coco_dir)
  reads = []
  monkeypatch.setattr(
    "lip_jax.data.box_records.read_file", lambda *args: reads.append(args) or iter(())
  )
  part = open_boxes("coco/2017", "train[7:12]+validation[2:4]", coco_dir)
  # The other file was read by another test, or not at all.
  assert all("train" not in str(path) for path, _ in reads)
  for k in range(5):
    np.testing.assert_array_equal(part[k]["boxes"], whole[7 + k]["boxes"])
    assert part[k]["image_id"] == 1007 + k


def test_ground_truth_has_the_annotations_of_the_split(coco_dir):
  source = open_boxes("coco/2017", "validation", coco_dir)
  truth = json.loads(json.dumps(source.ground_truth()))
  assert [image["id"] for image in truth["images"]] == list(range(1000, 1009))
  assert truth["images"][1] == {
    "id": 1001, "height": 60, "width": 40, "file_name": "000000001001.jpg"
  }  # fmt: skip
  assert [annotation["id"] for annotation in truth["annotations"]] == list(range(1, 9))
  box = fixture_boxes.picture(4, *fixture_boxes.SIZES[4])[1]
  assert truth["annotations"][4] == {
    "id": 5, "image_id": 1004, "category_id": coco_categories.IDS[75], "bbox": box,
    "area": box[2] * box[3] // 2, "iscrowd": 1,
  }  # fmt: skip
  assert truth["categories"][79] == {"id": 90, "name": "toothbrush"}


def test_digits(tmp_path, monkeypatch):
  (config,) = (c for c in ClutteredDigits.BUILDER_CONFIGS if c.name == "detect_small")
  monkeypatch.setattr(config, "num_train", 2)
  monkeypatch.setattr(config, "num_validation", 90)
  source = open_boxes("cluttered_digits/detect_small", "validation", str(tmp_path))
  assert source.class_names == [str(k) for k in range(10)]
  assert source.category_ids == list(range(1, 11))
  for k, example in enumerate(source):
    assert example["image_id"] == k
    assert 3 <= len(example["boxes"]) <= 12
    # Whole pixels, though the records have parts of the image's sides.
    np.testing.assert_array_equal(example["boxes"], example["boxes"].round())
    sides = example["boxes"][:, 2:] - example["boxes"][:, :2]
    np.testing.assert_array_equal(example["areas"], sides.prod(axis=1))
  # Small, medium and large ones are about as many.
  parts = np.bincount(np.digitize(source.table.areas, source.area_limits), minlength=3)
  assert (parts / parts.sum() > 0.25).all()


def test_a_data_set_without_boxes(tmp_path):
  with pytest.raises(UsageError, match="detection needs 'image' and a sequence 'objects'"):
    open_boxes("numbers", "train", str(write_numbers(tmp_path)))


def write_numbers(folder):
  import fixture_numbered
  import tensorflow_datasets as tfds

  class Numbers(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=fixture_numbered.features(1))

    def _split_generators(self, dl_manager):
      example = {"image": fixture_numbered.jpeg(0), "label": 0, "file_name": ""}
      return {"train": iter([(0, example)])}

    def _generate_examples(self):
      raise AssertionError

  Numbers(data_dir=folder).download_and_prepare(file_format="array_record")
  return folder


# COCO's JSON.


def test_an_annotation_file(tmp_path):
  source = open_boxes(fixture_boxes.write(tmp_path), "all")
  assert (len(source), source.class_names, source.category_ids) == (23, ["bird", "cat"], [7, 200])
  assert source.annotations == str(tmp_path / "all.json")
  examples = by_id(source)
  assert sorted(examples) == list(range(23))
  for k, example in examples.items():
    data, (x, y, w, h) = fixture_boxes.picture(k, *fixture_boxes.SIZES[k % 7])
    assert example["image"] == data
    assert example["id"] == f"{k}.jpg"
    np.testing.assert_array_equal(example["boxes"], np.float32([[x, y, x + w, y + h]]))
    assert example["labels"].tolist() == [k % 2 == 0]
    assert example["areas"].tolist() == [w * h / 2]
  truth, values = source.ground_truth(), fixture_boxes.content(23)
  assert sorted(truth["images"], key=lambda image: image["id"]) == values["images"]
  found = {annotation["image_id"]: annotation for annotation in truth["annotations"]}
  for annotation in values["annotations"]:
    for key in ("bbox", "category_id", "area", "iscrowd"):
      assert found[annotation["image_id"]][key] == annotation[key]


def test_parts_of_one_file_and_a_file_for_each_split(tmp_path):
  dataset = fixture_boxes.write(tmp_path)
  parts = [open_boxes(dataset, split) for split in ("all[:70%]", "all[70%:]")]
  ids = [set(by_id(part)) for part in parts]
  assert ids[0] | ids[1] == set(range(23))
  assert not ids[0] & ids[1]
  assert max(ids[0]) > min(ids[1])  # shuffled
  assert parts[0].annotations is None  # which would have other images, too
  for split, first in (("train2017", 0), ("val", 100)):
    values = fixture_boxes.content(5, first)
    dataset = fixture_boxes.write(tmp_path, values, split=split)
  assert set(by_id(open_boxes(dataset, "train2017"))) == set(range(5))
  validation = open_boxes(dataset, "validation")
  assert set(by_id(validation)) == set(range(100, 105))
  assert validation.annotations == str(tmp_path / "val.json")
  both = open_boxes(dataset, "train2017[:40%]+val")
  assert len(both) == 7
  assert set(by_id(both)) > set(range(100, 105))


def test_an_annotation_file_is_parsed_once_and_again_when_it_changes(tmp_path, monkeypatch):
  dataset = fixture_boxes.write(tmp_path)
  open_boxes(dataset, "all")
  monkeypatch.setattr("lip_jax.data.coco_json._parse", lambda content: 1 / 0)
  assert len(open_boxes(dataset, "all")) == 23
  monkeypatch.undo()
  fixture_boxes.write(tmp_path, count=9)
  assert len(open_boxes(dataset, "all")) == 9


def test_sizes_that_the_file_does_not_say_are_those_of_the_images(tmp_path):
  values = fixture_boxes.content(9)
  for image in values["images"]:
    del image["height"]
  dataset = fixture_boxes.write(tmp_path, values)
  (tmp_path / "images" / "3.jpg").write_bytes(b"no image")
  data = io.BytesIO()
  Image.new("CMYK", (60, 40)).save(data, "JPEG")
  (tmp_path / "images" / "0.jpg").write_bytes(data.getvalue())
  source = open_boxes(dataset, "all")
  ids = source.table.image_ids.tolist()
  sizes = dict(zip(ids, source.image_sizes().tolist(), strict=True))
  expected = {k: list(fixture_boxes.SIZES[k % 7]) for k in range(9)}
  assert sizes == {**expected, 3: [0, 0]}
  assert by_id(source)[8]["size"].tolist() == list(fixture_boxes.SIZES[1])


def changed(**changes):
  """An annotation file whose last entries differ."""
  values = fixture_boxes.content(5)
  for key, change in changes.items():
    values[key][-1] |= change
  return values


def without(key):
  values = fixture_boxes.content(5)
  del values[key]
  return values


BIG = 2**31


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (changed(annotations={"image_id": 99}), "1 annotations are of an image .* annotation 5 of im"),
    (changed(annotations={"image_id": None}), "1 annotations are of an image .* of image None"),
    (changed(annotations={"image_id": [1]}), r"1 annotations are of an image .* of image \[1\]"),
    (changed(annotations={"bbox": [1, 2, 3]}), r"annotation 5 has bbox \[1, 2, 3\]; expected"),
    (changed(annotations={"bbox": [1, 2, 3, float("nan")]}), "annotation 5 has bbox"),
    (changed(annotations={"bbox": [1, 2, 10**400, 3]}), "annotation 5 has bbox"),
    (changed(annotations={"bbox": None}), "annotation 5 has bbox None"),
    (changed(annotations={"area": "large"}), "annotation 5 has area large"),
    (changed(images={"id": 2}), "1 ids of image entries are there more than once, the first is 2"),
    (changed(images={"id": BIG}), f"1 ids of image entries are not whole .* first is {BIG}"),
    (changed(images={"id": -1}), "1 ids of image entries are not whole"),
    (changed(images={"id": "a"}), "1 ids of image entries are not whole .* the first is 'a';"),
    (changed(images={"file_name": None}), "image 4 has file_name None"),
    (changed(images={"width": 0}), "image 4 has height and width"),
    (changed(images={"width": 2.5}), "image 4 has height and width"),
    (changed(categories={"id": 200}), "1 ids of category entries are there more than once"),
    (changed(categories={"name": "cat\ud800"}), r"category \d+ is called cat\\ud800, not UTF-8"),
    (without("categories"), "not in COCO's format"),
    (without("images"), "not in COCO's format"),
    ({**fixture_boxes.content(2), "images": []}, "annotations are of an image"),
    ({**fixture_boxes.content(2), "images": [], "annotations": []}, "has no images"),
    ([1, 2], "not in COCO's format"),
  ],
)
def test_what_is_wrong_with_annotations_is_said_in_one_line(tmp_path, values, message):
  dataset = fixture_boxes.write(tmp_path)
  (tmp_path / "all.json").write_text(json.dumps(values))
  with pytest.raises(UsageError, match=message) as caught:
    open_boxes(dataset, "all")
  assert str(tmp_path / "all.json") in str(caught.value)
  assert "\n" not in str(caught.value)


def test_annotations_of_unknown_categories_are_left_out_with_a_warning(tmp_path, caplog):
  dataset = fixture_boxes.write(tmp_path, changed(annotations={"category_id": 3}))
  said = "1 annotations are of a category that it does not have and are left out"
  for _ in range(2):  # also where the file has been read before
    caplog.clear()
    source = open_boxes(dataset, "all")
    assert said in caplog.text
    assert len(by_id(source)[4]["boxes"]) == 0
    assert source.table.counts.sum() == 4
  result = verify(dataset, None)
  assert f"all: {said}, the first is annotation 5 of category 3" in result.faults


def test_other_errors_of_files_and_names(tmp_path):
  dataset = fixture_boxes.write(tmp_path)
  (tmp_path / "images" / "3.jpg").unlink()
  with pytest.raises(UsageError, match=r"lacks 1 of 23 images of .*all.json: 3.jpg"):
    open_boxes(dataset, "all")
  (tmp_path / "images" / "3.jpg").touch()
  for name, split, message in (
    ("coco:x", "all", "expected coco:ANNOTATIONS.json@IMAGES"),
    (dataset, "train", "its split is 'all', or a part such as"),
    (dataset, "all[", "has no split 'all"),
    (f"coco:{tmp_path}/{{split}}.json@{tmp_path}/images", "train", "there is no annotation file"),
    (f"coco:{tmp_path}/all.json@{tmp_path}/none", "all", "there is no folder of images"),
  ):
    with pytest.raises(UsageError, match=message):
      open_boxes(name, split)
  (tmp_path / "all.json").write_text("{")
  with pytest.raises(UsageError, match=r"all.json is not JSON: "):
    open_boxes(dataset, "all")


def test_annotations_that_are_strange_but_no_error(tmp_path):
  values = fixture_boxes.content(5)
  first, second, third, fourth, _ = values["annotations"]
  del first["area"], first["iscrowd"], first["id"]
  second["bbox"] = [3, 4, 0.5, 9]
  third["area"] = 0
  fourth["bbox"] = [500, 500, 10, 10]
  values["annotations"].append({**fourth, "iscrowd": 1, "bbox": [1, 1, 9, 9]})
  values["annotations"].append(dict(second))  # with its id
  examples = by_id(source := open_boxes(fixture_boxes.write(tmp_path, values), "all"))
  assert examples[0]["areas"].tolist() == [first["bbox"][2] * first["bbox"][3]]
  assert [examples[k]["usable"].tolist() for k in range(5)] == [
    [True], [False, False], [False], [False, True], [True]
  ]  # fmt: skip
  assert source.table.num_usable.sum() == 3
  assert source.table.num_objects.sum() == 2
  assert source.notes == ["2 ids of annotations are there more than once"]
