"""What a checkpoint says about itself, in JSON with a digest: what was saved, and is it whole?"""

import dataclasses
import errno
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lip_jax.errors import UsageError
from lip_jax.training.checkpoint.fingerprint import Leaf, fingerprint, leaves_of
from lip_jax.training.train_state import TrainState, Tree

FORMAT = 1

# What TensorStore, storage services and XLA say when something fails that may pass.
_PASSING = (
  "PERMISSION_DENIED",
  "UNAUTHENTICATED",
  "UNAVAILABLE",
  "DEADLINE_EXCEEDED",
  "ABORTED",
  "RESOURCE_EXHAUSTED",
  "Permission denied",
  "Forbidden",
  "Input/output error",
  "Out of memory",
)

# Clients of buckets; an object that is not there is a FileNotFoundError to all of them.
_CLIENTS = ("aiohttp", "gcsfs", "google", "requests")


class DamagedError(Exception):
  """A checkpoint, or a part of it, is not what was saved."""


@dataclasses.dataclass(frozen=True)
class Record:
  """Written beside the arrays of a train state.

  Attributes:
    step: number of updates.
    iterator: state of the input pipeline after the same step.
    metrics: validation results of this state, if it was evaluated.
    fingerprints: of each field of the train state.
    leaves: (path, dtype, shape) of the leaves of each field.
    format: of the checkpoint; numbers that are not ours are refused.
  """

  step: int
  iterator: dict[str, Any]
  metrics: dict[str, float] | None
  fingerprints: dict[str, str]
  leaves: dict[str, list[Leaf]]
  format: int = FORMAT

  def to_json(self) -> dict[str, str]:
    """The record as text, and its digest."""
    text = json.dumps(dataclasses.asdict(self))
    return {"text": text, "sha256": _digest(text)}


def describe(
  state: TrainState,
  iterator: dict[str, Any],
  *,
  step: int,
  metrics: dict[str, float] | None,
) -> Record:
  """Record of a train state; all processes that share its arrays have to call this together."""
  named = parts(state)
  return Record(
    step=step,
    iterator=iterator,
    metrics=metrics,
    fingerprints={name: fingerprint(tree) for name, tree in named.items()},
    leaves={name: leaves_of(tree) for name, tree in named.items()},
  )


def from_json(stored: bytes, step: int) -> Record:
  """Inverse of `Record.to_json`.

  Args:
    stored: what was read from the file.
    step: of the checkpoint, by the name of its directory.

  Raises:
    DamagedError: this is not what was written, or of another step.
    UsageError: it was written in another format.
  """
  try:
    content = json.loads(stored)
    text = content["text"]
    whole = content["sha256"] == _digest(text)
  except (ValueError, TypeError, KeyError, AttributeError):
    whole = False
  if not whole:
    raise DamagedError("its record does not have the digest that it was saved with")
  values = json.loads(text)
  if values["format"] != FORMAT:
    raise UsageError(
      f"the checkpoint of step {step} has the format {values['format']}, this version of lip_jax "
      f"reads format {FORMAT}; use the version that wrote it"
    )
  record = Record(**values)
  if record.step != step:
    raise DamagedError(f"it is the checkpoint of step {record.step}")
  _check_types(record)
  return record


def _check_types(record: Record) -> None:
  """Raises DamagedError unless a record holds what its type says: the digest is not a secret."""
  metrics = {} if record.metrics is None else record.metrics
  leaves, fingerprints = record.leaves, record.fingerprints
  try:
    right = (
      all(isinstance(value, int | float) for value in metrics.values())
      and fingerprints.keys() == leaves.keys()
      and all(isinstance(value, str) for value in fingerprints.values())
      and all(
        all(isinstance(key, str | int) for key in keys)
        and jnp.dtype(dtype).kind != "O"
        and all(isinstance(size, int) and size >= 0 for size in shape)
        for part in leaves.values()
        for keys, dtype, shape in part
      )
    )
  except (AttributeError, TypeError, ValueError):
    right = False
  if not right:
    raise DamagedError("its record holds other things than a record does")


def check_announced(record: Record, announced: dict[str, dict[str, Any]]) -> None:
  """Compares leaves with what the arrays' own files announce, before memory is taken for them.

  Args:
    record: of a checkpoint.
    announced: for each part, arrays or their shapes by path, with dots between the keys.

  Raises:
    DamagedError: they are others.
  """
  for part, arrays in announced.items():
    there = {".".join(map(str, keys)): tuple(shape) for keys, _, shape in record.leaves[part]}
    if there != {name: array.shape for name, array in arrays.items()}:
      raise DamagedError(f"its record is of other {part}")


def check_same_leaves(record: Record, like: TrainState, path: epath.Path) -> None:
  """Raises UsageError if a checkpoint holds other arrays than are wanted; names one of them."""
  for part, tree in parts(like).items():
    there = {_name(part, keys): _type(dtype, shape) for keys, dtype, shape in record.leaves[part]}
    here = {_name(part, keys): _type(dtype, shape) for keys, dtype, shape in leaves_of(tree)}
    for name in there | here:
      if there.get(name) != here.get(name):
        raise UsageError(
          f"the checkpoint {path} is of another model or optimizer than this configuration's: "
          f"{name} is {there.get(name, 'absent')} in it, and here {here.get(name, 'absent')} (the "
          "first axis of batch_stats are the batch-norm groups of a step: global_batch_size / "
          "model.bn_group_size); give the configuration that it was saved with"
        )


def tree_of(leaves: list[Leaf], placement: jax.sharding.Sharding | None) -> Tree:
  """Nested dicts of what to load: shapes with a sharding, or empty numpy arrays."""
  tree: Tree = {}
  for keys, dtype, shape in leaves:
    inner = tree
    for key in keys[:-1]:
      inner = inner.setdefault(key, {})
    inner[keys[-1]] = (
      np.empty(shape, jnp.dtype(dtype))
      if placement is None
      else jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=placement)
    )
  return tree


def reason(error: BaseException) -> str:
  """One line of what is behind an error."""
  while error.__cause__ is not None:
    error = error.__cause__
  lines = str(error).splitlines()
  return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def is_damage(error: BaseException) -> bool:
  """Whether an error of loading is the checkpoint's fault.

  It is not where permissions, the network, the disk or memory have failed: that may pass, and a
  checkpoint that cannot be read today is not to be given up.
  """
  if isinstance(error, BaseExceptionGroup):
    return all(map(is_damage, error.exceptions))
  if isinstance(error, MemoryError | TimeoutError | ConnectionError | PermissionError):
    return False
  if type(error).__module__.partition(".")[0] in _CLIENTS:
    return False
  if isinstance(error, OSError) and error.errno not in (
    None,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
  ):
    return False
  if any(text in str(error) for text in _PASSING):
    return False
  cause = error.__cause__ or error.__context__
  return cause is None or is_damage(cause)


def parts(state: TrainState | dict[str, Any]) -> dict[str, Any]:
  """Parts of a train state by name, each with a fingerprint of its own."""
  if isinstance(state, dict):
    return state
  return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _name(part: str, keys: list[str | int]) -> str:
  return "/".join(map(str, (part, *keys)))


def _type(dtype: str, shape: list[int]) -> str:
  return f"{dtype}{list(shape)}"


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()
