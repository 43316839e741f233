"""What all detectors share: backbone and pyramid, what a batch holds, how losses are added up."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from lip_jax.detection.anchors import ANCHORS, DIVISOR, Anchors
from lip_jax.detection.fpn import FPN
from lip_jax.detection.matching import RULES, in_crowd, match
from lip_jax.detection.postprocess import Detections, Level
from lip_jax.detection.presets import Preset
from lip_jax.errors import UsageError
from lip_jax.models import layers, padding
from lip_jax.models.network import Network
from lip_jax.ops import boxes as box_ops

# What images contain, of one batch: boxes [N, M, 4] (x1, y1, x2, y2 in pixels, of width x2 - x1),
# labels [N, M], valid [N, M] (False for padding) and crowd [N, M]; for what is drawn at random also
# image_id [N].
Targets = Mapping[str, jax.Array]
Sums = dict[str, jax.Array]

_SOME = 1000  # anchors of a level


class Outputs(NamedTuple):
  """What is predicted for the anchors of each level, in at least float32."""

  logits: list[jax.Array]  # [N, A, K]
  deltas: list[jax.Array]  # [N, A, 4]

  def by_term(self, terms: Sequence[str]) -> dict[str, jax.Array]:
    """Of some anchors, spread over each level, by the names of the two losses."""

    def some(level: jax.Array) -> jax.Array:
      count = level.shape[1]
      index = np.linspace(0, count - 1, min(count, _SOME)).astype(np.int32)
      return jnp.take(level, index, axis=1, mode="clip")

    return {
      term: jnp.concatenate([some(level) for level in part], axis=1)
      for term, part in zip(terms, self, strict=True)
    }


class Layout(NamedTuple):
  """Where the anchors of a batch lie, as the methods of `Anchors` take it."""

  padded: tuple[int, int]  # height and width of the batch in pixels, with padding
  grids: list[tuple[int, int]]  # rows and columns of each level


class GroundTruth(NamedTuple):
  """`Targets` as a detector learns them, with room for at least one box."""

  boxes: jax.Array  # [N, M, 4], inclusive where the preset is
  labels: jax.Array  # [N, M]
  valid: jax.Array  # [N, M], False for padding, degenerate boxes, labels of no class, and crowds
  crowd: jax.Array  # [N, M], crowds that are not degenerate


class ImageLosses(NamedTuple):
  """Of each image by itself, by the names of the losses."""

  sums: Sums  # [N]
  counts: Sums  # [N], what the sums are divided by, once both are added up over images


class Detector(nnx.Module):
  """A feature pyramid on any network's features, each of twice the stride of the one before.

  Attributes:
    stages: the backbone's features that the pyramid stands on.
    kind: of the anchors and of their matching.
    terms: names of the losses, whose sum is trained.
    num_labels: one more than the largest label.
    loss_group: so many consecutive images of a batch are divided together, and the quotients
      averaged; None: all are.

  Args:
    backbone: without a classifier.
    num_classes: that are told apart; the preset says what labels they have.
    preset: the conventions.
    fpn_channels: of the pyramid and what stands on it.
    anchor_scale: side of a level's smallest square anchors, in strides; None: the preset's.
    mask_padding: compute each image as if it were alone in the batch, in its own padding to a
      multiple of 32, so that nothing depends on the batch; False: do not, as the originals; None:
      do so in `detect`, if the preset says so, and not in `losses`.
    ignore_crowd: leave boxes in crowds out of the loss; False: they are background, as in
      mmdetection 0.6.
    dtype: of backbone, pyramid and heads; boxes, scores and losses have at least float32.
    rngs: source of the initial weights.
  """

  stages: ClassVar[tuple[str, ...]]
  kind: ClassVar[str]
  terms: ClassVar[tuple[str, ...]]
  loss_group: int | None

  def __init__(
    self,
    backbone: Network,
    num_classes: int,
    *,
    preset: Preset,
    fpn_channels: int = 256,
    anchor_scale: float | None = None,
    mask_padding: bool | None = None,
    ignore_crowd: bool = False,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    layers.check_sizes(num_classes=num_classes, fpn_channels=fpn_channels)
    self.stage_channels, strides = _stages(backbone, self.stages)
    self.backbone = backbone
    self.fpn = FPN(self.stage_channels, strides, fpn_channels, dtype=dtype, rngs=rngs)
    self.anchors = _anchors(self.kind, preset, strides, anchor_scale)
    self.num_labels = preset.outputs(num_classes)
    self.preset = preset
    self.ignore_crowd = ignore_crowd
    self.mask_losses = bool(mask_padding)
    self.mask_detection = preset.mask_detection if mask_padding is None else mask_padding
    self.dtype = layers.param_dtype(dtype)

  @staticmethod
  def count_classes(shapes: Mapping[str, tuple[int, ...]], preset: Preset) -> list[int]:
    """What `num_classes` can have been, by the shapes of the weights: COCO's first, if it can.

    Less than 1 where weights are missing.
    """
    raise NotImplementedError

  def losses(
    self,
    images: jax.Array,
    sizes: jax.Array,
    targets: Targets,
    priorities: Mapping[str, jax.Array] | None = None,
    key: jax.Array | None = None,
  ) -> Sums:
    """Scalars by name, see `terms`, whose sum is trained.

    Boxes that are degenerate, of a label that is no class, not valid, or crowds are not learned.

    Args:
      images: [N, H, W, 3], normalized, zero beyond each image's size.
      sizes: [N, 2], height and width of each image.
      targets: as `Targets`; labels count from 0, in preset torchvision they are COCO's ids.
      priorities: where boxes are sampled, those with the smallest are taken: "rpn" [N, anchors],
        "proposal" [N, 2000], "gt" [N, M]; None: random numbers.
      key: of these, with the image's id; None: that of a seed of 0.

    Raises:
      UsageError: there are no images.
    """
    if not images.shape[0]:
      raise UsageError("losses of a batch of no images; give at least one image")
    found = self.image_losses(images, sizes, targets, priorities, key)
    return self.mean_losses(found)

  def mean_losses(self, losses: ImageLosses) -> Sums:
    """`losses` of a whole batch, given those of its images."""
    count = len(next(iter(losses.counts.values())))
    rows = jnp.arange(count, dtype=jnp.int32)
    sums, counts = self.group_losses(losses, rows, count)
    return {name: (sums[name] / jnp.maximum(counts[name], 1)).mean() for name in sums}

  def group_losses(self, losses: ImageLosses, rows: jax.Array, count: int) -> tuple[Sums, Sums]:
    """(sums, counts) of each group of a batch, whose quotients are to be averaged.

    What the parts of a batch give can be added up: images of a group may be in several.

    Args:
      losses: of some images.
      rows: [N], their places in the batch.
      count: images of the batch.
    """
    size = self.loss_group or count
    groups = jnp.arange(-(-count // size), dtype=jnp.int32)
    inside = groups[:, None] == (rows // size)[None, :]

    def add_up(values: jax.Array) -> jax.Array:
      return jnp.where(inside, values[None, :], 0).sum(axis=1)

    return jax.tree.map(add_up, losses.sums), jax.tree.map(add_up, losses.counts)

  def image_losses(
    self,
    images: jax.Array,
    sizes: jax.Array,
    targets: Targets,
    priorities: Mapping[str, jax.Array] | None = None,
    key: jax.Array | None = None,
  ) -> ImageLosses:
    """What `losses` are computed of; no image changes another's."""
    raise NotImplementedError

  def detect(self, images: jax.Array, sizes: jax.Array) -> Detections:
    """What the network finds: at most 100 boxes in each image, 300 with some presets.

    Args:
      images: [N, H, W, 3], normalized, zero beyond each image's size.
      sizes: [N, 2], height and width of each image, in which the boxes lie.
    """
    raise NotImplementedError

  def predictions(self, images: jax.Array, sizes: jax.Array) -> Sums:
    """What `detect` chooses from, by `terms`: [N, ...] each; arguments as of `detect`.

    Of some anchors, spread over all levels; of a second stage for regions that lie the same in all
    images, wherever the first one looks.
    """
    raise NotImplementedError

  def match(self, images: jax.Array, sizes: jax.Array, targets: Targets) -> jax.Array:
    """The ground truth of each anchor, [N, A]: see `lip_jax.detection.matching.match`."""
    layout = self._layout(images)
    anchors = self.anchors.boxes(*layout, self.dtype)
    return self._match_anchors(anchors, layout, sizes, self._ground_truth(targets))

  def features(
    self, images: jax.Array, sizes: jax.Array, *, masked: bool = False
  ) -> dict[str, jax.Array]:
    """Features of the backbone, and of the pyramid under "p3", ...: each [N, H', W', C]."""
    with self._mask(images, sizes, masked):
      stages = self.backbone.features(_pad(images))
      pyramid = self.fpn([stages[name] for name in self.stages])
      pyramid += self._coarser(stages["c5"], pyramid[-1])
    return {**stages, **dict(zip(self._level_names, pyramid, strict=True))}

  def _coarser(self, c5: jax.Array, p5: jax.Array) -> list[jax.Array]:
    """Levels beyond those of the backbone's stages."""
    raise NotImplementedError

  @property
  def _level_names(self) -> list[str]:
    first = int(self.stages[0].removeprefix("c"))
    return [f"p{first + k}" for k in range(len(self.anchors.strides))]

  def _predict(
    self,
    head: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]],
    features: Mapping[str, jax.Array],
    images: jax.Array,
    sizes: jax.Array,
    masked: bool,
  ) -> Outputs:
    """What a head says of each level, given its features and stride."""
    with self._mask(images, sizes, masked):
      found = [
        head(features[name], stride)
        for name, stride in zip(self._level_names, self.anchors.strides, strict=True)
      ]
    return Outputs([logits for logits, _ in found], [deltas for _, deltas in found])

  def _each_image(
    self,
    find: Callable[[list[Level], jax.Array], Any],
    outputs: Outputs,
    boxes: Any,
    usable: Callable[[jax.Array], jax.Array],
    sizes: jax.Array,
  ) -> Any:
    """`find(levels, size)` of every image, given the anchors' boxes and which an image uses."""
    splits = list(itertools.accumulate(logits.shape[1] for logits in outputs.logits))[:-1]

    def of_image(logits, deltas, size):
      parts = (jnp.split(array, splits) for array in (boxes, usable(size)))
      return find([Level(*level) for level in zip(logits, deltas, *parts, strict=True)], size)

    return jax.vmap(of_image)(outputs.logits, outputs.deltas, jnp.asarray(sizes))

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

  def _ground_truth(self, targets: Targets) -> GroundTruth:
    boxes = jnp.asarray(targets["boxes"], self.dtype)
    pixels = jnp.asarray([0, 0, self.preset.pixel, self.preset.pixel], boxes.dtype)
    boxes = boxes - pixels[None, None, :]
    sides = jnp.stack(box_ops.sizes(boxes, inclusive=self.preset.inclusive), axis=-1)
    usable = jnp.asarray(targets["valid"], bool)
    usable &= ((sides > 0) & jnp.isfinite(sides)).all(axis=-1)
    labels, crowd = jnp.asarray(targets["labels"]), jnp.asarray(targets["crowd"], bool)
    usable &= (labels >= 0) & (labels < self.num_labels)
    found = GroundTruth(boxes, labels, usable & ~crowd, usable & crowd)
    if boxes.shape[1]:
      return found
    return jax.tree.map(lambda x: jnp.zeros((len(x), 1, *x.shape[2:]), x.dtype), found)

  def _match_anchors(self, anchors, layout: Layout, sizes, truth: GroundTruth) -> jax.Array:
    rule = RULES[self.kind, self.preset.name]

    def of_image(truth, size):
      usable = self.anchors.usable(size, *layout) & self._not_ignored(anchors, truth)
      return match(anchors, truth.boxes, truth.valid, rule=rule, usable=usable)

    return jax.vmap(of_image)(truth, jnp.asarray(sizes))

  def _not_ignored(self, boxes: jax.Array, truth: GroundTruth) -> jax.Array:
    """Boxes [B, 4] of an image that its crowds leave in the loss: [B] bool."""
    if not self.ignore_crowd:
      return jnp.ones(len(boxes), bool)
    return ~in_crowd(boxes, truth.boxes, truth.crowd, inclusive=self.preset.inclusive)


def _pad(images: jax.Array) -> jax.Array:
  """Images with zeros at the bottom and on the right, up to multiples of 32."""
  bottom, right = (-size % DIVISOR for size in images.shape[1:3])
  return jnp.pad(images, ((0, 0), (0, bottom), (0, right), (0, 0)))


def _stages(backbone: Network, names: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Channels and strides of the features that the pyramid stands on."""
  graph, state = nnx.split(backbone)

  def run(state: Any, images: jax.Array) -> dict[str, jax.Array]:
    network = nnx.merge(graph, state, copy=True)
    network.eval()  # in training a batch norm may want more images than one
    return network.features(images)

  size = 64
  images = jax.ShapeDtypeStruct((1, size, size, backbone.in_channels), jnp.float32)
  features = jax.eval_shape(run, state, images)
  stages = [features[name] for name in names]
  return tuple(x.shape[3] for x in stages), tuple(size // x.shape[1] for x in stages)


def _anchors(kind: str, preset: Preset, strides: Sequence[int], scale: float | None) -> Anchors:
  """The preset's, for levels that begin with these strides, perhaps of another scale."""
  anchors = ANCHORS[kind, preset.name]
  own = anchors.sizes[0][0] / anchors.strides[0]
  scale = own if scale is None else scale
  if not 0 < scale < math.inf:
    raise UsageError(f"anchor_scale must be a positive number, got {scale}")
  by = strides[0] / anchors.strides[0]
  return dataclasses.replace(
    anchors,
    strides=tuple(int(stride * by) for stride in anchors.strides),
    sizes=tuple(tuple(size * by * scale / own for size in sizes) for sizes in anchors.sizes),
  )
