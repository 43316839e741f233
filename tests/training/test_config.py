"""The configuration's schema, through the configuration of the embedded job."""

import dataclasses
import json
import runpy
import typing
from pathlib import Path

import pytest

from lip_jax.classification.config import Augment, Config
from lip_jax.cli import configuration
from lip_jax.errors import UsageError
from lip_jax.training import config as config_lib

CONFIGS = Path(__file__).parents[2] / "configs"


def embedded():
  get_config = runpy.run_path(str(CONFIGS / "cluttered_digits.py"))["get_config"]
  return get_config().to_dict()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_configuration_fits_the_schema_and_survives_json(path):
  values = runpy.run_path(str(path))["get_config"]().to_dict()
  config = config_lib.from_dict(values)
  again = config_lib.from_dict(json.loads(config_lib.to_json(config)))
  assert again == config
  assert config_lib.differences(config, again) == []


def test_differences_name_what_makes_another_run():
  values = embedded()
  old = config_lib.from_dict(values)
  values["optim"]["base_lr"] = 0.5
  values["model"]["pool"] = "max"
  values["log_every_steps"] = 99
  values["data"]["data_dir"] = "/elsewhere"
  assert config_lib.differences(config_lib.from_dict(values), old) == [
    "model.pool: 'max' (was None)",
    "optim.base_lr: 0.5 (was 0.8)",
  ]


@pytest.mark.parametrize(
  ("section", "key", "value", "message"),
  [
    (None, "sede", 1, "config has no key 'sede'; valid keys: task, model, data, optim, seed"),
    ("optim", "lr", 1, "config.optim has no key 'lr'; valid keys: optimizer, base_lr"),
    (None, "dtype", "float23", "config.dtype must be one of float32, bfloat16, got 'float23'"),
    ("optim", "schedule", "linear", "config.optim.schedule must be one of step, cosine"),
    (None, "global_batch_size", 0, "config.global_batch_size must be positive, got 0"),
    (None, "num_epochs", -1, "config.num_epochs must be positive, got -1"),
    (None, "num_epochs", float("nan"), "config.num_epochs must be positive, got nan"),
    (None, "label_smoothing", 1.0, "config.label_smoothing must be in"),
    (None, "seed", -1, "config.seed must be in"),
    (None, "keep_checkpoints", 1, "config.keep_checkpoints must be at least 2, got 1"),
    (None, "importance_every_epochs", -1.0, "config.importance_every_epochs must be at least 0"),
    ("data", "eval_resize", 32, "config.data.eval_resize=32 must be at least .*image_size=48"),
    ("data", "crop_scale", (1.0, 0.5), "config.data.crop_scale must be .*got \\(1.0, 0.5\\)"),
    ("data", "crop_scale", 0.5, "config.data.crop_scale must be .*got 0.5"),
    ("data", "mean", (1.0, 2.0), "config.data.mean and .* must be three numbers"),
    ("data", "std", (1.0, 0.0, 1.0), "config.data.std must be positive"),
    ("data", "image_size", 0, "config.data.image_size must be positive, got 0"),
    ("data", "eval_crops", 3, "config.data.eval_crops must be 1, 5 or 10, got 3"),
    ("data", "augment", {"mixpu": 1.0}, "config.data.augment has no key 'mixpu'; .*mixup, cutmix"),
    ("data", "augment", {"mixup": -1.0}, "augment.mixup must be at least 0 and finite, got -1.0"),
    ("data", "augment", {"mixup": "a"}, "augment.mixup must be a number, got 'a'"),
    ("data", "augment", {"erasing": 1.5}, "augment.erasing .* at least 0 and at most 1, got 1.5"),
    ("data", "augment", {"randaugment_ops": 1.5}, "randaugment_ops must be a whole number"),
    ("data", "augment", {"randaugment_magnitude": 31}, "at most 30, got 31"),
  ],
)
def test_faults_are_named(section, key, value, message):
  values = embedded()
  (values.setdefault(section, {}) if section else values)[key] = value
  with pytest.raises(UsageError, match=message):
    config_lib.from_dict(values)


def test_what_a_run_did_not_say_is_the_default():
  """Runs from before there was an option go on."""
  values = embedded()
  config = config_lib.from_dict(values)
  assert config.data.augment == Augment()
  values["data"]["augment"] = {"mixup": 0.2}
  changed = config_lib.from_dict(values)
  assert config_lib.from_dict(json.loads(config_lib.to_json(changed))) == changed
  assert config_lib.differences(changed, config) == ["data.augment.mixup: 0.2 (was 0.0)"]


def test_what_is_missing_is_named():
  values = embedded()
  del values["data"]["dataset"], values["model"]
  with pytest.raises(UsageError, match=r"config lacks model"):
    config_lib.from_dict(values)
  with pytest.raises(UsageError, match=r"config.data lacks dataset"):
    config_lib.from_dict({**values, "model": {"name": "resnet50"}})


def test_an_unknown_task_is_refused():
  with pytest.raises(UsageError, match=r"config.task must be one of classification.*got 'sorting'"):
    config_lib.from_dict({**embedded(), "task": "sorting"})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_a_file_states_what_differs_from_the_defaults_and_nothing_else(path):
  values = runpy.run_path(str(path))["get_config"]().to_dict()
  whole = config_lib.from_dict({"model": values["model"], "data": {"dataset": "none"}})
  defaults = config_lib.flatten(dataclasses.asdict(whole))
  stated = config_lib.flatten({k: v for k, v in values.items() if k != "model"})
  assert not [key for key, value in stated.items() if key in defaults and defaults[key] == value]


def may_be_none(cls, prefix=""):
  """Keys of the fields of a configuration that may be None."""
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(field.type):
      yield from may_be_none(field.type, f"{prefix}{field.name}.")
    elif type(None) in typing.get_args(field.type):
      yield prefix + field.name


@pytest.mark.parametrize("key", list(may_be_none(Config)))
def test_what_can_be_none_can_be_set_so_on_the_command_line(key):
  config = configuration.load(str(CONFIGS / "cluttered_digits.py"), [f"{key}=None"])
  assert config_lib.flatten(dataclasses.asdict(config))[key] is None


@pytest.mark.parametrize(
  ("change", "value"),
  [
    ("data.crop_scale=(0.1, 1)", (0.1, 1)),
    ("data.crop_scale=0.1,1", (0.1, 1)),
    ("data.flip=true", True),
    ("data.train_split=train[:8]", "train[:8]"),
    ("data.data_dir=/a=b", "/a=b"),
    ("num_epochs=3", 3),
    ("optim.base_lr=1e-3", 1e-3),
    ("model.pool=max", "max"),
    ("model.lip_stages=('c4', 'c5')", ("c4", "c5")),
    ("model.bn_group_size=None", None),
    ("model.zero_init_residual=false", False),
  ],
)
def test_values_are_read_as_their_fields_are(change, value):
  config = configuration.load(str(CONFIGS / "cluttered_digits.py"), [change])
  assert config_lib.flatten(dataclasses.asdict(config))[change.partition("=")[0]] == value


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("optim", "not of the form KEY=VALUE"),
    ("model.=3", "lacks a key"),
    ("optim.base_lr=1e400", "config.optim.base_lr must be at least 0 and finite, got inf"),
    ("optim=1", "config.optim must hold optim settings, got '1'"),
    ("optim.lr=1", r"config.optim has no key 'lr'; valid keys: optimizer, base_lr"),
    ("data.augment.mixpu=1", "config.data.augment has no key 'mixpu'.*did you mean mixup"),
    ("seed.x=1", "config.seed must be a whole number, got"),
    ("data.image_size=None", "config.data.image_size must be a whole number or .*got None"),
    ("data.dataset=None", "config.data.dataset must be a text, got None"),
    ("data.train_split=None", "config.data.train_split must be a text, got None"),
    ("data.flip=maybe", "config.data.flip must be true or false, got 'maybe'"),
  ],
)
def test_changes_that_cannot_be_made_are_named(change, message):
  with pytest.raises(UsageError, match=message):
    configuration.load(str(CONFIGS / "cluttered_digits.py"), [change])


def test_a_directory_without_a_run(tmp_path):
  with pytest.raises(UsageError, match=f"no run in {tmp_path}"):
    config_lib.load(tmp_path)
