"""What a checkpoint says about itself, in JSON with a digest: what was saved, and is it whole?"""

import dataclasses
import hashlib
import json
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lip_jax.errors import UsageError
from lip_jax.training.checkpoint.faults import DamagedError
from lip_jax.training.checkpoint.fingerprint import fingerprint, named

FORMAT = 2

Mode = Literal["max", "min"]


@dataclasses.dataclass(frozen=True)
class Metadata:
  """Written beside the arrays of a train state.

  Attributes:
    step: number of updates.
    iterator: state of the input pipeline after the same step.
    metrics: validation results of this state, if it was evaluated.
    best_metric: the one of them by which checkpoints are compared, if they are.
    best_mode: whether the most or the least of it is best.
    fingerprints: of each part of the train state.
    arrays: dtype and shape of each, by its path in the train state, dots between the keys.
    format: of the checkpoint; numbers that are not ours are refused.
  """

  step: int
  iterator: dict[str, Any]
  metrics: dict[str, float] | None
  best_metric: str | None
  best_mode: Mode
  fingerprints: dict[str, str]
  arrays: dict[str, list[Any]]
  format: int = FORMAT

  @property
  def score(self) -> float | None:
    """The metric by which checkpoints are compared, of which more is better; None without one."""
    value = (self.metrics or {}).get(self.best_metric or "")
    return -value if value is not None and self.best_mode == "min" else value

  def to_json(self) -> dict[str, str]:
    """The metadata as text, and its digest."""
    text = json.dumps(dataclasses.asdict(self))
    return {"text": text, "sha256": _digest(text)}

  @property
  def weights(self) -> tuple[str, str]:
    """Parts of the train state that a network is made of: its parameters, and its statistics."""
    return "ema" if "ema" in self.fingerprints else "params", "batch_stats"

  def like(self, part: str, sharding: jax.sharding.Sharding | None = None) -> dict[Any, Any]:
    """One part of the train state, as nested dicts of shapes and dtypes; empty if it had none.

    Keys that are numbers are integers, as in nnx.
    """
    tree: dict[Any, Any] = {}
    for name, (dtype, shape) in self.arrays.items():
      first, *keys = (int(key) if key.isdecimal() else key for key in name.split("."))
      if first == part:
        inner = tree
        for key in keys[:-1]:
          inner = inner.setdefault(key, {})
        inner[keys[-1]] = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=sharding)
    return tree


def describe(parts: dict[str, Any], **values: Any) -> Metadata:
  """Metadata of a train state; all processes that share its arrays have to call this together."""
  fingerprints = {name: fingerprint(tree) for name, tree in parts.items()}
  return Metadata(fingerprints=fingerprints, arrays=_described(parts), **values)


def from_json(stored: bytes, step: int) -> Metadata:
  """Inverse of `Metadata.to_json`.

  Args:
    step: of the checkpoint, by the name of its directory.

  Raises:
    DamagedError: this is not what was written, or of another step.
    UsageError: it was written in another format.
  """
  try:
    content = json.loads(stored)
    text = content["text"]
    whole = content["sha256"] == _digest(text)
  except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
    whole = False
  if not whole:
    raise DamagedError("its metadata does not have the digest that it was saved with")
  values = json.loads(text)
  if values["format"] != FORMAT:
    raise UsageError(
      f"the checkpoint of step {step} has the format {values['format']}, this version of lip_jax "
      f"reads format {FORMAT}; use the version that wrote it"
    )
  try:
    metadata = Metadata(**values)
    right = _has_right_types(metadata)
  except (AttributeError, TypeError, ValueError):
    right = False
  if not right or metadata.step != step:
    raise DamagedError(f"its metadata is not that of a checkpoint of step {step}")
  return metadata


def _has_right_types(metadata: Metadata) -> bool:
  """Whether metadata holds what its type says: the digest is not a secret."""
  return (
    all(isinstance(value, int | float) for value in (metadata.metrics or {}).values())
    and isinstance(metadata.best_metric, str | None)
    and all(isinstance(value, str) for value in metadata.fingerprints.values())
    and all(
      jnp.dtype(dtype).kind != "O" and all(isinstance(size, int) and size >= 0 for size in shape)
      for dtype, shape in metadata.arrays.values()
    )
  )


def check_same_leaves(metadata: Metadata, like: dict[str, Any], path: Any) -> None:
  """Raises UsageError if a checkpoint holds other arrays than are wanted; names one of them."""
  there, here = metadata.arrays, _described(like)
  for name in there | here:
    if there.get(name) != here.get(name):
      stored, wanted = (
        "{}{}".format(*of[name]) if name in of else "absent" for of in (there, here)
      )
      raise UsageError(
        f"the checkpoint {path} is of another model or optimizer than this configuration's: {name} "
        f"is {stored} in it, and here {wanted} (the first axis of batch_stats are the batch-norm "
        "groups of a step: global_batch_size / model.bn_group_size); give the configuration it was "
        "saved with"
      )


def _described(parts: dict[str, Any]) -> dict[str, list[Any]]:
  return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in named(parts).items()}


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()
