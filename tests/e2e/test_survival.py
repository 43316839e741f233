"""Runs that are killed end as if nothing had been.

One is killed ten times, or as often as the variable KILLS of the environment says: 30 take four
minutes.
"""

import copy
import json
import os
import re
import signal
from pathlib import Path

import fixture_boxes
import pytest
from compare_runs import assert_same_run, metrics_of

KILLS = int(os.environ.get("KILLS", "10"))
ROOT = Path(__file__).parents[2]
CONFIG = """
import runpy

def get_config():
  config = runpy.run_path({path!r})["get_config"]()
  config.model.name, config.model.pool = "resnet_small", "strided"
  config.model.width, config.model.stage_sizes = 8, (1, 1, 1, 1)
  del config.model.logit_width
  return config
"""


@pytest.mark.slow
def test_many_sigkills_and_the_same_run(training, tmp_path):
  """At any moment: in start-up, between steps, and most often while a checkpoint is written."""
  training = copy.copy(training)
  environment = training.environment.items()
  # As a user has it: compiled programs are kept in the workdir, where they, too, are cut off.
  training.environment = {k: v for k, v in environment if k != "JAX_COMPILATION_CACHE_DIR"}
  config = tmp_path / "tiny.py"
  original = ROOT / "configs" / "cluttered_digits.py"
  config.write_text(CONFIG.format(path=str(original)))

  def flags(workdir):
    _, *rest = training.train_flags(
      workdir,
      f"--config.num_epochs={KILLS + 2}",
      "--config.eval_every_epochs=8",
      "--config.checkpoint_every_steps=2",
    )
    return [f"--config={config}", *rest]

  done = training.start(*flags(tmp_path / "whole"))
  assert done.returncode == 0, done.stdout + done.stderr

  workdir = tmp_path / "killed"
  killed = training.run_script("kill_often.py", str(KILLS), "0", *flags(workdir))
  assert killed.returncode == 0, killed.stderr + workdir.with_suffix(".log").read_text()[-3000:]
  moments = json.loads(killed.stdout)
  assert sum(moments.values()) == KILLS
  assert moments["write"] >= KILLS // 4, moments
  steps = [line["step"] for line in metrics_of(workdir)]
  assert steps[-1] < 8 * (KILLS + 2)  # the run was not over before

  last = training.start(*flags(workdir))  # by the usual command
  assert last.returncode == 0, last.stdout + last.stderr
  assert "restored step" in last.stdout
  assert_same_run(workdir, tmp_path / "whole")
  assert list((workdir / "compilation_cache").glob("*-cache"))
  assert not (workdir / "damaged_checkpoints").exists()
  assert not list((workdir / "checkpoints").glob("*.*"))


@pytest.mark.parametrize("row", ["retinanet_lip_resnet50", "faster_rcnn_lip_resnet50"])
def test_a_detector_that_was_killed_ends_the_same(training, tmp_path, row):
  """Within a checkpoint or behind it."""
  settings = {
    "data.dataset": fixture_boxes.write(tmp_path, count=23),
    "data.train_split": "all",
    "data.validation_split": "all",
    "data.short_side": 48,
    "data.long_side": 64,
    "data.buckets": "('64x64',)",
    "model.backbone": "resnet18",
    "num_epochs": 5,
    "eval_every_epochs": 5,
    "checkpoint_every_steps": 2,
    "picture_every_epochs": 0,
    "figure_images": 0,
  }

  def flags(workdir):
    return [
      f"--config={ROOT / 'configs' / 'coco.py'}:{row},tiny",
      f"--workdir={workdir}",
      *(f"--config.{key}={value}" for key, value in settings.items()),
    ]

  done = training.run(*flags(tmp_path / "whole"))
  assert done.returncode == 0, done.stdout + done.stderr
  workdir = tmp_path / "killed"
  code, output = training.signal_at(workdir, 8, signal.SIGKILL, *flags(workdir))
  assert code == -signal.SIGKILL, output
  last = training.run(*flags(workdir))
  assert last.returncode == 0, last.stdout + last.stderr
  assert re.search(r"restored step [468] ", last.stdout)
  assert_same_run(workdir, tmp_path / "whole")
  assert metrics_of(workdir)[-1]["step"] == 15
