"""From a source to batches: `train_loader` and `eval_batches`.

Every position of the endless training stream has an image and a random generator that depend on
(seed, position) alone, if images are of several shapes on (seed, position, batch size). Global
batch j of size B is the positions [j * B, (j + 1) * B), and process p of P has the p-th of its P
equal parts. So what a batch holds depends neither on the number of
processes nor on that of threads, all of a loader's state is the number of its next batch, and a run
goes on exactly with another number of processes.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from lip_jax.data.buffers import Buffers
from lip_jax.data.order import InOrder, Order, Shuffled
from lip_jax.data.preprocess import CorruptImage
from lip_jax.data.skips import Skips
from lip_jax.data.source import Source
from lip_jax.data.transforms import Row, Shapes, Transform
from lip_jax.errors import UsageError

Batch = dict[str, np.ndarray]

# Endless, for all purposes. Grain's own endless stream has no length when cut into batches of one.
_POSITIONS = 2**48
# So many unreadable images in a row are no accident of one file.
_MAX_SKIPS = 100
# Skipped images that a state names, and unreadable ones that an error does. More are counted only.
_MAX_SAVED = 1000
_MAX_NAMED = 100


class UnreadableImagesError(UsageError):
  """Images that have to count cannot be read.

  Attributes:
    faults: which and why, each a text.
  """

  def __init__(self, source: Source, faults: Sequence[str]):
    self.faults = list(faults)
    named = "; ".join(self.faults[:_MAX_NAMED])
    if len(self.faults) > _MAX_NAMED:
      named += f"; and {len(self.faults) - _MAX_NAMED} more"
    super().__init__(
      f"{len(self.faults)} of {len(source)} images of {source.name} are unreadable, and each has "
      f"to count: {named}. {source.remedy}"
    )


class TrainLoader(Iterator[Batch]):
  """Endless iterator over one process's part of the training batches.

  Yields the transform's arrays, stacked: [local batch, ...]. Close it, or use it as a context
  manager, to end its threads. After an error it is closed.

  `get_state` and `num_skipped` may be asked by one thread while another takes batches.
  """

  def __init__(self, batches: Any, identity: dict[str, Any], skips: Skips):
    """Use `train_loader`. `identity`: what, beside the step, decides on the content of batches."""
    self._batches = batches
    self._identity = identity
    self._skips = skips

  def __next__(self) -> Batch:
    try:
      return next(self._batches)
    except BaseException:
      # Grain would go on with the batch after the one that failed.
      self.close()
      raise

  def position(self) -> int:
    """Number of the next batch: after those that were returned, not those made ahead."""
    return self._batches.get_state()["next_index"]

  def get_state(self, position: int | None = None) -> dict[str, Any]:
    """What `set_state` needs, on any number of processes, to go on from a position: JSON.

    It names the images that this process skipped; `joined` has those of all.

    Args:
      position: what `position()` was then; None is now.
    """
    position = self.position() if position is None else position
    skipped, count = self._skips.before(position)
    state = {"next_batch": position, **self._identity}
    return {**state, "num_skipped": count, "skipped": skipped[:_MAX_SAVED]}

  def joined(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One state out of those of all processes."""
    return joined(states)

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where `get_state` was called: the next batch is the one that came next there.

    Raises:
      UsageError: the state is of another stream, which holds no such batch.
    """
    for key, here in self._identity.items():
      if state.get(key) != here:
        raise UsageError(
          f"cannot continue the training data: it was saved with {key}={state.get(key)!r} and is "
          f"now read with {key}={here!r}; use the old value, or start a new run"
        )
    self.note_skipped(state)
    self._batches.set_state({"next_index": state["next_batch"]})

  def note_skipped(self, state: dict[str, Any]) -> None:
    """Takes over which images were skipped, by this process or another, from a state."""
    self._skips.restore(state.get("skipped", []), state.get("num_skipped", 0))

  def num_skipped(self, position: int | None = None) -> int:
    """How many images had been skipped at a position; None is now.

    Each counts once, whichever process met it: others' are known after `note_skipped`. Beyond 1000
    it is a lower bound, once a run was interrupted.
    """
    return self._skips.before(self.position() if position is None else position)[1]

  @property
  def skipped(self) -> tuple[str, ...]:
    """Names of the unreadable images that are known, also of batches made ahead, in order."""
    return self._skips.names

  def close(self) -> None:
    """Stops reading ahead; threads end when the batches they work on are done."""
    self._batches.close()

  def __enter__(self) -> "TrainLoader":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def joined(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The state of all processes, from that of each at the same step: with all skipped images."""
  skipped = sorted({key for each in states for key in each["skipped"]})
  most = max(each["num_skipped"] for each in states)
  return {**states[0], "num_skipped": max(most, len(skipped)), "skipped": skipped[:_MAX_SAVED]}


def train_loader(
  source: Source,
  transform: Transform | Sequence[Transform],
  *,
  global_batch_size: int,
  seed: int,
  order: Order | None = None,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int | None = None,
  prefetch: int | None = None,
) -> TrainLoader:
  """Shuffled, augmented batches without end; epochs follow each other inside a batch.

  Each epoch is another order of all images. An unreadable image is left out, and its name is logged
  once: the next readable one of the source takes its place.

  Args:
    source: where the images come from.
    transform: makes the rows of batches, such as `transforms.TrainCrop(224, (0.08, 1.0))`; or one
      for each group of `order`.
    seed: decides on the order and on what is random in `transform`.
    order: another than that: `order.ShuffledGroups`, of the same seed and batch size.
    process_index: which process this is, of `process_count` that share each batch.
    process_count: see `process_index`.
    num_threads: threads that read and decode, each one batch at a time; None is one for each core,
      at most 32.
    prefetch: batches made ahead; None is two more than there are threads.

  Raises:
    UsageError: `global_batch_size` cannot be divided among the processes. When iterating: too many
      images in a row are unreadable, or a file is damaged.
  """
  local_batch_size = _local_batch_size(global_batch_size, process_index, process_count)
  transforms = _as_sequence(transform)
  skips = Skips(source.describe)
  order = order or Shuffled(len(source), seed)

  def fill(position: int, group: int, rng: np.random.Generator, row: Row) -> None:
    tried = []
    for candidate in itertools.islice(order.candidates(position), _MAX_SKIPS):
      try:
        return transforms[group](source[candidate], rng, row)
      except CorruptImage as error:
        skips.note(candidate, position // global_batch_size, error)
        tried.append(candidate)
    raise UsageError(
      f"{len(tried)} images in a row are unreadable, from {source.describe(tried[0])} on; "
      f"{source.remedy}"
    )

  options = _read_options(num_threads, prefetch)
  shapes = [each.shapes for each in transforms]
  make = _BatchMaker(fill, order.group, shapes, local_batch_size, seed, options)
  parts = grain.MapDataset.range(_POSITIONS // local_batch_size)[process_index::process_count]
  identity = {"source": source.identity, **order.identity, "global_batch_size": global_batch_size}
  return TrainLoader(iter(parts.map(make).to_iter_dataset(options)), identity, skips)


def eval_batches(
  source: Source,
  transform: Transform | Sequence[Transform],
  *,
  global_batch_size: int,
  groups: Sequence[np.ndarray] | None = None,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int | None = None,
  prefetch: int | None = None,
) -> Generator[Batch, None, None]:
  """Every image once, in order, in ceil(n / global_batch_size) batches on every process.

  Yields the transform's arrays, stacked: [local batch, ...]; and "mask": float32 [local batch], 1
  for images and 0 for the rows that fill up the last batches, which are zero.

  `transform` may be `transforms.EvalCrop(224, 256)`; with `groups`, the images that each of several
  transforms takes, there are whole batches of one group after the other. The others as for
  `train_loader`.

  Raises:
    UsageError: `global_batch_size` cannot be divided among the processes. When iterating: a file is
      damaged.
    UnreadableImagesError: after the last batch, if there were unreadable images, which are masked;
      it names those of this process.
  """
  local_batch_size = _local_batch_size(global_batch_size, process_index, process_count)
  transforms = _as_sequence(transform)
  order = InOrder([range(len(source))] if groups is None else groups, global_batch_size)
  faults: dict[int, str] = {}

  def fill(position: int, group: int, rng: np.random.Generator, row: Row) -> None:
    row["mask"][...] = 0
    for index in order.candidates(position):
      try:
        transforms[group](source[index], rng, row)
        row["mask"][...] = 1
        return
      except CorruptImage as error:
        faults[index] = f"{source.describe(index)}: {error}"
    for array in row.values():
      array[...] = 0

  options = _read_options(num_threads, prefetch)
  shapes: list[Shapes] = [{**each.shapes, "mask": ((), np.float32)} for each in transforms]
  make = _BatchMaker(fill, order.group, shapes, local_batch_size, 0, options)
  parts = grain.MapDataset.range(order.num_batches * process_count)[process_index::process_count]

  def checked() -> Generator[Batch, None, None]:
    """Passes batches on and ends the threads with the last one, an error, or the consumer."""
    with contextlib.closing(iter(parts.map(make).to_iter_dataset(options))) as batches:
      yield from batches
    if faults:
      raise UnreadableImagesError(source, [faults[index] for index in sorted(faults)])

  return checked()


class _BatchMaker:
  """Makes one process's part of a global batch; threads may be at work on several.

  A whole batch is one element for Grain, whose bookkeeping would else cost a tenth of the time.
  """

  def __init__(
    self,
    fill: Callable[[int, int, np.random.Generator, Row], None],
    group: Callable[[int], int],
    shapes: Sequence[Shapes],
    size: int,
    seed: int,
    options: grain.ReadOptions,
  ):
    """`fill` writes the row of a position in the stream, whose `group` is that of the whole batch;
    `shapes` has the arrays of each group, and `size` is the number of rows.
    """
    self._fill = fill
    self._group = group
    self._size = size
    # As many as are made ahead, and two that the consumer is at work on.
    most = options.prefetch_buffer_size + 2
    self._buffers = [
      {name: Buffers((size, *shape), dtype, most) for name, (shape, dtype) in each.items()}
      for each in shapes
    ]
    # Another word than 1, with which Grain derives the seed of its order.
    self._key = np.random.SeedSequence((seed, 2)).generate_state(2, np.uint64)

  def __call__(self, part: int) -> Batch:
    """`part`: number of the batch if every process's part of a global batch counts as one."""
    group = self._group(part * self._size)
    batch = {name: buffers.take() for name, buffers in self._buffers[group].items()}
    # To set a generator's counter takes a tenth of the time of making another one.
    bits = np.random.Philox(key=self._key)
    rng, state = np.random.Generator(bits), bits.state
    for row in range(self._size):
      position = part * self._size + row
      # The second of its words, each a 64-bit number: the first counts an image's own draws.
      state["state"]["counter"][1] = position
      bits.state = state
      self._fill(position, group, rng, {name: array[row, ...] for name, array in batch.items()})
    return batch


def _as_sequence(transform: Transform | Sequence[Transform]) -> Sequence[Transform]:
  return transform if isinstance(transform, Sequence) else [transform]


def _local_batch_size(global_batch_size: int, process_index: int, process_count: int) -> int:
  if not 0 <= process_index < process_count:
    raise UsageError(f"process_index={process_index}, expected 0 to {process_count - 1}")
  if global_batch_size <= 0 or global_batch_size % process_count:
    raise UsageError(
      f"global_batch_size={global_batch_size} cannot be divided among {process_count} processes; "
      f"expected a positive multiple of {process_count}"
    )
  return global_batch_size // process_count


def _read_options(num_threads: int | None, prefetch: int | None) -> grain.ReadOptions:
  if num_threads is None:
    num_threads = min(os.cpu_count() or 1, 32)
  if prefetch is None:
    prefetch = num_threads + 2
  # A thread works on one batch, so more threads than batches ahead would have nothing to do.
  return grain.ReadOptions(num_threads=min(num_threads, prefetch), prefetch_buffer_size=prefetch)
