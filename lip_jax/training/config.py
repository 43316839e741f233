"""What every training run is configured by. A task adds fields of its own, such as
`lip_jax.classification.config.Config`.

Defaults are those of the dataclasses; a file in `configs/` states what differs from them. Building
a configuration refuses unknown and missing keys by name.
"""

import dataclasses
import difflib
import importlib
import json
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from etils import epath
from flax import nnx
from flax.typing import Dtype

from lip_jax.data import disk
from lip_jax.errors import UsageError
from lip_jax.models.description import check_model
from lip_jax.training import workdir as workdir_lib
from lip_jax.training.json_files import parse_json


class TaskPlace(typing.NamedTuple):
  """Where a task is defined, as "module:class": imported when a configuration asks for it."""

  config: str
  task: str


# By the value of `config.task`. Tasks are built on this room, which therefore cannot import them.
TASKS = {
  "classification": TaskPlace(
    "lip_jax.classification.config:Config", "lip_jax.classification.task:Classification"
  ),
  "detection": TaskPlace("lip_jax.detection.config:Config", "lip_jax.detection.task:Detection"),
}


class Bound(typing.NamedTuple):
  """What holds for a field's number, or for each of several: `Annotated[float, POSITIVE]`."""

  words: str  # "must be ..."
  holds: Callable[[float], bool]


POSITIVE = Bound("positive", lambda number: 0 < number < math.inf)
NOT_NEGATIVE = Bound("at least 0 and finite", lambda number: 0 <= number < math.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """Where examples come from; a task adds what the host does to them."""

  dataset: str  # TFDS name such as "imagenet2012", "folder:DIR", "fake" or "fake:N"
  data_dir: str | None = None  # TFDS directory; None: $TFDS_DATA_DIR or ~/tensorflow_datasets
  train_split: str = "train"
  validation_split: str = "validation"
  num_threads: Annotated[int, POSITIVE] = 16  # that read and decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
  """Optimizer and learning rate; epochs may be fractions.

  The defaults are the paper's recipe (section 4.1): momentum that is not Nesterov's, and weight
  decay on all parameters, those of batch norm included.
  """

  optimizer: Literal["sgd", "adamw", "lamb"] = "sgd"
  # Of base_batch_size images; scaled by global_batch_size / base_batch_size.
  base_lr: Annotated[float, NOT_NEGATIVE] = 0.1
  base_batch_size: Annotated[int, POSITIVE] = 256
  schedule: Literal["step", "cosine"] = "step"
  step_epochs: tuple[float, ...] = (30, 60, 80)  # where "step" multiplies by step_factor
  step_factor: Annotated[float, NOT_NEGATIVE] = 0.1
  warmup_epochs: Annotated[float, NOT_NEGATIVE] = 0.0
  warmup_lr: Annotated[float, NOT_NEGATIVE] = 0.0  # learning rate that the warm-up starts from
  momentum: Annotated[float, NOT_NEGATIVE] = 0.9  # of sgd
  b1: Annotated[float, NOT_NEGATIVE] = 0.9  # of adamw and lamb: decay of the mean of gradients
  b2: Annotated[float, NOT_NEGATIVE] = 0.999  # and of that of their squares
  eps: Annotated[float, NOT_NEGATIVE] = 1e-8  # and what keeps the denominator from zero
  weight_decay: Annotated[float, NOT_NEGATIVE] = 1e-4
  # Largest norm of all gradients together; None: not clipped.
  clip_norm: Annotated[float, POSITIVE] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One training run, as far as every task has it."""

  task: str  # a key of `TASKS`
  model: Mapping[str, Any]  # "name" and the options of the task's constructor
  data: Data
  optim: Optim = Optim()
  seed: Annotated[int, Bound("in [0, 2**32)", lambda seed: 0 <= seed < 2**32)] = 0
  num_epochs: Annotated[float, POSITIVE] = 90.0
  global_batch_size: Annotated[int, POSITIVE] = 256  # examples per step, over all devices
  eval_batch_size: Annotated[int, POSITIVE] = 256  # the same in evaluation
  dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
  # Of an average of the parameters, which is then evaluated.
  ema_decay: Annotated[float, Bound("in (0, 1)", lambda decay: 0 < decay < 1)] | None = None
  log_every_steps: Annotated[int, POSITIVE] = 100
  eval_every_epochs: Annotated[float, POSITIVE] = 1.0
  checkpoint_every_steps: Annotated[int, POSITIVE] = 1000
  # Latest ones kept, beside the best. While the newest is replaced or damaged, one has to be left.
  keep_checkpoints: Annotated[int, Bound("at least 2", lambda count: count >= 2)] = 2
  # Devices that share one copy of parameters and optimizer state; 1: whole on each.
  fsdp: Annotated[int, POSITIVE] = 1
  # Parts of a device's examples, computed one after the other.
  accumulation_steps: Annotated[int, POSITIVE] = 1
  remat: bool = False  # keep activations between blocks only: less memory, a forward pass more
  # In which gradients are added up over devices.
  gradient_dtype: Literal["float32", "bfloat16"] = "float32"
  # A step that takes longer is reported, and where it hangs.
  watchdog_seconds: Annotated[float, POSITIVE] = 300.0

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

  def network(
    self,
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    dtype: Dtype,
    workdir: epath.Path,
  ) -> tuple[nnx.Module, int]:
    """The run's network with shapes in place of arrays, and how many classes it has.

    Args:
      shapes: of its weights and statistics, by their paths in the network.
      where: they are kept, for errors.
      workdir: of the run.

    Raises:
      UsageError: no network is described, or the task's cannot be loaded.
    """
    raise UsageError(f"{where} is of a run of {self.task}, whose networks cannot be loaded")

  def known(self, workdir: epath.Path, num_classes: int) -> dict[str, Any]:
    """What else a network of the run in `workdir` is to be used with, such as "class_names".

    Raises:
      UsageError: the task's files there are damaged.
    """
    return {"class_names": None}

  def check(self) -> None:
    """Raises UsageError for values that no run can have."""
    _check_fields(self, "config")
    reserved = sorted({"remat", "bn_axis_name"} & set(self.model))
    if reserved:
      raise UsageError(f"config.model.{reserved[0]} is set by the trainer; see config.remat")
    if "name" not in self.model:
      raise UsageError("config.model lacks name; set it to one of lip_jax.list_models()")


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
  data_dir = data.data_dir and disk.absolute(data.data_dir)
  data = dataclasses.replace(data, dataset=disk.located(data.dataset), data_dir=data_dir)
  return dataclasses.replace(config, data=data)


def differences(new: Config, old: Config) -> list[str]:
  """Fields that make `new` another run than `old`, as "key: new value (was old value)"."""
  new_flat, old_flat = (flatten(json.loads(to_json(config))) for config in (new, old))
  for flat in (new_flat, old_flat):
    flat["data.dataset"] = disk.anywhere(flat["data.dataset"])
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
    near = difflib.get_close_matches(unknown[0], fields, 1)
    raise UsageError(
      f"{where} has no key {', '.join(map(repr, unknown))}; valid keys: {', '.join(fields)}"
      + (f"; did you mean {near[0]}?" if near else "")
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
    return {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
  return tuple(value) if isinstance(value, list) else value


def _check_fields(values: Any, where: str) -> None:
  """Raises UsageError unless the fields of a dataclass hold what their types say."""
  for field in dataclasses.fields(values):
    value, place = getattr(values, field.name), f"{where}.{field.name}"
    if dataclasses.is_dataclass(field.type):
      _check_fields(value, place)
    elif expected := _expected(value, field.type):
      raise UsageError(f"{place} must be {expected}, got {repr(value)[:80]}")


# How types are called; of tuples those of their parts.
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_NAMES |= {types.NoneType: "nothing", Mapping: "settings"}
_SEVERAL = {int: "whole numbers", float: "finite numbers", str: "texts"}


def _expected(value: Any, kind: Any) -> str | None:
  """What a value ought to be if it is not what a field's type says; None if it is."""
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if origin in (types.UnionType, typing.Union):
    faults = [_expected(value, one) for one in inner]
    return None if None in faults else " or ".join(filter(None, faults))
  if origin is Annotated:
    numbers = value if isinstance(value, tuple) else (value,)
    own, bound = _expected(value, inner[0]), inner[1]
    return own or (None if all(map(bound.holds, numbers)) else bound.words)
  if origin is Literal:
    fits = any(value == one and type(value) is type(one) for one in inner)
    return None if fits else f"one of {', '.join(map(str, inner))}"
  if origin is tuple:
    count = None if inner[-1] is Ellipsis else len(inner)
    fits = isinstance(value, tuple) and count in (None, len(value))
    fits = fits and all(_expected(v, inner[0]) is None for v in value)
    fits = fits and all(isinstance(v, str) or abs(v) < math.inf for v in value)
    parts = _SEVERAL.get(inner[0]) or f"some of {', '.join(typing.get_args(inner[0]))}"
    return None if fits else f"{count or ''} {parts}".strip()
  kind = origin or kind
  allowed = (int, float) if kind is float else kind
  fits = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
  return None if fits else _NAMES.get(kind, str(kind))
