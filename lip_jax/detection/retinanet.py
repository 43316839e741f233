"""RetinaNet (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017)."""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax.detection import postprocess
from lip_jax.detection.anchors import ANCHORS, DIVISOR, Anchors
from lip_jax.detection.fpn import FPN, CoarserLevels
from lip_jax.detection.matching import BACKGROUND, RULES, in_crowd, match
from lip_jax.detection.postprocess import Detections, Level
from lip_jax.detection.presets import Preset
from lip_jax.errors import UsageError
from lip_jax.models import layers, padding
from lip_jax.models.network import Network
from lip_jax.ops import boxes as box_ops
from lip_jax.ops import losses as loss_ops

# What images contain, of one batch: boxes [N, M, 4] (x1, y1, x2, y2 in pixels, of width x2 - x1),
# labels [N, M], valid [N, M] (False for padding) and crowd [N, M].
Targets = Mapping[str, jax.Array]

_STAGES = ("c3", "c4", "c5")
_NORMAL = nnx.initializers.normal(0.01)
_STDS = (1, 1, 1, 1)
_MOST_CONVS = 100  # of a tower: far above any detector's


class Outputs(NamedTuple):
  """What a dense detector predicts for the anchors of each level, in at least float32."""

  logits: list[jax.Array]  # [N, A, K]
  deltas: list[jax.Array]  # [N, A, 4]


class Layout(NamedTuple):
  """Where the anchors of a batch lie, as the methods of `Anchors` take it."""

  padded: tuple[int, int]  # height and width of the batch in pixels, with padding
  grids: list[tuple[int, int]]  # rows and columns of each level


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


class RetinaNet(nnx.Module):
  """RetinaNet on any network with features at three strides, each twice the one before.

  Args:
    backbone: without a classifier.
    num_outputs: classes that are told apart.
    preset: the conventions.
    fpn_channels: of the pyramid and the head.
    head_convs: convolutions of each of the head's towers before those that predict.
    anchor_scale: side of a level's smallest square anchors, in strides.
    mask_padding: compute each image as if it were alone in the batch, in its own padding to a
      multiple of 32, so that nothing depends on the batch; False: do not, as the originals; None:
      do so in `detect`, if the preset says so, and not in `losses`.
    ignore_crowd: leave anchors in crowds out of the loss; False: they are background, as in
      mmdetection 0.6.
    dtype: of backbone, pyramid and head; boxes, scores and losses have at least float32.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    backbone: Network,
    num_outputs: int,
    *,
    preset: Preset,
    fpn_channels: int = 256,
    head_convs: int = 4,
    anchor_scale: float = 4.0,
    mask_padding: bool | None = None,
    ignore_crowd: bool = False,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    layers.check_sizes(num_classes=num_outputs, fpn_channels=fpn_channels)
    layers.check_sizes(least=0, head_convs=head_convs)
    if head_convs > _MOST_CONVS:
      raise UsageError(f"head_convs must be at most {_MOST_CONVS}, got {head_convs}")
    rules = preset.retinanet
    channels, strides = _stages(backbone)
    self.backbone = backbone
    self.fpn = FPN(channels, strides, fpn_channels, dtype=dtype, rngs=rngs)
    self.coarser = CoarserLevels(
      channels[-1] if rules.p6_from == "c5" else fpn_channels,
      strides[-1],
      fpn_channels,
      relu_between=rules.relu_before_p7,
      dtype=dtype,
      rngs=rngs,
    )
    self.anchors = _anchors(preset, strides, anchor_scale)
    self.head = Head(
      fpn_channels, self.anchors.per_cell, num_outputs, depth=head_convs, dtype=dtype, rngs=rngs
    )
    self.preset = preset
    self.ignore_crowd = ignore_crowd
    self.mask_losses = bool(mask_padding)
    self.mask_detection = preset.mask_detection if mask_padding is None else mask_padding

  def losses(
    self,
    images: jax.Array,
    sizes: jax.Array,
    targets: Targets,
    priorities: Mapping[str, jax.Array] | None = None,
    key: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    """Focal loss of all classes and (smooth) L1 loss of the boxes, whose sum is trained.

    Each is divided by the number of positive anchors, of an image or of two (see `Preset`), and
    averaged. Boxes that are degenerate, not valid, or crowds are not learned.

    Args:
      images: [N, H, W, 3], normalized, zero beyond each image's size.
      sizes: [N, 2], height and width of each image.
      targets: as `Targets`; labels count from 0, in preset torchvision they are COCO's ids.
      priorities: nothing is sampled here.
      key: likewise.

    Returns:
      {"classification": ..., "boxes": ...}, scalars.
    """
    sums, weights = self.loss_sums(images, sizes, targets, priorities, key)
    return {name: sums[name] / weights[name] for name in sums}

  def loss_sums(
    self,
    images: jax.Array,
    sizes: jax.Array,
    targets: Targets,
    priorities: Mapping[str, jax.Array] | None = None,
    key: jax.Array | None = None,
  ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """`losses` as sums over groups of images, and as weights the number of groups.

    A group are as many consecutive images as the preset divides together.
    """
    del priorities, key
    outputs = self.outputs(images, sizes, masked=self.mask_losses)
    logits, deltas = (jnp.concatenate(part, axis=1) for part in (outputs.logits, outputs.deltas))
    layout = self._layout(images)
    anchors = self.anchors.boxes(*layout, logits.dtype)
    matches = self._match(anchors, layout, sizes, targets)
    gts = self._inward(targets["boxes"], anchors.dtype)
    of_image = functools.partial(self._image_losses, anchors)
    per_image = jax.vmap(of_image)(logits, deltas, matches, gts, targets["labels"])

    group = min(self.preset.loss_group, len(images))
    pad = -len(images) % group

    def grouped(values: jax.Array) -> jax.Array:
      return jnp.pad(values, (0, pad)).reshape(-1, group).sum(axis=1)

    positives = grouped(jnp.maximum((matches >= 0).sum(axis=1), 1).astype(logits.dtype))
    sums = {name: (grouped(loss) / positives).sum() for name, loss in per_image.items()}
    return sums, {name: jnp.asarray(len(positives), logits.dtype) for name in sums}

  def match(self, images: jax.Array, sizes: jax.Array, targets: Targets) -> jax.Array:
    """The ground truth of each anchor, [N, A]: see `lip_jax.detection.matching.match`."""
    layout = self._layout(images)
    anchors = self.anchors.boxes(*layout, self.head.dtype)
    return self._match(anchors, layout, sizes, targets)

  def detect(self, images: jax.Array, sizes: jax.Array) -> Detections:
    """What the network finds: at most 100 boxes in each image, 300 in preset torchvision.

    Args:
      images: [N, H, W, 3], normalized, zero beyond each image's size.
      sizes: [N, 2], height and width of each image, in which the boxes lie.
    """
    outputs = self.outputs(images, sizes, masked=self.mask_detection)
    layout = self._layout(images)
    anchors = self.anchors.boxes(*layout, self.head.dtype)
    splits = list(itertools.accumulate(logits.shape[1] for logits in outputs.logits))[:-1]

    def of_image(logits, deltas, size):
      usable = self.anchors.usable(size, *layout)
      parts = (jnp.split(array, splits) for array in (anchors, usable))
      levels = [Level(*level) for level in zip(logits, deltas, *parts, strict=True)]
      return postprocess.detections(levels, size, self.preset)

    return jax.vmap(of_image)(outputs.logits, outputs.deltas, jnp.asarray(sizes))

  def features(
    self, images: jax.Array, sizes: jax.Array, *, masked: bool = False
  ) -> dict[str, jax.Array]:
    """Features of the backbone, and of the pyramid as "p3" to "p7": each [N, H', W', C]."""
    with self._mask(images, sizes, masked):
      stages = self.backbone.features(_pad(images))
      pyramid = self.fpn([stages[name] for name in _STAGES])
      source = stages["c5"] if self.preset.retinanet.p6_from == "c5" else pyramid[-1]
      pyramid += self.coarser(source)
    return {**stages, **{f"p{3 + k}": level for k, level in enumerate(pyramid)}}

  def outputs(self, images: jax.Array, sizes: jax.Array, *, masked: bool = False) -> Outputs:
    """What the head predicts for each level; masked: as if each image were alone."""
    features = self.features(images, sizes, masked=masked)
    levels = [features[f"p{3 + k}"] for k in range(len(self.anchors.strides))]
    with self._mask(images, sizes, masked):
      found = [self.head(x, stride) for x, stride in zip(levels, self.anchors.strides, strict=True)]
    return Outputs([logits for logits, _ in found], [deltas for _, deltas in found])

  def _layout(self, images: jax.Array) -> Layout:
    height, width = (-(-size // DIVISOR) * DIVISOR for size in images.shape[1:3])
    return Layout(
      (height, width), [(-(-height // step), -(-width // step)) for step in self.anchors.strides]
    )

  def _mask(self, images: jax.Array, sizes: jax.Array, masked: bool) -> Any:
    if not masked:
      return contextlib.nullcontext()
    own = -(-jnp.asarray(sizes) // DIVISOR) * DIVISOR
    return padding.masked(own, self._layout(images).padded)

  def _inward(self, boxes: jax.Array, dtype: Dtype) -> jax.Array:
    boxes = jnp.asarray(boxes, dtype)
    pixels = jnp.asarray([0, 0, self.preset.pixel, self.preset.pixel], dtype)
    return boxes - pixels.reshape((1,) * (boxes.ndim - 1) + (4,))

  def _match(self, anchors, layout, sizes, targets) -> jax.Array:
    inclusive = self.preset.inclusive
    rule = RULES["retinanet", self.preset.name]
    gts = self._inward(targets["boxes"], anchors.dtype)
    width, height = box_ops.sizes(gts, inclusive=inclusive)
    valid = jnp.asarray(targets["valid"], bool) & (width > 0) & (height > 0)
    crowd = jnp.asarray(targets["crowd"], bool)

    def of_image(gts, valid, crowd, size):
      usable = self.anchors.usable(size, *layout)
      if self.ignore_crowd:
        usable &= ~in_crowd(anchors, gts, valid & crowd, inclusive=inclusive)
      return match(anchors, gts, valid & ~crowd, rule=rule, usable=usable)

    return jax.vmap(of_image)(gts, valid, crowd, jnp.asarray(sizes))

  def _image_losses(self, anchors, logits, deltas, matches, gts, labels) -> dict[str, jax.Array]:
    """Sums over the anchors of one image."""
    if not len(gts):
      gts, labels = jnp.zeros((1, 4), gts.dtype), jnp.zeros(1, jnp.int32)
    positive, index = matches >= 0, jnp.maximum(matches, 0)
    classes = jnp.arange(logits.shape[1])[None, :]
    wanted = positive[:, None] & (jnp.asarray(labels)[index][:, None] == classes)
    counts = positive | (matches == BACKGROUND)
    focal = jnp.where(counts[:, None], loss_ops.sigmoid_focal(logits, wanted), 0).sum()
    regression = box_ops.encode(anchors, gts[index], stds=_STDS, inclusive=self.preset.inclusive)
    difference = jnp.where(positive[:, None], deltas - regression, 0)
    beta = self.preset.retinanet.beta
    return {
      "classification": focal,
      "boxes": loss_ops.smooth_l1(difference, beta=beta).sum(),
    }


def _pad(images: jax.Array) -> jax.Array:
  """Images with zeros at the bottom and on the right, up to multiples of 32."""
  bottom, right = (-size % DIVISOR for size in images.shape[1:3])
  return jnp.pad(images, ((0, 0), (0, bottom), (0, right), (0, 0)))


def _stages(backbone: Network) -> tuple[list[int], list[int]]:
  """Channels and strides of the features that the pyramid stands on."""
  graph, state = nnx.split(backbone)

  def run(state: Any, images: jax.Array) -> dict[str, jax.Array]:
    network = nnx.merge(graph, state, copy=True)
    network.eval()  # in training a batch norm may want more images than one
    return network.features(images)

  size = 64
  images = jax.ShapeDtypeStruct((1, size, size, backbone.in_channels), jnp.float32)
  features = jax.eval_shape(run, state, images)
  stages = [features[name] for name in _STAGES]
  return [x.shape[3] for x in stages], [size // x.shape[1] for x in stages]


def _anchors(preset: Preset, strides: Sequence[int], scale: float) -> Anchors:
  """The preset's, for levels that begin with these strides, and of another scale than 4."""
  anchors = ANCHORS["retinanet", preset.name]
  if not 0 < scale < math.inf:
    raise UsageError(f"anchor_scale must be a positive number, got {scale}")
  by = strides[0] / anchors.strides[0]
  return dataclasses.replace(
    anchors,
    strides=tuple(int(stride * by) for stride in anchors.strides),
    sizes=tuple(tuple(size * by * scale / 4 for size in sizes) for sizes in anchors.sizes),
  )
