"""What Orbax does with one checkpoint's directory: saving, loading, what it announces.

The only module that imports Orbax.
"""

import gc
import time
from typing import Any, TypeAlias

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from lip_jax.errors import UsageError
from lip_jax.training.checkpoint import metadata as records
from lip_jax.training.checkpoint.quiet import quiet
from lip_jax.training.train_state import TrainState

STATE = "state"
RECORD, RECORD_FILE = "record", "record.json"
WEIGHTS = ("params", "batch_stats")  # of a train state: what a network is made of

Saving: TypeAlias = ocp.AsyncResponse[None]


def start_saving(path: epath.Path, state: TrainState, record: Any) -> Saving:
  """Starts saving; returns when the arrays are copied."""
  with _context():
    return ocp.save_checkpointables_async(path, {STATE: state, RECORD: record})


def outcome(response: Saving) -> str | None:
  """Waits for a save; what went wrong, if anything."""
  try:
    response.result()
  except Exception as error:
    return records.reason(error)
  return None


class _RecordHandler(ocp.handlers.JsonHandler):
  def __init__(self):
    super().__init__(RECORD_FILE)


def _context() -> ocp.Context:
  context = ocp.Context()
  registry = ocp.handlers.local_registry()
  registry.add(_RecordHandler, checkpointable_name=RECORD)
  context.checkpointables.registry = registry
  return context


def load_alone(path: epath.Path, like: Any) -> Any:
  """Orbax's load, in which a process waits for no other: some may fail, and say so later."""
  context = _context()
  process = ocp.multihost.process_index()
  context.multiprocessing.primary_host = process
  context.multiprocessing.active_processes = {process}
  context.pytree.loading.partial_load = True  # `like` may be some parts of the state
  with context:
    return ocp.load_checkpointables(path, {STATE: like})[STATE]


def refuse_earlier_format(path: epath.Path) -> None:
  """Raises UsageError if a checkpoint is of the time when there were no records."""
  if "iterator" in (ocp.checkpointables_metadata(path).custom_metadata or {}):
    raise UsageError(
      f"the checkpoint {path} was written by an earlier version of lip_jax, in a format that "
      "cannot be verified; go on with that version, or start again in a new --workdir"
    )


def settle_failed_load() -> None:
  """To be called while it is `quiet`, so that libraries' further errors are not told later."""
  gc.collect()  # asyncio tells of errors that nobody fetched when they are thrown away
  time.sleep(0.05)  # TensorStore does of other arrays of the same checkpoint


def weight_shapes(path: epath.Path) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """What parameters and batch statistics a checkpoint announces, before any is read.

  Args:
    path: from `Checkpoints.path`.

  Returns:
    {"params": ..., "batch_stats": ...}, each by the path in the network, dots between the parts.

  Raises:
    UsageError: the checkpoint is damaged, or its arrays are cut in another way than Orbax does,
      which could make little data fill all memory.
  """
  with quiet("absl", "asyncio"):
    try:
      with _context():
        trees = ocp.checkpointables_metadata(path).metadata[STATE]
      return {
        part: {
          jax.tree_util.keystr(keys, simple=True, separator="."): jax.ShapeDtypeStruct(
            _bounded(leaf), leaf.dtype
          )
          for keys, leaf in jax.tree_util.tree_flatten_with_path(trees[part])[0]
        }
        for part in WEIGHTS
      }
    except Exception as error:  # Orbax raises whatever its storage layers do
      reason = records.reason(error)
      settle_failed_load()
  raise UsageError(
    f"cannot load the weights in {path}: they are damaged or something else ({reason}); take "
    "another checkpoint, or copy it again"
  )


def _bounded(leaf: Any) -> tuple[int, ...]:
  """Shape of an array, none of whose chunks is larger than the whole."""
  chunk = leaf.storage_metadata.chunk_shape
  if len(chunk) != len(leaf.shape) or any(
    part > max(whole, 1) for part, whole in zip(chunk, leaf.shape, strict=True)
  ):
    raise ValueError(f"an array of shape {leaf.shape} is stored in parts of {chunk}")
  return tuple(leaf.shape)
