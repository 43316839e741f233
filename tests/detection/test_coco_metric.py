"""COCO's metric against reference values, and on what a run may meet."""

import json
import math

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
