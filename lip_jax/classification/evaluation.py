"""Exact evaluation: every image counts once, on any number of devices and at any batch size."""

import contextlib
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from lip_jax import visualize
from lip_jax.classification.config import Data
from lip_jax.data import pipeline, transforms
from lip_jax.data.source import Source, open_split
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.export import class_names
from lip_jax.models import description
from lip_jax.models.folding import fold_batch_norm
from lip_jax.ops.images import normalize
from lip_jax.training import config as config_lib
from lip_jax.training import evaluation, train_state
from lip_jax.training.train_state import Tree

Batch = Mapping[str, jax.Array]
EvalStep = Callable[[Tree, Tree, Batch, jax.Array], dict[str, jax.Array]]


def jitted_step(data: Data, graph: nnx.GraphDef, mesh: Mesh) -> jax.stages.Wrapped:
  """Losses and counts of one batch, masked.

  Args:
    data: how images are normalized, and whether crops are mirrored, too (`eval_crops` 10).

  Returns:
    A jitted function. It takes the model's params and batch_stats, a batch of "image" [N, H, W, 3]
    or, of several crops, [N, crops, H, W, 3] uint8, "label" [N] int and "mask" [N], zero where a
    row is padding, and stop, int [devices], from `sharding.StopFlags`. It returns, on every device,
    "loss": float [N], zero where a row is padding; and the whole numbers "top1", "top5", "count"
    and "stop", the greatest of the flags. Logits are averaged over crops.
  """
  rows = sharding.over_batch(mesh).spec
  # As in training: kernels are not left to XLA's partitioner, which ahead of time has no rule for
  # them and gives every TPU the whole batch.
  each_image = jax.shard_map(
    functools.partial(_each_image, graph=graph, data=data),
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec(), rows),
    out_specs=rows,
    check_vma=False,
  )

  def step(params: Tree, batch_stats: Tree, batch: Batch, stop: jax.Array) -> dict[str, jax.Array]:
    each = each_image(params, batch_stats, batch)
    counts = {name: each[name].sum() for name in ("top1", "top5", "count")}
    # Losses are summed on the host: in which order is not for XLA to say.
    return {"loss": each["loss"], **counts, "stop": stop.max()}

  return jax.jit(step, out_shardings=sharding.replicated(mesh))


def _each_image(
  params: Tree, batch_stats: Tree, batch: Batch, *, graph: nnx.GraphDef, data: Data
) -> dict[str, jax.Array]:
  """Loss and counts of every image, [N]."""
  model = train_state.merge(graph, params, batch_stats)
  model.eval()
  model = fold_batch_norm(model)
  images = normalize(batch["image"], data.mean, data.std)
  if data.eval_crops == 10:
    images = jnp.concatenate([images, images[..., ::-1, :]], axis=1)
  logits = model(images.reshape(-1, *images.shape[-3:]))
  logits = logits.reshape(len(images), -1, logits.shape[-1]).mean(axis=1)
  labels, mask = batch["label"], batch["mask"] > 0
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
  correct = (best == labels[:, None]) & mask[:, None]
  return {
    "loss": jnp.where(mask, loss, 0),
    "top1": correct[:, 0],
    "top5": correct.sum(axis=1),
    "count": mask,
  }


def lower(
  data: Data, batch_size: int, graph: nnx.GraphDef, mesh: Mesh, params: Tree, batch_stats: Tree
) -> jax.stages.Lowered:
  """The program of `jitted_step` for batches of `batch_size` images; needs no data.

  Args:
    params: arrays, or their shapes; likewise batch_stats.
  """
  crops = min(data.eval_crops, 5)  # mirrored on the device
  place = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.over_batch(mesh))
  batch = {
    "image": place((batch_size, *([crops] if crops > 1 else []), *data.shape), jnp.uint8),
    "label": place((batch_size,), jnp.int32),
    "mask": place((batch_size,), jnp.float32),
  }
  weights = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh)),
    (params, batch_stats),
  )
  return jitted_step(data, graph, mesh).lower(*weights, batch, place((mesh.size,), jnp.int32))


def evaluate(
  step: EvalStep,
  params: Tree,
  batch_stats: Tree,
  batches: Iterable[Mapping[str, np.ndarray]],
  mesh: Mesh,
  stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
  """Mean loss and top-1, top-5 as fractions of all images, and their count.

  Losses are added exactly, so the result does not depend on the number of processes and devices,
  nor on the order of images, but for what rounding in the network itself depends on.

  Args:
    step: of `jitted_step`, for the same mesh.
    stop: asked before each batch; once any process says yes, all stop, and the result is None.
  """
  counts = {"top1": 0, "top5": 0, "count": 0}
  losses: list[np.ndarray] = []

  def add(batch: Mapping[str, jax.Array]) -> None:
    for name in counts:
      counts[name] += int(batch[name])
    losses.append(np.asarray(batch["loss"]))

  if not evaluation.run(step, params, batch_stats, batches, mesh, stop, add):
    return None
  number = max(counts["count"], 1)
  loss = math.fsum(itertools.chain.from_iterable(losses))
  return {
    "loss": loss / number,
    "top1": counts["top1"] / number,
    "top5": counts["top5"] / number,
    "count": counts["count"],
  }


class Evaluator:
  """Validation of networks of one structure; all processes call it together.

  Args:
    num_figures: images of `figures`; at most those of one batch are taken.
  """

  def __init__(
    self,
    data: Data,
    batch_size: int,
    source: Source,
    graph: nnx.GraphDef,
    mesh: Mesh,
    *,
    num_figures: int = 0,
  ):
    self._data = data
    self._batch_size = batch_size
    self._source = source
    self._graph = graph
    self._mesh = mesh
    self._num_figures = num_figures
    self._step: Any = jitted_step(data, graph, mesh)

  def compile(self, params: Tree, batch_stats: Tree) -> None:
    """Compiles the step, so that what follows is evaluation alone."""
    self._step = lower(
      self._data, self._batch_size, self._graph, self._mesh, params, batch_stats
    ).compile()

  def __call__(
    self, params: Tree, batch_stats: Tree, stop: Callable[[], bool] = lambda: False
  ) -> dict[str, float] | None:
    """Exact "loss", "top1", "top5" and "count" over the validation split.

    Args:
      stop: asked before each batch; once any process says yes, the result is None.

    Raises:
      UnreadableImagesError: images of the split cannot be read; names those of all processes.
    """
    return evaluation.over_split(
      lambda batches: evaluate(self._step, params, batch_stats, batches, self._mesh, stop),
      self._batches(),
      self._source,
      math.ceil(len(self._source) / self._batch_size),
    )

  def figures(self, params: Tree, batch_stats: Tree) -> dict[str, np.ndarray]:
    """Importance maps of the first validation images as a picture, uint8 [H, W, 3].

    All processes have to call it; the first one draws. Empty where the network has no LIP layer.
    """
    if not self._num_figures:
      return {}
    # On the host, as one process cannot compute with what lies on the devices of others.
    params, batch_stats = jax.device_get((params, batch_stats))
    if jax.process_index() != 0:
      return {}
    with contextlib.closing(self._batches()) as batches:
      batch = next(batches)
    images = batch["image"][batch["mask"] > 0][: self._num_figures]
    if images.ndim == 5:
      images = images[:, 0]  # the central crop
    model = train_state.merge(self._graph, params, batch_stats)
    model.eval()
    data, channels = self._data, images.shape[-1]
    figure = visualize.importance_figure(
      model,
      np.repeat(images, 3 // channels, axis=-1),  # grey is drawn as such
      lambda x: normalize(jnp.asarray(x[..., :channels]), data.mean, data.std),
    )
    return {} if figure is None else {"importance": visualize.figure_to_array(figure)}

  def _batches(self) -> Generator[Mapping[str, np.ndarray], None, None]:
    return pipeline.eval_batches(
      self._source,
      transforms.EvalCrop(
        self._data.image_size,
        self._data.eval_resize,
        crops=min(self._data.eval_crops, 5),  # mirrored on the device
        channels=len(self._data.mean),
        upright=self._data.turns(self._source.upright),
      ),
      global_batch_size=self._batch_size,
      num_threads=self._data.num_threads,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )


def evaluate_model(
  model: nnx.Module, source: Source, data: Data, batch_size: int
) -> dict[str, float]:
  """Exact "loss", "top1", "top5", "count" over a split, and "images_per_second" without compiling.

  Raises:
    UnreadableImagesError: images of the split cannot be read.
  """
  mesh = sharding.make_mesh()
  params, batch_stats = jax.device_put(
    jax.device_get(train_state.split(model)), sharding.replicated(mesh)
  )
  batch_size = math.ceil(batch_size / mesh.size) * mesh.size
  evaluator = Evaluator(data, batch_size, source, nnx.graphdef(model), mesh)
  evaluator.compile(params, batch_stats)
  start = time.perf_counter()
  results = evaluator(params, batch_stats)
  assert results is not None  # nothing cancels it
  return {**results, "images_per_second": results["count"] / (time.perf_counter() - start)}


def evaluate_loaded(
  model: nnx.Module,
  config: Mapping[str, Any],
  *,
  dataset: str | None = None,
  data_dir: str | None = None,
  split: str | None = None,
  batch_size: int | None = None,
  crops: int | None = None,
) -> dict[str, Any]:
  """Evaluates what `lip_jax.load` gives, on all devices.

  Args:
    dataset: as for `open_split`; None: that of the training run which the network is of.
    split: None: "validation", or that of the training run.
    batch_size: images at once, made a multiple of the devices; None: the training run's, or 128.
    crops: of which logits are averaged, 1, 5 or 10; None: the training run's, or 1.

  Returns:
    "top1", "top5" (fractions), "loss", "count", "images_per_second" and "data", its name.

  Raises:
    UsageError: there is no data set, its classes are not the network's, or images are unreadable.
  """
  source = config["source"]
  run: Any = config_lib.load(source["path"]) if source["kind"] == "training run" else None
  if dataset is None and run is None:
    raise UsageError(
      f"{source['path']} does not say what data it is for; give --data, such as --data imagenet2012"
    )
  own = run.data if run is not None and dataset in (None, run.data.dataset) else None
  prepared = config["preprocess"]
  if prepared is None:
    raise UsageError(
      f"{source['path']} does not say how images are prepared: its config.json lacks preprocess; "
      "export or convert it again"
    )
  data = Data(
    dataset=own.dataset if own else str(dataset),
    data_dir=data_dir or (own.data_dir if own else None),
    train_split=own.train_split if own else "train",
    validation_split=split or (own.validation_split if own else "validation"),
    image_size=prepared["image_size"],
    crop_scale=None,
    eval_resize=prepared["resize"],
    upright=own.upright if own else None,
    flip=False,
    mean=tuple(prepared["mean"]),
    std=tuple(prepared["std"]),
    num_threads=run.data.num_threads if run else min(os.cpu_count() or 1, 32),
    eval_crops=crops or (run.data.eval_crops if run else 1),
  )
  images = open_split(
    data.dataset, data.validation_split, data.data_dir, train_split=data.train_split
  )
  class_names.check(config["num_classes"], config["class_names"], images.class_names, images.name)
  batch_size = batch_size or (run.eval_batch_size if run else 128)
  description.check_finite(model, source["path"])
  results = evaluate_model(model, images, data, batch_size)
  if not math.isfinite(results["loss"]):
    raise UsageError(
      f"the loss over {images.name} is not finite ({results['loss']}): the weights of "
      f"{source['path']} have diverged; take another checkpoint"
    )
  return {**results, "data": images.name}
