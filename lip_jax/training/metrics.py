"""Where numbers go: JSON lines, TensorBoard, and the terminal."""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from etils import epath

from lip_jax.errors import UsageError, log_to
from lip_jax.training import workdir as workdir_lib
from lip_jax.training.bucket_sync import BucketSync

log = logging.getLogger("lip_jax")

FILE = "metrics.jsonl"


def log_to_stdout(level: int = logging.INFO) -> None:
  """Prints what lip_jax has to say, from `level` on, to stdout, and of other libraries warnings."""
  logging.getLogger().setLevel(logging.WARNING)
  log.setLevel(level)
  log_to(sys.stdout, "%(asctime)s %(message)s", "%H:%M:%S")


class MetricsWriter:
  """Writes scalars by step to `<workdir>/metrics.jsonl`, TensorBoard files and the terminal.

  On a terminal a progress bar shows the latest numbers; elsewhere each write is a line of the log.
  Numbers that an interrupted run wrote after its last checkpoint are removed: the resumed run
  writes them again.

  In a bucket the files are replaced as a whole, once a minute, after each validation and by
  `flush`.

  Args:
    workdir: the run's directory, which exists, or one in a bucket.
    total_steps: where the progress bar ends.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    total_steps: int,
    start_step: int,
    active: bool = True,
    shown: Sequence[str] = (),
  ):
    self._active = active
    self._shown = ("loss", *shown, "images_per_second", "data_stall")
    self._total = total_steps
    if not active:
      return
    import tensorboardX  # which brings clients of buckets along: only where it writes

    self._bucket: BucketSync | None = None
    self._workdir = workdir
    directory = Path(workdir)
    if workdir_lib.in_bucket(workdir):
      remote = workdir_lib.absolute(workdir)
      before = workdir_lib.read_text(remote / FILE)
      self._bucket = BucketSync(remote)
      directory = self._bucket.local
      (directory / FILE).write_text(before or "", encoding="utf-8")
    kept = [line for line in read_lines(directory / FILE) if line["step"] <= start_step]
    text = "".join(f"{json.dumps(line)}\n" for line in kept)
    workdir_lib.write_text(epath.Path(directory) / FILE, text)
    # Without a buffer, which would be left with what the disk has no room for.
    self._lines = (directory / FILE).open("ab", buffering=0)
    self._board = tensorboardX.SummaryWriter(
      str(directory / "tensorboard"),
      purge_step=start_step + 1,
      filename_suffix=f".{start_step}",  # else a restart within a second has the same name
    )
    self._bar = tqdm.tqdm(
      total=total_steps,
      initial=start_step,
      unit="step",
      dynamic_ncols=True,
      disable=not sys.stderr.isatty(),
    )

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, error: type[BaseException] | None, *_) -> None:
    if not self._active:
      return
    self._bar.close()
    try:
      if self._board_writes():  # else it would be waited for, for ever
        self._board.close()
      self._lines.close()
    except OSError as fault:
      if error is None:
        raise self._cannot_write(fault) from fault
    finally:
      if self._bucket:
        self._bucket.close()

  def _board_writes(self) -> bool:
    """Whether TensorBoard's file is written to: its thread ends with an error of the disk."""
    return self._board.file_writer.event_writer._worker.is_alive()

  def _cannot_write(self, fault: OSError) -> UsageError:
    return UsageError(
      f"cannot write the metrics to {self._workdir}: {fault.strerror}; mend that and give the "
      "same command again, which goes on from the last checkpoint"
    )

  def flush(self) -> None:
    """Returns when all lines written so far are where they are to be kept.

    Call it before a checkpoint is saved: a run that goes on from there does not write what came
    before it again.
    """
    if self._active:
      try:
        self._board.flush()
      except OSError as fault:
        raise self._cannot_write(fault) from fault
      if self._bucket:
        self._bucket.flush()

  def advance(self, step: int) -> None:
    """Moves the progress bar to `step`."""
    if self._active:
      self._bar.update(step - self._bar.n)

  def write(self, step: int, prefix: str, values: Mapping[str, float]) -> None:
    """Records scalars of one step under `prefix/name`."""
    if not self._active:
      return
    named = {f"{prefix}/{name}": value for name, value in values.items()}
    try:
      self._lines.write((json.dumps({"step": step, **named}) + "\n").encode())
      for name, value in named.items():
        if not self._board_writes():
          raise OSError(None, "TensorBoard's file could not be written, see above")
        self._board.add_scalar(name, value, step)
    except OSError as fault:
      raise self._cannot_write(fault) from fault
    text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    if self._bar.disable:
      log.info("step %d/%d  %s  %s", step, self._total, prefix, text)
    elif prefix == "train":
      shown = (f"{name} {values[name]:.3g}" for name in self._shown if name in values)
      self._bar.set_postfix_str("  ".join(shown))
    else:
      self._bar.write(f"step {step}/{self._total}  {prefix}  {text}", file=sys.stderr)
    if self._bucket and (prefix == "validation" or self._bucket.due()):
      self._board.flush()
      self._bucket.start()

  def write_image(self, step: int, name: str, image: np.ndarray) -> None:
    """Records a picture of one step, uint8 [H, W, 3], for TensorBoard alone."""
    if self._active:
      self._board.add_image(name, image, step, dataformats="HWC")


def read_lines(path: Path) -> list[dict[str, Any]]:
  """What a run has written to `metrics.jsonl`, but for a line that is cut off, or being written."""
  lines = []
  for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
    with contextlib.suppress(json.JSONDecodeError):
      lines.append(json.loads(text))
  return lines


class Throughput:
  """Images per second since the last reading, without the time under `paused()`.

  And the part of that time in which the devices waited for data.
  """

  def __init__(self, images_per_step: int):
    self._images_per_step = images_per_step
    self._steps = 0
    self._stalled = 0.0
    self._start: float | None = None  # set by the first step, so that compilation does not count

  def count(self) -> None:
    """Counts one finished step."""
    if self._start is None:
      self._start = time.perf_counter()
    else:
      self._steps += 1

  def stall(self, seconds: float) -> None:
    """Counts time in which a step could not start because its batch was not there."""
    if self._start is not None:
      self._stalled += seconds

  def stalled(self) -> float:
    """Part of the time since the last `rate()` that was counted by `stall`, 0 to 1."""
    if self._start is None or not self._stalled:
      return 0.0
    return min(1.0, self._stalled / (time.perf_counter() - self._start))

  def rate(self) -> float:
    """Images per second; zero as long as there is nothing to measure. Starts the next reading."""
    if self._start is None or not self._steps:
      return 0.0
    now = time.perf_counter()
    rate = self._steps * self._images_per_step / (now - self._start)
    self._start, self._steps, self._stalled = now, 0, 0.0
    return rate

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Context whose time does not count."""
    entered = time.perf_counter()
    yield
    if self._start is not None:
      self._start += time.perf_counter() - entered
