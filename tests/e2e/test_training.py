"""Training as a user sees it: output, resume after any interruption, evaluation."""

import json
import signal

import pytest
from compare_runs import assert_same_run, metrics_of
from fixture_xla import QUICK
from tensorboardX.proto.event_pb2 import Event

from lip_jax.data import tfrecord
from lip_jax.training.checkpoint.checkpoints import Checkpoints

STEPS = 32


@pytest.fixture(scope="module")
def uninterrupted(training, tmp_path_factory):
  """A run from start to end, with an importance picture: (workdir, finished process)."""
  workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
  done = training.train(
    workdir, "--config.importance_images=3", "--config.importance_every_epochs=4"
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return workdir, done


def test_a_run_reports_and_leaves_what_the_readme_promises(uninterrupted):
  workdir, done = uninterrupted
  lines = done.stdout.splitlines()
  top1 = next(line for line in lines if line.startswith("top-1: "))
  percent = float(top1.removeprefix("top-1: ").removesuffix("%"))
  metrics = metrics_of(workdir)
  assert percent == pytest.approx(100 * metrics[-1]["validation/top1"], abs=0.01)
  assert f"checkpoint: {workdir}/checkpoints/{STEPS}" in lines
  assert f"TensorBoard: tensorboard --logdir {workdir}/tensorboard" in lines
  assert f"importance picture: {workdir}/importance.png" in lines
  assert (workdir / "importance.png").read_bytes().startswith(b"\x89PNG")
  assert list((workdir / "tensorboard").glob("events.*"))
  # Whenever there are metrics, they say how long the steps have waited for data.
  text = (workdir / "metrics.jsonl").read_text()
  training = [line for line in map(json.loads, text.splitlines()) if "train/loss" in line]
  assert all(0 <= line["train/data_stall"] <= 1 for line in training)
  assert "step 32/32  validation" in done.stdout
  assert [m["step"] for m in metrics if "train/loss" in m] == list(range(1, STEPS + 1))
  evaluated = [m for m in metrics if "validation/top1" in m]
  assert [(m["step"], m["validation/count"]) for m in evaluated] == [(16, 20), (32, 20)]
  assert json.loads((workdir / "config.json").read_text())["data"]["dataset"] == (
    "cluttered_digits/tiny"
  )


def test_importance_maps_are_in_tensorboard_when_they_are_due(uninterrupted):
  """At the end of four epochs, and not with the evaluation after two."""
  workdir, _ = uninterrupted
  events = [
    Event.FromString(record)
    for path in (workdir / "tensorboard").glob("events.*")
    for record in tfrecord.read_records(str(path))
  ]
  pictures = [
    (event.step, value.tag, value.image.encoded_image_string[:4])
    for event in events
    for value in event.summary.value
    if value.HasField("image")
  ]
  assert pictures == [(STEPS, "importance", b"\x89PNG")]


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, 15), (signal.SIGINT, 6)])
def test_asked_to_stop_it_saves_and_goes_on_there(training, uninterrupted, tmp_path, number, at):
  """In the middle of an epoch, and around an evaluation."""
  workdir = tmp_path / "run"
  code, output = training.signal_at(workdir, at, number)
  assert code == 0, output
  with Checkpoints(workdir, read_only=True) as checkpoints:
    step = checkpoints.latest_step
  assert at <= step < STEPS
  assert f"stopped at step {step}; the same command goes on from {workdir}/checkpoints/{step}" in (
    output
  )
  done = training.train(workdir)
  assert done.returncode == 0, done.stdout + done.stderr
  assert f"restored step {step} " in done.stdout
  assert_same_run(workdir, uninterrupted[0])


def test_a_finished_run_is_reported_again(training, uninterrupted):
  workdir, before = uninterrupted
  again = training.train(workdir, "--config.importance_images=3")
  assert again.returncode == 0
  first = [line for line in before.stdout.splitlines() if line.startswith(("top-", "checkpoint"))]
  assert [line for line in again.stdout.splitlines() if line in first] == first


def test_the_latest_checkpoints_and_the_best_are_kept(uninterrupted):
  workdir, _ = uninterrupted
  with Checkpoints(workdir, read_only=True) as checkpoints:
    assert {28, 32} <= set(checkpoints.steps) <= {16, 28, 32}
    assert checkpoints.best_step in (16, 32)
    evaluated = [m for m in metrics_of(workdir) if "validation/top1" in m]
    scores = {m["step"]: m["validation/top1"] for m in evaluated}
    assert scores[checkpoints.best_step] == max(scores.values())


@pytest.mark.parametrize("devices", [1, 4])
def test_evaluation_of_a_checkpoint(training, uninterrupted, devices):
  workdir, _ = uninterrupted
  done = training.lip_jax(
    "evaluate",
    str(workdir),
    "--checkpoint=latest",
    f"--data-dir={training.data_dir}",
    XLA_FLAGS=f"{QUICK} --xla_force_host_platform_device_count={devices}",
  )
  assert done.returncode == 0, done.stdout + done.stderr
  expected = metrics_of(workdir)[-1]
  assert f"top-1: {100 * expected['validation/top1']:.2f}%" in done.stdout
  assert f"top-5: {100 * expected['validation/top5']:.2f}%" in done.stdout
  assert "20 images" in done.stdout


def test_no_tensorflow_in_the_training_process(training, tmp_path, monkeypatch):
  code = (
    "import runpy, sys\n"
    "try:\n"
    "  runpy.run_path(sys.argv[0], run_name='__main__')\n"
    "except SystemExit as end:\n"
    "  assert not end.code\n"
    "assert 'grain' in sys.modules and 'tensorflow_datasets' in sys.modules\n"
    "assert 'tensorflow' not in sys.modules\n"
    "print('no tensorflow')\n"
  )
  # This one is compiled as users' are, which takes its time.
  monkeypatch.setitem(training.environment, "XLA_FLAGS", "")
  small = ("--config.num_epochs=0.25", "--config.model.lip_stages=('c4',)")
  flags = training.train_flags(tmp_path / "run", *small)
  script = training.command()[-1]
  done = training.run_code(f"import sys; sys.argv = {[script, *flags]!r}\n{code}")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "no tensorflow" in done.stdout
