"""Batches compared as a whole, and put together from those of several processes."""

import hashlib

import numpy as np


def digest(batches):
  """One number for all the bytes."""
  digests = hashlib.sha256()
  for batch in batches:
    for key in sorted(batch):
      digests.update(np.ascontiguousarray(batch[key]).tobytes())
  return digests.hexdigest()


def join(parts):
  """Global batches from those of each process."""
  return [
    {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    for batches in zip(*parts, strict=True)
  ]
