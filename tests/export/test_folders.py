"""Exported folders, with the small networks."""

import json
import math
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from fixture_weights import weight
from flax import nnx

import lip_jax
from lip_jax.errors import UsageError
from lip_jax.export import folders
from lip_jax.models import abstract_model

NAME = "lip_resnet_small"
OPTIONS = {"width": 2, "logit_width": 4, "bn_group_size": None}
PREPROCESS = {"image_size": 224, "resize": 256, "mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]}


def variables(model):
  return nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))


def make_model(num_classes=3, **options):
  """A network with arbitrary weights, without the time that initialisation takes."""
  model = abstract_model(NAME, num_classes=num_classes, **{**OPTIONS, **options})
  for path, variable in variables(model):
    key = ".".join(map(str, path)).replace("var", "running_var")
    variable.set_value(jnp.asarray(weight(key, variable.shape), variable.dtype))
  return model


@pytest.fixture(scope="module")
def model():
  return make_model()


def save(path, model, *, options=OPTIONS, num_classes=3, overwrite=False, **entries):
  config = {"model": {"name": NAME, **options}, "num_classes": num_classes, **entries}
  folders.save(path, model, config, overwrite=overwrite)
  return path


def assert_same_weights(left, right):
  left, right = dict(variables(left)), dict(variables(right))
  assert list(left) == list(right)
  for path, variable in left.items():
    assert variable.dtype == right[path].dtype
    np.testing.assert_array_equal(variable[...], right[path][...], err_msg=str(path))


def names(path):
  return sorted(entry.name for entry in path.iterdir())


def test_there_and_back(model, tmp_path):
  path = save(tmp_path / "new" / "out", model, preprocess=PREPROCESS)
  assert names(path) == ["config.json", "model.safetensors"]
  assert names(path.parent) == ["out"]
  loaded, config = folders.load(path)
  assert config == {
    "format": 1,
    "lip_jax": lip_jax.__version__,
    "model": {"name": NAME, **OPTIONS},
    "num_classes": 3,
    "preprocess": PREPROCESS,
  }
  assert_same_weights(loaded, model)
  tensors = safetensors.numpy.load_file(path / "model.safetensors")
  np.testing.assert_array_equal(tensors["layer2.0.conv1.kernel"], model.layer2[0].conv1.kernel[...])
  assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o777  # others may read it


def test_a_loaded_network_is_the_saved_one_in_evaluation_mode(model, tmp_path):
  loaded, _ = folders.load(save(tmp_path / "out", model))
  assert loaded.bn1.use_running_average
  expected = nnx.merge(*nnx.split(model), copy=True)
  assert nnx.graphdef(loaded) != nnx.graphdef(expected)
  expected.eval()
  assert nnx.graphdef(loaded) == nnx.graphdef(expected)


def test_dtype_is_that_of_the_computation(model, tmp_path):
  loaded, _ = folders.load(save(tmp_path / "out", model), dtype=jnp.bfloat16)
  assert loaded.dtype == jnp.bfloat16
  assert_same_weights(loaded, model)


def test_dtypes_are_kept_in_the_file(tmp_path):
  model = make_model()
  model.fc.kernel.set_value(np.full(model.fc.kernel.shape, 1 / 3))
  path = save(tmp_path / "out", model)
  tensors = safetensors.numpy.load_file(path / "model.safetensors")
  assert tensors["fc.kernel"].dtype == np.float64
  assert tensors["fc.bias"].dtype == np.float32
  assert folders.load(path)[0].fc.kernel.dtype == jnp.float32


def test_options_must_be_those_of_the_model(model, tmp_path):
  with pytest.raises(UsageError, match=r"2 faults.*shape of fc.bias is \(3,\), expected \(5,\)"):
    save(tmp_path / "out", model, num_classes=5)
  with pytest.raises(UsageError, match="unknown option wide"):
    save(tmp_path / "out", model, options={"wide": 2})
  with pytest.raises(UsageError, match="dtype is not among the options"):
    save(tmp_path / "out", model, options={**OPTIONS, "dtype": "float32"})
  assert names(tmp_path) == []


def test_what_is_true_of_one_machine_only_is_left_out(model, tmp_path):
  source = {"kind": "training run", "path": "/home/me/run", "step": 3, "revision": None}
  evaluation = {"data": "coco validation", "count": 5000, "AP": 0.365}  # of another task
  entries = {"source": source, "evaluation": evaluation}
  path = save(tmp_path / "out", model, data={"data_dir": "/home/me/data"}, **entries)
  assert "/home" not in (path / "config.json").read_text()
  config = lip_jax.load(path)[1]
  assert (config["evaluation"], config["source"]["step"]) == (evaluation, 3)
  with pytest.raises(UsageError, match=r"evaluation.AP is nan, expected a number"):
    save(tmp_path / "new", model, evaluation={**evaluation, "AP": math.nan})
  assert names(tmp_path) == ["out"]


def test_only_an_exported_folder_is_overwritten(model, tmp_path):
  other = make_model(num_classes=4)
  path = tmp_path / "out"
  path.mkdir()  # empty: may be used
  save(path, model)
  with pytest.raises(UsageError, match="exists; choose another folder, or say to overwrite"):
    save(path, other, num_classes=4)
  save(path, other, num_classes=4, overwrite=True)
  assert folders.load(path)[1]["num_classes"] == 4
  (path / "notes.txt").write_text("mine")
  with pytest.raises(UsageError, match=r"holds more than an exported network \(notes.txt\)"):
    save(path, model, overwrite=True)
  for occupied in (tmp_path / "folder", tmp_path / "file"):
    if occupied.name == "folder":
      occupied.mkdir()
      (occupied / "x").touch()
    else:
      occupied.touch()
    with pytest.raises(UsageError, match="exists and is not an exported network"):
      save(occupied, model, overwrite=True)
  assert names(tmp_path) == ["file", "folder", "out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_is_left(error, model, tmp_path, monkeypatch):
  path = save(tmp_path / "out", model)
  before = (path / "model.safetensors").read_bytes()

  def fail(_):  # when the folder is there
    raise error

  monkeypatch.setattr(safetensors.numpy, "save", fail)
  for place in ("out", "new"):
    with pytest.raises((UsageError, KeyboardInterrupt)) as caught:
      save(tmp_path / place, model, overwrite=True)
    if isinstance(error, OSError):
      assert "cannot write" in str(caught.value)
      assert "No space left" in str(caught.value)
  assert names(tmp_path) == ["out"]
  assert (path / "model.safetensors").read_bytes() == before


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
  model, tmp_path, monkeypatch
):
  path = save(tmp_path / "out", model)

  def fail(source, target):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(UsageError, match=r"cannot write .*Permission denied"):
    save(path, model, overwrite=True)
  monkeypatch.undo()
  assert names(tmp_path) == ["out"]
  assert_same_weights(folders.load(path)[0], model)


def test_places_that_cannot_be_written(model, tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UsageError, match=r"cannot write .*file/out"):
    save(tmp_path / "file" / "out", model)
  with pytest.raises(UsageError, match="is not a local path"):
    save("gs://bucket/out", model)


def test_weights_that_do_not_fit_are_listed_together(model, tmp_path):
  path = save(tmp_path / "out", model)
  weights = path / "model.safetensors"
  tensors = safetensors.numpy.load_file(weights)
  del tensors["bn1.scale"]
  tensors["fc.bias"] = np.zeros(7, np.float32)
  tensors["extra.kernel"] = np.zeros(1, np.float32)
  safetensors.numpy.save_file(tensors, weights)
  with pytest.raises(UsageError) as caught:
    folders.load(path)
  for part in (
    "3 faults",
    "missing bn1.scale",
    "shape of fc.bias is (7,), expected (3,)",
    "unexpected extra.kernel",
  ):
    assert part in str(caught.value)


def test_training_runs_are_not_exported_folders(tmp_path):
  step = tmp_path / "run" / "checkpoints" / "100"
  step.mkdir(parents=True)
  run = tmp_path / "run"
  for path in (run, step.parent, step):
    with pytest.raises(UsageError, match=f"a training run.*: lip-jax export {path} FOLDER$"):
      folders.load(path)
  step.rmdir()
  step.parent.rmdir()
  (run / "config.json").write_text(json.dumps({"model": {"name": NAME}, "seed": 0}))
  with pytest.raises(UsageError, match=f": lip-jax export {run} FOLDER$"):
    folders.load(run)


def test_folders_that_cannot_be_loaded(model, tmp_path):
  with pytest.raises(UsageError, match=f"there is no folder {tmp_path}/none"):
    folders.load(tmp_path / "none")
  with pytest.raises(UsageError, match=r"it has no config.json"):
    folders.load(tmp_path)
  (tmp_path / "w.pth").touch()
  with pytest.raises(UsageError, match=r"is a file.*lip-jax convert .*w.pth FOLDER --model NAME"):
    folders.load(tmp_path / "w.pth")

  whole = save(tmp_path / "whole", model)
  good = json.loads((whole / "config.json").read_text())
  for config, message in (
    ("{", "config.json is damaged"),
    ({**good, "format": 2, "lip_jax": "9.0"}, r"has format 2, .* reads 1; .*\(9.0\) or a later"),
    ({**good, "model": {}}, "lacks the model's name"),
    ({**good, "num_classes": None}, "lacks num_classes"),
    ({**good, "model": {"name": "lip_resnet9"}}, "unknown model 'lip_resnet9'"),
  ):
    path = tmp_path / "broken"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(UsageError, match=message):
      folders.load(path)

  weights = whole / "model.safetensors"
  content = weights.read_bytes()
  for damaged in (content[:-1], b""):
    weights.write_bytes(damaged)
    with pytest.raises(UsageError, match="missing or damaged"):
      folders.load(whole)
  weights.unlink()
  with pytest.raises(UsageError, match="missing or damaged"):
    folders.load(whole)
