"""Detectors as what is exported: how they are built, checked and run as functions of images."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from lip_jax.data import coco_categories
from lip_jax.detection import categories, postprocess, registry
from lip_jax.detection.anchors import DIVISOR
from lip_jax.detection.config import Data
from lip_jax.detection.inputs import normalize
from lip_jax.errors import UsageError
from lip_jax.export import inference, validation
from lip_jax.export.inference import Arrays, Compared, InferenceFunction
from lip_jax.export.networks import Networks
from lip_jax.models import description, torch_names
from lip_jax.ops import boxes as box_ops

OUTPUTS = ("boxes", "scores", "labels", "valid")

_TOLERANCE = 1e-2  # pixels; in half precision nothing of the kind holds
_MARGIN = 1e-3  # of scores and overlaps: within, another order of sums may decide what is found
_ENOUGH = 10  # detections in all examples, to tell whether two networks are the same


def _build(model: Mapping[str, Any], num_classes: int, where: str, dtype: Dtype) -> nnx.Module:
  return description.build(model, num_classes, where, dtype, registry.abstract_detector)


def _check(config: Mapping[str, Any], where: str) -> None:
  values = config.get("preprocess")
  validation.expect(isinstance(values, dict), where, "preprocess", values, "an object")
  assert values is not None
  for key in ("short_side", "long_side"):
    good = validation.is_whole(values.get(key), 1, validation.MAX_PIXELS)
    expected = f"1 to {validation.MAX_PIXELS:,} pixels"
    validation.expect(good, where, f"preprocess.{key}", values.get(key), expected)
  validation.check_moments(values, where)
  ids = config.get("category_ids")
  good = ids is None or (
    isinstance(ids, list | tuple)
    and all(validation.is_whole(one, 0, 2**31 - 1) for one in ids)
    and len(set(ids)) == len(ids) == config["num_classes"]
  )
  expected = f"{config['num_classes']} different whole numbers"
  validation.expect(good, where, "category_ids", ids, expected)


def prepare(
  detector: Any, config: Mapping[str, Any], image_size: int | None = None
) -> InferenceFunction:
  """The function that a file holds, from uint8 images and their sizes to boxes: `OUTPUTS`.

  Args:
    detector: of `create_detector`, with weights; it is left as it is.
    image_size: height and width in pixels, with padding; None: what holds any image that is resized
      as in training.
  """
  prepared = config["preprocess"]
  side = image_size or -(-prepared["long_side"] // DIVISOR) * DIVISOR
  if side % DIVISOR:
    raise UsageError(f"the image size of a detector is a multiple of {DIVISOR} px, not {side}")
  network = inference.on_host(detector)
  num_classes, preset = config["num_classes"], network.preset
  ids = config.get("category_ids") or list(range(1, num_classes + 1))
  classes = categories.classes(ids, preset, preset.outputs(num_classes))

  def normalized(images: jax.Array, sizes: jax.Array) -> jax.Array:
    return normalize(images, sizes, prepared["mean"], prepared["std"])

  def inside(images: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
    found = network.predictions(normalized(images, sizes), sizes)
    return tuple(found[name] for name in network.terms)

  def function(images: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
    found = network.detect(normalized(images, sizes), sizes)
    labels = jnp.asarray(classes)[found.labels]
    return found.boxes, found.scores, labels, found.valid & (labels >= 0)

  shape = (side, side, network.backbone.in_channels)
  described = inference.described(config, network.backbone.dtype, prepared, shape)
  described |= {
    "task": "detection",
    "category_ids": config.get("category_ids"),
    "inputs": ["images", "sizes"],
    "outputs": list(OUTPUTS),
  }
  described["input"] |= {"sizes": {"dtype": "int32", "shape": ["batch", 2]}}
  takes = shape, (jax.ShapeDtypeStruct((2,), np.int32),), _examples
  return InferenceFunction(
    function,
    described,
    *takes,
    _compare,
    InferenceFunction(
      inside, {**described, "outputs": list(network.terms)}, *takes, _compare_predictions
    ),
  )


def _examples(images: np.ndarray) -> tuple[np.ndarray, ...]:
  """Images of several sizes in one batch, the last of which shows nothing but a little noise.

  Without any, all places have the same scores, and rounding decides which boxes suppress others.
  """
  images = images.copy()
  images[-1] = 124 + images[0] // 32
  height, width = images.shape[1:3]
  sizes = [(height, width), (height - 5, width // 2 + 3), (height // 2 + 1, width), (height, width)]
  return images, np.asarray(sizes, np.int32)


def _compare(found: Arrays, expected: Arrays, dtype: str) -> Compared | None:
  """The largest difference of boxes in pixels, of detections with the same labels and scores.

  None if fewer than `_ENOUGH` can be compared: where nothing is found, or all scores are the same.
  """
  del dtype
  distances = [
    _distances(ours, theirs)
    for one, other in zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True)
    for ours, theirs in ((one, other), (other, one))
  ]
  together = np.concatenate(distances)
  worst = float(together.max(initial=0))
  if worst <= _TOLERANCE and len(together) < 2 * _ENOUGH:
    return None
  return worst, _TOLERANCE, "px"


def _compare_predictions(found: Arrays, expected: Arrays, dtype: str) -> Compared:
  difference, tolerance, _ = inference.compare_logits(found, expected, dtype)
  return difference, tolerance, "of the largest number that detections are chosen by"


def _distances(ours: Any, theirs: Any) -> np.ndarray:
  """How far boxes of ours are from those of theirs, if these must have them; inf: they have not.

  They need not have what is near the threshold, or near their last score if they are full. Nor, as
  of equal scores rounding decides which box suppresses the other, a few that others of theirs may
  have suppressed, which ours do not have.
  """
  (boxes, scores, labels, valid), (others, their_scores, their_labels, their_valid) = ours, theirs
  last = their_scores[their_valid].min() if their_valid.all() else 0
  sure = valid & (scores > max(postprocess.SCORE_THRESHOLD, last) + _MARGIN)
  same = valid[:, None] & their_valid[None, :] & (labels[:, None] == their_labels[None, :])
  alike = same & (np.abs(scores[:, None] - their_scores[None, :]) <= _MARGIN)
  apart = np.abs(boxes[:, None] - others[None, :]).max(axis=2)
  distances = np.where(alike, apart, np.inf)
  overlaps = np.asarray(box_ops.iou(boxes, others)) - postprocess.NMS_THRESHOLD
  only_theirs = distances.min(axis=0)[None, :] > _TOLERANCE
  may_suppress = (only_theirs & (overlaps > -_MARGIN)) | (np.abs(overlaps) <= _MARGIN)
  may_suppress &= same & (their_scores[None, :] > scores[:, None] - _MARGIN)
  nearest = distances.min(axis=1)
  suppressed = sure & (nearest > _TOLERANCE) & may_suppress.any(axis=1)
  few = 2 * suppressed.sum() < sure.sum()
  return nearest[sure & ~suppressed] if few else nearest[sure]


def _count_classes(model: Mapping[str, Any], state_dict: Mapping[str, Any], where: str) -> int:
  detector = _build(model, 1, where, jnp.float32)
  return registry.count_classes(model, torch_names.shapes_in(detector, state_dict), where)


def _published(num_classes: int) -> dict[str, Any]:
  """How torchvision's and mmdetection's detectors of COCO are used."""
  coco = num_classes == len(coco_categories.NAMES)
  return {
    "preprocess": {
      "short_side": Data.short_side,
      "long_side": Data.long_side,
      "mean": list(Data.mean),
      "std": list(Data.std),
    },
    "class_names": list(coco_categories.NAMES) if coco else None,
    "category_ids": list(coco_categories.IDS) if coco else None,
  }


NETWORKS = Networks(_build, _check, prepare, _count_classes, _published)
