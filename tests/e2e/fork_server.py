"""Runs train.py and `lip-jax` for the tests, one at a time.

A line of stdin is a JSON object: "command", "train" or "lip-jax"; "arguments"; "environment", what
is added to the variables; "stdout" and "stderr", files to write. The answer is the exit status.

Each process is forked from this one, which has imported everything and computed nothing: that alone
is not as it is when a user starts it, and saves seconds each time.
"""

import gc
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import ml_collections.config_flags  # noqa: F401
import tensorboardX  # noqa: F401
import tensorflow_datasets  # noqa: F401

import lip_jax.classification.task
import lip_jax.cli
import lip_jax.training.trainer  # noqa: F401

TRAIN = Path(__file__).parents[2] / "train.py"
TIMEOUT = 900  # seconds


def serve():
  """What this process is to run, in one that was forked for it; None at the end of the requests."""
  for line in sys.stdin:
    process = os.fork()
    if not process:
      return json.loads(line)
    _, status = os.waitpid(process, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
  return None


def become(request):
  """Goes on as the process that is asked for, whose end is this one's."""
  signal.alarm(TIMEOUT)
  for descriptor, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
  os.environ.update(request["environment"])
  sys.argv = [str(TRAIN), *request["arguments"]]
  if request["command"] == "train":
    runpy.run_path(sys.argv[0], run_name="__main__")
  else:
    runpy.run_module("lip_jax.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  gc.freeze()
  if request := serve():
    become(request)
