"""What a training of a detector is configured by, beside what every training has."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from etils import epath
from flax import nnx
from flax.typing import Dtype

from lip_jax.data.buckets import parse_buckets
from lip_jax.detection import categories, registry
from lip_jax.errors import UsageError
from lip_jax.export import class_names, validation
from lip_jax.models import description
from lip_jax.training import config as base
from lip_jax.training.config import NOT_NEGATIVE, POSITIVE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(base.Data):
  """Where images with boxes come from and how they are scaled; the defaults are the paper's."""

  short_side: Annotated[int, POSITIVE] = 800  # pixels that a shorter side is scaled to,
  long_side: Annotated[int, POSITIVE] = 1333  # unless the longer side would pass this
  buckets: tuple[str, ...] = ("800x1344", "1344x800")  # heights x widths, padded to, of batches
  max_boxes: Annotated[int, POSITIVE] = 100  # of an image: so many rows of padding
  min_side: Annotated[int, POSITIVE] = 32  # of images that are trained on, before scaling
  flip: bool = True  # mirror half of the training images
  mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # RGB, in [0, 255]
  std: Annotated[tuple[float, float, float], POSITIVE] = (58.395, 57.12, 57.375)

  @property
  def bucket_sizes(self) -> dict[str, tuple[int, int]]:
    """(height, width) of each bucket."""
    return dict(zip(self.buckets, parse_buckets(self.buckets), strict=True))

  def bench_options(self) -> dict[str, Any]:
    """Of `lip_jax.data.bench.bench`, for what these images are made of in training."""
    return {"image_size": self.short_side}

  def check(self) -> None:
    """Raises UsageError for values that no run can have."""
    if self.long_side < self.short_side:
      raise UsageError(
        f"config.data.long_side={self.long_side} must be at least config.data.short_side="
        f"{self.short_side}"
      )
    for name, (height, width) in self.bucket_sizes.items():
      if height % 32 or width % 32:
        raise UsageError(
          f"config.data.buckets: the sides of {name} must be multiples of 32, the stride of the "
          "networks"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(base.Config):
  """One training of a detector; `model` has "name", "backbone" and options of `create_detector`."""

  task: str = "detection"
  data: Data
  # Of the backbone, such as ("stem", "c2"): not trained.
  frozen_stages: tuple[Literal["stem", "c2", "c3", "c4", "c5"], ...] = ()
  # Beginnings of the names of weights that are not trained either, such as ("backbone", "fpn").
  frozen: tuple[str, ...] = ()
  # Validation images in the picture of what is found; 0: none.
  figure_images: Annotated[int, NOT_NEGATIVE] = 4
  # The same picture for TensorBoard, with evaluations; 0: never.
  picture_every_epochs: Annotated[float, NOT_NEGATIVE] = 0.0

  may_change: ClassVar[frozenset[str]] = base.Config.may_change | {
    "figure_images",
    "picture_every_epochs",
  }

  @property
  def figure_every_epochs(self) -> float:
    return self.picture_every_epochs

  def preprocess(self) -> dict[str, Any]:
    data = self.data
    return {
      "short_side": data.short_side,
      "long_side": data.long_side,
      "mean": list(data.mean),
      "std": list(data.std),
    }

  def network(
    self,
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    dtype: Dtype,
    workdir: epath.Path,
  ) -> tuple[nnx.Module, int]:
    names = class_names.read(workdir)
    named = len(names) if isinstance(names, list) else None
    classes = registry.count_classes(self.model, shapes, where, named)
    return description.build(self.model, classes, where, dtype, registry.abstract_detector), classes

  def known(self, workdir: epath.Path, num_classes: int) -> dict[str, Any]:
    names = class_names.read(workdir)
    where = str(workdir / class_names.FILE)
    return {
      "class_names": validation.check_class_names(names, num_classes, where),
      "category_ids": categories.read(workdir, num_classes),
    }

  def check(self) -> None:
    super().check()
    self.data.check()
    if not isinstance(self.model.get("backbone"), str):
      raise UsageError("config.model lacks backbone; set it to one of lip_jax.list_models()")
