"""Detectors by name."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax.detection import presets
from lip_jax.detection.detector import Detector
from lip_jax.detection.faster_rcnn import FasterRCNN
from lip_jax.detection.retinanet import RetinaNet
from lip_jax.errors import UsageError
from lip_jax.models import create_model, description
from lip_jax.models.description import check_num_classes
from lip_jax.models.registry import abstract

_DETECTORS: dict[str, type[Detector]] = {"retinanet": RetinaNet, "faster_rcnn": FasterRCNN}


def list_detectors() -> list[str]:
  """Names that `create_detector` knows, sorted."""
  return sorted(_DETECTORS)


def create_detector(
  name: str,
  *,
  backbone: str,
  num_classes: int = 80,
  preset: str = "mmdet1",
  dtype: Dtype = jnp.float32,
  rngs: nnx.Rngs,
  **options: Any,
) -> Detector:
  """Builds a detector with fresh weights.

  `detector.losses(images, sizes, targets)` gives what is trained, by name,
  `detector.detect(images, sizes)` the boxes that it finds. Images are [N, H, W, 3], normalized,
  with zeros at the bottom and on the right; sizes [N, 2] their heights and widths without these.
  Batch norms are frozen, as detectors are trained from classifiers (bn_frozen=False: not).

  Args:
    name: one of `list_detectors()`.
    backbone: one of `list_models()`.
    num_classes: classes without background. 80 stand for COCO's: preset torchvision has 91 outputs
      for them, and a class's label is its id.
    preset: "mmdet1", the conventions that the paper trained with (mmdetection 0.6), or
      "torchvision", those of torchvision's published weights.
    dtype: of the computation in backbone, pyramid and head; parameters, boxes, scores and losses
      have at least float32.
    rngs: source of the initial weights, `nnx.Rngs(seed)`.
    **options: arguments of the detector's constructor, such as fpn_channels=64 or
      mask_padding=True, and of `create_model`, such as width=8.

  Raises:
    UsageError: an unknown name, preset or option, or value of an option, with the valid ones.
  """
  constructor, rules = detector_class(name), presets.find(preset)
  of_backbone = backbone_options(name, options)
  norms = {
    "bn_frozen": True,
    "bn_affine": rules.bn_affine or not of_backbone.get("bn_frozen", True),
    "bn_epsilon": rules.bn_epsilon,
  }
  try:
    network = create_model(backbone, num_classes=0, dtype=dtype, rngs=rngs, **norms | of_backbone)
  except UsageError as error:
    own = ", ".join(sorted(_own_options(name)))
    raise UsageError(f"{error} (of detector {name!r}: {own})") from error
  return constructor(
    network,
    num_classes,
    preset=rules,
    dtype=dtype,
    rngs=rngs,
    **{option: value for option, value in options.items() if option not in of_backbone},
  )


def detector_class(name: str) -> type[Detector]:
  """The class of a detector, whose `terms` name its losses.

  Raises:
    UsageError: there is none of that name.
  """
  if name not in _DETECTORS:
    raise UsageError(f"unknown detector {name!r}; choose one of {', '.join(list_detectors())}")
  return _DETECTORS[name]


def backbone_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
  """Those of a detector's options that are arguments of `create_model`."""
  own = _own_options(name)
  return {option: value for option, value in options.items() if option not in own}


def _own_options(name: str) -> set[str]:
  own = {
    option
    for one in (detector_class(name), Detector)
    for option in inspect.signature(one.__init__).parameters
  }
  return own - {"self", "backbone", "num_classes", "preset", "dtype", "rngs", "options"}


def abstract_detector(name: str, *, mask_padding: bool | None = True, **options: Any) -> Any:
  """The detector that a training run makes of a description, with shapes in place of arrays.

  Unlike `create_detector` it computes each image as if it were alone unless told otherwise.
  """
  return abstract(
    lambda rngs: create_detector(name, mask_padding=mask_padding, rngs=rngs, **options)
  )


def class_arrays(model: Mapping[str, Any]) -> set[str]:
  """Paths of the weights of a detector's description whose shapes depend on the classes."""
  few, more = (
    description.flat_variables(description.build(model, count, "model", make=abstract_detector))
    for count in (1, 2)
  )
  return {path for path, variable in few.items() if variable.shape != more[path].shape}


def count_classes(
  model: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, ...]],
  where: str,
  named: int | None = None,
) -> int:
  """Number of classes of the detector of a description, by the shapes of its weights.

  In preset torchvision a Faster R-CNN of 90 other classes, or a RetinaNet of 91, has the shapes of
  one of COCO's 80.

  Args:
    named: of how many classes the names are known. That decides where the shapes allow several
      numbers; without it the network counts as COCO's.

  Raises:
    UsageError: it has no such weights.
  """
  preset = presets.find(str(model.get("preset", "mmdet1")))
  detector = detector_class(str(model.get("name")))
  counts = detector.count_classes(shapes, preset)
  return check_num_classes(named if named in counts else counts[0], where)
