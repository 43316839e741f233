"""From what a detector predicts for anchors or proposals to the detections of an image."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lip_jax.detection.presets import Preset
from lip_jax.ops import boxes as box_ops
from lip_jax.ops.nms import nms

PER_LEVEL = 1000  # candidates
SCORE_THRESHOLD = 0.05
NMS_THRESHOLD = 0.5
DETECTIONS = 100  # at most, of a two-stage detector, in an image


class Detections(NamedTuple):
  """What was found in each of N images, by decreasing score; zeros where not valid."""

  boxes: jax.Array  # [N, limit, 4], x1, y1, x2, y2 in pixels, of width x2 - x1
  scores: jax.Array  # [N, limit]
  labels: jax.Array  # [N, limit] int32
  valid: jax.Array  # [N, limit] bool


class Level(NamedTuple):
  """Predictions of one level of a pyramid for one image."""

  logits: jax.Array  # [A, K], of K classes
  deltas: jax.Array  # [A, 4]
  anchors: jax.Array  # [A, 4]
  usable: jax.Array  # [A] bool


class _Candidates(NamedTuple):
  boxes: jax.Array  # [B, 4]
  scores: jax.Array  # [B]
  labels: jax.Array  # [B]
  valid: jax.Array  # [B] bool


def dense_detections(levels: Sequence[Level], size: jax.Array, preset: Preset) -> Detections:
  """RetinaNet's detections in one image: of each level the best, then NMS of each class.

  Args:
    levels: of one image.
    size: [2], its height and width, that boxes are clipped to.
    preset: the conventions.

  Returns:
    As `Detections`, without the axis N.
  """
  select = _of_anchors if preset.retinanet.candidates == "anchors" else _of_pairs
  found = [select(level, size, preset) for level in levels]
  candidates = _Candidates(*(jnp.concatenate(parts) for parts in zip(*found, strict=True)))
  return _best(candidates, preset.retinanet.detections, preset)


def region_detections(
  scores: jax.Array, boxes: jax.Array, labels: jax.Array, valid: jax.Array, preset: Preset
) -> Detections:
  """Faster R-CNN's detections in one image: NMS of each class.

  Args:
    scores: [P, K] of each proposal and class, without the background.
    boxes: [P, K, 4], clipped to the image.
    labels: [K], of the classes.
    valid: [P] bool, which proposals there are.
    preset: the conventions.

  Returns:
    As `Detections`, without the axis N.
  """
  least = preset.faster_rcnn.least_detection
  width, height = box_ops.sizes(boxes, inclusive=preset.inclusive)
  usable = valid[:, None] & (scores > SCORE_THRESHOLD) & (width >= least) & (height >= least)
  candidates = _Candidates(
    boxes.reshape(-1, 4),
    scores.ravel(),
    jnp.broadcast_to(labels[None, :], scores.shape).ravel(),
    usable.ravel(),
  )
  return _best(candidates, DETECTIONS, preset)


def _best(candidates: _Candidates, limit: int, preset: Preset) -> Detections:
  """What NMS of each class leaves, outwards."""
  index, valid = nms(
    candidates.boxes,
    candidates.scores,
    candidates.labels,
    threshold=NMS_THRESHOLD,
    limit=limit,
    valid=candidates.valid,
    inclusive=preset.inclusive,
  )
  outward = jnp.asarray([0, 0, preset.pixel, preset.pixel], candidates.boxes.dtype)[None, :]
  return Detections(
    jnp.where(valid[:, None], candidates.boxes[index] + outward, 0),
    jnp.where(valid, candidates.scores[index], 0),
    jnp.where(valid, candidates.labels[index], 0),
    valid,
  )


def _of_anchors(level: Level, size: jax.Array, preset: Preset) -> _Candidates:
  """All classes of the anchors with the best highest scores."""
  scores = jax.nn.sigmoid(level.logits)
  best = jnp.where(level.usable, scores.max(axis=1), -1)
  best, index = lax.top_k(best, min(PER_LEVEL, len(best)))
  boxes = _decode(level, index, size, preset)
  num_classes = scores.shape[1]
  scores = scores[index]
  labels = jnp.broadcast_to(jnp.arange(num_classes, dtype=jnp.int32)[None, :], scores.shape)
  valid = (best >= 0)[:, None] & (scores > SCORE_THRESHOLD)
  return _Candidates(
    jnp.repeat(boxes, num_classes, axis=0), scores.ravel(), labels.ravel(), valid.ravel()
  )


def _of_pairs(level: Level, size: jax.Array, preset: Preset) -> _Candidates:
  """The best pairs of an anchor and a class."""
  scores = jax.nn.sigmoid(level.logits)
  scores = jnp.where(level.usable[:, None] & (scores > SCORE_THRESHOLD), scores, -1)
  # In two stages: they are of the anchors with the best highest scores. These in their order, as of
  # equal pairs the first one is the better; by top_k, which ONNX has, too.
  _, anchors = lax.top_k(scores.max(axis=1), min(PER_LEVEL, len(scores)))
  anchors = -lax.top_k(-anchors, len(anchors))[0]
  scores = scores[anchors]
  best, index = lax.top_k(scores.ravel(), min(PER_LEVEL, scores.size))
  row, label = jnp.divmod(index, scores.shape[1])
  return _Candidates(_decode(level, anchors[row], size, preset), best, label, best >= 0)


def _decode(level: Level, index: jax.Array, size: jax.Array, preset: Preset) -> jax.Array:
  return box_ops.decode(
    level.anchors[index],
    level.deltas[index],
    stds=(1, 1, 1, 1),
    inclusive=preset.inclusive,
    size=size,
  )
