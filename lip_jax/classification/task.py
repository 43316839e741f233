"""Classification as a task: images to classes, by cross-entropy."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from lip_jax.classification import augment, evaluation, fine_tuning
from lip_jax.classification.config import Config
from lip_jax.classification.evaluation import Evaluator
from lip_jax.data import pipeline, transforms
from lip_jax.data.source import open_split
from lip_jax.errors import UsageError
from lip_jax.export import class_names
from lip_jax.models import create_model
from lip_jax.models.registry import check_options
from lip_jax.training.task import Batch, Scalars, Task
from lip_jax.training.train_state import TrainState, Tree


class Rows(NamedTuple):
  """What the loss takes of some images."""

  images: jax.Array  # [N, H, W, 3], normalized
  targets: jax.Array  # [N, classes], probabilities
  dominant: jax.Array  # int [N], the label that counts for top-1


class Classification(Task):
  """Learns the classes of images.

  Args:
    num_classes: where the data set need not be there; None: what it says.

  Raises:
    UsageError: an unknown network or option of it, with those there are.
  """

  best_metric = "top1"
  shown = ("top1",)
  config: Config

  def __init__(self, config: Config, num_classes: int | None = None):
    super().__init__(config)
    self._num_classes = num_classes
    try:
      check_options(config.model["name"], [key for key in config.model if key != "name"])
    except UsageError as error:
      raise UsageError(f"config.model: {error}") from None

  @functools.cached_property
  def source(self) -> Any:
    """Training images."""
    data = self.config.data
    return open_split(data.dataset, data.train_split, data.data_dir, train_split=data.train_split)

  @functools.cached_property
  def validation(self) -> Any:
    """Validation images."""
    data = self.config.data
    return open_split(
      data.dataset, data.validation_split, data.data_dir, train_split=data.train_split
    )

  @property
  def num_classes(self) -> int:
    return self.source.num_classes if self._num_classes is None else self._num_classes

  @property
  def num_train(self) -> int:
    return len(self.source)

  def train_loader(self) -> pipeline.TrainLoader:
    data = self.config.data
    return pipeline.train_loader(
      self.source,
      transforms.TrainCrop(
        data.image_size,
        data.crop_scale,
        channels=len(data.mean),
        upright=data.turns(self.source.upright),
      ),
      global_batch_size=self.config.global_batch_size,
      seed=self.config.seed,
      num_threads=data.num_threads,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def batch_shapes(self, size: int, bucket: str) -> dict[str, jax.ShapeDtypeStruct]:
    return {
      "image": jax.ShapeDtypeStruct((size, *self.config.data.shape), jnp.uint8),
      "label": jax.ShapeDtypeStruct((size,), jnp.int32),
    }

  def create_model(self, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
    return create_model(
      **self.config.model,
      num_classes=self.num_classes,
      dtype=jnp.dtype(self.config.dtype),
      rngs=rngs,
      **options,
    )

  def prepare(self, batch: Batch, key: jax.Array) -> Rows:
    """Augmented and normalized images, and targets that are mixed where the images are."""
    data = self.config.data
    images = augment.training_images(batch["image"], key, data)
    mix_key = jax.random.fold_in(key, 4)
    images, labels = augment.mix(images, batch["label"], mix_key, data.augment)
    return Rows(images, labels.targets(self.num_classes), labels.dominant)

  def loss(self, model: Any, batch: Rows, key: jax.Array) -> tuple[Scalars, Scalars]:
    """Cross-entropy, and how often the most probable class is the dominant one."""
    logits = model(batch.images)
    targets = optax.smooth_labels(batch.targets.astype(logits.dtype), self.config.label_smoothing)
    losses = optax.softmax_cross_entropy(logits, targets)
    correct = (logits.argmax(axis=-1) == batch.dominant).astype(losses.dtype)
    number = jnp.asarray(len(losses), losses.dtype)
    return {"loss": losses.sum(), "top1": correct.sum()}, {"loss": number, "top1": number}

  def evaluator(self, graph: nnx.GraphDef, mesh: Mesh) -> Evaluator:
    config = self.config
    return Evaluator(
      config.data,
      config.eval_batch_size,
      self.validation,
      graph,
      mesh,
      num_figures=config.importance_images,
    )

  def lower_evaluation(
    self, graph: nnx.GraphDef, mesh: Mesh, params: Tree, batch_stats: Tree, bucket: str
  ) -> jax.stages.Lowered:
    config = self.config
    return evaluation.lower(config.data, config.eval_batch_size, graph, mesh, params, batch_stats)

  def summary(self, metrics: Mapping[str, float]) -> list[str]:
    return [
      f"top-1: {100 * metrics['top1']:.2f}%",
      f"top-5: {100 * metrics['top5']:.2f}%",
      f"loss: {metrics['loss']:.4f} over {metrics['count']} images",
    ]

  def start_from(self, path: str | Path, state: TrainState) -> TrainState:
    return fine_tuning.start_from(path, state, self.config, self.source.class_names)

  def files(self) -> dict[str, str]:
    return {class_names.FILE: class_names.to_json(self.source.class_names)}

  def check_same(self, workdir: epath.Path) -> None:
    class_names.check_same(workdir, self.source.class_names, self.source.name)
