"""Exact evaluation of detectors: COCO's metric, every image once, on any number of devices."""

import contextlib
import functools
import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from lip_jax import visualize
from lip_jax.data import boxes_pipeline, pipeline
from lip_jax.data.boxes import BoxSource
from lip_jax.detection import categories, coco_metric
from lip_jax.detection.coco_metric import Results
from lip_jax.detection.config import Data
from lip_jax.detection.inputs import normalize
from lip_jax.detection.prediction import looker
from lip_jax.detection.presets import Preset
from lip_jax.distributed import sharding
from lip_jax.models.folding import fold_batch_norm
from lip_jax.training import evaluation, train_state
from lip_jax.training.train_state import Tree
from lip_jax.visualize import Boxes, Picture

log = logging.getLogger("lip_jax")

# What comes with the detections of an image: which it is, and how it was resized.
_KEPT = ("image_id", "size", "scale", "original")
_SURE = 0.3  # least score of what a picture shows


def jitted_step(data: Data, graph: nnx.GraphDef, mesh: Mesh) -> jax.stages.Wrapped:
  """What is found in a batch, as `Detections` in pixels of the resized images, by name.

  Returns:
    A jitted function of (params, batch_stats, a batch of `boxes_pipeline.eval_batches`, stop: int
    [devices], from `sharding.StopFlags`). It gives, on every device, "boxes", "scores", "labels",
    "valid", what the batch says of its images, and "stop", the greatest of the flags.
  """
  rows = sharding.over_batch(mesh).spec

  def detect(params: Tree, batch_stats: Tree, images: jax.Array, sizes: jax.Array) -> Any:
    model = train_state.merge(graph, params, batch_stats)
    model.eval()
    model = fold_batch_norm(model)
    return model.detect(normalize(images, sizes, data.mean, data.std), sizes)._asdict()

  detect = jax.shard_map(
    detect,
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec(), rows, rows),
    out_specs=rows,
    check_vma=False,
  )

  def step(params: Tree, batch_stats: Tree, batch: Any, stop: jax.Array) -> dict[str, jax.Array]:
    found = detect(params, batch_stats, batch["image"], batch["size"])
    return {**found, **{name: batch[name] for name in _KEPT}, "stop": stop.max()}

  return jax.jit(step, out_shardings=sharding.replicated(mesh))


def lower(
  data: Data,
  batch_size: int,
  bucket: str,
  graph: nnx.GraphDef,
  mesh: Mesh,
  params: Tree,
  batch_stats: Tree,
) -> jax.stages.Lowered:
  """The program of `jitted_step` for batches of a bucket; needs no data."""
  place = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.over_batch(mesh))
  batch = {
    "image": place((batch_size, *data.bucket_sizes[bucket], 3), jnp.uint8),
    "size": place((batch_size, 2), jnp.int32),
    "image_id": place((batch_size,), jnp.int32),
    "scale": place((batch_size,), jnp.float32),
    "original": place((batch_size, 2), jnp.int32),
  }
  weights = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh)),
    (params, batch_stats),
  )
  return jitted_step(data, graph, mesh).lower(*weights, batch, place((mesh.size,), jnp.int32))


class Evaluator:
  """COCO's metric of networks of one structure over a split; all processes call it together.

  Args:
    batch_size: images at once, over all devices.
    preset: of the networks.
    num_figures: images of `figures`; at most those of one batch are taken.
  """

  def __init__(
    self,
    data: Data,
    batch_size: int,
    source: BoxSource,
    graph: nnx.GraphDef,
    mesh: Mesh,
    *,
    preset: Preset,
    num_figures: int = 0,
  ):
    self._data = data
    self._batch_size = batch_size
    self._source = source
    self._graph = graph
    self._mesh = mesh
    self._num_figures = num_figures
    self._step: Any = jitted_step(data, graph, mesh)
    outputs = preset.outputs(len(source.category_ids))
    self._labels = categories.classes(source.category_ids, preset, outputs)

  def __call__(
    self, params: Tree, batch_stats: Tree, stop: Callable[[], bool] = lambda: False
  ) -> dict[str, float] | None:
    """COCO's 12 numbers by `coco_metric.NAMES`, fractions, and "count" of images.

    Args:
      stop: asked before each batch; once any process says yes, the result is None.

    Raises:
      UnreadableImagesError: images of the split cannot be read; names those of all processes.
    """
    results = self.detect(params, batch_stats, stop)
    if results is None:
      return None
    scores = None
    if jax.process_index() == 0:
      score = coco_metric.score(self._source.ground_truth(), results)
      log.info("average precision by %s", score.library)
      scores = score.metrics
    return {**sharding.gather(scores)[0], "count": len(self._source)}

  def detect(
    self,
    params: Tree,
    batch_stats: Tree,
    stop: Callable[[], bool] = lambda: False,
    *,
    flip: bool = False,
  ) -> Results | None:
    """What is found in all images of the split, as COCO's files have it; None if stopped.

    Args:
      flip: look at them with left and right swapped; what is found lies in the images as they are.
    """
    parts: list[Results] = []
    seen: list[np.ndarray] = []

    def add(found: Mapping[str, jax.Array]) -> None:
      arrays = {name: np.asarray(value) for name, value in found.items()}
      there = arrays["image_id"] >= 0
      seen.append(arrays["image_id"][there])
      own = {name: arrays[name][there] for name in arrays if name != "stop"}
      if flip:
        x1, y1, x2, y2 = np.moveaxis(own["boxes"], -1, 0)
        width = own["size"][:, 1:]
        own["boxes"] = np.stack([width - x2, y1, width - x1, y2], axis=-1)
      parts.append(self._results(own))

    def compute(batches: Iterator[Mapping[str, np.ndarray]]) -> bool:
      whole = ({name: batch[name] for name in ("image", *_KEPT)} for batch in batches)
      return evaluation.run(self._step, params, batch_stats, whole, self._mesh, stop, add)

    num_batches = boxes_pipeline.num_eval_batches(self._source, **self._batching)
    if not evaluation.over_split(compute, self._batches(flip), self._source, num_batches):
      return None
    ids = np.sort(np.concatenate(seen)) if seen else np.zeros(0, int)
    assert np.array_equal(ids, np.sort(self._source.table.image_ids)), "an image is not there once"
    return Results.joined(parts)

  def figures(self, params: Tree, batch_stats: Tree) -> dict[str, np.ndarray]:
    """The first validation images with what is there, what is found, and what is important.

    uint8 [H, W, 3]. All processes have to call it; the first one draws.
    """
    if not self._num_figures:
      return {}
    # On the host, as one process cannot compute with what lies on the devices of others.
    params, batch_stats = jax.device_get((params, batch_stats))
    if jax.process_index() != 0:
      return {}
    with contextlib.closing(self._batches()) as batches:
      batch = next(batches)
    rows = np.flatnonzero(batch["mask"])[: self._num_figures]
    model = train_state.merge(self._graph, params, batch_stats)
    model.eval()
    data = self._data
    sizes = batch["size"][rows]
    images = normalize(jnp.asarray(batch["image"][rows]), jnp.asarray(sizes), data.mean, data.std)
    found, importance = looker(model)(images, sizes)
    by_id = {int(key): index for index, key in enumerate(self._source.table.image_ids)}
    pictures = []
    for k, row in enumerate(rows):
      example = self._source[by_id[int(batch["image_id"][row])]]
      height, width = sizes[k]
      sure = found.valid[k] & (found.scores[k] > _SURE)
      truth = Boxes(example["boxes"] * batch["scale"][row], example["labels"])
      seen = Boxes(found.boxes[k][sure], self._labels[found.labels[k][sure]], found.scores[k][sure])
      pictures.append(
        Picture(
          "",
          batch["image"][row][:height, :width],
          {"truth": truth, f"found, score above {_SURE}": seen},
          None if importance is None else importance[k],
        )
      )
    figure = visualize.boxes_figure(pictures, self._source.class_names)
    return {"detections": visualize.figure_to_array(figure)}

  def _results(self, found: Mapping[str, np.ndarray]) -> Results:
    """Detections [N, D] of some images in pixels of the images as stored."""
    height, width = np.split(found["original"].astype(np.float64), 2, axis=1)
    corners = found["boxes"].astype(np.float64) / found["scale"][:, None, None]
    corners = np.clip(corners, 0, np.concatenate([width, height] * 2, axis=1)[:, None])
    boxes = np.concatenate([corners[..., :2], corners[..., 2:] - corners[..., :2]], axis=2)
    labels = self._labels[found["labels"]]
    valid = found["valid"] & (labels >= 0)
    ids = np.broadcast_to(found["image_id"][:, None], valid.shape)
    return Results(
      ids[valid].astype(np.int64),
      np.asarray(self._source.category_ids, np.int64)[labels[valid]],
      boxes[valid],
      found["scores"][valid].astype(np.float64),
    )

  @property
  def _batching(self) -> dict[str, Any]:
    data = self._data
    return {
      "buckets": data.buckets,
      "short_side": data.short_side,
      "long_side": data.long_side,
      "global_batch_size": self._batch_size,
    }

  def _batches(self, flip: bool = False) -> Generator[pipeline.Batch, None, None]:
    return boxes_pipeline.eval_batches(
      self._source,
      **self._batching,
      flip=flip,
      num_threads=self._data.num_threads,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )


def summary(metrics: Mapping[str, float]) -> list[str]:
  """The most important of what `Evaluator` found, in lines for people."""
  names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
  return [
    ", ".join(
      f"{name} {100 * metrics[name]:.1f}" if metrics[name] >= 0 else f"{name} -" for name in names
    ),
    f"over {metrics['count']} images",
  ]
