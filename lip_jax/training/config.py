"""What every training run is configured by. A task adds fields of its own, such as
`lip_jax.classification.config.Config`.

Defaults are those of the dataclasses; a file in `configs/` states what differs from them. Building
a configuration refuses unknown and missing keys by name.
"""

import dataclasses
import importlib
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

from lip_jax.data import disk
from lip_jax.errors import UsageError
from lip_jax.models.description import check_model
from lip_jax.training import workdir as workdir_lib
from lip_jax.training.json_files import parse_json


class TaskPlace(typing.NamedTuple):
  """Where a task is defined, as "module:class": imported when a configuration asks for it."""

  config: str
  task: str


FOLDER = "folder:"  # begins `config.data.dataset` where that is an image folder

# By the value of `config.task`. Tasks are built on this room, which therefore cannot import them.
TASKS = {
  "classification": TaskPlace(
    "lip_jax.classification.config:Config", "lip_jax.classification.task:Classification"
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """Where examples come from; a task adds what the host does to them."""

  dataset: str  # TFDS name such as "imagenet2012", "folder:DIR", "fake" or "fake:N"
  data_dir: str | None = None  # TFDS directory; None: $TFDS_DATA_DIR or ~/tensorflow_datasets
  train_split: str = "train"
  validation_split: str = "validation"
  num_threads: int = 16  # that read and decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
  """Optimizer and learning rate; epochs may be fractions.

  The defaults are the paper's recipe (section 4.1): momentum that is not Nesterov's, and weight
  decay on all parameters, those of batch norm included.
  """

  optimizer: str = "sgd"  # or "adamw", "lamb"
  base_lr: float = 0.1  # for base_batch_size images; scaled by global_batch_size / base_batch_size
  base_batch_size: int = 256
  schedule: str = "step"  # or "cosine"
  step_epochs: tuple[float, ...] = (30, 60, 80)  # where "step" multiplies by step_factor
  step_factor: float = 0.1
  warmup_epochs: float = 0.0
  warmup_lr: float = 0.0  # learning rate that the warm-up starts from
  momentum: float = 0.9  # of sgd
  b1: float = 0.9  # of adamw and lamb: decay of the mean of gradients
  b2: float = 0.999  # and of that of their squares
  eps: float = 1e-8  # and what keeps the denominator from zero
  weight_decay: float = 1e-4
  clip_norm: float | None = None  # largest norm of all gradients together; None: not clipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One training run, as far as every task has it."""

  task: str  # a key of `TASKS`
  model: Mapping[str, Any]  # "name" and the options of the task's constructor
  data: Data
  optim: Optim = Optim()
  seed: int = 0
  num_epochs: float = 90.0
  global_batch_size: int = 256  # examples per step, over all devices
  eval_batch_size: int = 256  # the same in evaluation
  dtype: str = "float32"  # of the computation; or "bfloat16"
  ema_decay: float | None = None  # of an average of the parameters, which is then evaluated
  log_every_steps: int = 100
  eval_every_epochs: float = 1.0
  checkpoint_every_steps: int = 1000
  keep_checkpoints: int = 2  # latest ones kept, beside the best
  fsdp: int = 1  # devices that share one copy of parameters and optimizer state; 1: whole on each
  accumulation_steps: int = 1  # parts of a device's examples, computed one after the other
  remat: bool = False  # keep activations between blocks only: less memory, a forward pass more
  gradient_dtype: str = "float32"  # in which gradients are added up over devices; or "bfloat16"
  watchdog_seconds: float = 300.0  # a step that takes longer is reported, and where it hangs

  # How a run is watched, fed and spread over devices, not what it computes: these may change when
  # it is resumed.
  may_change: ClassVar[frozenset[str]] = frozenset(
    (
      "data.data_dir",
      "data.num_threads",
      "eval_batch_size",
      "log_every_steps",
      "eval_every_epochs",
      "checkpoint_every_steps",
      "keep_checkpoints",
      "fsdp",
      "accumulation_steps",
      "remat",
      "watchdog_seconds",
    )
  )

  @property
  def figure_every_epochs(self) -> float:
    """How often the task's figures are drawn for TensorBoard, with evaluations; 0: never."""
    return 0.0

  def preprocess(self) -> dict[str, Any] | None:
    """How inputs are prepared in evaluation, for who loads the network; None: there is no more."""
    return None

  def check(self) -> None:
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
      check_positive(f"config.{name}", getattr(self, name))
    check_positive("config.data.num_threads", self.data.num_threads)
    check_positive("config.optim.base_batch_size", self.optim.base_batch_size)
    for name, value in dataclasses.asdict(self.optim).items():
      if isinstance(value, int | float) and not 0 <= value < math.inf:
        raise UsageError(f"config.optim.{name} must be at least 0 and finite, got {value}")
    if self.optim.clip_norm is not None:
      check_positive("config.optim.clip_norm", self.optim.clip_norm)
    check_choice("config.dtype", self.dtype, ("float32", "bfloat16"))
    check_choice("config.gradient_dtype", self.gradient_dtype, ("float32", "bfloat16"))
    check_choice("config.optim.schedule", self.optim.schedule, ("step", "cosine"))
    check_choice("config.optim.optimizer", self.optim.optimizer, ("sgd", "adamw", "lamb"))
    if self.ema_decay is not None and not 0 < self.ema_decay < 1:
      raise UsageError(f"config.ema_decay must be in (0, 1), or None, got {self.ema_decay}")
    # While the newest is replaced or damaged, one has to be left.
    if self.keep_checkpoints < 2:
      raise UsageError(f"config.keep_checkpoints must be at least 2, got {self.keep_checkpoints}")
    if not 0 <= self.seed < 2**32:
      raise UsageError(f"config.seed must be in [0, 2**32), got {self.seed}")
    reserved = sorted({"remat", "bn_axis_name"} & set(self.model))
    if reserved:
      raise UsageError(f"config.model.{reserved[0]} is set by the trainer; see config.remat")
    if "name" not in self.model:
      raise UsageError("config.model lacks name; set it to one of lip_jax.list_models()")


def check_positive(name: str, value: float) -> None:
  """Raises UsageError unless a number is positive and finite."""
  if not 0 < value < math.inf:
    raise UsageError(f"{name} must be positive, got {value}")


def check_choice(name: str, value: str, valid: tuple[str, ...]) -> None:
  """Raises UsageError unless a value is one of those that are valid."""
  if value not in valid:
    raise UsageError(f"{name} must be one of {', '.join(valid)}, got {value!r}")


def find(place: str) -> Any:
  """The class at "module:class"."""
  module, _, name = place.partition(":")
  return getattr(importlib.import_module(module), name)


def config_class(values: Mapping[str, Any]) -> type[Config]:
  """The configuration's class, by its "task" (default: classification).

  Raises:
    UsageError: there is no such task.
  """
  task = values.get("task", "classification")
  if not isinstance(task, str) or task not in TASKS:
    raise UsageError(f"config.task must be one of {', '.join(TASKS)}, got {str(task)[:80]!r}")
  return find(TASKS[task].config)


def from_dict(values: Mapping[str, Any]) -> Config:
  """Configuration from nested mappings, for example `ConfigDict.to_dict()`.

  Raises:
    UsageError: an unknown key, with the valid ones; a missing key; a value out of range.
  """
  config = _build(config_class(values), values, "config")
  config.check()
  return config


def from_json(text: str) -> Config:
  """Configuration from `to_json`'s text."""
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


def located(config: Config) -> Config:
  """The configuration with absolute paths, so that the run can be used from any directory."""
  data = config.data
  dataset = data.dataset
  if dataset.startswith(FOLDER):
    dataset = FOLDER + disk.absolute(dataset.removeprefix(FOLDER))
  data_dir = data.data_dir and disk.absolute(data.data_dir)
  data = dataclasses.replace(data, dataset=dataset, data_dir=data_dir)
  return dataclasses.replace(config, data=data)


def differences(new: Config, old: Config) -> list[str]:
  """Fields that make `new` another run than `old`, as "key: new value (was old value)"."""
  new_flat, old_flat = (flatten(json.loads(to_json(config))) for config in (new, old))
  for flat in (new_flat, old_flat):
    if flat["data.dataset"].startswith(FOLDER):
      flat["data.dataset"] = FOLDER  # it is known by what it holds, wherever it lies
  return [
    f"{key}: {new_flat.get(key)!r} (was {old_flat.get(key)!r})"
    for key in sorted(new_flat | old_flat)
    if key not in new.may_change and new_flat.get(key) != old_flat.get(key)
  ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Values of nested mappings by their keys with dots between them."""
  flat = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[prefix + key] = value
  return flat


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
  return cls(
    **{
      name: _value(field.type, values[name], f"{where}.{name}")
      for name, field in fields.items()
      if name in values
    }
  )


def _value(kind: Any, value: Any, where: str) -> Any:
  """A value as a field of that type has it; JSON gives lists where there were tuples."""
  if dataclasses.is_dataclass(kind) and isinstance(kind, type):
    return _build(kind, value, where)
  if isinstance(value, Mapping):
    value = {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
  elif isinstance(value, list):
    value = tuple(value)
  if not _fits(value, kind):
    raise UsageError(f"{where} must be {_named(kind)}, got {str(value)[:80]!r}")
  return value


def _fits(value: Any, kind: Any) -> bool:
  """Whether a value is of a field's type. Numbers of a tuple are counted by `check`, not here."""
  if isinstance(kind, types.UnionType):
    return any(_fits(value, one) for one in typing.get_args(kind))
  number, *_ = typing.get_args(kind) or (None,)
  kind = typing.get_origin(kind) or kind
  if kind in (int, float):
    return isinstance(value, kind | int) and not isinstance(value, bool)
  if kind is tuple:
    # One number where several belong has a better error in `check`.
    values = value if isinstance(value, tuple) else (value,)
    return all(_fits(v, number) and (isinstance(v, str) or abs(v) < math.inf) for v in values)
  return isinstance(value, kind)


def _named(kind: Any) -> str:
  names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
  names |= {tuple: "finite numbers", Mapping: "settings", types.NoneType: "nothing"}
  kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
  named: dict[Any, str] = {**names, tuple[int, int]: "whole numbers"}
  return " or ".join(named.get(one) or named.get(typing.get_origin(one), str(one)) for one in kinds)
