"""Exact evaluation: every image counts once, on any number of devices and at any batch size."""

import contextlib
import functools
import itertools
import math
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax import nnx
from jax.sharding import Mesh

from lip_jax import augment, optim, sharding, train_state, visualize
from lip_jax.checkpoint import Checkpoints
from lip_jax.config import Config, Data
from lip_jax.data import pipeline
from lip_jax.data.source import Source, open_split
from lip_jax.train_state import TrainState, Tree

Batch = Mapping[str, jax.Array]
EvalStep = Callable[[Tree, Tree, Batch], dict[str, jax.Array]]


def eval_step(
  params: Tree,
  batch_stats: Tree,
  batch: Batch,
  *,
  graph: nnx.GraphDef,
  data: Data,
) -> dict[str, jax.Array]:
  """Sums over one batch, masked.

  Args:
    params: of the model.
    batch_stats: of the model.
    batch: "image" [N, H, W, 3] uint8, "label" [N] int, "mask" [N], zero where a row is padding.
    graph: of the model.
    data: how images are normalized.

  Returns:
    Scalars: "loss" and, as whole numbers, "top1", "top5" and "count".
  """
  model = train_state.merge(graph, params, batch_stats)
  model.eval()
  logits = model(augment.normalize(batch["image"], data))
  labels, mask = batch["label"], batch["mask"] > 0
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
  correct = (best == labels[:, None]) & mask[:, None]
  return {
    "loss": jnp.where(mask, loss, 0).sum(),
    "top1": correct[:, 0].sum(),
    "top5": correct.sum(),
    "count": mask.sum(),
  }


def evaluate(
  step: EvalStep,
  params: Tree,
  batch_stats: Tree,
  batches: Iterable[Mapping[str, np.ndarray]],
  mesh: Mesh,
) -> dict[str, float]:
  """Mean loss and top-1, top-5 as fractions of all images, and their count.

  Args:
    step: jitted `eval_step`.
    params: of the model.
    batch_stats: of the model.
    batches: this process's rows of each batch, padded and masked.
    mesh: to split the batches over.
  """
  sums = {"loss": 0.0, "top1": 0.0, "top5": 0.0, "count": 0.0}

  def add(batch: Mapping[str, jax.Array]) -> None:
    for name in sums:
      sums[name] += float(batch[name])

  pending = None
  for batch in batches:
    current = step(params, batch_stats, sharding.put_batch(batch, mesh))
    if pending is not None:
      add(pending)  # of the batch before, while this one runs
    pending = current
  if pending is not None:
    add(pending)
  count = sums.pop("count")
  # No batch at all, where an evaluation was cancelled: count zero says so.
  return {**{name: value / max(count, 1.0) for name, value in sums.items()}, "count": int(count)}


class Evaluator:
  """Validation of train states of one run.

  Args:
    config: of the run.
    source: its validation split.
    graph: of its model.
    mesh: to evaluate on.
  """

  def __init__(self, config: Config, source: Source, graph: nnx.GraphDef, mesh: Mesh):
    self._config = config
    self._source = source
    self._graph = graph
    self._mesh = mesh
    self._step = jax.jit(
      functools.partial(eval_step, graph=graph, data=config.data),
      out_shardings=sharding.replicated(mesh),
    )

  def __call__(
    self, state: TrainState, cancelled: Callable[[], bool] = lambda: False
  ) -> dict[str, float] | None:
    """Exact "loss", "top1", "top5" and "count" over the validation split.

    Args:
      state: what to evaluate.
      cancelled: asked before each batch; once it says yes, the result is None.
    """
    batches = tqdm.tqdm(
      self._batches(),
      desc="validation",
      total=math.ceil(len(self._source) / self._config.eval_batch_size),
      leave=False,
      disable=jax.process_index() != 0 or not sys.stderr.isatty(),
    )
    with contextlib.closing(batches):
      until = itertools.takewhile(lambda _: not cancelled(), batches)
      results = evaluate(self._step, state.params, state.batch_stats, until, self._mesh)
    return None if cancelled() else results

  def draw_importance(self, state: TrainState, count: int, path: Path) -> bool:
    """Draws the importance maps of the first validation images into a PNG file.

    Args:
      state: of the model.
      count: number of images; at most those of one batch are taken.
      path: file to write.

    Returns:
      False if the model has no LIP layer, and nothing was drawn.
    """
    with contextlib.closing(self._batches()) as batches:
      batch = next(batches)
    images = batch["image"][batch["mask"] > 0][:count]
    model = train_state.merge(self._graph, state.params, state.batch_stats)
    model.eval()
    return visualize.draw_importance(
      model, images, lambda x: augment.normalize(jnp.asarray(x), self._config.data), path
    )

  def _batches(self) -> Generator[Mapping[str, np.ndarray], None, None]:
    return pipeline.eval_batches(
      self._source,
      image_size=self._config.data.image_size,
      resize=self._config.data.eval_resize,
      global_batch_size=self._config.eval_batch_size,
      num_threads=self._config.data.num_threads,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )


def evaluate_checkpoint(
  config: Config, workdir: str | Path, which: str = "best"
) -> tuple[int, dict[str, float]]:
  """(step, validation metrics) of a checkpoint of the run in `workdir`.

  Args:
    config: of the run.
    workdir: directory of the run.
    which: "best", "latest" or a step number.

  Raises:
    UsageError: there is no such run or checkpoint.
  """
  mesh = sharding.make_mesh()
  sharding.check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
  with Checkpoints(workdir, read_only=True) as checkpoints:
    step = checkpoints.resolve(which)
    source = open_split(config.data.dataset, config.data.validation_split, config.data.data_dir)
    options = train_state.model_options(config, source.num_classes)
    optimizer = optim.sgd(config.optim, optax.constant_schedule(0.0))
    init = functools.partial(train_state.init, optimizer, config.seed, **options)
    state = checkpoints.restore(step, train_state.abstract(init, mesh)).state
  results = Evaluator(config, source, train_state.graph_of(**options), mesh)(state)
  assert results is not None  # nothing cancels it
  return step, results
