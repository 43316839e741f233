"""The device mesh and how arrays lie on it: data parallelism over all devices of all processes."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lip_jax.errors import UsageError

DATA_AXIS = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """One-dimensional mesh over `devices` (default: all, of all processes), along "data"."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
  """First axis split evenly over the devices."""
  return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
  """Raises UsageError if a batch cannot be split evenly over the mesh."""
  if batch_size % mesh.size:
    lower = batch_size - batch_size % mesh.size
    candidates = [str(n) for n in (lower, lower + mesh.size) if n]
    raise UsageError(
      f"config.{name}={batch_size} is not divisible by the {mesh.size} devices; use "
      f"{' or '.join(candidates)}, or another number of devices"
    )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Global arrays from this process's rows of a batch, split over the devices."""
  return {
    name: jax.make_array_from_process_local_data(over_batch(mesh), rows)
    for name, rows in batch.items()
  }
