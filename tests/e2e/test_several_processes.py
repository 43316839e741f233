"""Trainings of several real processes on the loopback interface, stopped, killed and moved."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from fixture_ports import free_port
from fixture_xla import QUICK

CONFIG = Path(__file__).parents[2] / "configs" / "imagenet.py"
STEPS = 20


class Processes:
  """The processes of one training, each with the same number of fake devices."""

  def __init__(self, training, workdir, processes, devices, *overrides):
    self.workdir = workdir
    where = [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
    settings = {
      "data.dataset": "cluttered_digits/tiny",
      "data.data_dir": training.data_dir,
      "data.train_split": "train",
      "data.validation_split": "validation",
      "num_epochs": 10,
      "global_batch_size": 32,
      "eval_batch_size": 32,
      "eval_every_epochs": 5,
      "checkpoint_every_steps": 3,
      "importance_images": 0,
      "optim.base_lr": 0.02,  # rounding is amplified slowly
      "model.lip_stages": ("c4",),
    }
    flags = [
      f"--config={CONFIG}:lip_resnet_small,tiny",
      f"--workdir={workdir}",
      *(f"--config.{key}={value}" for key, value in settings.items()),
      *overrides,
    ]
    self._processes = [
      subprocess.Popen(
        training.command(*flags, *([*where, f"--process_id={k}"] if processes > 1 else [])),
        env={
          **training.environment,
          "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for k in range(processes)
    ]

  def send_after(self, step, process, number):
    """Sends a signal once a step is logged."""
    metrics = self.workdir / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
      assert all(p.poll() is None for p in self._processes), self.end()
      assert time.monotonic() < deadline, [p.kill() for p in self._processes] and self.end()
      time.sleep(0.01)
    self._processes[process].send_signal(number)

  def end(self):
    """(exit status, stdout, stderr) of each."""
    return [
      (process.returncode, *output)
      for process in self._processes
      for output in [process.communicate(timeout=200)]
    ]


def losses_of(workdir):
  """By step."""
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.fixture(scope="module")
def reference(training, tmp_path_factory):
  """Losses of a run of one process on one device."""
  workdir = tmp_path_factory.mktemp("reference") / "run"
  ((status, out, err),) = Processes(training, workdir, 1, 1).end()
  assert status == 0, out + err
  assert "1 process(es), 1 device(s) (cpu), mesh data 1; 32 examples a step" in out
  losses = losses_of(workdir)
  assert list(losses) == list(range(1, STEPS + 1))
  return losses


@pytest.mark.parametrize(
  ("processes", "devices", "overrides"),
  [
    (2, 4, []),
    (1, 8, []),
    (1, 2, ["--config.accumulation_steps=2", "--config.fsdp=2", "--config.remat=True"]),
  ],
)
def test_losses_do_not_depend_on_processes_and_devices(
  training, tmp_path, reference, processes, devices, overrides
):
  ends = Processes(training, tmp_path / "run", processes, devices, *overrides).end()
  assert [status for status, *_ in ends] == [0] * processes, ends
  losses = losses_of(tmp_path / "run")
  assert list(losses) == list(reference)
  np.testing.assert_allclose([*losses.values()], [*reference.values()], rtol=1e-4)
  for _, out, err in ends[1:]:  # the first process speaks for all
    assert "top-1" not in out
    assert "train" not in out
    # But for what jaxlib may say when one process ends a moment before another.
    assert [line for line in err.splitlines() if "coordination_service" not in line] == []


def test_stopped_killed_and_moved_to_another_machine_it_is_the_same_run(
  training, tmp_path, reference
):
  workdir = tmp_path / "run"
  run = Processes(training, workdir, 2, 4, "--config.fsdp=2")
  run.send_after(4, 1, signal.SIGTERM)
  ends = run.end()
  assert [status for status, *_ in ends] == [0, 0], ends
  # Each says so: docs/launch/keep_running.sh, on its host, starts it again.
  ((stopped,),) = {
    tuple(line for line in out.splitlines() if line.startswith("stopped at step "))
    for _, out, _ in ends
  }
  step = int(stopped.removeprefix("stopped at step ").partition(";")[0])
  assert 4 <= step < STEPS - 6  # with room for the kill
  assert (workdir / "checkpoints" / str(step)).is_dir()

  run = Processes(training, workdir, 2, 4)
  run.send_after(step + 3, 1, signal.SIGKILL)
  killed_at = time.monotonic()
  (status, out, err), _ = run.end()
  assert time.monotonic() - killed_at < 60
  assert status == 75, out + err
  assert f"restored step {step} from" in out
  assert "process 1 (" in err.splitlines()[-1]
  assert "was lost" in err.splitlines()[-1]

  ((status, out, err),) = Processes(training, workdir, 1, 8).end()
  assert status == 0, out + err
  assert "restored step " in out
  losses = losses_of(workdir)
  assert list(losses) == list(reference)
  np.testing.assert_allclose([*losses.values()], [*reference.values()], rtol=1e-4)
