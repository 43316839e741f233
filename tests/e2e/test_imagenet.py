"""configs/imagenet.py through train.py, as a user starts it."""

import json
from pathlib import Path

import pytest

from lip_jax import cli

CONFIG = Path(__file__).parents[2] / "configs" / "imagenet.py"


@pytest.mark.slow
def test_a_row_shrunk_by_an_argument(training, tmp_path, capsys):
  workdir = tmp_path / "table1_lip_bottleneck128"
  done = training.run(
    f"--config={CONFIG}:table1_lip_bottleneck128,tiny",
    f"--workdir={workdir}",
    f"--config.data.data_dir={training.data_dir}",
    "--config.data.dataset=cluttered_digits/tiny",
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert "step 4/4  validation" in done.stdout
  assert "over 16 images" in done.stdout
  assert (workdir / "importance.png").exists()
  model = json.loads((workdir / "config.json").read_text())["model"]
  assert (model["name"], model["logit_width"]) == ("lip_resnet50", 4)
  # A trial is no result.
  assert cli.main(["tables", f"--runs={tmp_path}"]) == 0
  assert (
    "not counted: a run on cluttered_digits/tiny, not on imagenet2012" in capsys.readouterr()[0]
  )


@pytest.mark.parametrize(
  ("arg", "override", "parts"),
  [
    ("resnet51", "--config.seed=1", ["'resnet51'", "lip_resnet50", "table1_average"]),
    ("further_max,small", "--config.seed=1", ["'small'", "further_max,tiny"]),
    (
      "further_max",
      "--config.model.pol=lip",
      ["config.model", "option pol ", "lip_stages"],
    ),
    (
      "densenet121",
      "--config.model.zero_init_residual=True",
      ["unknown option zero_init_residual ", "structure"],
    ),
    ("lip_resnet50", "--seed=1", ["seed"]),
    ("further_max,tiny", "--config.model.lip_stages=('c6',)", ["stem, c3, c4, c5", "('c6',)"]),
    (
      "lip_resnet50",
      "--config.seed=1",
      ["imagenet2012", "not prepared", "tfds build", "array_record"],
    ),
  ],
)
def test_what_is_wrong_is_said_in_one_line(training, tmp_path, arg, override, parts):
  data = []
  if "," in arg:
    data = ["--config.data.dataset=cluttered_digits/tiny"]
  done = training.run(
    f"--config={CONFIG}:{arg}",
    f"--config.data.data_dir={training.data_dir}",
    *data,
    override,
    f"--workdir={tmp_path / 'run'}",
  )
  assert done.returncode != 0, done.stdout
  message = done.stderr.strip()
  assert message.startswith("error: ")
  assert len(message.splitlines()) == 1, message
  for part in parts:
    assert part in message, message


def test_help_with_a_configuration(training):
  done = training.start("--help", f"--config={CONFIG}:lip_resnet50")
  assert "--workdir" in done.stdout
