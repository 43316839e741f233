"""The device mesh, how arrays lie on it, and how they get there.

The batch is split over all devices of all processes, each of which feeds its own; parameters and
optimizer state are whole on every device, or split over an "fsdp" axis of the mesh.
"""

import collections
import concurrent.futures
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lip_jax.errors import UsageError

# Rows of a batch are split over all three, in this order. "group": devices that share the groups of
# batch norm which do not fit on one. "fsdp": devices that share the train state.
AXES = ("data", "group", "fsdp")
# Smaller arrays are whole on every device: splitting them costs more than it saves.
_LEAST_SPLIT = 2**12


def make_mesh(
  devices: Sequence[jax.Device] | None = None, *, fsdp: int = 1, group_span: int = 1
) -> Mesh:
  """Mesh over `devices` (default: all, of all processes), along "data", "group" and "fsdp".

  Devices are in the order of processes, so that a batch's rows, and with them the groups of batch
  norm, are the same images on any number of processes.

  Args:
    devices: whose number is divisible by `fsdp` and `group_span`.
    group_span: devices over which a group of batch norm is spread; 0 or 1: over no more than one.

  Raises:
    UsageError: the devices cannot be divided like this.
  """
  devices = jax.devices() if devices is None else devices
  devices = sorted(devices, key=lambda device: (device.process_index, device.id))
  if len(devices) % fsdp:
    raise UsageError(f"config.fsdp={fsdp} does not divide the {len(devices)} devices; change it")
  if group_span > 1 and group_span % fsdp:
    raise UsageError(
      f"a batch-norm group is spread over {group_span} devices, which config.fsdp={fsdp} does not "
      "divide; take an fsdp that does, or a larger config.global_batch_size"
    )
  group = max(1, group_span // fsdp)
  shape = (len(devices) // (group * fsdp), group, fsdp)
  return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def group_span(
  global_batch_size: int, accumulation_steps: int, group_size: int, num_devices: int
) -> int:
  """Devices over which a batch-norm group is spread; 1 if whole groups fit on a device.

  Args:
    global_batch_size: images per step, divisible by `num_devices`.
    group_size: images per group; 0: there are no groups, and the span is 0.

  Raises:
    UsageError: groups would have to be cut.
  """
  local, rest = divmod(global_batch_size // num_devices, accumulation_steps)
  if rest:
    raise UsageError(
      f"config.accumulation_steps={accumulation_steps} does not divide the "
      f"{global_batch_size // num_devices} images that each of {num_devices} devices has of "
      f"config.global_batch_size={global_batch_size}; change one of them"
    )
  if group_size == 0:
    return 0
  if local % group_size == 0:
    return 1
  share = f"{global_batch_size // num_devices} images of a step"
  if accumulation_steps > 1:
    raise UsageError(
      f"batch norm over {group_size} images (config.model.bn_group_size) needs them at once, but "
      f"each device takes its {share} in {accumulation_steps} parts of {local}; lower "
      "config.accumulation_steps, or raise config.global_batch_size"
    )
  if group_size % local or num_devices % (group_size // local):
    raise UsageError(
      f"batch norm over groups of {group_size} images (config.model.bn_group_size) does not fit "
      f"{share} on each of {num_devices} devices: one has to be a multiple of the other; change "
      "config.global_batch_size"
    )
  return group_size // local


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
  """First axis split evenly over the devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def over_groups(mesh: Mesh, group_span: int) -> NamedSharding:
  """First axis, that of batch-norm groups: each is where its images are; a span of 0: on all."""
  axes = {0: None, 1: AXES}.get(group_span, "data")
  return NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec())


def fsdp_axis(shape: Sequence[int], mesh: Mesh) -> int:
  """Axis of an array that is split over "fsdp", the longest that can be; -1 if it stays whole."""
  parts = mesh.shape["fsdp"]
  axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
  if parts == 1 or not axes or math.prod(shape) < _LEAST_SPLIT:
    return -1
  return max(axes, key=lambda axis: shape[axis])


def over_fsdp(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
  """How an array of the train state lies: split along its `fsdp_axis`."""
  axis = fsdp_axis(shape, mesh)
  return NamedSharding(
    mesh, PartitionSpec(*[None] * axis, "fsdp") if axis >= 0 else PartitionSpec()
  )


def check_batch_size(name: str, batch_size: int, num_devices: int) -> None:
  """Raises UsageError if a batch cannot be split evenly over the devices."""
  if batch_size % num_devices:
    lower = batch_size - batch_size % num_devices
    candidates = [str(n) for n in (lower, lower + num_devices) if n]
    raise UsageError(
      f"config.{name}={batch_size} is not divisible by the {num_devices} devices; use "
      f"{' or '.join(candidates)}, or another number of devices"
    )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Global arrays from this process's rows of a batch, split over the devices."""
  return {
    name: jax.make_array_from_process_local_data(over_batch(mesh), rows)
    for name, rows in batch.items()
  }


class StopFlags:
  """Whether each process was asked to stop, as arrays that a step reduces to one answer for all."""

  def __init__(self, mesh: Mesh):
    here = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    self._arrays = {
      flag: jax.make_array_from_process_local_data(
        over_batch(mesh), np.full(here, flag, np.int32), (mesh.size,)
      )
      for flag in (False, True)
    }

  def __call__(self, stop: bool) -> jax.Array:
    """Int32 [devices], 1 on those of this process if it was asked to stop."""
    return self._arrays[stop]


class Prefetch(Iterator[dict[str, jax.Array]]):
  """Batches on the devices, put there by a thread before they are asked for.

  While a step runs on one batch, the next ones are read and copied, so that neither the wait for
  the host's batch nor the copy falls between two steps. An error of `batches` is raised in place of
  the batch that it kept from coming. Close it, or use it as a context manager.

  Args:
    batches: this process's rows of each batch. Until closed, only the thread may use it.
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
  """What each process gave, by process index; all of them have to call it at the same point."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(data)))
  rows = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - len(data))))
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
