"""Arrays of one checkpoint: written by Orbax, read through TensorStore, in which Orbax keeps them.

Orbax's own load forsakes the other reads when one fails: they end after its event loop is closed,
in threads, with pages of errors that nobody can catch. Here all have ended before an error is
raised, and no process waits for another.
"""

import concurrent.futures
import os
from typing import Any, TypeAlias

import jax
import numpy as np
import tensorstore
from etils import epath
from orbax.checkpoint import v1 as ocp

from lip_jax.training.checkpoint.faults import DamagedError
from lip_jax.training.checkpoint.fingerprint import named
from lip_jax.training.workdir import in_bucket

METADATA_FILE = "metadata/data.json"  # as Orbax calls it
_STATE, _METADATA = "state", "metadata"
_INDEX_BYTES = 10**8  # of memory for the index, which all arrays share
_THREADS = 32

Saving: TypeAlias = ocp.AsyncResponse[None]


def save_async(path: epath.Path, parts: dict[str, Any], metadata: dict[str, str]) -> Saving:
  """Starts saving trees of arrays; returns when the arrays are copied.

  `path` becomes a checkpoint in one go: by its name on a disk, by a last object in a bucket.
  """
  registry = ocp.handlers.local_registry()
  registry.add(ocp.handlers.JsonHandler, checkpointable_name=_METADATA)
  context = ocp.Context()
  context.checkpointables.registry = registry
  context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = True  # which `_read` expects
  context.array.saving.enable_write_sharding_file = False  # whoever reads says where to
  # Else each replica writes a slice of what all have, cut by a program of its own, compiled at the
  # first save. So the first replica writes all: 200 MB of LIP-ResNet-50.
  context.array.saving.use_replica_parallel = False
  with context:
    return ocp.save_checkpointables_async(path, {_STATE: named(parts), _METADATA: metadata})


def read(path: epath.Path, like: dict[str, Any]) -> dict[str, Any]:
  """Trees of arrays.

  Args:
    path: of the checkpoint.
    like: their shapes and dtypes, and the shardings that they shall have; numpy arrays without one.

  Raises:
    DamagedError: an array is of another shape or dtype; no memory was taken for it.
    ValueError: from TensorStore, for whatever it meets with.
  """
  if in_bucket(path):
    bucket, _, directory = str(path).removeprefix("gs://").partition("/")
    base = {"driver": "gcs", "bucket": bucket, "path": f"{directory}/{_STATE}/"}
  else:
    base = {"driver": "file", "path": f"{os.fspath(path)}/{_STATE}/"}
  context = tensorstore.Context({"cache_pool#index": {"total_bytes_limit": _INDEX_BYTES}})
  leaves = named(like)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    arrays = threads.map(
      lambda name, leaf: _read(base, name, leaf, context), leaves, leaves.values()
    )
  return jax.tree.unflatten(jax.tree.structure(like), arrays)


def _read(
  base: dict[str, str], name: str, like: Any, context: tensorstore.Context
) -> np.ndarray | jax.Array:
  store = tensorstore.open(
    {
      "driver": "zarr3",
      "kvstore": {
        "driver": "ocdbt",
        "base": base,
        "path": f"{name}/",
        "cache_pool": "cache_pool#index",
      },
      "recheck_cached_data": False,
      "recheck_cached_metadata": False,
      "fill_missing_data_reads": False,
    },
    open=True,
    read=True,
    context=context,
  ).result()
  if store.shape != tuple(like.shape) or store.dtype.numpy_dtype != like.dtype:
    stored = f"{store.dtype.name}{list(store.shape)}"
    raise DamagedError(f"its {name} is {stored}, not {like.dtype}{list(like.shape)}")
  # A little data could fill all memory if it were stored as a corner of something larger.
  chunk = store.chunk_layout.read_chunk_template.shape
  if any(part > max(whole, 1) for part, whole in zip(chunk, store.shape, strict=True)):
    raise DamagedError(f"its {name} of shape {store.shape} is stored in parts of {chunk}")
  if like.sharding is None:
    return np.asarray(store.read().result())
  parts: dict[str, np.ndarray] = {}  # several devices may hold the same

  def part(index: Any) -> np.ndarray:
    if str(index) not in parts:
      parts[str(index)] = store[index].read().result()
    return parts[str(index)]

  return jax.make_array_from_callback(store.shape, like.sharding, part)
