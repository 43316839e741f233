"""The configuration's schema, through the configuration of the embedded job."""

import runpy
from pathlib import Path

import pytest

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
  assert config_lib.from_json(config_lib.to_json(config)) == config
  assert config_lib.differences(config, config_lib.from_json(config_lib.to_json(config))) == []


def test_differences_name_what_makes_another_run():
  values = embedded()
  old = config_lib.from_dict(values)
  values["optim"]["base_lr"] = 0.5
  values["model"]["pool"] = "max"
  values["log_every_steps"] = 99
  values["data"]["data_dir"] = "/elsewhere"
  assert config_lib.differences(config_lib.from_dict(values), old) == [
    "model.pool: 'max' (was 'lip')",
    "optim.base_lr: 0.5 (was 0.8)",
  ]


@pytest.mark.parametrize(
  ("section", "key", "value", "message"),
  [
    (None, "sede", 1, "config has no key 'sede'; valid keys: model, data, optim, seed"),
    ("optim", "lr", 1, "config.optim has no key 'lr'; valid keys: base_lr"),
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
    ("data", "mean", (1.0, 2.0), "config.data.mean must be three numbers"),
    ("data", "std", (1.0, 0.0, 1.0), "config.data.std must be positive"),
    ("data", "image_size", 0, "config.data.image_size must be positive, got 0"),
    ("data", "eval_crops", 3, "config.data.eval_crops must be 1, 5 or 10, got 3"),
    ("data", "shuffle_window", 0, "config.data.shuffle_window must be positive, got 0"),
    ("data", "augment", {"mixpu": 1.0}, "config.data.augment has no key 'mixpu'; .*mixup, cutmix"),
    ("data", "augment", {"mixup": -1.0}, "augment.mixup must be a number, at least 0, got -1.0"),
    ("data", "augment", {"mixup": "a"}, "augment.mixup must be a number, at least 0, got 'a'"),
    ("data", "augment", {"erasing": 1.5}, "augment.erasing .* at least 0 and at most 1, got 1.5"),
    ("data", "augment", {"randaugment_ops": 1.5}, "randaugment_ops must be a whole number"),
    ("data", "augment", {"randaugment_magnitude": 31}, "at most 30, got 31"),
  ],
)
def test_faults_are_named(section, key, value, message):
  values = embedded()
  (values[section] if section else values)[key] = value
  with pytest.raises(UsageError, match=message):
    config_lib.from_dict(values)


def test_options_that_are_off_may_be_left_out():
  """Runs from before there were such options go on."""
  values = embedded()
  for name in ("eval_crops", "shuffle_window", "augment"):
    del values["data"][name]
  config = config_lib.from_dict(values)
  assert config == config_lib.from_dict(embedded())
  assert config.data.augment == config_lib.Augment()
  assert not config_lib.differences(config_lib.from_dict(embedded()), config)
  values["data"]["augment"] = {"mixup": 0.2}
  changed = config_lib.from_dict(values)
  assert config_lib.from_json(config_lib.to_json(changed)) == changed
  assert config_lib.differences(changed, config) == ["data.augment.mixup: 0.2 (was 0.0)"]


def test_what_is_missing_is_named():
  values = embedded()
  del values["optim"]["momentum"], values["optim"]["warmup_lr"]
  with pytest.raises(UsageError, match=r"config.optim lacks warmup_lr, momentum"):
    config_lib.from_dict(values)


def test_a_directory_without_a_run(tmp_path):
  with pytest.raises(UsageError, match=f"no run in {tmp_path}"):
    config_lib.load(tmp_path)
