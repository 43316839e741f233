"""Detectors that start from a classifier, wherever that is kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_runs import CLASSES, NAME, OPTIONS, SIZE, make_model, write_images, write_run

from lip_jax.detection.config import Config, Data
from lip_jax.detection.task import Detection
from lip_jax.errors import UsageError
from lip_jax.export import folders
from lip_jax.models.description import flat_variables
from lip_jax.models.torch_names import to_torch_state_dict
from lip_jax.training.train_step import Program

CONFIG = Config(
  model={"name": "retinanet", "backbone": NAME, **OPTIONS, "fpn_channels": 8, "head_convs": 0},
  data=Data(dataset="coco/2017", mean=(0.0,) * 3, std=(64.0,) * 3),
  global_batch_size=8,
  eval_batch_size=8,
)
DESCRIPTION = {
  "model": {"name": NAME, **OPTIONS},
  "num_classes": len(CLASSES),
  "class_names": CLASSES,
  "preprocess": {"image_size": SIZE, "resize": SIZE, "mean": [1.0] * 3, "std": [64.0] * 3},
}


def write_exported(place):
  folders.save(place / "exported", make_model(), DESCRIPTION)
  return place / "exported", make_model()


def write_classifier_run(place):
  write_images(place / "images")
  write_run(place / "run", place / "images", {4: {"top1": 0.5, "count": 10}})
  return place / "run", make_model("4")


def write_torch(place):
  np.savez(place / "weights.npz", **to_torch_state_dict(make_model()))
  return place / "weights.npz", make_model()


@functools.cache
def first_state(preset):
  """(task, zeros): nothing is initialised."""
  task = Detection(dataclasses.replace(CONFIG, model={**CONFIG.model, "preset": preset}), 80)
  state = Program(task, steps_per_epoch=1.0).state
  return task, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), state)


def arrays_of(state):
  statistics = jax.tree.map(lambda array: array[-1], state.batch_stats)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(array)
    for tree in (state.params, statistics)
    for path, array in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.parametrize(
  ("write", "preset"),
  [(write_exported, "torchvision"), (write_classifier_run, "mmdet1"), (write_torch, "mmdet1")],
)
def test_the_backbone_is_the_classifier_s(write, preset, tmp_path, caplog):
  path, classifier = write(tmp_path)
  task, state = first_state(preset)
  with caplog.at_level("INFO", "lip_jax"):
    ours = arrays_of(task.start_from(path, state))
  theirs = {
    f"backbone.{key}": np.asarray(variable[...])
    for key, variable in flat_variables(classifier).items()
    if not key.startswith("fc.")
  }
  assert set(theirs) == {name for name in ours if name.startswith("backbone.")}
  for name, array in ours.items():
    np.testing.assert_array_equal(array, theirs.get(name, 0 * array), err_msg=name)
  assert "pyramid and head are new" in caplog.text
  if write is write_exported:
    assert "was trained with data.mean [1.0, 1.0, 1.0], and this run has [0.0" in caplog.text


def test_other_networks_are_refused(tmp_path):
  task, state = first_state("mmdet1")
  arrays = to_torch_state_dict(make_model())
  arrays = {name: array for name, array in arrays.items() if not name.startswith("layer4")}
  np.savez(tmp_path / "weights.npz", **arrays)
  with pytest.raises(UsageError, match=r"do not fit the model.*missing layer4") as caught:
    task.start_from(tmp_path / "weights.npz", state)
  assert "\n" not in str(caught.value)
