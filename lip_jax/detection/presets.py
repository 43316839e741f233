"""What differs between the detectors of the paper and those of torchvision."""

import dataclasses
from typing import Literal

from lip_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class RetinaNetRules:
  """What differs in RetinaNet."""

  p6_from: Literal["c5", "p5"]
  relu_before_p7: bool
  beta: float  # of the smooth L1 loss of boxes; 0: L1
  # Of each level, the so many anchors with the best highest score, and all their classes; or the so
  # many best pairs of an anchor and a class that pass the threshold.
  candidates: Literal["anchors", "pairs"]
  detections: int  # at most, of an image
  loss_group: int  # images whose losses are added up before they are divided


@dataclasses.dataclass(frozen=True)
class FasterRCNNRules:
  """What differs in Faster R-CNN."""

  # How many anchors of a level, and how many of all after NMS, become proposals in evaluation; in
  # training it is 2,000.
  proposals: int
  roi_mode: Literal["legacy", "unaligned"]  # of RoIAlign
  beta: float  # of the smooth L1 loss of boxes in the second stage
  loss_group: int | None  # as RetinaNet's; None: the whole batch
  least_count: int  # of an image's positive anchors, and of its others, to divide losses by
  least_proposal: float  # sides, in pixels
  least_detection: float


@dataclasses.dataclass(frozen=True)
class Preset:
  """A family of conventions: those of all detectors, and those of each.

  Boxes that a detector takes and gives have a width of x2 - x1 in all presets; see `pixel`.
  """

  name: Literal["mmdet1", "torchvision"]
  inclusive: bool  # whether x2 and y2 are last pixels inside the detector
  coco_outputs: int  # of the 80 classes of COCO
  bn_affine: bool  # whether the frozen batch norms' scale and bias are parameters
  bn_epsilon: float
  mask_detection: bool  # whether `detect` computes each image as if it were alone
  retinanet: RetinaNetRules
  faster_rcnn: FasterRCNNRules

  @property
  def pixel(self) -> int:
    """What boxes lose at x2 and y2 on the way in, and get back on the way out."""
    return int(self.inclusive)

  def outputs(self, num_classes: int) -> int:
    """One more than the largest label: 80 classes are COCO's, which torchvision counts by id."""
    return self.coco_outputs if num_classes == 80 else num_classes


PRESETS = {
  # mmdetection 0.6, which the paper trained with.
  "mmdet1": Preset(
    name="mmdet1",
    inclusive=True,
    coco_outputs=80,
    bn_affine=True,
    bn_epsilon=1e-5,
    mask_detection=True,
    retinanet=RetinaNetRules(
      p6_from="c5",
      relu_before_p7=False,
      beta=0.11,
      candidates="anchors",
      detections=100,
      loss_group=2,
    ),
    faster_rcnn=FasterRCNNRules(
      proposals=2000,
      roi_mode="legacy",
      beta=1.0,
      loss_group=2,
      least_count=1,
      least_proposal=0.0,
      least_detection=0.0,
    ),
  ),
  # torchvision's detectors with the weights COCO_V1.
  "torchvision": Preset(
    name="torchvision",
    inclusive=False,
    coco_outputs=91,
    bn_affine=False,
    bn_epsilon=0.0,
    mask_detection=False,
    retinanet=RetinaNetRules(
      p6_from="p5",
      relu_before_p7=True,
      beta=0.0,
      candidates="pairs",
      detections=300,
      loss_group=1,
    ),
    faster_rcnn=FasterRCNNRules(
      proposals=1000,
      roi_mode="unaligned",
      beta=1 / 9,
      loss_group=None,
      least_count=0,
      least_proposal=1e-3,
      least_detection=1e-2,
    ),
  ),
}


def find(name: str) -> Preset:
  """The preset of that name.

  Raises:
    UsageError: there is none, with those that there are.
  """
  if name not in PRESETS:
    raise UsageError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
  return PRESETS[name]
