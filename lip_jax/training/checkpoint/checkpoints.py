"""Checkpoints of a run: asynchronous, atomic, verified, the latest few and the best.

What lies in a checkpoint, `<workdir>/checkpoints/<step>`:

- `state/`: the arrays. Neither Orbax nor TensorStore notices every changed byte in them.
- `metadata/data.json`: the state of the input pipeline, the validation results, and a fingerprint
  of each part of the train state, with a digest of it all. No state is given out whose
  fingerprints are not those.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath

from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.training import workdir as workdir_lib
from lip_jax.training.checkpoint import arrays, loading, step_directories
from lip_jax.training.checkpoint import metadata as metadata_lib
from lip_jax.training.checkpoint.faults import DamagedError, reason
from lip_jax.training.checkpoint.fingerprint import named
from lip_jax.training.checkpoint.metadata import Metadata, Mode
from lip_jax.training.workdir import PathLike

log = logging.getLogger("lip_jax")

Tree = dict[Any, Any]


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint holds: the train state and the input pipeline's state after the same step."""

  state: Any
  iterator: dict[str, Any]
  metrics: dict[str, float] | None  # validation results of this state, if it was evaluated
  path: epath.Path


def has_checkpoints(workdir: PathLike) -> bool:
  """Whether the run in `workdir` has saved anything yet."""
  return bool(step_directories.steps_in(_directory(workdir)))


def most_at_a_time(keep: int) -> int:
  """How many lie in a workdir at most: the latest, the best, and the one being written."""
  return keep + 2


class Checkpoints:
  """The checkpoints of one run, in `<workdir>/checkpoints/<step>`, on a disk or in a bucket.

  A checkpoint is one of them only when it is complete. Leaving the context waits for the save that
  is under way. On several processes all call `save` and `restore...`, and leave the context, at the
  same points; they come to the same result or all raise.

  A train state is a dataclass whose fields are trees of arrays, or None. Of these only
  `restore_weights` knows any: `params`, `ema` where there is one, and `batch_stats`.

  Args:
    workdir: the run's directory; on several processes one that all of them see.
    best_metric: of those given to `save`, by which the best is known; written into the checkpoints.
    best_mode: whether the "max" or the "min" of it is best.
    read_only: never change anything, not even remains of interrupted saves.

  Raises:
    UsageError: the directory cannot be written, or, read only, does not exist.
  """

  def __init__(
    self,
    workdir: PathLike,
    *,
    keep: int = 2,
    best_metric: str | None = None,
    best_mode: Mode = "max",
    read_only: bool = False,
  ):
    self.directory = _directory(workdir)
    self._keep = keep
    self._best = {"best_metric": best_metric, "best_mode": best_mode}
    self._read_only = read_only
    self._saving: tuple[Metadata, arrays.Saving] | None = None
    if read_only and not self.directory.is_dir():
      raise UsageError(
        f"no checkpoints under {self.directory.parent}; give the --workdir of a training run"
      )
    if not read_only and jax.process_index() == 0:
      workdir_lib.check_access(self.directory)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, error: type[BaseException] | None, *_) -> None:
    if error is None:
      self._finish_save()
    elif self._saving and (fault := _fault_of(self._saving[1].result)):
      # What ended the run is not to be hidden by a further error.
      log.error("%s", self._cannot_write(self._saving[0].step, fault))

  @property
  def steps(self) -> list[int]:
    """Steps that have a checkpoint, ascending.

    Raises:
      UsageError: the directory cannot be read.
    """
    try:
      return step_directories.steps_in(self.directory)
    except Exception as error:  # a bucket's clients have errors of their own
      why = workdir_lib.reason(self.directory, error)
      raise UsageError(f"cannot read {self.directory}: {why}") from error

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, None if there is none."""
    return max(self.steps, default=None)

  @property
  def best_step(self) -> int | None:
    """Step of the best checkpoint, of equal ones the latest; None if none was evaluated."""
    return _best(self._readable())

  def metrics(self, step: int) -> dict[str, float] | None:
    """Validation results saved with a checkpoint, None if it has none that can be read."""
    with contextlib.suppress(Exception):  # whatever the storage layers raise
      return loading.read_metadata(self.path(step)).metrics
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

  def check_room(self, like: Any) -> None:
    """Warns if the disk has no room for all checkpoints of states like this that the run will keep.

    Raises:
      UsageError: there is no room for a single one.
    """
    free = workdir_lib.free_space(self.directory)
    if free is None or jax.process_index() != 0:
      return
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    count = most_at_a_time(self._keep)
    there = sum(file.stat().st_size for file in Path(self.directory).rglob("*") if file.is_file())
    text = (
      f"{self.directory} has {free / 1e9:.3g} GB free; a checkpoint of this run takes "
      f"{size / 1e9:.3g} GB, and up to {count} of them lie there at a time"
    )
    if free < size:
      raise UsageError(f"{text}: make room, or take a --workdir on a larger disk")
    if free < size * count - there:
      log.warning("%s: make room, or saving will fail", text)

  def save(
    self,
    state: Any,
    iterator: dict[str, Any],
    *,
    step: int,
    metrics: dict[str, float] | None = None,
  ) -> None:
    """Starts saving; returns when the arrays are copied and may be overwritten.

    Where the same state is saved already, only what is said of it is replaced, at once.

    Args:
      state: train state after `step` updates.
      metrics: validation results of this state, if it was evaluated.

    Raises:
      UsageError: this save, or the one before it, could not be written, or there is another state
        of this step. Checkpoints that were there are untouched.
    """
    self._finish_save()
    parts = _parts(state)
    metadata = metadata_lib.describe(
      parts, iterator=iterator, step=step, metrics=metrics, **self._best
    )
    if sharding.gather(jax.process_index() == 0 and step in self.steps)[0]:
      if fault := _fault_on_first(lambda: self._replace_metadata(metadata)):
        raise UsageError(self._cannot_write(step, fault))
      self._delete_old()
      return
    try:
      saving = arrays.save_async(self.path(step), parts, metadata.to_json())
    except Exception as error:  # Orbax raises whatever its storage layers do
      self._clear_unfinished()
      raise UsageError(self._cannot_write(step, reason(error))) from error
    self._saving = (metadata, saving)

  def restore(self, step: int, like: Any) -> Restored:
    """Loads one checkpoint.

    Args:
      step: one of `steps`.
      like: train state of the expected shapes and dtypes, with the shardings that the result is to
        have, on any mesh.

    Raises:
      UsageError: the checkpoint is damaged (then a DamagedError) or holds something else.
    """
    wanted = _parts(like)

    def check(metadata: Metadata) -> dict[str, Any]:
      metadata_lib.check_same_leaves(metadata, wanted, self.path(step))
      return wanted

    metadata, loaded = loading.load(self.path(step), check)
    state = dataclasses.replace(like, **loaded)
    return Restored(state, metadata.iterator, metadata.metrics, self.path(step))

  def restore_latest(
    self, like: Any, accept: Callable[[Restored], None] = lambda restored: None
  ) -> Restored | None:
    """Loads the newest checkpoint that is whole, None if the run has none at all.

    Damaged ones that are newer are reported and moved to `<workdir>/damaged_checkpoints`, remains
    of interrupted saves deleted, once `accept` has not refused what was loaded.

    Raises:
      UsageError: all are damaged, or one cannot be read for a reason that may pass.
    """
    self._finish_save()
    sharding.gather(None)  # the first process has made the directory
    views = sharding.gather(self.steps)
    if views.count(views[0]) != len(views):
      raise UsageError(
        f"the processes see different checkpoints in {self.directory}: {views}; --workdir has to "
        "be a directory that all hosts share"
      )
    damaged: dict[int, str] = {}
    for step in reversed(views[0]):
      try:
        restored = self.restore(step, like)
      except DamagedError as error:
        log.warning("the checkpoint %s is damaged (%s): passed over", self.path(step), error.fault)
        damaged[step] = error.fault
      else:
        accept(restored)
        self._move_damaged(list(damaged))
        self._clear_unfinished()
        return restored
    if not damaged:
      self._clear_unfinished()
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

    Parameters are the averaged ones, if the train state has such.

    Args:
      step: one of `steps`.
      placement: of all arrays; None: as numpy arrays.

    Raises:
      UsageError: the checkpoint is damaged.
    """

    def like(metadata: Metadata) -> dict[str, Tree]:
      return {part: metadata.like(part, placement) for part in metadata.weights}

    metadata, loaded = loading.load(self.path(step), like)
    params, batch_stats = metadata.weights
    return loaded[params], loaded[batch_stats]

  def weight_shapes(self, step: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Shapes and dtypes of what `restore_weights` gives, by the path in the network, with dots.

    Raises:
      UsageError: the checkpoint is damaged.
    """
    path = self.path(step)
    metadata = loading.together(path, lambda: loading.read_metadata(path))
    return [named(metadata.like(part)) for part in metadata.weights]

  def _readable(self) -> dict[int, Metadata]:
    """Metadata of all checkpoints but those whose cannot be read; restoring these will tell."""
    found = {}
    for step in self.steps:
      with contextlib.suppress(Exception):  # whatever the storage layers raise
        found[step] = loading.read_metadata(self.path(step))
    return found

  def _replace_metadata(self, metadata: Metadata) -> None:
    path = self.path(metadata.step)
    if loading.read_metadata(path).fingerprints != metadata.fingerprints:
      raise UsageError("there is another state of this step, which would be lost")
    workdir_lib.write_text(path / arrays.METADATA_FILE, json.dumps(metadata.to_json()))

  def _finish_save(self) -> None:
    """Waits for the save that is under way; then deletes what need not be kept."""
    if self._saving is None:
      return
    metadata, saving = self._saving
    self._saving = None
    if fault := _any(_fault_of(saving.result)):
      self._clear_unfinished()
      raise UsageError(self._cannot_write(metadata.step, fault))
    self._delete_old()

  def _delete_old(self) -> None:
    def delete() -> None:
      # Of one whose metadata cannot be read nothing is known: it stays, and takes no other's place.
      known = self._readable()
      for step in set(known) - {*list(known)[-self._keep :], _best(known)}:
        step_directories.delete(self.path(step))

    if jax.process_index() == 0 and (fault := _fault_of(delete)):
      log.warning("cannot delete an old checkpoint: %s", fault)

  def _clear_unfinished(self) -> None:
    def clear() -> None:
      step_directories.clear_unfinished(self.directory)

    if not self._read_only and jax.process_index() == 0 and (fault := _fault_of(clear)):
      log.warning("cannot remove what an interrupted save has left: %s", fault)

  def _move_damaged(self, steps: list[int]) -> None:
    def move() -> None:
      for step in steps:
        into = self.directory.with_name("damaged_checkpoints")
        place = step_directories.move(self.path(step), into)
        log.warning("the damaged checkpoint of step %d is now %s", step, place)

    if steps and not self._read_only and (fault := _fault_on_first(move)):
      raise UsageError(
        f"cannot move a damaged checkpoint out of {self.directory}: {fault}; move it away yourself"
      )

  def _cannot_write(self, step: int, fault: str) -> str:
    try:
      last = self.latest_step
      good = "none is there" if last is None else f"the last good one is {self.path(last)}"
    except UsageError:  # what is in the way of one may be in that of the other
      good = "those before it are untouched"
    return (
      f"cannot write the checkpoint {self.path(step)}: {fault}; {good}. Mend that and give the "
      "same command again, which goes on from there"
    )


def restore_path(path: PathLike, like: Any) -> Restored:
  """Loads the checkpoint in the directory `<workdir>/checkpoints/<step>`.

  Raises:
    UsageError: there is none, or it is damaged.
  """
  place = workdir_lib.absolute(path)
  if not place.name.isdecimal() or place.parent.name != "checkpoints" or not place.is_dir():
    raise UsageError(f"{place} is no checkpoint; name a directory RUN/checkpoints/STEP")
  with Checkpoints(place.parent.parent, read_only=True) as checkpoints:
    return checkpoints.restore(checkpoints.resolve(place.name), like)


def _directory(workdir: PathLike) -> epath.Path:
  return workdir_lib.absolute(workdir) / "checkpoints"  # Orbax takes absolute paths only


def _parts(state: Any) -> dict[str, Any]:
  """Fields of a train state by name, without those that hold no array."""
  fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  return {name: tree for name, tree in fields.items() if jax.tree.leaves(tree)}


def _best(metadata: dict[int, Metadata]) -> int | None:
  scores = {step: each.score for step, each in metadata.items() if each.score is not None}
  return max(scores, key=lambda step: (scores[step], step), default=None)


def _fault_of(action: Callable[[], Any]) -> str | None:
  """Why an action has failed, in a line; None if it has not."""
  try:
    action()
  except Exception as error:  # whatever the storage layers raise
    return reason(error)
  return None


def _any(fault: str | None) -> str | None:
  """The first fault that a process has met with; all have to call this together."""
  return next((each for each in sharding.gather(fault) if each), None)


def _fault_on_first(action: Callable[[], Any]) -> str | None:
  """As `_fault_of`, of what the first process does; all have to call this together."""
  return _any(_fault_of(action) if jax.process_index() == 0 else None)
