"""The input of real processes: evaluation on several, and reading that is killed and goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fixture_numbered
import pytest
import read_numbered
from fixture_ports import free_port

HERE = Path(__file__).parent
LENGTHS = (9, 1, 14, 3, 10)
COUNT = sum(LENGTHS)


def start(script, *arguments, **options):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  command = [sys.executable, str(HERE / script), *map(str, arguments)]
  return subprocess.Popen(command, env=environment, text=True, **options)


def evaluate(process_count, *folders):
  """What each process printed."""
  port = free_port()
  processes = [
    start(
      "evaluate_numbered.py", port, p, process_count, *folders,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for p in range(process_count)
  ]  # fmt: skip
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
  assert reference[1] == reference[0]  # in order as with random access
  assert 0 < reference[0]["top5"] < 0.1
  for process_count in (2, 4):
    for result in evaluate(process_count, whole, *([broken] if process_count == 2 else [])):
      # Loss, top-1 and top-5 are sums divided by 1003: exactly the same.
      assert result[:2] == reference
      # Every process names what any of them could not read.
      for message in result[2:]:
        assert "2 of 37 images of numbered train are unreadable" in message
        assert message.index("(3.JPEG)") < message.index("(30.JPEG)")


@pytest.mark.parametrize("process_count", [1, 2])
def test_killed_processes_go_on_with_the_batch_that_would_have_come(tmp_path, process_count):
  steps = 20
  data, out = tmp_path / "data", tmp_path / "out"
  data.mkdir()
  out.mkdir()
  fixture_numbered.write(data, LENGTHS)

  def run():
    return [
      start("read_numbered.py", data, out, p, process_count, steps) for p in range(process_count)
    ]

  def lines(p):
    path = out / f"seen-{p}.jsonl"
    return path.read_text().splitlines(keepends=True) if path.exists() else []

  # Killed somewhere in the middle, of an epoch, of a window, or between two checkpoints.
  processes = run()
  victim, target = random.randrange(process_count), random.randint(1, 12)
  deadline = time.monotonic() + 120
  while len(lines(victim)) < target and processes[victim].poll() is None:
    assert time.monotonic() < deadline
    time.sleep(0.001)
  for process in processes:
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert [process.wait(timeout=120) for process in run()] == [0] * process_count

  seen = {}  # what the steps of each process got; a step that was repeated got the same
  for p in range(process_count):
    for line in lines(p):
      if line.endswith("\n"):  # else killed while writing it
        step, labels = json.loads(line)
        for kind, values in labels.items():
          assert seen.setdefault((kind, p), {}).setdefault(step, values) == values
  for kind in read_numbered.KINDS:
    parts = []
    for p in range(process_count):
      # Uninterrupted.
      loader = read_numbered.loader(kind, data, p, process_count)
      with loader:
        expected = [next(loader)["label"].tolist() for _ in range(steps)]
      assert [labels for _, labels in sorted(seen[kind, p].items())] == expected
      parts.append(expected)
    # And that is every image once in an epoch.
    for epoch in range(4):
      if kind == "source":  # an epoch is a piece of the sequence of global batches
        order = [
          label for batches in zip(*parts, strict=True) for part in batches for label in part
        ]
        ids = order[epoch * COUNT : (epoch + 1) * COUNT]
      else:  # of each process's own
        ids = []
        for p, part in enumerate(parts):
          order = [label for batch in part for label in batch]
          first, last = ((e * COUNT + p) // process_count for e in (epoch, epoch + 1))
          ids += order[first:last]
      assert sorted(ids) == list(range(COUNT))
