"""Fingerprints of array trees: equal bits give equal fingerprints on any mesh and sharding.

A sum modulo 2^32 does not depend on the order of its terms, so devices may add up what they hold in
any way: integer arithmetic makes the result exact.
"""

import functools
import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Leaf = tuple[list[str | int], str, list[int]]

# Up to here numpy is done before a program for the shape is compiled (0.1 s each).
_MOST_ON_HOST = 2**18


def leaves_of(tree: Any) -> list[Leaf]:
  """(path, dtype, shape) of each leaf, in a form that JSON keeps as it is.

  Args:
    tree: of arrays, or of anything else with a shape and a dtype.
  """
  return [
    ([_key(entry) for entry in path], str(leaf.dtype), list(leaf.shape))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


def fingerprint(tree: Any) -> str:
  """16 hexadecimal digits that depend on each bit of each leaf, its place, path, dtype and shape.

  A change of a single element always shows; any other change goes unnoticed with a probability of
  about 2^-63. It is a checksum, no defence against forgery.

  Args:
    tree: of jax or numpy arrays of real numbers of whole bytes, or of bools. Arrays may be spread
      over several processes, which then all have to call this at the same point.
  """
  sums, on_host = [], []
  for described, leaf in zip(leaves_of(tree), jax.tree.leaves(tree), strict=True):
    seed = np.uint32(zlib.crc32(json.dumps(described).encode()))
    if isinstance(leaf, jax.Array) and (not leaf.is_fully_replicated or leaf.size > _MOST_ON_HOST):
      mesh = leaf.sharding.mesh if isinstance(leaf.sharding, NamedSharding) else None
      sums.append(_compiled(mesh)(leaf, seed))
    else:
      on_host.append((leaf, seed))
  leaves = jax.device_get([leaf for leaf, _ in on_host])
  sums += [_sums_on_host(leaf, seed) for leaf, (_, seed) in zip(leaves, on_host, strict=True)]
  total = np.zeros(2, np.uint64)
  for pair in jax.device_get(sums):  # all at once
    total += pair
  first, second = total % 2**32
  return f"{first:08x}{second:08x}"


def _key(entry: Any) -> str | int:
  for attribute in ("key", "idx", "name"):
    if hasattr(entry, attribute):
      return getattr(entry, attribute)
  raise TypeError(f"no name for the tree's key {entry!r}")


@functools.cache
def _compiled(mesh: Mesh | None) -> Any:
  """`_sums_on_devices` for arrays on the devices of `mesh`, or on a single one."""
  # Asked for rather than left to the partitioner: every process has to read the result.
  everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
  return jax.jit(_sums_on_devices, out_shardings=everywhere)


def _sums_on_devices(leaf: jax.Array, seed: jax.Array) -> jax.Array:
  if leaf.dtype == jnp.bool_:
    leaf = leaf.astype(jnp.uint8)
  word = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
  words = jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)
  index = jnp.zeros(words.shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(words.ndim)):  # no reshape, which would gather a sharded array
    index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
    stride *= words.shape[axis]
  return jnp.stack(_sums(words, index, seed))


def _sums_on_host(leaf: np.ndarray, seed: np.uint32) -> np.ndarray:
  size = leaf.dtype.itemsize
  flat = np.ascontiguousarray(leaf).reshape(-1)
  # 64-bit elements are two words, the lower one first, as jax casts them.
  words = flat.view("<u4" if size == 8 else f"u{size}").astype(np.uint32)
  index = np.arange(words.size, dtype=np.uint64).astype(np.uint32)
  return np.array(_sums(words, index, seed), np.uint32)


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
