"""COCO's files: annotations, and what a detector found ("results"), which other tools take, too."""

import json
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lip_jax.data import coco_json
from lip_jax.detection.coco_metric import Results
from lip_jax.errors import UsageError
from lip_jax.export.destination import check_file, replacing

log = logging.getLogger("lip_jax")

_KEYS = ("image_id", "category_id", "bbox", "score")


def read_ground_truth(path: str | Path) -> dict[str, Any]:
  """What an annotation file holds: "images", "annotations", "categories" and "info".

  Raises:
    UsageError: there is no such file, or its annotations are not in order.
  """
  file = coco_json.read(str(path))
  return file.table.to_coco(file.class_names, file.category_ids, file.area_limits)


def write_ground_truth(path: str | Path, ground_truth: Mapping[str, Any]) -> None:
  """Writes annotations as `read_ground_truth` takes them.

  Raises:
    UsageError: the file cannot be written.
  """
  images = [
    {**image, "file_name": image["file_name"] or str(image["id"])}
    for image in ground_truth["images"]
  ]
  _write(path, {**ground_truth, "images": images}, "annotations")


def read_results(path: str | Path, ground_truth: Mapping[str, Any]) -> Results:
  """The detections in a JSON file: a list of "image_id", "category_id", "bbox" (x, y, width,
  height in pixels) and "score".

  Those of categories that the ground truth does not have are left out, as pycocotools does, with a
  warning.

  Raises:
    UsageError: there is no such file, it holds something else, or images or numbers that cannot be.
  """
  try:
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(rows, list):
      raise ValueError(f"a JSON {type(rows).__name__}")
    columns = [[row[key] for row in rows] for key in _KEYS]
    if not all(isinstance(box, list) and len(box) == 4 for box in columns[2]):
      raise ValueError("a bbox has to be four numbers")
    ids, categories, boxes, scores = (np.array(column) for column in columns)
    whole = all(type(one) is int for column in columns[:2] for one in column)
    boxes = boxes if rows else np.zeros((0, 4))
    numbers = boxes.ndim == 2 and scores.ndim == 1
    if not (whole and numbers and {boxes.dtype.kind, scores.dtype.kind} <= set("iuf")):
      raise ValueError("ids have to be whole numbers, boxes and scores numbers")
    boxes, scores = boxes.astype(np.float64), scores.astype(np.float64)
    results = Results(ids.astype(np.int64), categories.astype(np.int64), boxes, scores)
  except OSError as error:
    raise UsageError(f"cannot read the detections in {path}: {error.strerror}") from None
  except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
    raise UsageError(
      f"{path} holds no detections ({type(error).__name__}: {error}); expected a JSON list of "
      f"objects with {', '.join(_KEYS)}"
    ) from None
  unknown = np.setdiff1d(results.image_ids, [one["id"] for one in ground_truth["images"]])
  if len(unknown):
    raise UsageError(
      f"{path} has the image_id {unknown[0]}, and {len(unknown) - 1} others, that the annotations "
      "lack; give the annotations of the same split"
    )
  wrong = ~(np.isfinite(results.scores) & np.isfinite(boxes).all(axis=1))
  wrong |= (boxes[:, 2:] < 0).any(axis=1)
  if wrong.any():
    raise UsageError(
      f"{path} has {wrong.sum()} detections with a negative size or a number that is not finite, "
      f"the first in image {results.image_ids[wrong][0]}"
    )
  known = np.isin(results.category_ids, [one["id"] for one in ground_truth["categories"]])
  if not known.all():
    log.warning(
      "%s: %d detections are of categories that the annotations lack, the first of %d; "
      "they are left out",
      path,
      (~known).sum(),
      results.category_ids[~known][0],
    )
  return Results(*(column[known] for column in results))


def write_results(path: str | Path, results: Results) -> None:
  """Writes detections as `read_results` takes them.

  Raises:
    UsageError: the file cannot be written.
  """
  _write(path, _rows(results), "detections")


def check_submission(path: str | Path, *, overwrite: bool) -> None:
  """Raises UsageError if `write_submission` may not write there."""
  if Path(path).suffix != ".zip":
    raise UsageError(f"a submission is a zip file, not {path}; choose a name that ends with .zip")
  check_file(Path(path), overwrite=overwrite)


def write_submission(path: str | Path, results: Results, annotations: str | None) -> None:
  """Writes what COCO's evaluation server takes: a zip file with detections under the name it wants.

  Args:
    annotations: path of the images' file, image_info_SET.json or instances_SET.json; SET becomes a
      part of the name. Of any other it is test-dev2017.

  Raises:
    UsageError: the file cannot be written.
  """
  found = re.fullmatch(r"(?:image_info|instances)_(.+)\.json", Path(annotations or "").name)
  name = f"detections_{found[1] if found else 'test-dev2017'}_lip_results.json"
  with replacing(Path(path)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
    archive.writestr(name, json.dumps(_rows(results)), zipfile.ZIP_DEFLATED)


def _rows(results: Results) -> list[dict[str, Any]]:
  return [
    dict(zip(_KEYS, row, strict=True)) for row in zip(*(a.tolist() for a in results), strict=True)
  ]


def _write(path: str | Path, values: Any, what: str) -> None:
  try:
    Path(path).write_text(json.dumps(values))
  except OSError as error:
    raise UsageError(f"cannot write the {what} to {path}: {error.strerror}") from None
