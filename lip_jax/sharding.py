"""The device mesh, how arrays lie on it, and how they get there: data parallelism over all devices.

"All" are those of all processes; each process feeds its own.
"""

import collections
import concurrent.futures
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
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


class Prefetch(Iterator[dict[str, jax.Array]]):
  """Batches on the devices, put there by a thread before they are asked for.

  While a step runs on one batch, the next ones are read and copied, so that neither the wait for
  the host's batch nor the copy falls between two steps. An error of `batches` is raised in place of
  the batch that it kept from coming. Close it, or use it as a context manager.

  Args:
    batches: this process's rows of each batch. Until closed, only the thread may use it.
    mesh: to split the batches over.
    size: batches that are on the devices, or on the way to them, beside those handed out.
    position: asked, in the thread, after each batch that is taken from `batches`.
  """

  def __init__(
    self,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
    size: int = 2,
    position: Callable[[], Any] = lambda: None,
  ):
    self._batches = iter(batches)
    self._mesh = mesh
    self._position_of = position
    self._position: Any = position()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="lip-feed")
    self._watcher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="lip-watch")
    self._ahead = collections.deque(self._thread.submit(self._fetch) for _ in range(size))

  def _fetch(self) -> tuple[dict[str, jax.Array], Any] | None:
    for batch in self._batches:
      # Waiting for the copy here lets `wait` know of it; the step does not wait.
      return jax.block_until_ready(put_batch(batch, self._mesh)), self._position_of()
    return None

  @property
  def position(self) -> Any:
    """What `position()` was after the last batch handed out, not after those taken ahead of it."""
    return self._position

  def wait(self, running: Any = None) -> float:
    """Waits until the next batch has been taken from `batches`.

    Args:
      running: arrays that the devices are still computing, if any.

    Returns:
      Seconds, of those that this took, in which the devices had nothing more to compute.
    """
    batch = self._ahead[0]
    if not batch.done() and running is not None:
      step = self._watcher.submit(jax.block_until_ready, running)
      concurrent.futures.wait([batch, step], return_when=concurrent.futures.FIRST_COMPLETED)
    idle_since = time.perf_counter()
    concurrent.futures.wait([batch])
    return time.perf_counter() - idle_since

  def __next__(self) -> dict[str, jax.Array]:
    fetched = self._ahead[0].result()
    if fetched is None:
      raise StopIteration
    self._ahead.popleft()
    self._ahead.append(self._thread.submit(self._fetch))
    batch, self._position = fetched
    return batch

  def close(self) -> None:
    """Ends the thread, after the batch that it is working on."""
    self._thread.shutdown(wait=True, cancel_futures=True)
    self._watcher.shutdown(wait=True)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def gather(value: Any) -> list[Any]:
  """What each process gave, by process index; all of them have to call it at the same point.

  Args:
    value: anything that JSON can hold.
  """
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(data)))
  rows = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - len(data))))
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
