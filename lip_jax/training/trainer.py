"""Training from start to finish: data, mesh and model, restore, loop."""

import contextlib
import dataclasses
import itertools
import logging
import math
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from etils import epath

from lip_jax import visualize
from lip_jax.classification import fine_tuning
from lip_jax.classification.evaluation import Evaluator
from lip_jax.data import pipeline
from lip_jax.data.source import open_split
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.export import class_names
from lip_jax.training import compilation_cache
from lip_jax.training import config as config_lib
from lip_jax.training.checkpoint.checkpoints import Checkpoints, has_checkpoints, restore_path
from lip_jax.training.config import Config
from lip_jax.training.metrics import MetricsWriter, Throughput
from lip_jax.training.preemption import StopRequest
from lip_jax.training.train_step import Program
from lip_jax.training.watchdog import Watchdog
from lip_jax.training.workdir import check_access, lock, write_text

log = logging.getLogger("lip_jax")

# What a file system that hosts share may need to show a file of one to the others.
_VISIBLE_SECONDS = 10

_STEP_METRICS = ("loss", "top1", "grad_norm", "param_norm")  # in the order that they are shown


class NonFiniteLossError(RuntimeError):
  """Loss or gradient are no longer finite; names the step and the checkpoint to return to."""


@dataclasses.dataclass(frozen=True)
class Result:
  """How a call of `train` ended."""

  step: int  # updates made
  finished: bool  # False: stopped by a signal; the same call goes on
  metrics: dict[str, float]  # of the validation split: top1, top5 (fractions), loss, count
  checkpoint: epath.Path | None  # directory of the state; None: stopped before there was one
  importance_picture: epath.Path | None


def train(
  config: Config,
  workdir: str | Path,
  *,
  start_from: str | Path | None = None,
  weights: str | Path | None = None,
) -> Result:
  """Trains, or goes on where the run in `workdir` stopped.

  Writes `config.json`, `classes.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and, at the
  end, `importance.png`. SIGTERM and SIGINT save a checkpoint and end the call; after them, or after
  any crash, the same call continues with the batch that would have come next.

  Args:
    config: what to train.
    workdir: directory of the run, created if need be.
    start_from: directory of another run's checkpoint, `<its workdir>/checkpoints/<step>`. A run
      that has none of its own yet goes on from there, for example with a lower learning rate.
    weights: what `lip_jax.load` takes. A run that has no checkpoint of its own yet starts at step 0
      with the weights of that network, to fine-tune them; its classifier starts afresh where the
      data have other classes.

  Raises:
    UsageError: a configuration that cannot run, a workdir that holds another run, or weights of
      another network.
    NonFiniteLossError: training has diverged.
  """
  if start_from is not None and weights is not None:
    raise UsageError(
      f"start_from={start_from} and weights={weights} are given: a run goes on from a checkpoint, "
      "or starts from the weights of a network; leave one of them out"
    )
  directory = check_access(workdir)
  _check_shared(directory)
  first = jax.process_index() == 0
  with lock(directory) if first else contextlib.nullcontext():
    return _train(config, directory, start_from, weights)


def _train(
  config: Config,
  directory: epath.Path,
  start_from: str | Path | None,
  weights: str | Path | None,
) -> Result:
  _check_same_run(config, directory)
  _check_batch_norm_groups(config)
  # Data
  source = open_split(config.data.dataset, config.data.train_split, config.data.data_dir)
  steps_per_epoch = len(source) / config.global_batch_size
  total_steps = max(1, round(config.num_epochs * steps_per_epoch))
  eval_steps = max(1, round(config.eval_every_epochs * steps_per_epoch))
  draw_steps = max(1, round(config.importance_every_epochs * steps_per_epoch))
  loader = pipeline.train_loader(
    source,
    image_size=config.data.image_size,
    crop_scale=config.data.crop_scale,
    global_batch_size=config.global_batch_size,
    seed=config.seed,
    shuffle_window=config.data.shuffle_window,
    num_threads=config.data.num_threads,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  validation = open_split(config.data.dataset, config.data.validation_split, config.data.data_dir)

  # Mesh and model
  program = Program(config, num_classes=source.num_classes, steps_per_epoch=steps_per_epoch)
  evaluator = Evaluator(config, validation, program.graph, program.mesh)
  if jax.process_index() == 0:
    write_text(directory / "config.json", config_lib.to_json(config) + "\n")
    class_names.write(directory, source.class_names)

  with (
    # Around it all: the last save, too, is not to be cut short.
    StopRequest(preemption_notice=jax.default_backend() == "tpu") as stop,
    compilation_cache.kept_in(directory),
    Watchdog(seconds=config.watchdog_seconds) as watchdog,
    loader,
    Checkpoints(directory, keep=config.keep_checkpoints, best_metric="top1") as checkpoints,
  ):
    # Restore
    checkpoints.check_room(program.state)
    watchdog.doing("restoring a checkpoint")
    restored = checkpoints.restore_latest(program.state)
    results = restored.metrics if restored else None
    if restored is None and start_from is not None:
      restored = restore_path(start_from, program.state)
    if restored is None:
      watchdog.doing("making the first state")
      state, step, last_good = program.init(), 0, None
      if weights is not None:
        state = fine_tuning.start_from(weights, state, config, source.class_names)
    else:
      state, last_good = restored.state, restored.path
      step = int(state.step)
      loader.set_state(restored.iterator)
      log.info("restored step %d from %s", step, last_good)
    if step > total_steps:
      raise UsageError(
        f"the checkpoint {last_good} is of step {step}, but this run ends at step {total_steps}; "
        "raise config.num_epochs"
      )
    log.info(
      "%s: %d parameters; %d images, %d steps",
      config.model["name"],
      sum(leaf.size for leaf in jax.tree.leaves(state.params)),
      len(source),
      total_steps,
    )
    log.info("%s", _describe(config, program))
    if step < total_steps:
      log.info("compiling the training step, which can take minutes for a large network")

    # Loop
    with (
      MetricsWriter(
        directory, total_steps=total_steps, start_step=step, active=jax.process_index() == 0
      ) as writer,
      sharding.Prefetch(loader, program.mesh, position=loader.position) as feed,
    ):
      votes = sharding.Votes(program.mesh)
      stopping = any(sharding.gather(stop.requested))  # before there is anything to compile
      pending: tuple[int, Mapping[str, jax.Array], Any] | None = None
      saved = step
      clock = Throughput(config.global_batch_size)

      def settle() -> None:
        """Waits for the step in flight, refuses a non-finite loss, and logs."""
        nonlocal pending, stopping
        if pending is None:
          return
        done, arrays, position = pending
        pending = None
        values = {name: float(arrays[name]) for name in _STEP_METRICS}
        clock.count()
        stopping |= bool(arrays["vote"])  # all processes see the same, at the same step
        writer.advance(done)
        if not all(map(math.isfinite, values.values())):
          raise NonFiniteLossError(_diverged(done, values, program.schedule, last_good))
        if done % config.log_every_steps == 0:
          values |= {
            "learning_rate": float(program.schedule(done - 1)),
            "epoch": done / steps_per_epoch,
            "data_stall": clock.stalled(),
            "images_per_second": clock.rate(),
            "skipped_images": loader.num_skipped(position),
          }
          writer.write(done, "train", values)

      def save() -> None:
        """Saves the state after `step`, and the place in the data behind it."""
        # Of the batches that the model has seen, not of those that are made ahead.
        watchdog.doing(f"saving step {step}")
        iterator = pipeline.joined(sharding.gather(loader.get_state(feed.position)))
        loader.note_skipped(iterator)  # by other processes
        writer.flush()
        checkpoints.save(state, iterator, step=step, metrics=results)

      def draw_importance() -> None:
        """Puts the importance maps into TensorBoard."""
        watchdog.doing(f"drawing the importance maps of step {step}")
        figure = evaluator.importance_figure(state, config.importance_images)
        if figure is not None:
          writer.write_image(step, "importance", visualize.figure_to_array(figure))

      def stop_evaluation() -> bool:
        """Asked before each batch of an evaluation."""
        watchdog.doing(f"evaluation batch {next(batch_numbers)}")
        return stop.requested

      batch_numbers = itertools.count()
      while True:
        stopping |= stop.requested and jax.process_count() == 1  # else it is voted on
        # The last evaluation is that of the last step, with none shortly before it.
        early = step % eval_steps == 0 and 2 * (total_steps - step) > eval_steps
        due = step > 0 and (early or step == total_steps)
        evaluated = False
        if due and results is None and not stopping:
          settle()
          with clock.paused():
            try:
              results = evaluator(state, stop=stop_evaluation)
            except UsageError as error:  # the steps so far must not be lost with it
              # Unreadable images stop all processes; another error may be of this one alone, and
              # saving needs all.
              together = isinstance(error, pipeline.UnreadableImagesError)
              if step > saved and (together or jax.process_count() == 1):
                save()
              raise
            # Since the evaluation before, a multiple of draw_steps has been passed.
            if results and config.importance_every_epochs and step % draw_steps < eval_steps:
              draw_importance()
          evaluated = results is not None
          stopping |= results is None
          if results is not None:
            writer.write(step, "validation", results)
        unsaved = step > saved and (step % config.checkpoint_every_steps == 0 or stopping)
        if evaluated or unsaved:
          settle()
          with clock.paused():
            save()
          saved, last_good = step, checkpoints.path(step)
        if step == total_steps or stopping:
          break
        watchdog.doing(f"step {step + 1}, and the wait for its images")
        clock.stall(feed.wait(running=pending and pending[1]))
        state, arrays = program.update(state, next(feed), votes(stop.requested))
        settle()  # of the step before, while this one runs
        step += 1
        pending, results = (step, arrays, feed.position), None
      settle()

    watchdog.doing("the end of the run")
    finished = step == total_steps and results is not None
    picture: epath.Path | None = None
    if finished and config.importance_images:
      figure = evaluator.importance_figure(state, config.importance_images)
      if figure is not None:
        picture = directory / "importance.png"
        visualize.save_figure(figure, picture)
    return Result(step, finished, results or {}, last_good, picture)


def _describe(config: Config, program: Program) -> str:
  """One line: where this runs, and on how many images at once."""
  mesh = program.mesh
  parts, local = config.accumulation_steps, config.global_batch_size // mesh.size
  return (
    f"{jax.process_count()} process(es), {mesh.size} device(s) "
    f"({mesh.devices.flat[0].device_kind}), mesh "
    + " x ".join(
      f"{name} {size}" for name, size in mesh.shape.items() if size > 1 or name == "data"
    )
    + f"; {config.global_batch_size} images a step, {local} on each "
    + (f"device in {parts} parts" if parts > 1 else "device")
    + f"; peak learning rate {config.optim.base_lr * config.global_batch_size / 256:g}"
  )


def _check_shared(workdir: epath.Path) -> None:
  """Raises UsageError, on all processes, if the workdir is not the same directory for all."""
  if jax.process_count() == 1:
    return
  mark = workdir / f".lip_jax_{sharding.gather(uuid.uuid4().hex)[0]}"
  if jax.process_index() == 0:
    write_text(mark, mark.name)
  sharding.gather(None)
  deadline = time.monotonic() + _VISIBLE_SECONDS
  while not (there := mark.exists()) and time.monotonic() < deadline:
    time.sleep(0.5)
  seen = sharding.gather(there)
  if jax.process_index() == 0:
    mark.unlink()
  if not all(seen):
    raise UsageError(
      f"{workdir} of process 0 is another directory than that of process {seen.index(False)}; "
      "--workdir has to be one that all hosts share, on a shared file system or gs://BUCKET/RUN"
    )


def _check_same_run(config: Config, workdir: epath.Path) -> None:
  """Raises UsageError if the workdir is that of another run."""
  if not has_checkpoints(workdir):
    return
  different = config_lib.differences(config, config_lib.load(workdir))
  if different:
    raise UsageError(
      f"{workdir} holds a run with another configuration: {'; '.join(different)}. Take another "
      "--workdir, or give the values that the run was started with"
    )


def _check_batch_norm_groups(config: Config) -> None:
  size = config.model.get("bn_group_size")
  if size and size > 0 and config.global_batch_size % size:
    raise UsageError(
      f"config.global_batch_size={config.global_batch_size} is not a multiple of "
      f"config.model.bn_group_size={size}; change one of them"
    )


def _diverged(
  step: int, values: Mapping[str, float], schedule: optax.Schedule, last_good: epath.Path | None
) -> str:
  """What happened, and how to go on with a run that is no longer finite."""
  back = (
    f"return to the checkpoint before it with --start_from={last_good}"
    if last_good
    else "there is no checkpoint before it: start again"
  )
  numbers = ", ".join(f"{name} {values[name]:g}" for name in _STEP_METRICS)
  return (
    f"step {step} is not finite: {numbers}, learning rate {float(schedule(step - 1)):g}; {back}, "
    "a new --workdir, and a lower config.optim.base_lr, a longer config.optim.warmup_epochs or "
    "config.dtype=float32"
  )
