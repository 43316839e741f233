"""Detectors by name."""

import inspect
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax.detection import presets
from lip_jax.detection.retinanet import RetinaNet
from lip_jax.errors import UsageError
from lip_jax.models import create_model

_DETECTORS = {"retinanet": RetinaNet}


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
) -> RetinaNet:
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
  if name not in _DETECTORS:
    raise UsageError(f"unknown detector {name!r}; choose one of {', '.join(list_detectors())}")
  constructor, rules = _DETECTORS[name], presets.find(preset)
  own = set(inspect.signature(constructor.__init__).parameters)
  own -= {"self", "backbone", "num_outputs", "preset", "dtype", "rngs"}
  of_backbone = {option: value for option, value in options.items() if option not in own}
  norms = {
    "bn_frozen": True,
    "bn_affine": rules.bn_affine or not of_backbone.get("bn_frozen", True),
    "bn_epsilon": rules.bn_epsilon,
  }
  try:
    network = create_model(backbone, num_classes=0, dtype=dtype, rngs=rngs, **norms | of_backbone)
  except UsageError as error:
    raise UsageError(f"{error} (of detector {name!r}: {', '.join(sorted(own))})") from error
  return constructor(
    network,
    rules.outputs(num_classes),
    preset=rules,
    dtype=dtype,
    rngs=rngs,
    **{option: value for option, value in options.items() if option in own},
  )
