"""Checkpoints of a run: asynchronous, atomic, verified, the latest few and the best.

What lies in a checkpoint, `<workdir>/checkpoints/<step>`:

- `state/`: the arrays. Orbax and TensorStore do not notice every changed byte in them.
- `record/record.json`: the state of the input pipeline, the validation results, and a fingerprint
  of each part of the train state, with a digest of it all. No state is given out whose
  fingerprints are not those.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.training.checkpoint import metadata as records
from lip_jax.training.checkpoint import orbax_io, step_directories
from lip_jax.training.checkpoint.fingerprint import fingerprint
from lip_jax.training.checkpoint.metadata import DamagedError, Record
from lip_jax.training.checkpoint.quiet import quiet
from lip_jax.training.train_state import TrainState, Tree
from lip_jax.training.workdir import PathLike, absolute

log = logging.getLogger("lip_jax")

_BEST = "top1"


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint holds: the train state and the input pipeline's state after the same step."""

  state: TrainState
  iterator: dict[str, Any]
  metrics: dict[str, float] | None  # validation results of this state, if it was evaluated
  path: epath.Path


def has_checkpoints(workdir: PathLike) -> bool:
  """Whether the run in `workdir` has saved anything yet."""
  return step_directories.any_in(_directory(workdir))


class Checkpoints:
  """The checkpoints of one run, in `<workdir>/checkpoints/<step>`, on a disk or in a bucket.

  A checkpoint is one of them only when it is complete. Use as a context manager: leaving it
  waits for the save that is under way.

  On several processes all of them call `save`, `restore`, `restore_latest` and leave the context at
  the same points; they come to the same result or all raise.

  Args:
    workdir: the run's directory; on several processes one that all of them see.
    keep: how many of the latest to keep, beside the one with the best validation top-1.
    read_only: never change anything, not even remains of interrupted saves.

  Raises:
    UsageError: the directory cannot be written, or, read only, does not exist.
  """

  def __init__(
    self, workdir: PathLike, *, keep: int = 2, read_only: bool = False, best_metric=None
  ):
    self.directory = _directory(workdir)
    self._keep = keep
    self._read_only = read_only
    self._records: dict[int, Record] = {}
    self._saving: tuple[int, Record, orbax_io.Saving] | None = None
    if read_only and not self.directory.is_dir():
      raise UsageError(
        f"no checkpoints under {absolute(workdir)}; give the --workdir of a training run"
      )
    if not read_only and jax.process_index() == 0:
      try:
        step_directories.prepare(self.directory)
      except OSError as error:
        raise UsageError(
          f"cannot write checkpoints to {self.directory}: {error}; name a writable --workdir"
        ) from None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, error: type[BaseException] | None, *_) -> None:
    if error is None:
      self._finish_save()
    elif self._saving is not None:  # what ended the run is not to be hidden by a further error
      fault = orbax_io.outcome(self._saving[2])
      if fault:
        log.error("%s", self._failure(self._saving[0], fault))

  @property
  def steps(self) -> list[int]:
    """Steps that have a checkpoint, ascending.

    Raises:
      UsageError: the directory cannot be read.
    """
    try:
      return step_directories.steps_in(self.directory)
    except OSError as error:
      raise UsageError(f"cannot read {self.directory}: {error}") from error

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, None if there is none."""
    return max(self.steps, default=None)

  @property
  def best_step(self) -> int | None:
    """Step of the checkpoint with the best validation top-1, None if none was evaluated."""
    return _best({step: self.metrics(step) for step in self.steps})

  def metrics(self, step: int) -> dict[str, float] | None:
    """Validation results saved with a checkpoint, None if it has none that can be read."""
    try:
      return self._record(step).metrics
    except Exception:  # a damaged checkpoint has no say here; restoring it will tell
      return None

  def resolve(self, which: str) -> int:
    """Step number for "latest", "best" or a number in text.

    Raises:
      UsageError: there is no such checkpoint; names those there are.
    """
    step = {"latest": self.latest_step, "best": self.best_step}.get(which, which)
    if isinstance(step, str):
      step = int(step) if step.isdecimal() else None
    if step not in self.steps:
      there = ", ".join(map(str, self.steps)) or "none"
      raise UsageError(
        f"no checkpoint {which!r} in {self.directory}; there are: {there} (or say latest, best)"
      )
    return step

  def path(self, step: int) -> epath.Path:
    """Directory of one checkpoint."""
    return self.directory / str(step)

  def check_room(self, like: TrainState) -> None:
    """Warns if the disk has no room for all checkpoints that the run will keep.

    Args:
      like: train state, or the shapes and dtypes of one.

    Raises:
      UsageError: there is no room for a single one.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    if jax.process_index() == 0:
      # The latest, the best, and the one that is being written.
      step_directories.check_room(self.directory, size, self._keep + 2)

  def save(
    self,
    state: TrainState,
    iterator: dict[str, Any],
    *,
    step: int,
    metrics: dict[str, float] | None = None,
  ) -> None:
    """Starts saving; returns when the arrays are copied and may be overwritten.

    Args:
      state: train state after `step` updates.
      iterator: JSON-serialisable state of the input pipeline after the same step.
      step: number of updates.
      metrics: validation results of this state, with "top1", if it was evaluated.

    Raises:
      UsageError: this save, or the one before it, could not be written. Checkpoints that were there
        are untouched.
    """
    self._finish_save()
    record = records.describe(state, iterator, step=step, metrics=metrics)
    try:
      if jax.process_index() == 0:
        step_directories.set_aside(self.path(step))
      saving = orbax_io.start_saving(self.path(step), state, record.to_json())
    except Exception as error:  # Orbax raises whatever its storage layers do
      self._give_up(step)
      raise UsageError(self._failure(step, records.reason(error))) from error
    self._saving = (step, record, saving)

  def restore(self, step: int, like: TrainState) -> Restored:
    """Loads one checkpoint.

    Args:
      step: one of `steps`.
      like: what `train_state.abstract` gives: the expected shapes and dtypes, and the shardings
        that the result is to have, on any mesh.

    Raises:
      UsageError: the checkpoint is damaged or holds something else.
    """
    restored = self._load_state(step, like)
    if isinstance(restored, DamagedError):
      raise UsageError(self._damaged(step, restored))
    return restored

  def restore_latest(self, like: TrainState) -> Restored | None:
    """Loads the newest checkpoint that is whole, None if the run has none at all.

    DamagedError ones that are newer are reported and moved to `<workdir>/damaged_checkpoints`.

    Args:
      like: as for `restore`.

    Raises:
      UsageError: all are damaged, or one cannot be read for a reason that may pass.
    """
    self._finish_save()
    sharding.gather(None)  # the first process has put the directory in order
    views = sharding.gather(self.steps)
    if views.count(views[0]) != len(views):
      raise UsageError(
        f"the processes see different checkpoints in {self.directory}: {views}; --workdir has to "
        "be a directory that all hosts share"
      )
    damaged: dict[int, DamagedError] = {}
    for step in reversed(views[0]):
      restored = self._load_state(step, like)
      if isinstance(restored, Restored):
        self._move_damaged(list(damaged))
        return restored
      log.warning("the checkpoint %s is damaged (%s): passed over", self.path(step), restored)
      damaged[step] = restored
    if not damaged:
      return None
    # They stay where they are, so that the same command does not start from zero the next time.
    faults = "; ".join(f"{step}: {fault}" for step, fault in damaged.items())
    raise UsageError(
      f"no checkpoint in {self.directory} is whole ({faults}); move that directory away to start "
      "from the beginning, or put back a copy of a whole one"
    )

  def restore_weights(
    self, step: int, placement: jax.sharding.Sharding | None = None
  ) -> tuple[Tree, Tree]:
    """(parameters, batch statistics) of one checkpoint, without knowing model or optimizer.

    Args:
      step: one of `steps`.
      placement: of all arrays; None: as numpy arrays.

    Raises:
      UsageError: the checkpoint is damaged.
    """

    def weights(record: Record) -> dict[str, Tree]:
      records.check_announced(record, orbax_io.weight_shapes(self.path(step)))
      return {part: records.tree_of(record.leaves[part], placement) for part in orbax_io.WEIGHTS}

    loaded = self._load(step, weights)
    if isinstance(loaded, DamagedError):
      raise UsageError(self._damaged(step, loaded))
    return loaded[1]["params"], loaded[1]["batch_stats"]

  def _load_state(self, step: int, like: TrainState) -> Restored | DamagedError:
    path = self.path(step)

    def check(record: Record) -> TrainState:
      records.check_same_leaves(record, like, path)
      return like

    loaded = self._load(step, check)
    if isinstance(loaded, DamagedError):
      return loaded
    record, state = loaded
    return Restored(state, record.iterator, record.metrics, path)

  def _load(self, step: int, like_of: Callable[[Record], Any]) -> tuple[Record, Any] | DamagedError:
    """What all processes together make of one checkpoint.

    Args:
      step: of the checkpoint.
      like_of: shapes, dtypes and places of what to load: a train state, or some parts by name.

    Raises:
      UsageError: it is whole, as far as known, but of no use; or it cannot be read at present.
    """
    loaded: Any = None
    fault: tuple[str, bool] | None = None
    with quiet("absl", "asyncio"):
      try:
        step_directories.check_readable(self.path(step))
        record = self._record(step)
        loaded = orbax_io.load_alone(self.path(step), like_of(record))
      except UsageError as error:
        fault = (str(error), False)
      except Exception as error:  # Orbax raises whatever its storage layers do
        reason = records.reason(error)
        fault = (reason, True)
        if not records.is_damage(error):
          fault = (
            f"cannot read the checkpoint {self.path(step)}, which may be whole: {reason}; mend "
            "that and give the same command again",
            False,
          )
      if fault:
        orbax_io.settle_failed_load()
    # One process that cannot read its part must not leave the others waiting for it.
    faults = [each for each in sharding.gather(fault) if each is not None]
    for text, is_damage in faults:
      if not is_damage:
        raise UsageError(text)
    if faults:
      return DamagedError(faults[0][0])
    for part, tree in records.parts(loaded).items():
      if fingerprint(tree) != record.fingerprints[part]:
        return DamagedError(f"its {part} is not what was saved")
    return record, loaded

  def _record(self, step: int) -> Record:
    if step not in self._records:
      try:
        stored = (self.path(step) / orbax_io.RECORD / orbax_io.RECORD_FILE).read_bytes()
      except FileNotFoundError:
        orbax_io.refuse_earlier_format(self.path(step))
        raise
      self._records[step] = records.from_json(stored, step)
    return self._records[step]

  def _finish_save(self) -> None:
    """Waits for the save that is under way; then deletes what need not be kept."""
    if self._saving is None:
      return
    step, record, response = self._saving
    self._saving = None
    faults = [fault for fault in sharding.gather(orbax_io.outcome(response)) if fault]
    if faults:
      self._give_up(step)
      raise UsageError(self._failure(step, faults[0]))
    self._records[step] = record
    if jax.process_index() != 0:
      return
    try:
      # Of one whose record cannot be read nothing is known: it stays, and takes no other's place.
      scores = {step: self.metrics(step) for step in self.steps}
      known = [step for step in scores if step in self._records]
      kept = {*known[-self._keep :], _best(scores)}
      for old in set(known) - kept:
        step_directories.delete(self.path(old))
      step_directories.clear_remains(self.directory)  # of the one that this has replaced
    except (OSError, UsageError) as error:
      log.warning("cannot delete an old checkpoint: %s", error)

  def _damaged(self, step: int, error: DamagedError) -> str:
    there = ", ".join(map(str, self.steps))
    return (
      f"the checkpoint {self.path(step)} is damaged ({error}); take another one, there are: {there}"
    )

  def _give_up(self, step: int) -> None:
    """Removes what a failed save has left."""
    if jax.process_index() == 0:
      try:
        step_directories.clear_remains(self.directory)
      except OSError as error:
        log.warning("cannot remove what the failed save of step %d has left: %s", step, error)

  def _failure(self, step: int, fault: str) -> str:
    try:
      last = self.latest_step
      good = "there is none before it"
      if last is not None:
        good = f"the last good one is {self.path(last)}"
    except UsageError:  # what is in the way of one may be in that of the other
      good = "those before it are untouched"
    return (
      f"cannot write the checkpoint {self.path(step)}: {fault}; {good}. Mend that and give the "
      "same command again, which goes on from there"
    )

  def _move_damaged(self, steps: list[int]) -> None:
    if not steps or self._read_only:
      return
    fault = None
    if jax.process_index() == 0:
      try:
        for step in steps:
          place = step_directories.move(
            self.path(step), self.directory.with_name("damaged_checkpoints")
          )
          log.warning("the damaged checkpoint of step %d is now %s", step, place)
      except OSError as error:
        fault = f"cannot move a damaged checkpoint out of {self.directory}: {error}"
    faults = [each for each in sharding.gather(fault) if each]
    if faults:
      raise UsageError(f"{faults[0]}; move it away yourself")


def restore_path(path: PathLike, like: TrainState) -> Restored:
  """Loads the checkpoint in the directory `<workdir>/checkpoints/<step>`.

  Raises:
    UsageError: there is none, or it is damaged.
  """
  place = absolute(path)
  if not place.name.isdecimal() or place.parent.name != "checkpoints" or not place.is_dir():
    raise UsageError(f"{place} is no checkpoint; name a directory RUN/checkpoints/STEP")
  with Checkpoints(place.parent.parent, read_only=True) as checkpoints:
    return checkpoints.restore(checkpoints.resolve(place.name), like)


def _directory(workdir: PathLike) -> epath.Path:
  return absolute(workdir) / "checkpoints"  # Orbax takes absolute paths only


def _best(metrics: dict[int, dict[str, float] | None]) -> int | None:
  scores = {step: values[_BEST] for step, values in metrics.items() if values and _BEST in values}
  return max(scores, key=lambda step: (scores[step], step), default=None)
