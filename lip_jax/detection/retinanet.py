"""RetinaNet (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017)."""

import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax.detection import postprocess
from lip_jax.detection.anchors import ANCHORS
from lip_jax.detection.detector import Detector, GroundTruth, ImageLosses, Outputs
from lip_jax.detection.fpn import CoarserLevels
from lip_jax.detection.matching import BACKGROUND
from lip_jax.detection.postprocess import Detections
from lip_jax.errors import UsageError
from lip_jax.models import layers, padding
from lip_jax.models.network import Network
from lip_jax.ops import boxes as box_ops
from lip_jax.ops import losses as loss_ops

_NORMAL = nnx.initializers.normal(0.01)
_STDS = (1, 1, 1, 1)
_MOST_CONVS = 100  # of a tower: far above any detector's


class Head(nnx.Module):
  """Two towers of 3x3 convolutions, for classes and for boxes, the same for all levels.

  Args:
    channels: of the pyramid, and inside.
    per_cell: anchors of a cell.
    num_outputs: classes.
    depth: convolutions of a tower, before the one that predicts.
    dtype: of the computation.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    channels: int,
    per_cell: int,
    num_outputs: int,
    *,
    depth: int,
    dtype: Dtype,
    rngs: nnx.Rngs,
  ):
    factory = layers.LayerFactory(dtype, rngs, _NORMAL)
    make = functools.partial(factory.conv, channels, size=3, use_bias=True)
    self.class_convs = nnx.List([make(channels) for _ in range(depth)])
    self.box_convs = nnx.List([make(channels) for _ in range(depth)])
    self.class_logits = make(per_cell * num_outputs)
    self.box_deltas = make(per_cell * 4)
    # So that at first each class has a probability of 0.01 (section 4.1).
    bias = self.class_logits.bias
    assert bias is not None
    bias.set_value(jnp.full_like(bias[...], -math.log(99)))
    self.num_outputs = num_outputs
    self.dtype = layers.param_dtype(dtype)

  def __call__(self, x: jax.Array, stride: int) -> tuple[jax.Array, jax.Array]:
    """[N, H, W, channels] of one level -> logits [N, A, K], deltas [N, A, 4]."""
    classes = boxes = x
    for conv in self.class_convs:
      classes = padding.blank(nnx.relu(conv(classes)), stride)
    for conv in self.box_convs:
      boxes = padding.blank(nnx.relu(conv(boxes)), stride)
    logits, deltas = self.class_logits(classes), self.box_deltas(boxes)
    # Not len(x): the number of images is a symbol where the network is exported.
    return (
      logits.reshape(x.shape[0], -1, self.num_outputs).astype(self.dtype),
      deltas.reshape(x.shape[0], -1, 4).astype(self.dtype),
    )


class RetinaNet(Detector):
  """RetinaNet on the features "c3" to "c5".

  Its losses are the focal loss of all classes and the (smooth) L1 loss of the boxes, each divided
  by the number of positive anchors, of an image or of two (see `Preset`), and averaged. Nothing is
  sampled.

  Args:
    head_convs: convolutions of each of the head's towers before those that predict.
    **options: of `Detector`, as the others.
  """

  stages: ClassVar = ("c3", "c4", "c5")
  kind: ClassVar = "retinanet"
  terms: ClassVar = ("classification", "boxes")

  def __init__(
    self,
    backbone: Network,
    num_classes: int,
    *,
    head_convs: int = 4,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    super().__init__(backbone, num_classes, dtype=dtype, rngs=rngs, **options)
    layers.check_sizes(least=0, head_convs=head_convs)
    if head_convs > _MOST_CONVS:
      raise UsageError(f"head_convs must be at most {_MOST_CONVS}, got {head_convs}")
    rules, channels = self.preset.retinanet, self.fpn.channels
    self.loss_group = rules.loss_group
    self.coarser = CoarserLevels(
      self.stage_channels[-1] if rules.p6_from == "c5" else channels,
      self.fpn.strides[-1],
      channels,
      relu_between=rules.relu_before_p7,
      dtype=dtype,
      rngs=rngs,
    )
    self.head = Head(
      channels, self.anchors.per_cell, self.num_labels, depth=head_convs, dtype=dtype, rngs=rngs
    )

  @staticmethod
  def count_classes(shapes, preset):
    bias = shapes.get("head.class_logits.bias") or (0,)
    outputs = bias[0] // ANCHORS["retinanet", preset.name].per_cell
    return [80, outputs] if outputs == preset.outputs(80) else [outputs]

  def image_losses(self, images, sizes, targets, priorities=None, key=None):
    del priorities, key
    outputs = self.outputs(images, sizes, masked=self.mask_losses)
    logits, deltas = (jnp.concatenate(part, axis=1) for part in (outputs.logits, outputs.deltas))
    layout = self._layout(images)
    anchors = self.anchors.boxes(*layout, self.dtype)
    truth = self._ground_truth(targets)
    matches = self._match_anchors(anchors, layout, sizes, truth)
    of_image = functools.partial(self._image_losses, anchors)
    per_image = jax.vmap(of_image)(logits, deltas, matches, truth)
    positives = jnp.maximum((matches >= 0).sum(axis=1), 1).astype(logits.dtype)
    return ImageLosses(per_image, dict.fromkeys(per_image, positives))

  def detect(self, images: jax.Array, sizes: jax.Array) -> Detections:
    outputs = self.outputs(images, sizes, masked=self.mask_detection)
    layout = self._layout(images)
    return self._each_image(
      lambda levels, size: postprocess.dense_detections(levels, size, self.preset),
      outputs,
      self.anchors.boxes(*layout, self.dtype),
      lambda size: self.anchors.usable(size, *layout),
      sizes,
    )

  def predictions(self, images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
    outputs = self.outputs(images, sizes, masked=self.mask_detection)
    return outputs.by_term(self.terms)

  def outputs(self, images: jax.Array, sizes: jax.Array, *, masked: bool = False) -> Outputs:
    """What the head predicts for each level; masked: as if each image were alone."""
    features = self.features(images, sizes, masked=masked)
    return self._predict(self.head, features, images, sizes, masked)

  def _coarser(self, c5: jax.Array, p5: jax.Array) -> list[jax.Array]:
    return self.coarser(c5 if self.preset.retinanet.p6_from == "c5" else p5)

  def _image_losses(
    self, anchors, logits, deltas, matches, truth: GroundTruth
  ) -> dict[str, jax.Array]:
    """Sums over the anchors of one image."""
    positive, index = matches >= 0, jnp.maximum(matches, 0)
    classes = jnp.arange(logits.shape[1])[None, :]
    wanted = positive[:, None] & (truth.labels[index][:, None] == classes)
    counts = positive | (matches == BACKGROUND)
    focal = jnp.where(counts[:, None], loss_ops.sigmoid_focal(logits, wanted), 0).sum()
    regression = box_ops.encode(
      anchors, truth.boxes[index], stds=_STDS, inclusive=self.preset.inclusive
    )
    difference = jnp.where(positive[:, None], deltas - regression, 0)
    beta = self.preset.retinanet.beta
    return {
      "classification": focal,
      "boxes": loss_ops.smooth_l1(difference, beta=beta).sum(),
    }
