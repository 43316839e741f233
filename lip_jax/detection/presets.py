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


@dataclasses.dataclass(frozen=True)
class Preset:
  """A family of conventions: those of all detectors, and those of each.

  Boxes that a detector takes and gives have a width of x2 - x1 in all presets; see `inward`.
  """

  name: Literal["mmdet1", "torchvision"]
  inclusive: bool  # whether x2 and y2 are last pixels inside the detector
  coco_outputs: int  # of the 80 classes of COCO
  bn_affine: bool  # whether the frozen batch norms' scale and bias are parameters
  bn_epsilon: float
  mask_detection: bool  # whether `detect` computes each image as if it were alone
  loss_group: int  # images whose losses are added up before they are divided
  retinanet: RetinaNetRules

  @property
  def pixel(self) -> int:
    """What boxes lose at x2 and y2 on the way in, and get back on the way out."""
    return int(self.inclusive)

  def outputs(self, num_classes: int) -> int:
    """Class outputs of a detector: 80 classes are those of COCO, which torchvision counts by id."""
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
    loss_group=2,
    retinanet=RetinaNetRules(
      p6_from="c5", relu_before_p7=False, beta=0.11, candidates="anchors", detections=100
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
    loss_group=1,
    retinanet=RetinaNetRules(
      p6_from="p5", relu_before_p7=True, beta=0.0, candidates="pairs", detections=300
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
