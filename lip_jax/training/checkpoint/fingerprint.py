"""Fingerprints of array trees: equal bits give equal fingerprints on any mesh and sharding.

A sum modulo 2^32 does not depend on the order of its terms, so each device adds up what it holds:
integer arithmetic makes the result exact.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lip_jax.distributed import sharding

# Up to here numpy is done before a program for the shape is compiled (0.1 s each).
_MOST_ON_HOST = 2**18


def named(tree: Any) -> dict[str, Any]:
  """Leaves of a tree by their path, dots between the keys, which must not make two the same."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
  if len(set(names)) != len(names):
    raise ValueError(f"two arrays of one path among {names}: keys of a train state have no dots")
  return {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def fingerprint(tree: Any) -> str:
  """16 hexadecimal digits that depend on each bit of each leaf, its place, path, dtype and shape.

  A change of a single element always shows; any other change goes unnoticed with a probability of
  about 2^-63. It is a checksum, no defence against forgery. Leaves are jax or numpy arrays of real
  numbers of whole bytes, or of bools, and may be spread over several processes, which then all have
  to call this at the same point.
  """
  on_devices, on_host = [], []
  for name, leaf in named(tree).items():
    seed = np.uint32(zlib.crc32(f"{name} {leaf.dtype} {leaf.shape}".encode()))
    strides = [math.prod(leaf.shape[axis + 1 :]) for axis in range(leaf.ndim)]
    for part, starts in _parts_here(leaf):
      first = sum(start * stride for start, stride in zip(starts, strides, strict=True))
      where = (np.array(strides, np.uint64).astype(np.uint32), np.uint32(first % 2**32), seed)
      if isinstance(part, jax.Array) and part.size > _MOST_ON_HOST:
        on_devices.append(_sums_on_device(part, *where))
      else:
        on_host.append((part, where))
  arrays = jax.device_get([part for part, _ in on_host])  # all at once
  sums = [_sums_on_host(part, *where) for part, (_, where) in zip(arrays, on_host, strict=True)]
  totals = [sum(int(pair[k]) for pair in sums + jax.device_get(on_devices)) for k in range(2)]
  # One exchange between processes, at the end: not a collective for each leaf.
  first, second = (sum(each) % 2**32 for each in zip(*sharding.gather(totals), strict=True))
  return f"{first:08x}{second:08x}"


def _parts_here(leaf: Any) -> list[tuple[Any, list[int]]]:
  """The parts of an array that this process answers for, and where each begins in it."""
  if isinstance(leaf, jax.Array):
    return [
      (shard.data, [place.start or 0 for place in shard.index])
      for shard in leaf.addressable_shards
      if shard.replica_id == 0  # of equal ones, one
    ]
  return [(leaf, [0] * leaf.ndim)] if jax.process_index() == 0 else []


@jax.jit
def _sums_on_device(leaf: jax.Array, strides: jax.Array, first: jax.Array, seed: jax.Array):
  if leaf.dtype == jnp.bool_:
    leaf = leaf.astype(jnp.uint8)
  word = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
  words = jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)
  return jnp.stack(_sums(words, _index(jnp, words.shape, leaf.ndim, strides, first), seed))


def _sums_on_host(
  leaf: np.ndarray, strides: np.ndarray, first: np.uint32, seed: np.uint32
) -> np.ndarray:
  size = leaf.dtype.itemsize
  words = np.ascontiguousarray(leaf).reshape(leaf.shape)
  if size == 8:  # two words, the lower one first, as jax casts them
    words = words.reshape(-1).view("<u4").reshape(*leaf.shape, 2)
  else:
    words = words.view(f"u{size}")
  index = _index(np, words.shape, leaf.ndim, strides, first)
  # Flat, as numpy warns of numbers that overflow, and not of arrays.
  return np.array(_sums(words.astype(np.uint32).ravel(), index.ravel(), seed), np.uint32)


def _index(numpy: Any, shape: tuple[int, ...], ndim: int, strides: Any, first: Any) -> Any:
  """Number, modulo 2^32, of each word in the whole array.

  Args:
    shape: of the words; behind the `ndim` axes of the array there may be one of parts of elements.
  """
  index = numpy.full((1,) * len(shape), first, np.uint32)
  for axis in range(ndim):
    place = numpy.arange(shape[axis], dtype=np.uint32) * strides[axis]
    index = index + place.reshape([-1 if k == axis else 1 for k in range(len(shape))])
  if len(shape) > ndim:
    index = index * np.uint32(shape[-1]) + numpy.arange(shape[-1], dtype=np.uint32)
  return numpy.broadcast_to(index, shape)


def _sums(words: Any, index: Any, seed: Any) -> tuple[Any, Any]:
  """Two sums over mixed words; in the second each has an odd weight of its own."""
  place = _mixed(index + seed)
  mixed = _mixed(words ^ place)
  return mixed.sum(dtype=np.uint32), (mixed * (place | np.uint32(1))).sum(dtype=np.uint32)


def _mixed(x: Any) -> Any:
  """Finalizer of MurmurHash3 (Appleby, 2011): a permutation of the 32-bit words."""
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return x ^ (x >> np.uint32(16))
