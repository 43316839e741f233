"""Starts train.py again and again and kills each process at a random moment, by SIGKILL.

  python kill_often.py KILLS SEED FLAGS...

FLAGS are those of train.py; the run has to be long enough for all the kills. Each process is forked
from this one, which has imported everything and computed nothing: that alone is not as it is when a
user starts it, and saves seconds each time. Prints as JSON how often it killed at which moments.
"""

import gc
import json
import os
import random
import runpy
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import ml_collections.config_flags  # noqa: F401
import tensorflow_datasets  # noqa: F401
from absl import app  # noqa: F401

import lip_jax.training.trainer  # noqa: F401

TRAIN = Path(__file__).parents[2] / "train.py"


def start(flags, log):
  """Process id of a training."""
  process = os.fork()
  if process:
    return process
  descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(descriptor, 1)
  os.dup2(descriptor, 2)
  sys.argv = [str(TRAIN), *flags]
  status = 1
  try:
    runpy.run_path(sys.argv[0], run_name="__main__")
    status = 0
  except SystemExit as end:
    status = int(end.code or 0)
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def being_written(workdir):
  """Names of the checkpoints that are being written, or were when their process ended."""
  try:
    names = os.listdir(workdir / "checkpoints")
  except FileNotFoundError:
    return set()
  return {name for name in names if ".orbax-checkpoint-tmp" in name}


def wait_until(happens, process):
  """Waits; raises if the process has ended, which is too early."""
  while not happens():
    if os.waitpid(process, os.WNOHANG)[0]:
      raise RuntimeError("the training has ended before it was killed: see its log")
    time.sleep(0.0005)


def size_of(path):
  return path.stat().st_size if path.exists() else 0


def kill_once(rng, flags, workdir, log):
  """Starts a training and kills it; says when that was."""
  metrics = workdir / "metrics.jsonl"
  before = being_written(workdir)
  process = start(flags, log)
  kind = rng.choices(["start", "step", "write"], [1, 3, 6])[0]
  if kind == "start":
    wait_until(lambda: size_of(metrics), process)
    time.sleep(rng.uniform(0, 0.5))
  if kind == "step":
    start_size = size_of(metrics)
    # Its first act is to remove the lines after the checkpoint, if there are any.
    wait_until(lambda: size_of(metrics) != start_size, process)
    start_size = size_of(metrics)
    wait_until(lambda: size_of(metrics) > start_size, process)
    time.sleep(rng.uniform(0, 0.2))
  if kind == "write":
    wait_until(lambda: being_written(workdir) - before, process)
    time.sleep(rng.choice([0, rng.uniform(0, 0.03)]))
  os.kill(process, signal.SIGKILL)
  _, status = os.waitpid(process, 0)
  if not os.WIFSIGNALED(status):
    raise RuntimeError("the training has ended before it was killed: see its log")
  return "write" if being_written(workdir) - before else kind


def main(kills, seed, *flags):
  """Kills, then lets the run end."""
  rng = random.Random(int(seed))
  workdir = Path(next(flag for flag in flags if flag.startswith("--workdir=")).partition("=")[2])
  log = workdir.with_suffix(".log")
  moments = Counter(kill_once(rng, flags, workdir, log) for _ in range(int(kills)))
  print(json.dumps(moments))


if __name__ == "__main__":
  gc.freeze()  # what has been imported is no garbage
  main(*sys.argv[1:])
