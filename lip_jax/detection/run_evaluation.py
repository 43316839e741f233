"""What the detector of a training run finds in a split, and what that is worth."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from lip_jax.data.annotations import check_area_limits
from lip_jax.data.boxes import open_boxes
from lip_jax.detection import coco_metric, result_files
from lip_jax.detection.coco_metric import Results
from lip_jax.detection.curves import draw_curves
from lip_jax.detection.detector import Detector
from lip_jax.detection.evaluation import Evaluator
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.export import class_names
from lip_jax.models import description
from lip_jax.training import config as config_lib
from lip_jax.training import train_state


def evaluate_loaded(
  detector: Detector,
  config: Mapping[str, Any],
  *,
  data_dir: str | None = None,
  split: str | None = None,
  batch_size: int | None = None,
  annotations: str | Path | None = None,
  save_detections: str | Path | None = None,
  save_annotations: str | Path | None = None,
  areas: Sequence[float] | None = None,
  curves: str | Path | None = None,
) -> dict[str, Any]:
  """COCO's metric of what `lip_jax.load` gives, on all devices; all processes call it together.

  Args:
    detector: of a training run.
    data_dir: None: that of the run; likewise split.
    batch_size: images at once, made a multiple of the devices; None: the run's.
    annotations: file with the ground truth; None: what the data set says.
    save_detections: where to write what is found, as COCO's results.
    save_annotations: where to write the ground truth, as COCO's annotations.
    areas: up to which objects are small, and medium, in pixels^2; None: what the ground truth says.
    curves: picture file for precision over recall.

  Returns:
    `coco_metric.NAMES`, "AP_by_class", "count" of images, "data", "ground_truth" and "library" by
    name, "area_limits", "step".

  Raises:
    UsageError: there is no such data set, its classes are others, weights are not finite, or a file
      cannot be written.
  """
  description.check_finite(detector, config["source"]["path"])
  run: Any = config_lib.load(config["source"]["path"])
  data = dataclasses.replace(
    run.data,
    data_dir=data_dir or run.data.data_dir,
    validation_split=split or run.data.validation_split,
  )
  source = open_boxes(data.dataset, data.validation_split, data.data_dir)
  class_names.check(config["num_classes"], config["class_names"], source.class_names, source.name)
  learned = config["category_ids"]
  if learned is not None and learned != source.category_ids:
    raise UsageError(
      f"{config['source']['path']} learned the categories {learned[:10]} and {source.name} has "
      f"{source.category_ids[:10]}; give the data set that it was trained on"
    )
  truth = source.ground_truth() if annotations is None else _truth(annotations, source)
  _set_areas(truth, areas)
  mesh = sharding.make_mesh()
  # By way of the host: one process cannot place arrays of its own on the devices of others.
  weights = jax.device_put(jax.device_get(train_state.split(detector)), sharding.replicated(mesh))
  size = math.ceil((batch_size or run.eval_batch_size) / mesh.size) * mesh.size
  evaluator = Evaluator(data, size, source, nnx.graphdef(detector), mesh, preset=detector.preset)
  results = evaluator.detect(*weights)
  assert results is not None  # nothing stops it
  values: dict[str, Any] = {}
  if jax.process_index() == 0:
    if save_detections is not None:
      result_files.write_results(save_detections, results)
    if save_annotations is not None:
      result_files.write_ground_truth(save_annotations, truth)
    values = _report(truth, results, curves)
  return {
    **sharding.gather(values)[0],
    "count": len(source),
    "data": source.name,
    "ground_truth": str(annotations or source.annotations or "the data set's own"),
    "step": config["source"]["step"],
  }


def evaluate_files(
  detections: str | Path,
  annotations: str | Path,
  *,
  areas: Sequence[float] | None = None,
  curves: str | Path | None = None,
) -> dict[str, Any]:
  """COCO's metric of detections in a file, without a network: as `evaluate_loaded`, but "step"."""
  truth = result_files.read_ground_truth(annotations)
  _set_areas(truth, areas)
  return {
    **_report(truth, result_files.read_results(detections, truth), curves),
    "count": len(truth["images"]),
    "data": str(detections),
    "ground_truth": str(annotations),
  }


def _set_areas(truth: dict[str, Any], areas: Sequence[float] | None) -> None:
  if areas is not None:
    check_area_limits(*areas)
    truth["info"] = {"area_limits": list(areas)}


def _report(
  truth: Mapping[str, Any], results: Results, curves: str | Path | None
) -> dict[str, Any]:
  score = coco_metric.score(truth, results)
  if curves is not None:
    draw_curves(score, curves)
  return {
    **score.metrics,
    "AP_by_class": score.by_class,
    "library": score.library,
    "area_limits": truth["info"]["area_limits"],
  }


def _truth(annotations: str | Path, source: Any) -> dict[str, Any]:
  truth = result_files.read_ground_truth(annotations)
  ids = {image["id"] for image in truth["images"]}
  strangers = [int(one) for one in source.table.image_ids if int(one) not in ids]
  if strangers or len(ids) != len(source):
    raise UsageError(
      f"{annotations} has {len(ids)} images and {source.name} {len(source)}, of which "
      f"{len(strangers)} are not in the file; give the annotations of that split"
    )
  return truth
