"""COCO's metric against reference values, and on what a run may meet."""

import itertools
import json
import math
import time

import numpy as np
import pytest
from fixture_detection import DATA

from lip_jax.detection import coco_metric
from lip_jax.detection.coco_metric import Results


def read(name):
  return json.loads((DATA / f"coco_{name}.json").read_text())


def results_of(found):
  columns = [[one[key] for one in found] for key in ("image_id", "category_id", "bbox", "score")]
  return Results(*(np.array(column, dtype) for column, dtype in zip(columns, "qqdd", strict=True)))


def test_the_numbers_are_the_reference():
  expected = read("metrics")
  score = coco_metric.score(read("ground_truth"), results_of(read("detections")))
  assert list(score.metrics) == list(coco_metric.NAMES)
  for name, value in score.metrics.items():
    assert math.isclose(value, expected[name], rel_tol=1e-12), name
  names = {one["id"]: one["name"] for one in read("ground_truth")["categories"]}
  for key, value in expected["AP_per_category"].items():
    here = score.by_class[names[int(key)]]
    assert here == -1 if value is None else math.isclose(here, value, rel_tol=1e-12)
  assert math.isclose(np.mean(score.curve()), expected["AP"], rel_tol=1e-9)
  assert score.library.split()[0] in ("hotcoco", "pycocotools")


def boxes(image, labels, size=20.0):
  """Objects side by side in an image, as annotations or, with a score, as detections."""
  return [
    {"image_id": image, "category_id": label, "bbox": [40.0 * k, 5.0, size, size]}
    for k, label in enumerate(labels)
  ]


def truth(annotations, images=(1, 2)):
  return {
    "images": [{"id": image} for image in images],
    "categories": [{"id": 3, "name": "three"}, {"id": 900, "name": "many"}],
    "annotations": annotations,
  }


NOTHING = Results.joined([])


def test_images_without_detections_count():
  """Half of the objects are in an image in which nothing is found."""
  expected = truth([*boxes(1, [3]), *boxes(2, [3])])
  found = results_of([{**one, "score": 0.9} for one in boxes(1, [3])])
  assert coco_metric.score(expected, found).metrics["AP"] == pytest.approx(51 / 101)
  assert coco_metric.score(expected, NOTHING).metrics["AP"] == 0


def test_images_without_detections_lower_it():
  """100 objects in 33 images with one detection each, 50 in 17 images without."""
  counts = [4] + [3] * 48 + [2]
  objects = [boxes(image, [3] * count) for image, count in enumerate(counts)]
  right = [33, 30, 27, 24, 21, 18, 12, 7, 4, 2]  # detections at an IoU of 0.5, 0.55, ...
  found = []
  for image in range(33):
    iou = 0.47 + 0.05 * sum(count > image for count in right)
    x, y, width, height = objects[image][0]["bbox"]
    box = [x, y, width * iou, height]
    found.append({"image_id": image, "category_id": 3, "bbox": box, "score": 0.9})
  for images, expected in ((33, 0.186), (50, 0.126)):
    ground_truth = truth([*itertools.chain(*objects[:images])], range(images))
    ap = coco_metric.score(ground_truth, results_of(found)).metrics["AP"]
    assert round(ap, 3) == expected


def test_five_thousand_images_take_seconds():
  """As many as COCO's validation images, objects and classes, with 100 detections each."""
  rng = np.random.default_rng(0)
  images, objects, most = 5000, 36781, 100

  def random_boxes(count):
    sizes = np.exp(rng.uniform(np.log(6), np.log(300), (count, 2)))
    return np.concatenate([rng.uniform(0, 1, (count, 2)) * (640 - sizes), sizes], axis=1)

  where, labels = rng.integers(0, images, objects), rng.integers(1, 81, objects)
  rows = zip(where.tolist(), labels.tolist(), random_boxes(objects).tolist(), strict=True)
  ground_truth = {
    "images": [{"id": image} for image in range(images)],
    "categories": [{"id": label, "name": str(label)} for label in range(1, 81)],
    "annotations": [
      {"image_id": image, "category_id": label, "bbox": box} for image, label, box in rows
    ],
  }
  number = images * most
  found = Results(
    np.repeat(np.arange(images), most),
    rng.integers(1, 81, number),
    random_boxes(number),
    rng.uniform(0.05, 1, number),
  )
  # Some are right: the first of each image that has an object.
  first = np.unique(where, return_index=True)[1]
  found.boxes[where[first] * most] = [ground_truth["annotations"][k]["bbox"] for k in first]
  found.category_ids[where[first] * most] = labels[first]
  start = time.perf_counter()
  metrics = coco_metric.score(ground_truth, found).metrics
  seconds = time.perf_counter() - start
  assert 0 < metrics["AP"] < 0.2
  assert seconds < 5


def test_without_objects_nothing_is_defined_and_all_is_json():
  metrics = coco_metric.score(truth([]), NOTHING).metrics
  assert set(metrics.values()) == {-1.0}
  json.dumps(metrics, allow_nan=False)


def test_limits_of_area_are_those_given():
  expected = truth([*boxes(1, [3], size=10.0), *boxes(2, [900], size=30.0)])
  found = results_of([{**one, "score": 0.9} for one in boxes(2, [900], size=30.0)])
  metrics = coco_metric.score(expected, found).metrics
  assert (metrics["AP_small"], metrics["AP_medium"]) == (pytest.approx(0.5), -1.0)
  metrics = coco_metric.score(expected, found, area_limits=(200.0, 1000.0)).metrics
  assert (metrics["AP_small"], metrics["AP_medium"], metrics["AP_large"]) == (
    *(0.0, pytest.approx(1.0)),
    -1.0,
  )


def test_crowds_excuse_what_lies_in_them():
  crowd = {**boxes(1, [3], size=100.0)[0], "iscrowd": 1, "area": 1e4}
  expected = truth([*boxes(2, [3]), crowd])
  found = results_of([{**one, "score": 0.9} for one in [*boxes(1, [3, 3]), *boxes(2, [3])]])
  assert coco_metric.score(expected, found).metrics["AP"] == pytest.approx(1.0)


def test_categories_of_one_name_keep_their_own_ap():
  expected = truth(boxes(1, [3]))
  first = expected["categories"][0]
  expected["categories"] = [first, {**first, "id": first["id"] + 1}]
  found = results_of([{**one, "score": 0.9} for one in boxes(1, [3])])
  by_class = coco_metric.score(expected, found).by_class
  assert by_class == {
    f"{first['name']} ({first['id']})": pytest.approx(1.0),
    f"{first['name']} ({first['id'] + 1})": -1.0,
  }
