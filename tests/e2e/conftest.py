"""Real processes: train.py on a small data set, as a user starts it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fixture_digits import prepare_digits
from fixture_xla import QUICK

from lip_jax.data.prepare.cluttered_digits import ClutteredDigits

ROOT = Path(__file__).parents[2]


class Training:
  """Starts train.py on the data set `cluttered_digits/tiny`: 64 + 20 images of 48 px.

  Attributes:
    environment: of the processes, unchanged of those that `run`, `train` and `lip_jax` start.
  """

  def __init__(self, data_dir: Path, cache: Path):
    self.data_dir = data_dir
    self.environment = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": QUICK,  # and one device, unless a test says otherwise
      "JAX_COMPILATION_CACHE_DIR": str(cache),  # its own: some are killed while they write to it
    }
    self._server: subprocess.Popen[str] | None = None

  def close(self) -> None:
    if self._server:
      with self._server:  # waits for it
        self._server.stdin.close()

  def prepare(self, name: str, builder: type[ClutteredDigits] = ClutteredDigits) -> None:
    """Writes the data set `cluttered_digits/<name>`."""
    prepare_digits(self.data_dir, name, builder)

  def command(self, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *flags]

  def train_flags(self, workdir: Path, *overrides: str) -> list[str]:
    """32 steps of 8 images, a checkpoint every 4, evaluation every 16."""
    settings = {
      "data.dataset": "cluttered_digits/tiny",
      "data.data_dir": self.data_dir,
      "model.width": 4,  # to be quick, as is the size, to which images are scaled
      "data.image_size": 32,
      "data.eval_resize": 32,
      "num_epochs": 4,
      "global_batch_size": 8,
      "eval_batch_size": 8,
      "model.bn_group_size": 8,
      "log_every_steps": 1,
      "eval_every_epochs": 2,
      "checkpoint_every_steps": 4,
      "importance_images": 0,
    }
    return [
      f"--config={ROOT / 'configs' / 'cluttered_digits.py'}",
      f"--workdir={workdir}",
      *(f"--config.{key}={value}" for key, value in settings.items()),
      *overrides,
    ]

  def run(self, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return self._forked("train", flags, environment)

  def lip_jax(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return self._forked("lip-jax", arguments, environment)

  def start(self, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`run`, by an interpreter of its own."""
    return self._started(self.command(*flags), environment)

  def run_code(self, code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in the environment of a training."""
    return self._started([sys.executable, "-c", code], {})

  def run_script(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of this directory in the environment of a training."""
    return self._started([sys.executable, str(Path(__file__).with_name(name)), *arguments], {})

  def _forked(self, command: str, arguments: Sequence[str], environment: dict[str, str]):
    """Runs a command in a process that has imported all it needs: see fork_server.py."""
    if self._server is None:
      server = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
      pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
      self._server = subprocess.Popen(server, env=self.environment, **pipes)
    with tempfile.TemporaryDirectory() as folder:
      files = {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
      request = {"command": command, "arguments": arguments, "environment": environment, **files}
      print(json.dumps(request), file=self._server.stdin, flush=True)
      status = int(self._server.stdout.readline())
      return subprocess.CompletedProcess(
        [command, *arguments], status, *(Path(path).read_text() for path in files.values())
      )

  def _started(self, command: list[str], environment: dict[str, str]):
    return subprocess.run(
      command,
      env={**self.environment, **environment},
      capture_output=True,
      text=True,
      timeout=900,
    )

  def train(self, workdir: Path, *overrides: str, **environment: str):
    return self.run(*self.train_flags(workdir, *overrides), **environment)

  def signal_at(
    self, workdir: Path, step: int, number: signal.Signals, *flags: str
  ) -> tuple[int, str]:
    """Starts training, sends a signal once `step` is logged; (exit code, output).

    `flags`: default: `train_flags`.
    """
    process = subprocess.Popen(
      self.command(*(flags or self.train_flags(workdir))),
      env=self.environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
      assert process.poll() is None, process.communicate()[0]
      assert time.monotonic() < deadline
      time.sleep(0.01)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


@pytest.fixture(scope="session")
def training(tmp_path_factory) -> Iterator[Training]:
  training = Training(tmp_path_factory.mktemp("tfds"), tmp_path_factory.mktemp("compilation_cache"))
  training.prepare("tiny")
  with contextlib.closing(training):
    yield training
