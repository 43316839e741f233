"""Training from start to finish: mesh, data, model, optimizer, restore, steps, loop."""

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx

from lip_jax import augment, class_names, optim, sharding, train_state
from lip_jax import config as config_lib
from lip_jax.checkpoint import Checkpoints, has_checkpoints, restore_path
from lip_jax.config import Config, Data
from lip_jax.data import pipeline
from lip_jax.data.source import open_split
from lip_jax.errors import UsageError
from lip_jax.evaluate import Evaluator
from lip_jax.interrupt import StopOnSignal
from lip_jax.metrics import MetricsWriter, Throughput
from lip_jax.train_state import TrainState

log = logging.getLogger("lip_jax")

_STEP_METRICS = ("loss", "top1", "grad_norm", "param_norm")  # in the order that they are shown


class NonFiniteLossError(RuntimeError):
  """Loss or gradient are no longer finite; names the step and the checkpoint to return to."""


@dataclasses.dataclass(frozen=True)
class Result:
  """How a call of `train` ended."""

  step: int  # updates made
  finished: bool  # False: stopped by a signal; the same call goes on
  metrics: dict[str, float]  # of the validation split: top1, top5 (fractions), loss, count
  checkpoint: Path | None  # directory of the state; None: stopped before there was one
  importance_picture: Path | None


def train(config: Config, workdir: str | Path, *, start_from: str | Path | None = None) -> Result:
  """Trains, or goes on where the run in `workdir` stopped.

  Writes `config.json`, `classes.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and, at the
  end, `importance.png`. SIGTERM and SIGINT save a checkpoint and end the call; after them, or after
  any crash, the same call continues with the batch that would have come next.

  Args:
    config: what to train.
    workdir: directory of the run, created if need be.
    start_from: directory of another run's checkpoint, `<its workdir>/checkpoints/<step>`. A run
      that has none of its own yet goes on from there, for example with a lower learning rate.

  Raises:
    UsageError: a configuration that cannot run, or a workdir that holds another run.
    NonFiniteLossError: training has diverged.
  """
  workdir = Path(workdir).resolve()
  _claim_workdir(config, workdir)

  # Mesh
  mesh = sharding.make_mesh()
  sharding.check_batch_size("global_batch_size", config.global_batch_size, mesh)
  sharding.check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
  _check_batch_norm_groups(config)
  processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}

  # Data
  source = open_split(config.data.dataset, config.data.train_split, config.data.data_dir)
  if jax.process_index() == 0:
    class_names.write(workdir, source.class_names)
  steps_per_epoch = len(source) / config.global_batch_size
  total_steps = max(1, round(config.num_epochs * steps_per_epoch))
  eval_steps = max(1, round(config.eval_every_epochs * steps_per_epoch))
  loader = pipeline.train_loader(
    source,
    image_size=config.data.image_size,
    crop_scale=config.data.crop_scale,
    global_batch_size=config.global_batch_size,
    seed=config.seed,
    shuffle_window=config.data.shuffle_window,
    num_threads=config.data.num_threads,
    **processes,
  )

  # Model and optimizer
  options = train_state.model_options(config, source.num_classes)
  graph = train_state.graph_of(**options)
  schedule = optim.learning_rate(
    config.optim,
    global_batch_size=config.global_batch_size,
    steps_per_epoch=steps_per_epoch,
    num_epochs=config.num_epochs,
  )
  optimizer = optim.sgd(config.optim, schedule)
  init = jax.jit(
    functools.partial(train_state.init, optimizer, config.seed, **options),
    out_shardings=sharding.replicated(mesh),
  )
  validation = open_split(config.data.dataset, config.data.validation_split, config.data.data_dir)
  evaluator = Evaluator(config, validation, graph, mesh)

  with loader, Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
    # Restore
    like = train_state.abstract(init, mesh)
    step = checkpoints.latest_step or 0
    restored, last_good = None, None
    if step:
      restored, last_good = checkpoints.restore(step, like), checkpoints.path(step)
    elif start_from is not None:
      restored, last_good = restore_path(start_from, like), Path(start_from)
    if restored is None:
      state = init()
    else:
      state = restored.state
      step = int(state.step)
      loader.set_state(restored.iterator)
      log.info("restored step %d from %s", step, last_good)
    if step > total_steps:
      raise UsageError(
        f"the checkpoint {last_good} is of step {step}, but this run ends at step {total_steps}; "
        "raise config.num_epochs"
      )
    results = checkpoints.metrics(step)
    log.info(
      "%s: %d parameters, %d images, %d steps of %d images on %d device(s) (%s)",
      config.model["name"],
      sum(leaf.size for leaf in jax.tree.leaves(state.params)),
      len(source),
      total_steps,
      config.global_batch_size,
      mesh.size,
      mesh.devices.flat[0].device_kind,
    )

    # Steps
    update = jax.jit(
      functools.partial(
        train_step,
        graph=graph,
        optimizer=optimizer,
        data=config.data,
        label_smoothing=config.label_smoothing,
        seed=config.seed,
      ),
      donate_argnums=0,
      out_shardings=sharding.replicated(mesh),
    )

    if step < total_steps:
      log.info("compiling the training step, which can take minutes for a large network")

    # Loop
    with (
      StopOnSignal() as stop,
      MetricsWriter(
        workdir, total_steps=total_steps, start_step=step, active=jax.process_index() == 0
      ) as writer,
      sharding.Prefetch(loader, mesh, position=loader.position) as feed,
    ):
      pending: tuple[int, Mapping[str, jax.Array], Any] | None = None
      saved = step
      clock = Throughput(config.global_batch_size)

      def settle() -> None:
        """Waits for the step in flight, refuses a non-finite loss, and logs."""
        nonlocal pending
        if pending is None:
          return
        done, arrays, position = pending
        pending = None
        values = {name: float(arrays[name]) for name in _STEP_METRICS}
        clock.count()
        writer.advance(done)
        if not all(map(math.isfinite, values.values())):
          raise NonFiniteLossError(_diverged(done, values, schedule, last_good))
        if done % config.log_every_steps == 0:
          values |= {
            "learning_rate": float(schedule(done - 1)),
            "epoch": done / steps_per_epoch,
            "data_stall": clock.stalled(),
            "images_per_second": clock.rate(),
            "skipped_images": loader.num_skipped(position),
          }
          writer.write(done, "train", values)

      def save() -> None:
        """Saves the state after `step`, and the place in the data behind it."""
        # Of the batches that the model has seen, not of those that are made ahead.
        iterator = pipeline.joined(sharding.gather(loader.get_state(feed.position)))
        loader.note_skipped(iterator)  # by other processes
        checkpoints.save(state, iterator, step=step, metrics=results)

      while True:
        stopping = stop.requested
        # The last evaluation is that of the last step, with none shortly before it.
        early = step % eval_steps == 0 and 2 * (total_steps - step) > eval_steps
        due = step > 0 and (early or step == total_steps)
        evaluated = False
        if due and results is None and not stopping:
          settle()
          with clock.paused():
            try:
              results = evaluator(state, cancelled=lambda: stop.requested)
            except UsageError:  # unreadable images: the steps so far must not be lost with them
              if step > saved:
                save()
              raise
          evaluated = results is not None
          stopping = results is None
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
        clock.stall(feed.wait(running=pending and pending[1]))
        state, arrays = update(state, next(feed))
        settle()  # of the step before, while this one runs
        step += 1
        pending, results = (step, arrays, feed.position), None
      settle()

    finished = step == total_steps and results is not None
    picture = None
    if finished and config.importance_images and jax.process_index() == 0:
      picture = workdir / "importance.png"
      if not evaluator.draw_importance(state, config.importance_images, picture):
        picture = None
    return Result(step, finished, results or {}, last_good, picture)


def train_step(
  state: TrainState,
  batch: Mapping[str, jax.Array],
  *,
  graph: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  data: Data,
  label_smoothing: float,
  seed: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update.

  Args:
    state: before the update.
    batch: "image" [N, H, W, 3] uint8 and "label" [N] int.
    graph: of the model.
    optimizer: whose state `state.opt_state` is.
    data: how images are normalized and augmented.
    label_smoothing: share of the target that is spread over all classes.
    seed: of the augmentation, which depends on it and the step alone.

  Returns:
    State after the update and the scalars "loss" (mean), "top1" (fraction; of mixed images against
    the label of the greater part) and "grad_norm" of the batch before it, and "param_norm" after
    it.
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  images = augment.training_images(batch["image"], key, data)
  images, labels = augment.mix(images, batch["label"], jax.random.fold_in(key, 4), data.augment)

  def loss_of(params):
    model = train_state.merge(graph, params, state.batch_stats)
    logits = model(images)
    targets = optax.smooth_labels(labels.targets(logits.shape[-1], logits.dtype), label_smoothing)
    loss = optax.softmax_cross_entropy(logits, targets).mean()
    return loss, (logits, train_state.split(model)[1])

  (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  new = TrainState(
    state.step + 1, optax.apply_updates(state.params, updates), batch_stats, opt_state
  )
  top1 = (logits.argmax(axis=-1) == labels.dominant).mean()
  return new, {
    "loss": loss,
    "top1": top1,
    "grad_norm": optax.tree.norm(grads),
    "param_norm": optax.tree.norm(new.params),
  }


def _claim_workdir(config: Config, workdir: Path) -> None:
  """Creates the workdir and stores the configuration; refuses the workdir of another run."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    if has_checkpoints(workdir):
      different = config_lib.differences(config, config_lib.load(workdir))
      if different:
        raise UsageError(
          f"{workdir} holds a run with another configuration: {'; '.join(different)}. Take another "
          "--workdir, or give the values that the run was started with"
        )
    if jax.process_index() == 0:
      temporary = path.with_suffix(".tmp")
      temporary.write_text(config_lib.to_json(config) + "\n", encoding="utf-8")
      os.replace(temporary, path)
  except OSError as error:
    raise UsageError(
      f"cannot use --workdir {workdir}: {error}; name a writable directory"
    ) from None


def _check_batch_norm_groups(config: Config) -> None:
  size = config.model.get("bn_group_size")
  if size and size > 0 and config.global_batch_size % size:
    raise UsageError(
      f"config.global_batch_size={config.global_batch_size} is not a multiple of "
      f"config.model.bn_group_size={size}; change one of them"
    )


def _diverged(
  step: int, values: Mapping[str, float], schedule: optax.Schedule, last_good: Path | None
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
