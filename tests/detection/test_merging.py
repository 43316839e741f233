"""Evaluation of detectors on flipped images and on several scales."""

import json

import cv2
import fixture_small_detectors as small
import numpy as np
import pytest
from fixture_detector_runs import write
from flax import nnx

from lip_jax import cli
from lip_jax.detection import merging
from lip_jax.detection.coco_metric import Results
from lip_jax.export import folders

SIZES = [(48, 64), (64, 48), (48, 48)]  # at which images are not resized


def results(*rows):
  """Of (image, category, box, score)."""
  return Results(*(np.array(column) for column in zip(*rows, strict=True)))


def test_what_several_views_found_is_suppressed_by_class_and_image():
  one = results(
    (5, 1, [10.0, 10, 20, 20], 0.9),
    (5, 2, [10.0, 10, 20, 20], 0.3),
    (9, 1, [0.0, 0, 5, 5], 0.5),
  )
  other = results(
    (9, 1, [0.0, 1, 5, 5], 0.6),  # an IoU of 2 / 3
    (5, 1, [12.0, 10, 20, 20], 0.8),
    (5, 1, [40.0, 10, 20, 20], 0.7),
    (4, 1, [0.0, 0, 5, 5], 0.1),
  )
  found = merging.merge([one, other])
  kept = [(int(k), int(c), float(b[0]), float(s)) for k, c, b, s in zip(*found, strict=True)]
  assert kept == [
    (4, 1, 0.0, 0.1), (5, 1, 10.0, 0.9), (5, 1, 40.0, 0.7), (5, 2, 10.0, 0.3), (9, 1, 0.0, 0.6)
  ]  # fmt: skip
  assert found.boxes[-1].tolist() == [0, 1, 5, 5]


def test_the_hundred_best_of_an_image_are_taken_after_that():
  first = results(*((1, 1, [100.0 * k, 0, 10, 10], 0.9 - k / 1000) for k in range(80)))
  second = results(*((1, 1, [100.0 * k, 1, 10, 10], 0.8 - k / 1000) for k in range(150)))
  found = merging.merge([first, second])
  assert found.boxes[:, 0].tolist() == [100.0 * k for k in range(100)]
  assert found.boxes[:, 1].tolist() == [0.0] * 80 + [1.0] * 20


def test_nothing_is_found():
  empty = Results.joined([])
  assert len(merging.merge([empty, empty]).scores) == 0


def write_images(folder, *, flipped):
  """Noise with a box in each; returns the name of the data set."""
  (folder / "images").mkdir(parents=True)
  images, annotations = [], []
  for k, (height, width) in enumerate(SIZES):
    pixels = np.random.default_rng(k).integers(0, 256, (height, width, 3), np.uint8)
    cv2.imwrite(str(folder / f"images/{k}.png"), pixels[:, ::-1] if flipped else pixels)
    images.append({"id": k, "file_name": f"{k}.png", "height": height, "width": width})
    x = width - 15 if flipped else 5
    box = {"bbox": [x, 8, 10, 12], "area": 120, "iscrowd": 0, "category_id": 7}
    annotations.append({"id": k + 1, "image_id": k, **box})
  categories = [{"id": 7, "name": "bird"}, {"id": 200, "name": "cat"}]
  values = {"images": images, "annotations": annotations, "categories": categories}
  (folder / "all.json").write_text(json.dumps(values))
  return f"coco:{folder}/all.json@{folder}/images"


def test_flipped_images_give_the_flipped_detections(tmp_path, capsys):
  """The views of flipped images are those of the others in another order."""
  datasets = [write_images(tmp_path / f"set{k}", flipped=bool(k)) for k in range(2)]
  detector = nnx.merge(*small.create("faster_rcnn", num_classes=2, mask_padding=True))
  model = {**small.SMALL["faster_rcnn"], "name": "faster_rcnn", "backbone": "lip_resnet_small"}
  del model["num_classes"]
  preprocess = {"short_side": 48, "long_side": 64, "mean": [128.0] * 3, "std": [64.0] * 3}
  config = {"task": "detection", "model": model, "num_classes": 2, "preprocess": preprocess}
  folders.save(tmp_path / "folder", detector, config)
  found, scores = [], []
  for k, dataset in enumerate(datasets):
    path = tmp_path / f"{k}.json"
    command = ["evaluate", str(tmp_path / "folder"), f"--data={dataset}", "--split=all", "--json"]
    assert cli.main([*command, "--flip", "--batch-size=8", f"--save-detections={path}"]) == 0
    scores.append(json.loads(capsys.readouterr().out))
    found.append(json.loads(path.read_text()))
  assert scores[0]["AP"] == pytest.approx(scores[1]["AP"])
  assert scores[0]["data"].endswith(" all (flipped, too)")
  assert len(found[0]) > 30
  widths = dict(enumerate(width for _, width in SIZES))

  def rows(detections, flip):
    for one in detections:
      x, y, width, height = one["bbox"]
      x = widths[one["image_id"]] - x - width if flip else x
      yield one["image_id"], one["category_id"], *np.round([x, y, width, height, one["score"]], 3)

  assert sorted(rows(found[0], False)) == sorted(rows(found[1], True))
  assert sorted(rows(found[0], False)) != sorted(rows(found[1], False))


def test_several_scales(tmp_path, capsys):
  dataset = write_images(tmp_path / "set", flipped=False)
  write(tmp_path / "run", dataset)
  found = {}
  for scales in ("48", "48 80", "80"):
    path = tmp_path / f"{scales}.json"
    command = ["evaluate", str(tmp_path / "run"), "--scales", *scales.split(), "--batch-size=8"]
    assert cli.main([*command, f"--save-detections={path}"]) == 0
    assert f"(shorter sides of {scales.replace(' ', ', ')} px)" in capsys.readouterr().out
    found[scales] = {
      (one["image_id"], one["category_id"], *one["bbox"]) for one in json.loads(path.read_text())
    }
  assert found["48 80"] <= found["48"] | found["80"]
  assert found["48 80"] - found["48"]
  assert found["48 80"] - found["80"]
