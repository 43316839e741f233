"""Two finished runs: bit for bit the same?"""

import json

import jax
import numpy as np

from lip_jax.training import config as config_lib
from lip_jax.training import task as task_lib
from lip_jax.training.checkpoint.checkpoints import Checkpoints
from lip_jax.training.train_step import Program


def final_state(workdir):
  """The train state that a finished run ended with, and the state of its input pipeline."""
  config = config_lib.load(workdir)
  classes = json.loads((workdir / "classes.json").read_text())["class_names"]
  task = task_lib.make(config, num_classes=len(classes))
  like = Program(task, steps_per_epoch=8, devices=jax.devices()[:1]).state
  with Checkpoints(workdir, read_only=True) as checkpoints:
    assert checkpoints.latest_step == metrics_of(workdir)[-1]["step"]
    return checkpoints.restore(checkpoints.latest_step, like)


def metrics_of(workdir):
  """Lines of a run's metrics.jsonl, without the times."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  for line in lines:
    line.pop("train/images_per_second", None)
    line.pop("train/data_stall", None)
  return lines


def assert_same_run(one, other):
  """Same parameters, optimizer, place in the data and metrics at the end."""
  ours, theirs = final_state(one), final_state(other)
  jax.tree.map(np.testing.assert_array_equal, ours.state, theirs.state)
  assert ours.iterator == theirs.iterator
  assert metrics_of(one) == metrics_of(other)
