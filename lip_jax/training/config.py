"""What a training configuration holds: the fields' names, types and meaning, but no values.

Values live in `configs/`. Building a `Config` from a `ConfigDict` refuses unknown and missing keys
by name.
"""

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

from lip_jax.errors import UsageError
from lip_jax.models.description import check_model
from lip_jax.training import workdir as workdir_lib
from lip_jax.training.json_files import parse_json


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


@dataclasses.dataclass(frozen=True)
class Data:
  """Where images come from and what the host does to them."""

  dataset: str  # TFDS name such as "imagenet2012", "folder:DIR", "fake" or "fake:N"
  data_dir: str | None  # TFDS directory; None: $TFDS_DATA_DIR or ~/tensorflow_datasets
  train_split: str
  validation_split: str
  image_size: int  # height and width that the network sees, in pixels
  crop_scale: tuple[float, float] | None  # area of the random resized crop; None: no random crop
  eval_resize: int | None  # shorter side before the central crop of evaluation; None: image_size
  flip: bool  # mirror half of the training images
  mean: tuple[float, float, float]  # RGB, in [0, 255]
  std: tuple[float, float, float]
  num_threads: int  # that read and decode
  eval_crops: int = 1  # of which logits are averaged: 1 central, 5 with corners, 10 with mirrored
  shuffle_window: int = 4096  # images shuffled among each other, where a data set is read in order
  augment: Augment = Augment()


@dataclasses.dataclass(frozen=True)
class Optim:
  """SGD and its learning rate; epochs may be fractions."""

  base_lr: float  # learning rate for 256 images; scaled by global_batch_size / 256
  schedule: str  # "step" or "cosine"
  step_epochs: tuple[float, ...]  # where "step" multiplies the learning rate by step_factor
  step_factor: float
  warmup_epochs: float
  warmup_lr: float  # learning rate that the warm-up starts from
  momentum: float
  weight_decay: float  # on all parameters, batch norm included


@dataclasses.dataclass(frozen=True)
class Config:
  """One training run."""

  model: Mapping[str, Any]  # "name" and the options of `create_model`
  data: Data
  optim: Optim
  seed: int
  num_epochs: float
  global_batch_size: int  # images per step, over all devices
  eval_batch_size: int  # the same in evaluation
  dtype: str  # of the computation: "float32" or "bfloat16"
  label_smoothing: float
  log_every_steps: int
  eval_every_epochs: float
  checkpoint_every_steps: int
  keep_checkpoints: int  # latest ones kept, beside the best
  importance_images: int  # validation images in the importance picture drawn at the end; 0: none
  importance_every_epochs: float = (
    0.0  # the same picture for TensorBoard, with evaluations; 0: none
  )
  fsdp: int = 1  # devices that share one copy of parameters and optimizer state; 1: whole on each
  accumulation_steps: int = 1  # parts of a device's images that are computed one after the other
  remat: bool = False  # keep activations between blocks only: less memory, a forward pass more
  gradient_dtype: str = "float32"  # in which gradients are added up over devices; or "bfloat16"
  watchdog_seconds: float = 300.0  # a step that takes longer is reported, and where it hangs


# How a run is watched, fed and spread over devices, not what it computes: these may change when it
# is resumed.
_MAY_CHANGE = (
  "data.data_dir",
  "data.num_threads",
  "data.eval_crops",
  "eval_batch_size",
  "log_every_steps",
  "eval_every_epochs",
  "checkpoint_every_steps",
  "keep_checkpoints",
  "importance_images",
  "importance_every_epochs",
  "fsdp",
  "accumulation_steps",
  "remat",
  "watchdog_seconds",
)


def from_dict(values: Mapping[str, Any]) -> Config:
  """`Config` from nested mappings, for example `ConfigDict.to_dict()`.

  Raises:
    UsageError: an unknown key, with the valid ones; a missing key; a value out of range.
  """
  config = _build(Config, values, "config")
  _check(config)
  return config


def from_json(text: str) -> Config:
  """`Config` from `to_json`'s text."""
  return from_dict(json.loads(text))


def load(workdir: str | os.PathLike[str]) -> Config:
  """Configuration that the run in `workdir`, which may be in a bucket, was started with.

  Raises:
    UsageError: there is no run, or it cannot be read.
  """
  path = workdir_lib.absolute(workdir) / "config.json"
  text = workdir_lib.read_text(path)
  if text is None:
    raise UsageError(f"no run in {workdir}: {path} does not exist; give a run's --workdir")
  values = parse_json(text, str(path), "copy the folder again, or take another --workdir")
  check_model(values.get("model"), str(path))
  return from_dict(values)


def to_json(config: Config) -> str:
  """The configuration as indented JSON."""
  return json.dumps(dataclasses.asdict(config), indent=2)


def differences(new: Config, old: Config) -> list[str]:
  """Fields that make `new` another run than `old`, as "key: new value (was old value)"."""
  new_flat, old_flat = _flatten(json.loads(to_json(new))), _flatten(json.loads(to_json(old)))
  return [
    f"{key}: {new_flat.get(key)!r} (was {old_flat.get(key)!r})"
    for key in sorted(new_flat | old_flat)
    if key not in _MAY_CHANGE and new_flat.get(key) != old_flat.get(key)
  ]


def _build(cls: type, values: Any, where: str) -> Any:
  if not isinstance(values, Mapping):
    raise UsageError(f"{where} must hold {cls.__name__.lower()} settings, got {str(values)[:80]!r}")
  fields = {field.name: field for field in dataclasses.fields(cls)}
  unknown = sorted(set(values) - set(fields))
  if unknown:
    raise UsageError(
      f"{where} has no key {', '.join(map(repr, unknown))}; valid keys: {', '.join(fields)}"
    )
  missing = [
    name
    for name, field in fields.items()
    if name not in values and field.default is dataclasses.MISSING
  ]
  if missing:
    raise UsageError(f"{where} lacks {', '.join(missing)}; set it in the config file")
  arguments = {}
  for name, field in fields.items():
    if name not in values:
      continue
    value = values[name]
    if dataclasses.is_dataclass(field.type) and isinstance(field.type, type):
      value = _build(field.type, value, f"{where}.{name}")
    elif isinstance(value, Mapping):
      # Sequences are tuples here, too: JSON gives lists.
      value = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    elif isinstance(value, list):
      value = tuple(value)
    # `_build` has checked other settings, and `_check_augment` has better errors for its own.
    settings = cls is Augment or dataclasses.is_dataclass(field.type)
    if not settings and not _fits(value, field.type):
      raise UsageError(f"{where}.{name} must be {_named(field.type)}, got {str(value)[:80]!r}")
    arguments[name] = value
  return cls(**arguments)


def _fits(value: Any, kind: Any) -> bool:
  """Whether a value is of a field's type. Numbers of a tuple are counted by `_check`, not here."""
  if isinstance(kind, types.UnionType):
    return any(_fits(value, one) for one in typing.get_args(kind))
  kind = typing.get_origin(kind) or kind
  if kind in (int, float):
    return isinstance(value, kind | int) and not isinstance(value, bool)
  if kind is tuple:
    # One number where several belong has a better error in `_check`.
    values = value if isinstance(value, tuple) else (value,)
    return all(_fits(v, float) and abs(v) < math.inf for v in values)
  return isinstance(value, kind)


def _named(kind: Any) -> str:
  names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
  names |= {tuple: "finite numbers", Mapping: "settings", types.NoneType: "nothing"}
  kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
  return " or ".join(names.get(typing.get_origin(one) or one, str(one)) for one in kinds)


def _check(config: Config) -> None:
  """Raises UsageError for values that no run can have."""
  for name in (
    "num_epochs",
    "global_batch_size",
    "eval_batch_size",
    "log_every_steps",
    "eval_every_epochs",
    "checkpoint_every_steps",
    "fsdp",
    "accumulation_steps",
    "watchdog_seconds",
  ):
    if not 0 < getattr(config, name) < math.inf:
      raise UsageError(f"config.{name} must be positive, got {getattr(config, name)}")
  if not 0 <= config.importance_every_epochs < math.inf:
    raise UsageError(
      f"config.importance_every_epochs must be at least 0, got {config.importance_every_epochs}"
    )
  if config.importance_every_epochs and not config.importance_images:
    raise UsageError(
      f"config.importance_every_epochs={config.importance_every_epochs} draws no images: "
      "config.importance_images is 0; set both or neither"
    )
  choices = {
    "dtype": (config.dtype, ("float32", "bfloat16")),
    "gradient_dtype": (config.gradient_dtype, ("float32", "bfloat16")),
    "optim.schedule": (config.optim.schedule, ("step", "cosine")),
  }
  for name, (value, valid) in choices.items():
    if value not in valid:
      raise UsageError(f"config.{name} must be one of {', '.join(valid)}, got {value!r}")
  if config.importance_images < 0:
    raise UsageError(f"config.importance_images must be at least 0, got {config.importance_images}")
  if not 0 <= config.label_smoothing < 1:
    raise UsageError(f"config.label_smoothing must be in [0, 1), got {config.label_smoothing}")
  # While the newest is replaced or damaged, one has to be left.
  if config.keep_checkpoints < 2:
    raise UsageError(f"config.keep_checkpoints must be at least 2, got {config.keep_checkpoints}")
  if not 0 <= config.seed < 2**32:
    raise UsageError(f"config.seed must be in [0, 2**32), got {config.seed}")
  _check_data(config.data)
  reserved = sorted({"remat", "bn_axis_name"} & set(config.model))
  if reserved:
    raise UsageError(f"config.model.{reserved[0]} is set by the trainer; see config.remat")
  if "name" not in config.model:
    raise UsageError("config.model lacks name; set it to one of lip_jax.list_models()")


def _check_data(data: Data) -> None:
  for name in ("image_size", "num_threads", "shuffle_window"):
    if getattr(data, name) < 1:
      raise UsageError(f"config.data.{name} must be positive, got {getattr(data, name)}")
  for name in ("mean", "std"):
    value = getattr(data, name)
    if not isinstance(value, tuple) or len(value) != 3:
      raise UsageError(f"config.data.{name} must be three numbers, for R, G and B, got {value}")
  if min(data.std) <= 0:
    raise UsageError(f"config.data.std must be positive, got {data.std}")
  scale = data.crop_scale
  if scale is not None and not (
    isinstance(scale, tuple) and len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
  ):
    raise UsageError(
      "config.data.crop_scale must be (least, greatest) with 0 < least <= greatest <= 1, "
      f"got {scale}"
    )
  if data.eval_resize is not None and data.eval_resize < data.image_size:
    raise UsageError(
      f"config.data.eval_resize={data.eval_resize} must be at least config.data.image_size="
      f"{data.image_size}"
    )
  if data.eval_crops not in (1, 5, 10):
    raise UsageError(f"config.data.eval_crops must be 1, 5 or 10, got {data.eval_crops}")
  _check_augment(data.augment)


def _check_augment(augment: Augment) -> None:
  limits = {
    "cutmix_probability": 1,
    "erasing": 1,
    "brightness": 1,
    "contrast": 1,
    "saturation": 1,
    "randaugment_magnitude": 30,
  }
  for name, value in dataclasses.asdict(augment).items():
    limit = limits.get(name, math.inf)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= limit or value == math.inf:
      upper = "" if limit == math.inf else f" and at most {limit}"
      raise UsageError(
        f"config.data.augment.{name} must be a number, at least 0{upper}, got {value!r}"
      )
  if not isinstance(augment.randaugment_ops, int):
    raise UsageError(
      f"config.data.augment.randaugment_ops must be a whole number, got {augment.randaugment_ops!r}"
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in values.items():
    if isinstance(value, dict):
      flat.update(_flatten(value, f"{prefix}{key}."))
    else:
      flat[prefix + key] = value
  return flat
