"""What a detector finds in a split, and what that is worth."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from lip_jax.data.annotations import check_area_limits
from lip_jax.data.boxes import BoxSource, open_boxes
from lip_jax.detection import coco_metric, merging, result_files
from lip_jax.detection.anchors import DIVISOR
from lip_jax.detection.coco_metric import Results
from lip_jax.detection.config import Data
from lip_jax.detection.curves import draw_curves
from lip_jax.detection.detector import Detector
from lip_jax.detection.evaluation import Evaluator
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.export import class_names
from lip_jax.models import description
from lip_jax.training import config as config_lib
from lip_jax.training import train_state

_BATCH_SIZE = 8  # of a detector that comes without its run


def evaluate_loaded(
  detector: Detector,
  config: Mapping[str, Any],
  *,
  dataset: str | None = None,
  data_dir: str | None = None,
  split: str | None = None,
  batch_size: int | None = None,
  flip: bool = False,
  scales: Sequence[int] | None = None,
  annotations: str | Path | None = None,
  save_detections: str | Path | None = None,
  save_annotations: str | Path | None = None,
  submission: str | Path | None = None,
  overwrite: bool = False,
  areas: Sequence[float] | None = None,
  curves: str | Path | None = None,
) -> dict[str, Any]:
  """COCO's metric of what `lip_jax.load` gives, on all devices; all processes call it together.

  Args:
    dataset: None: that of the training run; likewise data_dir and split, which is "validation"
      where there is no run.
    batch_size: images at once, made a multiple of the devices; None: the run's, or 8.
    flip: look at each image with left and right swapped, too.
    scales: the shorter sides of images to look at, in pixels, in place of the network's own. What
      is found in all forms of an image is merged: see `merging.merge`.
    annotations: file with the ground truth; None: what the data set says.
    save_detections: where to write what is found, as COCO's results.
    save_annotations: where to write the ground truth, as COCO's annotations.
    submission: zip file to write for COCO's evaluation server, also of images without annotations,
      such as test-dev's, which are not scored.
    overwrite: replace that file if it is there.
    areas: up to which objects are small, and medium, in pixels^2; None: what the ground truth says.
    curves: picture file for precision over recall.

  Returns:
    `coco_metric.NAMES`, "AP_by_class", "count" of images, "data", "ground_truth" and "library" by
    name, "area_limits", "step"; where nothing is scored "count", "data" and "step".

  Raises:
    UsageError: there is no such data set, or none is named, its classes are others, weights are not
      finite, or a file cannot be written.
  """
  if submission is not None:
    result_files.check_submission(submission, overwrite=overwrite)
  description.check_finite(detector, config["source"]["path"])
  run: Any = None
  if config["data"] is not None:  # of a training run
    run = config_lib.load(config["source"]["path"])
    batch_size = batch_size or run.eval_batch_size
  data = _data(config, run and run.data, dataset=dataset, data_dir=data_dir, validation_split=split)
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
  sides = scales or (data.short_side,)
  results = _detect(detector, data, source, batch_size or _BATCH_SIZE, flip, sides)
  values: dict[str, Any] = {}
  if jax.process_index() == 0:
    if save_detections is not None:
      result_files.write_results(save_detections, results)
    if save_annotations is not None:
      result_files.write_ground_truth(save_annotations, truth)
    if submission is not None:
      result_files.write_submission(submission, results, source.annotations)
    if submission is None or truth["annotations"]:
      values = _report(truth, results, curves)
      values["ground_truth"] = str(annotations or source.annotations or "the data set's own")
  return {
    **sharding.gather(values)[0],
    "count": len(source),
    "data": source.name + _seen(flip, scales),
    "step": config["source"]["step"],
  }


def _detect(
  detector: Detector,
  data: Data,
  source: BoxSource,
  batch_size: int,
  flip: bool,
  scales: Sequence[int],
) -> Results:
  """What is found in all images of a split, in one form of them or in several."""
  graph, mesh = nnx.graphdef(detector), sharding.make_mesh()
  # By way of the host: one process cannot place arrays of its own on the devices of others.
  weights = jax.device_put(jax.device_get(train_state.split(detector)), sharding.replicated(mesh))
  size = math.ceil(batch_size / mesh.size) * mesh.size
  views = []
  for side in scales:
    evaluator = Evaluator(_scaled(data, side), size, source, graph, mesh, preset=detector.preset)
    for flipped in (False, True) if flip else (False,):
      found = evaluator.detect(*weights, flip=flipped)
      assert found is not None  # nothing stops it
      views.append(found)
  return views[0] if len(views) == 1 else merging.merge(views)


def _scaled(data: Data, short_side: int) -> Data:
  """Images resized to another shorter side, and as much to a longer one, in buckets for them."""
  if short_side == data.short_side:
    return data
  factor = short_side / data.short_side
  sides = (
    [math.ceil(side * factor / DIVISOR) for side in one] for one in data.bucket_sizes.values()
  )
  buckets = dict.fromkeys(f"{rows * DIVISOR}x{columns * DIVISOR}" for rows, columns in sides)
  long_side = max(short_side, math.floor(data.long_side * factor))
  return dataclasses.replace(
    data, short_side=short_side, long_side=long_side, buckets=tuple(buckets)
  )


def _seen(flip: bool, scales: Sequence[int] | None) -> str:
  """In what forms the images were looked at, in words."""
  forms = ["flipped, too"] if flip else []
  if scales:
    forms.append(f"shorter sides of {', '.join(map(str, scales))} px")
  return f" ({'; '.join(forms)})" if forms else ""


def _data(config: Mapping[str, Any], of_run: Data | None, **given: str | None) -> Data:
  """Where the images come from and how they are resized, but for what is given."""
  named: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
  if of_run is not None:
    return dataclasses.replace(of_run, **named)
  if "dataset" not in named:
    raise UsageError(f"{config['source']['path']} names no data set; say which (--data)")
  prepared = config["preprocess"]
  short, long = (-(-prepared[f"{name}_side"] // DIVISOR) * DIVISOR for name in ("short", "long"))
  values: dict[str, Any] = {
    **{key: prepared[key] for key in ("short_side", "long_side")},
    **{key: tuple(prepared[key]) for key in ("mean", "std")},
    "buckets": tuple(dict.fromkeys((f"{short}x{long}", f"{long}x{short}"))),
    **named,
  }
  return Data(**values)


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
