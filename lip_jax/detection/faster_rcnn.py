"""Faster R-CNN (Ren et al., NeurIPS 2015) with a feature pyramid (Lin et al., CVPR 2017)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax import lax

from lip_jax.detection import box_head, postprocess, proposals
from lip_jax.detection.anchors import DIVISOR
from lip_jax.detection.box_head import BoxHead
from lip_jax.detection.detector import (
  Detector,
  GroundTruth,
  ImageLosses,
  Layout,
  Outputs,
  Sums,
  Targets,
)
from lip_jax.detection.matching import UNUSED, match_proposals
from lip_jax.detection.postprocess import Detections
from lip_jax.detection.presets import Preset
from lip_jax.detection.proposals import ProposalHead, Proposals
from lip_jax.detection.sampling import Sample, sample
from lip_jax.models import layers
from lip_jax.models.network import Network
from lip_jax.ops import boxes as box_ops
from lip_jax.ops import losses as loss_ops
from lip_jax.ops import whole
from lip_jax.ops.roi_align import multilevel_roi_align, roi_levels

_POOLED_LEVELS = 4  # of the pyramid, P2 to P5: regions have none of P6
_FINEST = 4  # stride of P2 for which the levels of regions are defined
_RPN_BETA = 1 / 9  # of its smooth L1 loss
_NUM_PROBES = 50
_POSITIVE_ANCHORS, _POSITIVE_REGIONS = 0.5, 0.25  # of a sample, at most


class Training(NamedTuple):
  """The losses of each image, and what they are losses of."""

  losses: ImageLosses
  anchors: Sample  # indices into all anchors, [N, 256]
  proposals: Proposals
  candidates: Sample  # indices into ground truth and proposals, [N, 512]: see `match_proposals`


class _Regions(NamedTuple):
  """Sampled regions of an image."""

  boxes: jax.Array  # [R, 4]
  matches: jax.Array  # [R]
  sample: Sample


class FasterRCNN(Detector):
  """Faster R-CNN on the features "c2" to "c5".

  Its losses are of the first stage whether there is an object at an anchor, "rpn_classification",
  and where, "rpn_boxes", and of the second the same for the classes of proposals,
  "classification" and "boxes". Both stages learn from samples; how losses are divided by their
  sizes says the `Preset`.

  Args:
    fc_features: of the second stage's two layers.
    num_proposals: of each level, and of all, in an image; None: 2,000, and in evaluation as many as
      the preset says.
    anchor_samples: of an image, that the first stage learns from.
    region_samples: of an image, that the second stage learns from.
    **options: of `Detector`, as the others.
  """

  stages: ClassVar = ("c2", "c3", "c4", "c5")
  kind: ClassVar = "rpn"
  terms: ClassVar = ("rpn_classification", "rpn_boxes", "classification", "boxes")

  def __init__(
    self,
    backbone: Network,
    num_classes: int,
    *,
    fc_features: int = 1024,
    num_proposals: int | None = None,
    anchor_samples: int = 256,
    region_samples: int = 512,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    super().__init__(backbone, num_classes, dtype=dtype, rngs=rngs, **options)
    self.num_proposals = 2000 if num_proposals is None else num_proposals
    self.loss_group = self.preset.faster_rcnn.loss_group
    self.detection_proposals = num_proposals or self.preset.faster_rcnn.proposals
    self.anchor_samples, self.region_samples = anchor_samples, region_samples
    layers.check_sizes(
      fc_features=fc_features,
      num_proposals=self.num_proposals,
      anchor_samples=anchor_samples,
      region_samples=region_samples,
    )
    channels = self.fpn.channels
    outputs = _outputs(num_classes, self.preset)
    self.first_output = outputs - self.num_labels
    self.rpn = ProposalHead(channels, self.anchors.per_cell, dtype=dtype, rngs=rngs)
    self.box_head = BoxHead(channels, fc_features, outputs, dtype=dtype, rngs=rngs)

  @staticmethod
  def count_classes(shapes, preset):
    outputs = (shapes.get("box_head.class_logits.bias") or (0,))[-1]
    return [80, outputs - 1] if outputs == _outputs(80, preset) else [outputs - 1]

  def image_losses(self, images, sizes, targets, priorities=None, key=None):
    return self.training(images, sizes, targets, priorities, key).losses

  def training(
    self,
    images: jax.Array,
    sizes: jax.Array,
    targets: Targets,
    priorities: Mapping[str, jax.Array] | None = None,
    key: jax.Array | None = None,
  ) -> Training:
    """`image_losses`, and what was sampled for them; arguments as of `losses`."""
    masked = self.mask_losses
    features = self.features(images, sizes, masked=masked)
    outputs = self._predict(self.rpn, features, images, sizes, masked)
    layout = self._layout(images)
    truth = self._ground_truth(targets)
    if priorities is None:
      priorities = self._random(targets, key, sum(x.shape[1] for x in outputs.logits))

    anchors = jnp.asarray(self.anchors.boxes(*layout, self.dtype))
    matches = self._match_anchors(anchors, layout, sizes, truth)
    draw = functools.partial(sample, size=self.anchor_samples, positive_fraction=_POSITIVE_ANCHORS)
    sampled = jax.vmap(draw)(matches, priorities["rpn"])
    logits, deltas = (jnp.concatenate(part, axis=1) for part in (outputs.logits, outputs.deltas))
    of_anchors = functools.partial(self._anchor_losses, anchors)
    sums = jax.vmap(of_anchors)(logits[..., 0], deltas, matches, truth, sampled)
    counts = dict.fromkeys(sums, self._count(sampled, self.preset.faster_rcnn.least_count))

    proposed = self._propose(outputs, layout, sizes, self.num_proposals, masked)
    drawn = [priorities[name] for name in ("proposal", "gt")]
    regions = jax.vmap(self._regions)(proposed, truth, *drawn)
    predicted = self._classify(features, regions.boxes, self._extents(sizes, layout, masked))
    more = jax.vmap(self._region_losses)(*predicted, regions, truth)
    losses = ImageLosses(sums | more, counts | dict.fromkeys(more, self._count(regions.sample, 0)))
    return Training(losses, sampled, proposed, regions.sample)

  def detect(self, images: jax.Array, sizes: jax.Array) -> Detections:
    features, proposed = self._first_stage(images, sizes)
    extents = self._extents(sizes, self._layout(images), self.mask_detection)
    logits, deltas = self._classify(features, proposed.boxes, extents)
    labels = jnp.arange(1, logits.shape[2], dtype=jnp.int32) - self.first_output
    inclusive = self.preset.inclusive

    def of_image(logits, deltas, proposed, size):
      scores = jax.nn.softmax(logits, axis=1)[:, 1:]
      boxes = box_ops.decode(
        proposed.boxes[:, None], deltas[:, 1:], stds=box_head.STDS, inclusive=inclusive, size=size
      )
      return postprocess.region_detections(scores, boxes, labels, proposed.valid, self.preset)

    return jax.vmap(of_image)(logits, deltas, proposed, jnp.asarray(sizes))

  def predictions(self, images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
    masked = self.mask_detection
    features = self.features(images, sizes, masked=masked)
    outputs = self._predict(self.rpn, features, images, sizes, masked)
    last = (jnp.asarray(sizes)[:, [1, 0, 1, 0]] - 1).astype(self.dtype)
    regions = jnp.asarray(_probes(), self.dtype)[None] * last[:, None]
    extents = self._extents(sizes, self._layout(images), masked)
    logits, deltas = self._classify(features, regions, extents)
    deltas = deltas.reshape(*logits.shape[:2], 4 * logits.shape[2])
    return {
      **outputs.by_term(self.terms[:2]),
      **dict(zip(self.terms[2:], (logits, deltas), strict=True)),
    }

  def proposals(self, images: jax.Array, sizes: jax.Array) -> Proposals:
    """What `detect` classifies: at most 2,000 regions of each image, 1,000 with some presets."""
    return self._first_stage(images, sizes)[1]

  def _coarser(self, c5: jax.Array, p5: jax.Array) -> list[jax.Array]:
    return [lax.slice(p5, (0, 0, 0, 0), p5.shape, (1, 2, 2, 1))]

  def _first_stage(self, images, sizes) -> tuple[dict[str, jax.Array], Proposals]:
    masked = self.mask_detection
    features = self.features(images, sizes, masked=masked)
    outputs = self._predict(self.rpn, features, images, sizes, masked)
    return features, self._propose(
      outputs, self._layout(images), sizes, self.detection_proposals, masked
    )

  def _propose(
    self, outputs: Outputs, layout: Layout, sizes: jax.Array, limit: int, masked: bool
  ) -> Proposals:
    """Of all anchors; masked: of those that would be there if each image were alone."""
    anchors = dataclasses.replace(self.anchors, whole=False)
    boxes = anchors.boxes(*layout, self.dtype)
    return self._each_image(
      lambda levels, size: proposals.propose(levels, size, self.preset, limit),
      outputs,
      boxes,
      lambda size: anchors.usable(size, *layout) if masked else jnp.ones(len(boxes), bool),
      sizes,
    )

  def _regions(self, proposed: Proposals, truth: GroundTruth, of_proposals, of_gts) -> _Regions:
    """What the second stage learns from in one image; no gradient flows through."""
    boxes, matches = match_proposals(
      proposed.boxes, proposed.valid, truth.boxes, truth.valid, preset=self.preset.name
    )
    matches = jnp.where(self._not_ignored(boxes, truth), matches, UNUSED)
    # Without any boxes the ground truth still has room for one.
    of_gts = jnp.zeros(1, of_proposals.dtype) if not len(of_gts) else of_gts
    order = (of_proposals, of_gts) if self.preset.name == "torchvision" else (of_gts, of_proposals)
    found = sample(
      matches, jnp.concatenate(order), size=self.region_samples, positive_fraction=_POSITIVE_REGIONS
    )
    return _Regions(lax.stop_gradient(boxes[found.indices]), matches[found.indices], found)

  def _extents(self, sizes: jax.Array, layout: Layout, masked: bool) -> jax.Array:
    """Rows and columns of the pooled levels for each image, [N, L, 2]; masked: its own."""
    sides = -(-jnp.asarray(sizes) // DIVISOR) * DIVISOR
    if not masked:
      sides = jnp.broadcast_to(jnp.asarray(layout.padded)[None, :], sides.shape)
    strides = jnp.asarray(self.anchors.strides[:_POOLED_LEVELS])
    return -(-sides[:, None, :] // strides[None, :, None])

  def _classify(
    self, features, boxes: jax.Array, extents: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Logits [N, R, K] and deltas [N, R, K, 4] of regions [N, R, 4]."""
    strides = self.anchors.strides[:_POOLED_LEVELS]
    levels = [features[name] for name in self._level_names[:_POOLED_LEVELS]]
    level = roi_levels(boxes * (_FINEST / strides[0]), inclusive=self.preset.inclusive)
    mode = self.preset.faster_rcnn.roi_mode
    rules: dict[str, Any] = {"strides": strides, "size": box_head.BINS, "samples": 2, "mode": mode}

    def pool(image):
      *inputs, extents = image
      return multilevel_roi_align(*inputs, extents=extents, **rules)

    def each(*images):
      return lax.map(pool, images)  # one image after another, for memory

    pooled = whole.call("roi_align", each, levels, boxes, level, extents, **rules)
    found = self.box_head(pooled.reshape(-1, *pooled.shape[2:]))
    logits, deltas = (array.reshape(*boxes.shape[:2], *array.shape[1:]) for array in found)
    return logits, deltas

  def _anchor_losses(self, anchors, logits, deltas, matches, truth, sampled: Sample) -> Sums:
    """Sums over the sampled anchors of one image."""
    index = sampled.indices
    wanted = sampled.positive.astype(logits.dtype)
    entropy = jax.nn.softplus(logits[index]) - wanted * logits[index]
    regression = box_ops.encode(
      anchors[index],
      truth.boxes[jnp.maximum(matches[index], 0)],
      stds=proposals.STDS,
      inclusive=self.preset.inclusive,
    )
    difference = jnp.where(sampled.positive[:, None], deltas[index] - regression, 0)
    return {
      "rpn_classification": jnp.where(sampled.valid, entropy, 0).sum(),
      "rpn_boxes": loss_ops.smooth_l1(difference, beta=_RPN_BETA).sum(),
    }

  def _region_losses(self, logits, deltas, regions: _Regions, truth: GroundTruth) -> Sums:
    """Sums over the sampled regions of one image."""
    positive, gt = regions.sample.positive, jnp.maximum(regions.matches, 0)
    wanted = jnp.where(positive, truth.labels[gt] + self.first_output, 0)
    entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=1), wanted[:, None], axis=1)
    regression = box_ops.encode(
      regions.boxes, truth.boxes[gt], stds=box_head.STDS, inclusive=self.preset.inclusive
    )
    own = jnp.take_along_axis(deltas, wanted[:, None, None], axis=1)[:, 0]
    difference = jnp.where(positive[:, None], own - regression, 0)
    beta = self.preset.faster_rcnn.beta
    return {
      "classification": jnp.where(regions.sample.valid, entropy[:, 0], 0).sum(),
      "boxes": loss_ops.smooth_l1(difference, beta=beta).sum(),
    }

  def _random(self, targets: Targets, key: jax.Array | None, anchors: int) -> dict[str, jax.Array]:
    """Priorities for each image, by its id."""
    key = jax.random.key(0) if key is None else key
    count, boxes = jnp.shape(targets["labels"])
    counts = {"rpn": anchors, "proposal": self.num_proposals, "gt": boxes}

    def of_image(number):
      keys = jax.random.split(jax.random.fold_in(key, number), len(counts))
      return {
        name: jax.random.uniform(own, (count,))
        for own, (name, count) in zip(keys, counts.items(), strict=True)
      }

    return jax.vmap(of_image)(jnp.asarray(targets.get("image_id", jnp.arange(count))))

  def _count(self, sampled: Sample, least: int) -> jax.Array:
    """Samples of each image, of either kind at least `least`: [N]."""
    positive, others = (
      jnp.maximum(kind.sum(axis=1), least)
      for kind in (sampled.positive, sampled.valid & ~sampled.positive)
    )
    return (positive + others).astype(self.dtype)


def _probes() -> np.ndarray:
  """Regions [R, 4] of all kinds of sizes, in parts of an image's width and height."""
  corners = np.random.default_rng(0).uniform(size=(_NUM_PROBES, 2, 2))
  return np.sort(corners, axis=1).reshape(-1, 4)


def _outputs(num_classes: int, preset: Preset) -> int:
  """Those of the second stage: number 0 is the background, which no label has that is an id."""
  labels = preset.outputs(num_classes)
  return labels + (labels == num_classes)
