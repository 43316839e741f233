"""Checkpoints of a run: asynchronous, atomic, the latest few and the best.

The only module that imports Orbax.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from lip_jax.errors import UsageError
from lip_jax.train_state import TrainState, Tree

_STATE = "state"
_ITERATOR = "iterator"
_BEST = "top1"
_WEIGHTS = ("params", "batch_stats")


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint holds: the train state and the input pipeline's state after the same step."""

  state: TrainState
  iterator: dict[str, Any]


def has_checkpoints(workdir: Path) -> bool:
  """Whether the run in `workdir` has saved anything yet."""
  directory = _directory(workdir)
  return directory.is_dir() and any(entry.name.isdecimal() for entry in directory.iterdir())


class Checkpoints:
  """The checkpoints of one run, in `<workdir>/checkpoints/<step>`.

  A checkpoint appears under its name only when it is complete. Use as a context manager: leaving it
  waits for the save that is under way.

  Args:
    workdir: the run's directory.
    keep: how many of the latest to keep, beside the one with the best validation top-1.
    read_only: never delete anything, not even remains of interrupted saves.
  """

  def __init__(self, workdir: str | Path, *, keep: int = 2, read_only: bool = False):
    self.directory = _directory(workdir)
    if read_only and not self.directory.is_dir():
      raise UsageError(
        f"no checkpoints under {Path(workdir).resolve()}; give the --workdir of a training run"
      )
    policies = ocp.training.preservation_policies
    keep_latest = policies.LatestN(keep)
    keep_best = policies.BestN(
      get_metric_fn=lambda metrics: metrics[_BEST], n=1, keep_checkpoints_without_metrics=False
    )
    self._checkpointer = ocp.training.Checkpointer(
      self.directory,
      preservation_policy=(
        policies.PreserveAll()
        if read_only
        else policies.AnyPreservationPolicy([keep_latest, keep_best])
      ),
      cleanup_tmp_directories=not read_only,
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    self._checkpointer.close()

  @property
  def steps(self) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    return [info.step for info in self._checkpointer.checkpoints]

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, None if there is none."""
    return self.steps[-1] if self.steps else None

  @property
  def best_step(self) -> int | None:
    """Step of the checkpoint with the best validation top-1, None if none was evaluated."""
    scored = [info for info in self._checkpointer.checkpoints if info.metrics]
    best = max(scored, key=lambda info: (info.metrics[_BEST], info.step), default=None)
    return None if best is None else best.step

  def metrics(self, step: int) -> dict[str, float] | None:
    """Validation results saved with a checkpoint, None if it has none or does not exist."""
    for info in self._checkpointer.checkpoints:
      if info.step == step:
        return info.metrics
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

  def path(self, step: int) -> Path:
    """Directory of one checkpoint."""
    return self.directory / str(step)

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
    """
    self._checkpointer.save_checkpointables_async(
      step,
      {_STATE: state},
      metrics=metrics,
      custom_metadata={_ITERATOR: iterator},
      overwrite=True,
      force=True,
    )

  def restore(self, step: int, like: TrainState) -> Restored:
    """Loads one checkpoint.

    Args:
      step: one of `steps`.
      like: what `train_state.abstract` gives: the expected shapes and dtypes, and the shardings
        that the result is to have.

    Raises:
      UsageError: the checkpoint is damaged or holds something else.
    """
    try:
      state = self._checkpointer.load_checkpointables(step, {_STATE: like})[_STATE]
      iterator = self._checkpointer.metadata(step).custom_metadata[_ITERATOR]
    except Exception as error:  # Orbax raises whatever its storage layers do
      raise UsageError(
        f"cannot load the checkpoint {self.path(step)}: it is damaged, or of another model or "
        f"optimizer than this configuration's. Delete it to go on from the one before it, or give "
        f"the configuration that it was saved with ({str(error).splitlines()[0][:200]})"
      ) from error
    return Restored(state, iterator)


def restore_path(path: str | Path, like: TrainState) -> Restored:
  """Loads the checkpoint in the directory `<workdir>/checkpoints/<step>`.

  Raises:
    UsageError: there is none.
  """
  path = Path(path).resolve()
  if not path.name.isdecimal() or path.parent.name != "checkpoints" or not path.is_dir():
    raise UsageError(f"{path} is no checkpoint; name a directory RUN/checkpoints/STEP")
  with Checkpoints(path.parent.parent, read_only=True) as checkpoints:
    return checkpoints.restore(checkpoints.resolve(path.name), like)


def _directory(workdir: str | Path) -> Path:
  return Path(workdir).resolve() / "checkpoints"  # Orbax takes absolute paths only


def weight_shapes(path: Path) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """What parameters and batch statistics a checkpoint announces, before any is read.

  Args:
    path: from `Checkpoints.path`.

  Returns:
    {"params": ..., "batch_stats": ...}, each by the path in the network, dots between the parts.

  Raises:
    UsageError: the checkpoint is damaged, or its arrays are cut in another way than Orbax does,
      which could make little data fill all memory.
  """
  try:
    trees = ocp.checkpointables_metadata(path).metadata[_STATE]
    found = {}
    for part in _WEIGHTS:
      leaves = jax.tree_util.tree_flatten_with_path(trees[part])[0]
      found[part] = {
        jax.tree_util.keystr(keys, simple=True, separator="."): jax.ShapeDtypeStruct(
          _bounded(leaf), leaf.dtype
        )
        for keys, leaf in leaves
      }
    return found
  except Exception as error:  # Orbax raises whatever its storage layers do
    raise _unreadable(path, error) from error


def restore_weights(path: Path) -> tuple[Tree, Tree]:
  """(parameters, batch statistics) of a checkpoint, without knowing its optimizer or mesh.

  Args:
    path: from `Checkpoints.path`; its `weight_shapes` have been checked.

  Raises:
    UsageError: the checkpoint is damaged.
  """
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  try:
    trees = ocp.checkpointables_metadata(path).metadata[_STATE]
    like = {
      part: jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), trees[part])
      for part in _WEIGHTS
    }
    with context:
      state = ocp.load_checkpointables(path, {_STATE: like})[_STATE]
  except Exception as error:
    raise _unreadable(path, error) from error
  return state["params"], state["batch_stats"]


def _bounded(leaf: Any) -> tuple[int, ...]:
  """Shape of an array, none of whose chunks is larger than the whole."""
  chunk = leaf.storage_metadata.chunk_shape
  if len(chunk) != len(leaf.shape) or any(
    part > max(whole, 1) for part, whole in zip(chunk, leaf.shape, strict=True)
  ):
    raise ValueError(f"an array of shape {leaf.shape} is stored in parts of {chunk}")
  return tuple(leaf.shape)


def _unreadable(path: Path, error: Exception) -> UsageError:
  lines = str(error).splitlines() or [""]
  return UsageError(
    f"cannot load the weights in {path}: they are damaged or something else "
    f"({type(error).__name__}: {lines[0][:200]}); take another checkpoint, or copy it again"
  )
