"""The input of real processes: evaluation on several, and reading that is killed and goes on."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fixture_boxes
import fixture_numbered
import pytest
import read_numbered
from fixture_ports import free_port
from fixture_xla import QUICK

HERE = Path(__file__).parent
LENGTHS = (9, 1, 14, 3, 10)
COUNT = sum(LENGTHS)


def start(script, *arguments, **options):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}
  command = [sys.executable, str(HERE / script), *map(str, arguments)]
  return subprocess.Popen(command, env=environment, text=True, **options)


def evaluate(process_count, *data, script="evaluate_numbered.py"):
  """What each process printed."""
  port = free_port()
  processes = [
    start(*(script, port, p, process_count, *data), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for p in range(process_count)
  ]
  outputs = [process.communicate(timeout=120) for process in processes]
  assert [process.returncode for process in processes] == [0] * process_count, outputs
  return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def test_evaluation_is_the_same_on_any_number_of_processes(tmp_path):
  """1,003 images at batch 64, in files of uneven lengths; the last batch holds 43."""
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  whole.mkdir()
  broken.mkdir()
  fixture_numbered.write(whole, (400, 3, 350, 250))
  fixture_numbered.write(broken, LENGTHS, {3: b"", 30: fixture_numbered.jpeg(30)[:150]})
  (reference,) = evaluate(1, whole)
  assert reference[0]["count"] == 1003
  assert reference[1] == reference[0]
  assert 0 < reference[0]["top5"] < 0.1
  for process_count in (2, 4):
    for result in evaluate(process_count, whole, *([broken] if process_count == 2 else [])):
      # Loss, top-1 and top-5 are sums divided by 1003: exactly the same.
      assert result[:2] == reference
      # Every process names what any of them could not read.
      for message in result[2:]:
        assert "2 of 37 images of numbered train are unreadable" in message
        assert message.index("(3.JPEG)") < message.index("(30.JPEG)")


def test_detections_and_their_metric_are_the_same_on_any_number_of_processes(tmp_path):
  """23 images of two shapes at batch 8, which no number of processes divides."""
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  dataset, damaged = (fixture_boxes.write(folder) for folder in (whole, broken))
  for k in (3, 20):
    (broken / "images" / f"{k}.jpg").write_bytes(b"")
  ((reference,),) = evaluate(1, dataset, script="evaluate_boxes.py")
  _, seen, metrics, stopped = reference
  assert metrics["count"] == seen == 23
  assert 0.001 < metrics["AP"] < 0.5
  assert stopped is None
  for process_count in (2, 4):
    more = [damaged] if process_count == 2 else []
    for same, *messages in evaluate(process_count, dataset, *more, script="evaluate_boxes.py"):
      assert same == reference
      # Every process names what any of them could not read.
      for message in messages:
        assert "2 of 23 images" in message
        assert "3.jpg" in message
        assert "20.jpg" in message


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_killed_processes_go_on_with_the_batch_that_would_have_come(tmp_path, before, after):
  """From files and from memory, on another number of processes."""
  steps = 20
  data, out = tmp_path / "data", tmp_path / "out"
  data.mkdir()
  out.mkdir()
  fixture_numbered.write(data, LENGTHS)

  def run(process_count):
    return [
      start("read_numbered.py", data, out, p, process_count, steps) for p in range(process_count)
    ]

  def lines(p, process_count):
    path = out / f"seen-{p}-of-{process_count}.jsonl"
    return path.read_text().splitlines(keepends=True) if path.exists() else []

  # Killed somewhere in the middle, of an epoch, or between two checkpoints.
  processes = run(before)
  victim, target = random.randrange(before), random.randint(1, 12)
  deadline = time.monotonic() + 120
  while len(lines(victim, before)) < target and processes[victim].poll() is None:
    assert time.monotonic() < deadline
    time.sleep(0.001)
  for process in processes:
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert [process.wait(timeout=120) for process in run(after)] == [0] * after

  # Uninterrupted, on one process.
  expected = {}
  for kind in read_numbered.KINDS:
    with read_numbered.loader(kind, data, 0, 1) as loader:
      expected[kind] = [read_numbered.seen(next(loader)) for _ in range(steps)]
  assert expected["memory"] == expected["tfrecord"]
  labels = [label for batch_labels, _ in expected["tfrecord"] for label in batch_labels]
  for epoch in range(4):
    assert sorted(labels[epoch * COUNT : (epoch + 1) * COUNT]) == list(range(COUNT))

  # What the steps of each process got, those that were repeated, too, is its part of that.
  steps_of = {}
  for run_index, process_count in enumerate([before, after]):
    rows = 8 // process_count
    for p in range(process_count):
      steps_of[run_index, p] = set()
      for line in lines(p, process_count):
        if not line.endswith("\n"):
          continue  # killed while writing it
        step, kinds = json.loads(line)
        steps_of[run_index, p].add(step)
        part = slice(p * rows, (p + 1) * rows)
        for kind, (got_labels, sums) in kinds.items():
          assert [got_labels, sums] == [values[part] for values in expected[kind][step]]
  for p, q in itertools.product(range(before), range(after)):
    assert steps_of[0, p] | steps_of[1, q] == set(range(steps))
    assert steps - 1 in steps_of[1, q]
