"""What a training of a classifier is configured by, beside what every training has."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from etils import epath
from flax import nnx
from flax.typing import Dtype

from lip_jax.errors import UsageError
from lip_jax.export import class_names
from lip_jax.models import description
from lip_jax.training import config as base
from lip_jax.training.config import NOT_NEGATIVE, POSITIVE, Bound

_FRACTION = Bound("at least 0 and at most 1", lambda part: 0 <= part <= 1)


@dataclasses.dataclass(frozen=True)
class Augment:
  """What the device does to training images beside mirroring them; all of it is off by default."""

  # Alpha of the Beta distribution of the share of the other image; 0: off.
  mixup: Annotated[float, NOT_NEGATIVE] = 0.0
  # The same for the area of the rectangle from the other image; 0: off.
  cutmix: Annotated[float, NOT_NEGATIVE] = 0.0
  # Of CutMix for a batch, else mixup, where both are on.
  cutmix_probability: Annotated[float, _FRACTION] = 0.5
  # Probability that a random rectangle of an image is erased.
  erasing: Annotated[float, _FRACTION] = 0.0
  # Factors are drawn from 1 - this to 1 + this; 0: off.
  brightness: Annotated[float, _FRACTION] = 0.0
  contrast: Annotated[float, _FRACTION] = 0.0
  saturation: Annotated[float, _FRACTION] = 0.0
  randaugment_ops: Annotated[int, NOT_NEGATIVE] = 0  # operations on each image; 0: off
  randaugment_magnitude: Annotated[
    float, Bound("at least 0 and at most 30", lambda strength: 0 <= strength <= 30)
  ] = 9.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(base.Data):
  """Where images come from and what the host does to them; the defaults are ImageNet's."""

  # That the network sees, in pixels; or (height, width).
  image_size: Annotated[int | tuple[int, int], POSITIVE] = 224
  crop_scale: tuple[float, float] | None = (0.08, 1.0)  # area of the random crop; None: no crop
  eval_resize: int | None = 256  # shorter side before the central crop; None: image_size
  # Turn images as their EXIF orientation says; None: in image folders and copies of them, not in
  # data sets of TFDS. ImageNet's published numbers are of images as they are stored: False.
  upright: bool | None = None
  flip: bool = True  # mirror half of the training images
  mean: tuple[float, ...] = (123.675, 116.28, 103.53)  # RGB, in [0, 255]; one number: grey images
  std: Annotated[tuple[float, ...], POSITIVE] = (58.395, 57.12, 57.375)
  # Of which logits are averaged: 1 central, 5 with corners, 10 with mirrored.
  eval_crops: Annotated[int, Bound("1, 5 or 10", lambda count: count in (1, 5, 10))] = 1
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

  def bench_options(self) -> dict[str, Any]:
    """Of `lip_jax.data.bench.bench`, for what these images are made of in training."""
    crops = {} if self.crop_scale is None else {"crop_scale": self.crop_scale}
    return {"image_size": self.image_size, **crops}

  def check(self) -> None:
    """Raises UsageError for values that no run can have."""
    if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
      raise UsageError(
        "config.data.mean and config.data.std must be three numbers, for R, G and B, or one, for "
        f"grey images, got {self.mean} and {self.std}"
      )
    scale = self.crop_scale
    if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
      raise UsageError(
        "config.data.crop_scale must be (least, greatest) with 0 < least <= greatest <= 1, "
        f"got {scale}"
      )
    if self.eval_resize is not None and self.eval_resize < max(self.shape[:2]):
      raise UsageError(
        f"config.data.eval_resize={self.eval_resize} must be at least config.data.image_size="
        f"{self.image_size}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(base.Config):
  """One training of a classifier."""

  task: str = "classification"
  data: Data
  # Share of the target that is spread over all classes.
  label_smoothing: Annotated[float, Bound("in [0, 1)", lambda share: 0 <= share < 1)] = 0.0
  # Validation images in the picture drawn at the end; 0: none.
  importance_images: Annotated[int, NOT_NEGATIVE] = 8
  # The same picture for TensorBoard, with evaluations; 0: never.
  importance_every_epochs: Annotated[float, NOT_NEGATIVE] = 0.0

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

  def network(
    self,
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    dtype: Dtype,
    workdir: epath.Path,
  ) -> tuple[nnx.Module, int]:
    classes = description.count_classes(shapes, where)
    return description.build(self.model, classes, where, dtype), classes

  def known(self, workdir: epath.Path, num_classes: int) -> dict[str, Any]:
    return {"class_names": class_names.of_run(workdir, self, num_classes)}

  def check(self) -> None:
    super().check()
    self.data.check()
    channels, taken = self.data.shape[-1], self.model.get("in_channels", 3)
    if taken != channels:
      raise UsageError(
        f"config.model.in_channels={taken}, but images have {channels} channel(s), as many as "
        "config.data.mean has numbers; set both alike"
      )
    if self.importance_every_epochs and not self.importance_images:
      raise UsageError(
        f"config.importance_every_epochs={self.importance_every_epochs} draws no images: "
        "config.importance_images is 0; set both or neither"
      )
