"""Training from start to finish: data, mesh and model, restore, loop."""

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import PIL.Image
from etils import epath

from lip_jax.data import pipeline
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.training import compilation_cache
from lip_jax.training import config as config_lib
from lip_jax.training import task as task_lib
from lip_jax.training.checkpoint.checkpoints import (
  Checkpoints,
  Restored,
  has_checkpoints,
  restore_path,
)
from lip_jax.training.config import Config
from lip_jax.training.metrics import MetricsWriter, Throughput
from lip_jax.training.preemption import StopRequest
from lip_jax.training.task import Task
from lip_jax.training.train_state import TrainState, Tree
from lip_jax.training.train_step import Program
from lip_jax.training.watchdog import Watchdog
from lip_jax.training.workdir import check_access, check_shared, lock, read_text, write_text

log = logging.getLogger("lip_jax")


class NonFiniteLossError(UsageError):
  """A loss, a gradient or a result of the validation is no longer finite; names the step and the
  checkpoint to return to.
  """


@dataclasses.dataclass(frozen=True)
class Result:
  """How a call of `train` ended."""

  step: int  # updates made
  finished: bool  # False: stopped by a signal; the same call goes on
  metrics: dict[str, float]  # of the validation split, as the task's evaluator names them
  checkpoint: epath.Path | None  # directory of the state; None: stopped before there was one
  pictures: dict[str, epath.Path]  # of the task's figures, by name
  summary: list[str]  # of a finished run, in lines for people


def train(
  config: Config,
  workdir: str | Path,
  *,
  start_from: str | Path | None = None,
  weights: str | Path | None = None,
) -> Result:
  """Trains, or goes on where the run in `workdir` stopped.

  Writes `config.json`, the task's files, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and, at
  the end, the task's figures. SIGTERM and SIGINT save a checkpoint and end the call; after them, or
  after any crash, the same call continues with the batch that would have come next.

  Args:
    workdir: directory of the run, created if need be.
    start_from: directory of another run's checkpoint, `<its workdir>/checkpoints/<step>`. A run
      that has none of its own yet goes on from there, for example with a lower learning rate.
    weights: what `lip_jax.load` takes. A run that has no checkpoint of its own yet starts at step 0
      with the weights of that network, to fine-tune them.

  Raises:
    UsageError: a configuration that cannot run, a workdir that holds another run, or weights of
      another network. The run in `workdir` is as it was.
    NonFiniteLossError: training has diverged.
  """
  if start_from is not None and weights is not None:
    raise UsageError(
      f"start_from={start_from} and weights={weights} are given: a run goes on from a checkpoint, "
      "or starts from the weights of a network; leave one of them out"
    )
  directory = check_access(workdir)
  check_shared(directory)
  first = jax.process_index() == 0
  with lock(directory) if first else contextlib.nullcontext():
    trainer = Trainer(task_lib.make(config_lib.located(config)), directory)
    with trainer.open():
      trainer.restore(start_from, weights)
      return trainer.run()


class Trainer:
  """One run: what it computes, where it stands, and what it leaves behind.

  Use: `with trainer.open(): trainer.restore(); trainer.run()`.

  Args:
    workdir: directory of the run; exists.

  Raises:
    UsageError: a configuration that cannot run, or a workdir that holds another run.
  """

  def __init__(self, task: Task, workdir: epath.Path):
    self.task, self.config, self.workdir = task, task.config, workdir
    _check_same_run(task, workdir)
    _check_batch_norm_groups(task)
    self.steps_per_epoch = task.num_train / self.config.global_batch_size
    self.total_steps = max(1, round(self.config.num_epochs * self.steps_per_epoch))
    self.eval_steps = self._steps(self.config.eval_every_epochs)
    self.loader = task.train_loader()
    self.program = Program(task, steps_per_epoch=self.steps_per_epoch)
    self.evaluator = task.evaluator(self.program.graph, self.program.mesh)
    self.clock = Throughput(self.config.global_batch_size)
    # Where the run stands.
    self.step = 0
    self.results: dict[str, float] | None = None  # of the validation after `step`
    self.last_checkpoint: epath.Path | None = None
    self._saved = 0
    self._stopping = False
    self._compiled: set[tuple[tuple[int, ...], ...]] = set()  # shapes of batches
    # The step in flight: its number, metrics and the place in the data behind it.
    self._pending: tuple[int, Mapping[str, jax.Array], Any] | None = None

  def _steps(self, epochs: float) -> int:
    return max(1, round(epochs * self.steps_per_epoch))

  @contextlib.contextmanager
  def open(self) -> Iterator[None]:
    """What has to be closed again: signals, threads, checkpoints."""
    with (
      # Around it all: the last save, too, is not to be cut short.
      StopRequest(preemption_notice=jax.default_backend() == "tpu") as self.stop,
      Watchdog(seconds=self.config.watchdog_seconds) as self.watchdog,
      self.loader,
      Checkpoints(
        self.workdir, keep=self.config.keep_checkpoints, best_metric=self.task.best_metric
      ) as self.checkpoints,
    ):
      yield

  def restore(
    self, start_from: str | Path | None = None, weights: str | Path | None = None
  ) -> None:
    """Makes the state to go on from: the run's latest, another run's, or the first one."""
    self.checkpoints.check_room(self.program.state)
    self.watchdog.doing("restoring a checkpoint")
    restored = self.checkpoints.restore_latest(self.program.state, self._continue)
    if restored is not None:
      self.results = restored.metrics
    elif start_from is not None:
      self._continue(restore_path(start_from, self.program.state))
    else:
      self.watchdog.doing("making the first state")
      self.state: TrainState = self.program.init()
      if weights is not None:
        self.state = self.task.start_from(weights, self.state)
        if self.state.ema is not None:  # of these; a copy, as a state is given away
          ema = jax.tree.map(jnp.copy, self.state.params)
          self.state = dataclasses.replace(self.state, ema=ema)
    self._saved = self.step
    self._write_files()

  def _continue(self, restored: Restored) -> None:
    self.state, self.last_checkpoint = restored.state, restored.path
    self.step = int(self.state.step)
    if self.step > self.total_steps:
      raise UsageError(
        f"the checkpoint {restored.path} is of step {self.step}, but this run ends at step "
        f"{self.total_steps}; raise config.num_epochs"
      )
    self.loader.set_state(restored.iterator)
    log.info("restored step %d from %s", self.step, restored.path)

  def _write_files(self) -> None:
    """What says what this run is; nothing of it is written before the run is sure to go on."""
    if jax.process_index() != 0:
      return
    files = {"config.json": config_lib.to_json(self.config) + "\n", **self.task.files()}
    for name, text in files.items():
      if read_text(self.workdir / name) != text:
        write_text(self.workdir / name, text)

  def run(self) -> Result:
    """Trains from where the run stands to its end, or until it is asked to stop."""
    self._introduce()
    with (
      compilation_cache.kept_in(self.workdir),  # here: a refused start leaves nothing in it
      MetricsWriter(
        self.workdir,
        total_steps=self.total_steps,
        start_step=self.step,
        active=jax.process_index() == 0,
        shown=self.task.shown,
      ) as self.writer,
      sharding.Prefetch(self.loader, self.program.mesh, position=self.loader.position) as self.feed,
    ):
      stop_flags = sharding.StopFlags(self.program.mesh)
      # Before there is anything to compile.
      self._stopping = any(sharding.gather(self.stop.requested))
      while True:
        self._pause()
        if self.step == self.total_steps or self._stopping:
          break
        self._advance(stop_flags)
      self.settle()
    self.watchdog.doing("the end of the run")
    finished = self.step == self.total_steps and self.results is not None
    pictures = self._save_figures() if finished else {}
    results = self.results or {}
    summary = self.task.summary(results) if finished else []
    return Result(self.step, finished, results, self.last_checkpoint, pictures, summary)

  def _pause(self) -> None:
    """Evaluates and saves, where that is due after this step."""
    self._stopping |= self.stop.requested and jax.process_count() == 1  # else all agree on it
    # The last evaluation is that of the last step, with none shortly before it.
    left = self.total_steps - self.step
    early = self.step % self.eval_steps == 0 and 2 * left > self.eval_steps
    due = self.step > 0 and (early or left == 0)
    evaluated = due and self.results is None and not self._stopping and self.evaluate()
    periodic = self.step % self.config.checkpoint_every_steps == 0
    if evaluated or (self.step > self._saved and (periodic or self._stopping)):
      self.settle()
      with self.clock.paused():
        self.save()

  def _advance(self, stop_flags: sharding.StopFlags) -> None:
    """Dispatches the next step; settles the one before it, while this one runs."""
    self.watchdog.doing(f"step {self.step + 1}, and the wait for its examples")
    self.clock.stall(self.feed.wait(running=self._pending and self._pending[1]))
    batch = next(self.feed)
    self._note_compilation(batch)
    self.state, arrays = self.program.update(self.state, batch, stop_flags(self.stop.requested))
    self.settle()
    self.step += 1
    self._pending, self.results = (self.step, arrays, self.feed.position), None

  def _note_compilation(self, batch: Mapping[str, jax.Array]) -> None:
    """Says that a step takes long, where it has to be compiled for a new shape of batch first."""
    shapes = tuple(batch[name].shape for name in sorted(batch))
    if shapes not in self._compiled:
      self._compiled.add(shapes)
      log.info(
        "compiling the training step for batches of %s, which can take minutes for a large network",
        ", ".join(f"{name} {'x'.join(map(str, batch[name].shape))}" for name in sorted(batch)),
      )

  def settle(self) -> None:
    """Waits for the step in flight, refuses a non-finite loss, and logs.

    Raises:
      NonFiniteLossError: loss, gradients or parameters are not finite any more.
    """
    if self._pending is None:
      return
    step, arrays, position = self._pending
    self._pending = None
    values = {name: float(arrays[name]) for name in _in_order(arrays)}
    self.clock.count()
    self._stopping |= bool(arrays["stop"])  # all processes see the same, at the same step
    self.writer.advance(step)
    if not all(map(math.isfinite, values.values())):
      raise NonFiniteLossError(self._diverged(step, values))
    if step % self.config.log_every_steps == 0:
      values |= {
        "learning_rate": float(self.program.schedule(step - 1)),
        "epoch": step / self.steps_per_epoch,
        "data_stall": self.clock.stalled(),
        "images_per_second": self.clock.rate(),
        "skipped_images": self.loader.num_skipped(position),
      }
      self.writer.write(step, "train", values)

  def save(self) -> None:
    """Saves the state after `step`, and the place in the data behind it."""
    # Of the batches that the model has seen, not of those that are made ahead.
    self.watchdog.doing(f"saving step {self.step}")
    iterator = self.loader.joined(sharding.gather(self.loader.get_state(self.feed.position)))
    self.loader.note_skipped(iterator)  # by other processes
    self.writer.flush()
    self.checkpoints.save(self.state, iterator, step=self.step, metrics=self.results)
    self._saved, self.last_checkpoint = self.step, self.checkpoints.path(self.step)

  def evaluate(self) -> bool:
    """Validates the state after `step`; False if that was interrupted by the wish to stop.

    Raises:
      UsageError: examples cannot be read; the steps so far are saved.
    """
    self.settle()
    batch_numbers = itertools.count()

    def stop() -> bool:
      self.watchdog.doing(f"evaluation batch {next(batch_numbers)}")
      return self.stop.requested

    with self.clock.paused():
      try:
        params, batch_stats = self.program.weights(self.state)
        self.results = self.evaluator(params, batch_stats, stop)
      except UsageError as error:
        # Unreadable examples stop all processes; another error may be of this one alone, and saving
        # needs all.
        together = isinstance(error, pipeline.UnreadableImagesError)
        if self.step > self._saved and (together or jax.process_count() == 1):
          self.save()
        raise
      if self.results is None:
        self._stopping = True
        return False
      if not all(map(math.isfinite, self.results.values())):
        raise NonFiniteLossError(f"validation after {self._diverged(self.step, self.results)}")
      self._draw(params, batch_stats)
    self.writer.write(self.step, "validation", self.results)
    return True

  def _draw(self, params: Tree, batch_stats: Tree) -> None:
    """Puts the figures into TensorBoard, if that is due with this evaluation."""
    every = self.config.figure_every_epochs
    # Since the evaluation before, a multiple of that has been passed.
    if every and self.step % self._steps(every) < self.eval_steps:
      self.watchdog.doing(f"drawing the figures of step {self.step}")
      for name, pixels in self.evaluator.figures(params, batch_stats).items():
        self.writer.write_image(self.step, name, pixels)

  def _save_figures(self) -> dict[str, epath.Path]:
    pictures = {}
    for name, pixels in self.evaluator.figures(*self.program.weights(self.state)).items():
      pictures[name] = self.workdir / f"{name}.png"
      with pictures[name].open("wb") as file:
        PIL.Image.fromarray(pixels).save(file, format="PNG")
    return pictures

  def _introduce(self) -> None:
    """Logs what runs where, and on how many examples at once."""
    config, mesh = self.config, self.program.mesh
    parts, local = config.accumulation_steps, config.global_batch_size // mesh.size
    sizes = (f"{name} {n}" for name, n in mesh.shape.items() if n > 1 or name == "data")
    log.info(
      "%s: %d parameters; %d examples, %d steps",
      config.model["name"],
      sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
      self.task.num_train,
      self.total_steps,
    )
    log.info(
      "%d process(es), %d device(s) (%s), mesh %s; %d examples a step, %d on each device%s; peak "
      "learning rate %g",
      jax.process_count(),
      mesh.size,
      mesh.devices.flat[0].device_kind,
      " x ".join(sizes),
      config.global_batch_size,
      local,
      f" in {parts} parts" if parts > 1 else "",
      config.optim.base_lr * config.global_batch_size / config.optim.base_batch_size,
    )

  def _diverged(self, step: int, values: Mapping[str, float]) -> str:
    """What happened, and how to go on with a run that is no longer finite."""
    back = "there is no checkpoint before it: start again"
    if self.last_checkpoint:
      back = f"return to the checkpoint before it with --start_from={self.last_checkpoint}"
    numbers = ", ".join(f"{name} {value:g}" for name, value in values.items())
    return (
      f"step {step} is not finite: {numbers}, learning rate "
      f"{float(self.program.schedule(step - 1)):g}; {back}, a new --workdir, and a lower "
      "config.optim.base_lr, a longer config.optim.warmup_epochs or config.dtype=float32"
    )


def _in_order(metrics: Mapping[str, Any]) -> list[str]:
  """Names of a step's metrics as they are shown: the loss, the task's own, norms."""
  norms = ("grad_norm", "param_norm")
  return ["loss", *sorted(set(metrics) - {"loss", "stop", *norms}), *norms]


def _check_same_run(task: Task, workdir: epath.Path) -> None:
  """Raises UsageError if the workdir is that of another run."""
  if not has_checkpoints(workdir):
    return
  different = config_lib.differences(task.config, config_lib.load(workdir))
  if different:
    raise UsageError(
      f"{workdir} holds a run with another configuration: {'; '.join(different)}. Take another "
      "--workdir, or give the values that the run was started with"
    )
  task.check_same(workdir)


def _check_batch_norm_groups(task: Task) -> None:
  config, size = task.config, task.batch_norm_group
  if isinstance(size, int) and size > 0 and config.global_batch_size % size:
    raise UsageError(
      f"config.global_batch_size={config.global_batch_size} is not a multiple of "
      f"config.model.bn_group_size={size}; change one of them"
    )
