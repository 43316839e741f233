import json
import resource

import pytest

from lip_jax.errors import UsageError
from lip_jax.training.metrics import MetricsWriter, Throughput


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_rewrites_what_came_after_its_checkpoint(tmp_path):
  with MetricsWriter(tmp_path, total_steps=9, start_step=0) as writer:
    for step in range(1, 6):
      writer.write(step, "train", {"loss": float(step)})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "train/lo')  # cut off by a crash
  with MetricsWriter(tmp_path, total_steps=9, start_step=3) as writer:
    writer.write(4, "train", {"loss": 40.0})
    writer.write(4, "validation", {"top1": 0.5, "count": 10})
  assert lines(tmp_path) == [
    {"step": 1, "train/loss": 1.0},
    {"step": 2, "train/loss": 2.0},
    {"step": 3, "train/loss": 3.0},
    {"step": 4, "train/loss": 40.0},
    {"step": 4, "validation/top1": 0.5, "validation/count": 10},
  ]
  assert list((tmp_path / "tensorboard").glob("events.*"))


# Of TensorBoard's file, which is thrown away with what could not be written.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_an_error_of_one_line(tmp_path):
  """As far as no file may grow beyond 4 kB."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

  def run():
    with MetricsWriter(tmp_path, total_steps=9, start_step=0) as writer:
      resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
      for step in range(1000):
        writer.write(step, "train", {"loss": 0.5})

  try:
    with pytest.raises(UsageError, match=f"cannot write the metrics to {tmp_path}: File too large"):
      run()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_only_one_process_writes(tmp_path):
  with MetricsWriter(tmp_path, total_steps=9, start_step=0, active=False) as writer:
    writer.write(1, "train", {"loss": 1.0})
    writer.advance(1)
  assert list(tmp_path.iterdir()) == []


def test_throughput_leaves_out_the_first_step_and_pauses(monkeypatch):
  now = [0.0]
  monkeypatch.setattr("lip_jax.training.metrics.time.perf_counter", lambda: now[0])
  clock = Throughput(images_per_step=10)
  now[0] = 100.0  # compilation
  clock.count()
  for _ in range(4):
    now[0] += 1.0
    clock.count()
  with clock.paused():
    now[0] += 50.0
  assert clock.rate() == pytest.approx(10.0)
  now[0] += 0.5
  clock.count()
  assert clock.rate() == pytest.approx(20.0)


def test_stalls_are_a_part_of_the_time_between_readings(monkeypatch):
  now = [0.0]
  monkeypatch.setattr("lip_jax.training.metrics.time.perf_counter", lambda: now[0])
  clock = Throughput(images_per_step=10)
  clock.stall(50.0)  # before the first step, which compiles
  clock.count()
  assert clock.stalled() == 0.0
  for _ in range(4):
    now[0] += 1.0
    clock.stall(0.25)
    clock.count()
  with clock.paused():
    now[0] += 50.0
  assert clock.stalled() == pytest.approx(0.25)
  clock.rate()
  now[0] += 1.0
  clock.count()
  assert clock.stalled() == 0.0
