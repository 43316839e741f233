"""configs/coco.py: the rows of table 5, and their trial size."""

import math
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from lip_jax.detection.task import Detection
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.models.registry import abstract
from lip_jax.tools import paper
from lip_jax.training import config as config_lib
from lip_jax.training import optim, train_state, trainer
from lip_jax.training.train_step import Program

CONFIGS = Path(__file__).parents[2] / "configs"

# By row, with 80 classes.
PARAMETERS = {
  "faster_rcnn_resnet50": 41_757_156,
  "faster_rcnn_lip_resnet50": 40_064_356,
  "faster_rcnn_resnet101": 60_749_284,
  "faster_rcnn_lip_resnet101": 59_056_484,
  "faster_rcnn_resnext101": 99_655_396,
  "faster_rcnn_lip_resnet101_md": 60_197_450,
  "retinanet_resnet50": 37_968_692,
  "retinanet_lip_resnet50": 36_275_892,
  "retinanet_resnet101": 56_960_820,
  "retinanet_lip_resnet101": 55_268_020,
}
# Trained with evaluation and checkpoints.
IN_FULL = ("faster_rcnn_lip_resnet50", "retinanet_lip_resnet50")


def read(arg):
  return config_lib.from_dict(runpy.run_path(str(CONFIGS / "coco.py"))["get_config"](arg).to_dict())


@pytest.mark.parametrize("arg", PARAMETERS)
def test_a_row_is_that_network_and_that_recipe(arg):
  task = Detection(read(arg), num_classes=80)
  model = abstract(task.create_model)
  params, _ = train_state.split(model)
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == PARAMETERS[arg]
  assert task.batch_norm_group == 0
  rate = optim.learning_rate(
    task.config.optim, global_batch_size=16, steps_per_epoch=7330, num_epochs=24
  )
  steps = (0, 250, 500, 16 * 7330, 22 * 7330)
  full = 0.02 if arg.startswith("faster_rcnn") else 0.01
  expected = (full / 3, full * 2 / 3, full, full / 10, full / 100)
  assert [float(rate(step)) for step in steps] == pytest.approx(expected)
  shapes = {name: task.batch_shapes(16, name)["image"].shape for name in task.buckets}
  assert shapes == {"800x1344": (16, 800, 1344, 3), "1344x800": (16, 1344, 800, 3)}


def test_the_tables_name_rows_that_are_there():
  for row, (argument, name, backbone) in paper.DETECTORS.items():
    model = read(argument).model
    assert (model["name"], model["backbone"]) == (name, backbone)
    assert row in {one.name for one in paper.ROWS}
  assert {row.name for row in paper.ROWS if row.table == 5} < set(paper.DETECTORS)


def test_a_row_that_is_not_there():
  with pytest.raises(UsageError, match=r"unknown detector 'retinanet_vgg'; choose one of"):
    read("retinanet_vgg")


@pytest.mark.parametrize("arg", IN_FULL)
def test_a_row_trains_in_its_trial_size(tmp_path, arg):
  result = trainer.train(read(f"{arg},tiny"), tmp_path / "run")
  assert result.finished
  assert result.step == 4
  assert result.metrics["count"] == 13


@pytest.mark.parametrize("arg", [arg for arg in PARAMETERS if arg not in IN_FULL])
def test_the_other_rows_train_two_steps(arg):
  task = Detection(read(f"{arg},tiny"))
  program = Program(task, steps_per_epoch=4, devices=jax.devices()[:1])
  stop = sharding.StopFlags(program.mesh)(False)
  state = program.init()
  first = jax.device_get(state.params)
  with task.train_loader() as loader:
    for _ in range(2):
      batch = sharding.put_batch(next(loader), program.mesh)
      state, metrics = program.update(state, batch, stop)
      assert np.isfinite(metrics["loss"])
  # The stem, the first stage and batch norms are frozen.
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), first, jax.device_get(state.params))
  assert np.mean(jax.tree.leaves(moved)) > 0.5
