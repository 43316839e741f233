"""What the detector of a training run finds in a split, and what that is worth."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
from etils import epath
from flax import nnx

from lip_jax.data.boxes import open_boxes
from lip_jax.detection import categories, coco_metric, result_files
from lip_jax.detection.evaluation import Evaluator
from lip_jax.detection.task import Detection
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.models import description
from lip_jax.training import config as config_lib
from lip_jax.training import train_state
from lip_jax.training.checkpoint.checkpoints import Checkpoints
from lip_jax.training.workdir import absolute


def evaluate_run(
  run: str | Path,
  *,
  checkpoint: str | None = None,
  data_dir: str | None = None,
  split: str | None = None,
  batch_size: int | None = None,
  annotations: str | Path | None = None,
  save_detections: str | Path | None = None,
) -> dict[str, Any]:
  """COCO's metric of a run's detector on all devices; all processes call it together.

  Args:
    checkpoint: "best", "latest" or a step; None: the best, or the latest if none was evaluated.
    data_dir: None: that of the run; likewise split.
    batch_size: images at once, made a multiple of the devices; None: the run's.
    annotations: file with the ground truth; None: what the data set says.
    save_detections: where to write what is found, as COCO's results.

  Returns:
    `coco_metric.NAMES`, "count" of images, "data", "ground_truth" and "library" by name, "step".

  Raises:
    UsageError: there is no such run, checkpoint or data set, or its classes are others.
  """
  config: Any = config_lib.load(run)
  data = dataclasses.replace(
    config.data,
    data_dir=data_dir or config.data.data_dir,
    validation_split=split or config.data.validation_split,
  )
  source = open_boxes(data.dataset, data.validation_split, data.data_dir)
  learned = categories.read(absolute(run))
  if learned is not None and learned != source.category_ids:
    raise UsageError(
      f"{run} learned the categories {learned[:10]} and {source.name} has "
      f"{source.category_ids[:10]}; give the data set that it was trained on"
    )
  truth = source.ground_truth() if annotations is None else _truth(annotations, source)
  task = Detection(config, num_classes=source.num_classes)
  model = nnx.eval_shape(lambda: task.create_model(nnx.Rngs(0)))
  with Checkpoints(epath.Path(run), read_only=True) as checkpoints:
    best = "latest" if checkpoints.best_step is None else "best"
    step = checkpoints.resolve(checkpoint or best)
    shapes = checkpoints.weight_shapes(step)
    found = {name: (array.shape, array.dtype.name) for name, array in shapes[0].items()}
    # Statistics have an axis of batch-norm groups in front.
    found |= {name: (array.shape[1:], array.dtype.name) for name, array in shapes[1].items()}
    description.check_weights(
      found,
      description.flat_variables(model),
      f"{checkpoints.path(step)} does not fit the run's config.json",
    )
    params, batch_stats = checkpoints.restore_weights(step)
  mesh = sharding.make_mesh()
  weights = jax.device_put((params, train_state.averaged(batch_stats)), sharding.replicated(mesh))
  size = math.ceil((batch_size or config.eval_batch_size) / mesh.size) * mesh.size
  evaluator = Evaluator(data, size, source, nnx.graphdef(model), mesh, preset=task.preset)
  results = evaluator.detect(*weights)
  assert results is not None  # nothing stops it
  values: dict[str, Any] = {}
  if jax.process_index() == 0:
    if save_detections is not None:
      result_files.write_results(save_detections, results)
    score = coco_metric.score(truth, results, area_limits=source.area_limits)
    values = {**score.metrics, "library": score.library}
  return {
    **sharding.gather(values)[0],
    "count": len(source),
    "data": source.name,
    "ground_truth": str(annotations or source.annotations or "the data set's own"),
    "step": step,
  }


def evaluate_files(detections: str | Path, annotations: str | Path) -> dict[str, Any]:
  """COCO's metric of detections in a file, without a network; as `evaluate_run`, without "step"."""
  truth = result_files.read_ground_truth(annotations)
  score = coco_metric.score(truth, result_files.read_results(detections, truth))
  return {
    **score.metrics,
    "library": score.library,
    "count": len(truth["images"]),
    "data": str(detections),
    "ground_truth": str(annotations),
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
