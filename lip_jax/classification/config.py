"""What a training of a classifier is configured by, beside what every training has."""

import dataclasses
import math
from typing import Any, ClassVar

from lip_jax.errors import UsageError
from lip_jax.training import config as base
from lip_jax.training.config import check_positive


@dataclasses.dataclass(frozen=True)
class Augment:
  """What the device does to training images beside mirroring them; all of it is off by default."""

  mixup: float = 0.0  # alpha of the Beta distribution of the share of the other image; 0: off
  cutmix: float = 0.0  # the same for the area of the rectangle from the other image; 0: off
  cutmix_probability: float = 0.5  # of CutMix for a batch, else mixup, where both are on
  erasing: float = 0.0  # probability that a random rectangle of an image is erased
  brightness: float = 0.0  # factors are drawn from 1 - this to 1 + this; 0: off
  contrast: float = 0.0
  saturation: float = 0.0
  randaugment_ops: int = 0  # operations on each image; 0: off
  randaugment_magnitude: float = 9.0  # their strength, 0 to 30

  def check(self) -> None:
    """Raises UsageError for values out of range."""
    limits = {
      "cutmix_probability": 1,
      "erasing": 1,
      "brightness": 1,
      "contrast": 1,
      "saturation": 1,
      "randaugment_magnitude": 30,
    }
    for name, value in dataclasses.asdict(self).items():
      limit = limits.get(name, math.inf)
      if not 0 <= value <= limit or value == math.inf:
        upper = "" if limit == math.inf else f" and at most {limit}"
        raise UsageError(
          f"config.data.augment.{name} must be a number, at least 0{upper}, got {value!r}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(base.Data):
  """Where images come from and what the host does to them; the defaults are ImageNet's."""

  image_size: int | tuple[int, int] = 224  # that the network sees, in pixels; or (height, width)
  crop_scale: tuple[float, float] | None = (0.08, 1.0)  # area of the random crop; None: no crop
  eval_resize: int | None = 256  # shorter side before the central crop; None: image_size
  # Turn images as their EXIF orientation says; None: in image folders and copies of them, not in
  # data sets of TFDS. ImageNet's published numbers are of images as they are stored: False.
  upright: bool | None = None
  flip: bool = True  # mirror half of the training images
  mean: tuple[float, ...] = (123.675, 116.28, 103.53)  # RGB, in [0, 255]; one number: grey images
  std: tuple[float, ...] = (58.395, 57.12, 57.375)
  eval_crops: int = 1  # of which logits are averaged: 1 central, 5 with corners, 10 with mirrored
  augment: Augment = Augment()

  def turns(self, source_upright: bool) -> bool:
    """Whether images of a source are turned, which by itself says yes or no."""
    return source_upright if self.upright is None else self.upright

  @property
  def shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of an image as the network sees it."""
    size = self.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return height, width, len(self.mean)

  def check(self) -> None:
    """Raises UsageError for values that no run can have."""
    for name in ("mean", "std"):
      value = getattr(self, name)
      if not isinstance(value, tuple) or len(value) not in (1, 3):
        raise UsageError(
          f"config.data.{name} must be three numbers, for R, G and B, or one, for grey images, "
          f"got {value}"
        )
    if len(self.mean) != len(self.std):
      raise UsageError(
        f"config.data.mean has {len(self.mean)} number(s) and config.data.std {len(self.std)}; "
        "give as many of each"
      )
    if isinstance(self.image_size, tuple) and len(self.image_size) != 2:
      raise UsageError(f"config.data.image_size must be (height, width), got {self.image_size}")
    for pixels in self.shape[:2]:
      check_positive("config.data.image_size", pixels)
    if min(self.std) <= 0:
      raise UsageError(f"config.data.std must be positive, got {self.std}")
    scale = self.crop_scale
    if scale is not None and not (
      isinstance(scale, tuple) and len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
    ):
      raise UsageError(
        "config.data.crop_scale must be (least, greatest) with 0 < least <= greatest <= 1, "
        f"got {scale}"
      )
    if self.eval_resize is not None and self.eval_resize < max(self.shape[:2]):
      raise UsageError(
        f"config.data.eval_resize={self.eval_resize} must be at least config.data.image_size="
        f"{self.image_size}"
      )
    if self.eval_crops not in (1, 5, 10):
      raise UsageError(f"config.data.eval_crops must be 1, 5 or 10, got {self.eval_crops}")
    self.augment.check()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(base.Config):
  """One training of a classifier."""

  task: str = "classification"
  data: Data
  label_smoothing: float = 0.0  # share of the target that is spread over all classes
  importance_images: int = 8  # validation images in the picture drawn at the end; 0: none
  importance_every_epochs: float = 0.0  # the same picture for TensorBoard, with evaluations

  may_change: ClassVar[frozenset[str]] = base.Config.may_change | {
    "data.eval_crops",
    "importance_images",
    "importance_every_epochs",
  }

  @property
  def figure_every_epochs(self) -> float:
    return self.importance_every_epochs

  def preprocess(self) -> dict[str, Any]:
    return {
      "image_size": self.data.image_size,
      "resize": self.data.eval_resize or self.data.image_size,
      "mean": list(self.data.mean),
      "std": list(self.data.std),
    }

  def check(self) -> None:
    super().check()
    self.data.check()
    channels, taken = self.data.shape[-1], self.model.get("in_channels", 3)
    if taken != channels:
      raise UsageError(
        f"config.model.in_channels={taken}, but images have {channels} channel(s), as many as "
        "config.data.mean has numbers; set both alike"
      )
    if not 0 <= self.label_smoothing < 1:
      raise UsageError(f"config.label_smoothing must be in [0, 1), got {self.label_smoothing}")
    if self.importance_images < 0:
      raise UsageError(f"config.importance_images must be at least 0, got {self.importance_images}")
    if not 0 <= self.importance_every_epochs < math.inf:
      raise UsageError(
        f"config.importance_every_epochs must be at least 0, got {self.importance_every_epochs}"
      )
    if self.importance_every_epochs and not self.importance_images:
      raise UsageError(
        f"config.importance_every_epochs={self.importance_every_epochs} draws no images: "
        "config.importance_images is 0; set both or neither"
      )
