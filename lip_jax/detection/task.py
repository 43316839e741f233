"""Detection as a task: images to boxes with classes, by the detector's own losses."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from lip_jax.data import boxes_pipeline, pipeline
from lip_jax.data.boxes import BoxSource, open_boxes
from lip_jax.detection import categories, evaluation, fine_tuning, presets
from lip_jax.detection.config import Config
from lip_jax.detection.evaluation import Evaluator
from lip_jax.detection.inputs import normalize
from lip_jax.detection.registry import abstract_detector, create_detector, detector_class
from lip_jax.errors import UsageError
from lip_jax.export import class_names
from lip_jax.models.registry import network_class
from lip_jax.training.task import Batch, Scalars, Task
from lip_jax.training.train_state import TrainState, Tree


class Detection(Task):
  """Learns where objects are, and of which class.

  Args:
    num_classes: where the data set need not be there; None: what it says.

  Raises:
    UsageError: an unknown detector, preset or option.
  """

  best_metric = "AP"
  config: Config

  def __init__(self, config: Config, num_classes: int | None = None):
    super().__init__(config)
    self._num_classes = num_classes
    self.preset = presets.find(config.model.get("preset", "mmdet1"))
    self.buckets = config.data.buckets
    self.trained = self.shown = detector_class(config.model["name"]).terms
    try:
      abstract_detector(**config.model, num_classes=1, dtype=jnp.dtype(config.dtype))
    except (TypeError, ValueError) as error:
      raise UsageError(f"config.model: {error}") from None

  @functools.cached_property
  def source(self) -> BoxSource:
    """Training images."""
    data = self.config.data
    return open_boxes(data.dataset, data.train_split, data.data_dir)

  @functools.cached_property
  def validation(self) -> BoxSource:
    """Validation images."""
    data = self.config.data
    found = open_boxes(data.dataset, data.validation_split, data.data_dir)
    if (found.class_names, found.category_ids) != (
      self.source.class_names,
      self.source.category_ids,
    ):
      raise UsageError(
        f"{found.name} has other classes than {self.source.name}; give splits of one data set"
      )
    return found

  @property
  def num_classes(self) -> int:
    return self.source.num_classes if self._num_classes is None else self._num_classes

  @functools.cached_property
  def num_train(self) -> int:
    data, options = self.config.data, self._resizing
    images = boxes_pipeline.train_images(
      self.source, max_boxes=data.max_boxes, min_side=data.min_side, **options
    )
    return images.num_train(self.config.global_batch_size)

  @property
  def _resizing(self) -> dict[str, Any]:
    data = self.config.data
    return {
      "buckets": data.buckets,
      "short_side": data.short_side,
      "long_side": data.long_side,
    }

  def train_loader(self) -> pipeline.TrainLoader:
    data = self.config.data
    return boxes_pipeline.train_loader(
      self.source,
      max_boxes=data.max_boxes,
      flip=0.5 if data.flip else 0.0,
      min_side=data.min_side,
      global_batch_size=self.config.global_batch_size,
      seed=self.config.seed,
      num_threads=data.num_threads,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      **self._resizing,
    )

  def batch_shapes(self, size: int, bucket: str) -> dict[str, jax.ShapeDtypeStruct]:
    height, width = self.config.data.bucket_sizes[bucket]
    boxes = self.config.data.max_boxes
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
      "image": ((height, width, 3), jnp.uint8),
      "size": ((2,), jnp.int32),
      "boxes": ((boxes, 4), jnp.float32),
      "labels": ((boxes,), jnp.int32),
      "valid": ((boxes,), jnp.bool_),
      "crowd": ((boxes,), jnp.bool_),
      "image_id": ((), jnp.int32),
    }
    return {
      name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in shapes.items()
    }

  def create_model(self, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
    return create_detector(
      **{"mask_padding": True, **self.config.model},
      num_classes=self.num_classes,
      dtype=jnp.dtype(self.config.dtype),
      rngs=rngs,
      **options,
    )

  @property
  def batch_norm_group(self) -> int:
    return super().batch_norm_group if self.config.model.get("bn_frozen") is False else 0

  def prepare(self, batch: Batch, key: jax.Array) -> Batch:
    """Normalized images, the numbers of outputs in place of the data set's labels, and places."""
    data = self.config.data
    outputs = jnp.asarray(self._outputs)
    return {
      **batch,
      "image": normalize(batch["image"], batch["size"], data.mean, data.std),
      "labels": outputs[batch["labels"]],
      "row": jnp.arange(len(batch["labels"]), dtype=jnp.int32),
    }

  @functools.cached_property
  def _outputs(self) -> np.ndarray:
    if self._num_classes is not None:
      return np.arange(self._num_classes, dtype=np.int32)
    return categories.outputs(self.source.category_ids, self.preset)

  def loss(self, model: Any, batch: Batch, key: jax.Array) -> tuple[Scalars, Scalars]:
    targets = {name: batch[name] for name in ("boxes", "labels", "valid", "crowd", "image_id")}
    found = model.image_losses(batch["image"], batch["size"], targets, key=key)
    return model.group_losses(found, batch["row"], self.config.global_batch_size)

  def trainable(self, path: tuple[str, ...]) -> bool:
    stages = network_class(self.config.model["backbone"]).stages
    frozen = {name for stage in self.config.frozen_stages for name in stages[stage]}
    name = ".".join(map(str, path))
    by_name = any(f"{name}.".startswith(f"{one}.") for one in self.config.frozen)
    return not (by_name or (path[0] == "backbone" and path[1] in frozen))

  def evaluator(self, graph: nnx.GraphDef, mesh: Mesh) -> Evaluator:
    config = self.config
    return Evaluator(
      config.data,
      config.eval_batch_size,
      self.validation,
      graph,
      mesh,
      preset=self.preset,
      num_figures=config.figure_images,
    )

  def lower_evaluation(
    self, graph: nnx.GraphDef, mesh: Mesh, params: Tree, batch_stats: Tree, bucket: str
  ) -> jax.stages.Lowered:
    config = self.config
    return evaluation.lower(
      config.data, config.eval_batch_size, bucket, graph, mesh, params, batch_stats
    )

  def summary(self, metrics: Mapping[str, float]) -> list[str]:
    return evaluation.summary(metrics)

  def start_from(self, path: str | Path, state: TrainState) -> TrainState:
    """`state` with the weights of a detector, or the backbone of a classifier: a run, an exported
    folder, hf://, or a file of PyTorch's.
    """
    return fine_tuning.start_from(path, state, self.config, lambda: self.source)

  def files(self) -> dict[str, str]:
    return {
      class_names.FILE: class_names.to_json(self.source.class_names),
      categories.FILE: categories.to_json(self.source.category_ids),
    }

  def check_same(self, workdir: epath.Path) -> None:
    class_names.check_same(workdir, self.source.class_names, self.source.name)
    super().check_same(workdir)
