"""From a source on disk to batches: `train_loader` and `eval_batches`.

Where images can be read in any order, Grain gives every position of the endless training stream an
image and a random generator that depend on (seed, position) alone. Global batch j of size B is the
positions [j * B, (j + 1) * B), and process p of P has the p-th of its P equal parts. So what a
batch holds depends neither on the number of processes nor on that of threads, all of a loader's
state is the number of its next batch, and a run goes on exactly with another number of processes.

Files that can only be read in order are shared among the processes (`stream.py`). What a process's
batches hold then depends on the number of processes, and so a state fits that number only.
"""

import contextlib
import functools
import logging
import math
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from lip_jax.data import preprocess, stream
from lip_jax.data.source import RecordStream, Source
from lip_jax.errors import UsageError

Batch = dict[str, np.ndarray]

# Endless, for all purposes. Grain's own endless stream has no length when cut into batches of one.
_POSITIONS = 2**48
# Below this Grain's order takes more than 10 us an image.
_FEW = 10_000
# So many unreadable images in a row are no accident of one file.
_MAX_SKIPS = 100
# Skipped images that a state names, and unreadable ones that an error does. More are counted only.
_MAX_SAVED = 1000
_MAX_NAMED = 100

logger = logging.getLogger(__name__)


class UnreadableImagesError(UsageError):
  """Images that have to count cannot be read.

  Attributes:
    faults: which and why, each a text.
  """

  def __init__(self, source: Source | RecordStream, faults: Sequence[str]):
    self.faults = list(faults)
    named = "; ".join(self.faults[:_MAX_NAMED])
    if len(self.faults) > _MAX_NAMED:
      named += f"; and {len(self.faults) - _MAX_NAMED} more"
    super().__init__(
      f"{len(self.faults)} of {len(source)} images of {source.name} are unreadable, and each has "
      f"to count: {named}. {source.remedy}"
    )


class _Batches(Protocol):
  """What Grain's iterators and those of `stream.py` have in common."""

  def __next__(self) -> Batch: ...
  def get_state(self) -> dict[str, Any]: ...
  def set_state(self, state: dict[str, Any]) -> None: ...
  def close(self) -> None: ...


class TrainLoader(Iterator[Batch]):
  """Endless iterator over one process's part of the training batches.

  Yields "image": uint8 [local batch, S, S, 3] and "label": int32 [local batch]. Close it, or use it
  as a context manager, to end its threads. After an error it is closed.

  `get_state` and `skipped` may be asked by one thread while another takes batches.
  """

  def __init__(self, batches: _Batches, identity: dict[str, Any], skips: "_Skips", process_index=0):
    """Use `train_loader`. `identity`: what, beside the step, decides on the content of batches."""
    self._batches = batches
    self._identity = identity
    self._skips = skips
    self._process_index = process_index

  def __next__(self) -> Batch:
    try:
      return next(self._batches)
    except BaseException:
      # Grain would go on with the batch after the one that failed.
      self.close()
      raise

  def position(self) -> dict[str, Any]:
    """Where this process stands: after the batches that were returned, not those made ahead."""
    state = self._batches.get_state()
    return {"next_batch": state["next_index"]} if "next_index" in state else state

  def get_state(self, position: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `set_state` needs to go on from a position: JSON.

    Where images can be read in any order it fits any number of processes. Else, and to know all
    images that were skipped, give `joined` those of all processes.

    Args:
      position: what `position()` was then; None is now.
    """
    position = self.position() if position is None else position
    skipped, count = self._skips.before(position["next_batch"])
    state = {"next_batch": position["next_batch"], **self._identity}
    if "reader" in position:
      state["readers"] = [position["reader"]]
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
      if state.get(key) == here:
        continue
      given = f"it was saved with {key}={state.get(key)!r} and is now read with {key}={here!r}"
      if key == "process_count":
        raise UsageError(
          f"cannot continue the training data: {given}, and TFRecord files are read in order, by "
          f"each process its own; use {state.get(key) or 'as many'} processes, or convert the data "
          "set to ArrayRecord (lip-jax data convert) and start a new run, which then goes on with "
          "any number"
        )
      raise UsageError(
        f"cannot continue the training data: {given}; use the old value, or start a new run"
      )
    self.note_skipped(state)
    position = {"next_batch": state["next_batch"]}
    if "process_count" not in self._identity:
      self._batches.set_state({"next_index": state["next_batch"]})
      return
    if len(state["readers"]) != self._identity["process_count"]:
      raise UsageError(
        f"cannot continue the training data: the state holds {len(state['readers'])} of "
        f"{self._identity['process_count']} processes; join those of all (pipeline.joined)"
      )
    self._batches.set_state({**position, "reader": state["readers"][self._process_index]})

  def note_skipped(self, state: dict[str, Any]) -> None:
    """Takes over which images were skipped, by this process or another, from a state."""
    self._skips.restore(state.get("skipped", []), state.get("num_skipped", 0))

  def num_skipped(self, position: dict[str, Any] | None = None) -> int:
    """How many images had been skipped at a position; None is now.

    Each counts once, whichever process met it: others' are known after `note_skipped`. Beyond 1000
    it is a lower bound, once a run was interrupted.
    """
    position = self.position() if position is None else position
    return self._skips.before(position["next_batch"])[1]

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
  """The state of all processes, from that of each at the same step, in the order of processes."""
  state = dict(states[0])
  if "readers" in state:
    state["readers"] = [reader for each in states for reader in each["readers"]]
  skipped = sorted({key for each in states for key in each["skipped"]})
  most = max(each["num_skipped"] for each in states)
  return {**state, "num_skipped": max(most, len(skipped)), "skipped": skipped[:_MAX_SAVED]}


def train_loader(
  source: Source | RecordStream,
  *,
  image_size: int,
  crop_scale: tuple[float, float] | None = None,
  global_batch_size: int,
  seed: int,
  shuffle_window: int = 4096,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int | None = None,
  prefetch: int | None = None,
) -> TrainLoader:
  """Shuffled, augmented batches without end; epochs follow each other inside a batch.

  Each epoch is another order of all images. An unreadable image is left out, and its name is logged
  once: the next readable one of the source takes its place, or of the batch where files are read in
  order. After any number of steps all processes have had equally many images of every epoch, but
  for one where the number of images cannot be divided.

  Args:
    source: where the images come from.
    image_size: side of the images in a batch, pixels.
    crop_scale: least and greatest area of the random crop, in parts of the image's; None takes the
      whole image, scaled, and cut to a square, if its size differs.
    global_batch_size: images of all processes in a step.
    seed: decides on order and crops.
    shuffle_window: encoded images that a process keeps in memory to shuffle them, if the source can
      only be read in order; else all are shuffled.
    process_index: which process this is.
    process_count: number of processes that share each batch.
    num_threads: threads that read and decode, each one batch at a time; None is one for each core,
      at most 32.
    prefetch: batches made ahead; None is two more than there are threads.

  Raises:
    UsageError: `global_batch_size` cannot be divided among the processes. When iterating: too many
      images in a row are unreadable, or a file is damaged.
  """
  local_batch_size = _local_batch_size(global_batch_size, process_index, process_count)
  options = _read_options(num_threads, prefetch)
  identity = {
    "source": source.name,
    "num_examples": len(source),
    "seed": seed,
    "global_batch_size": global_batch_size,
  }
  # As many as are made ahead, and two that the consumer is at work on.
  shape = (local_batch_size, image_size, image_size, 3)
  buffers = _Buffers(shape, options.prefetch_buffer_size + 2)
  batches: Any
  if isinstance(source, Source):
    skips = _Skips(lambda index: _describe(source, index))
    batch_sizes = (local_batch_size, global_batch_size)
    read = _TrainReader(source, image_size, crop_scale, seed, batch_sizes, buffers, skips)
    parts = grain.MapDataset.range(_POSITIONS // local_batch_size)
    dataset = parts[process_index::process_count].map(read)
    batches = iter(dataset.to_iter_dataset(options))
  else:
    skips = _Skips(str)
    identity |= {"shuffle_window": shuffle_window, "process_count": process_count}
    make = _TrainBatchMaker(source, image_size, crop_scale, (seed, process_index), buffers, skips)
    records = stream.ShuffledRecords(
      source.shards(),
      seed=seed,
      window=shuffle_window,
      process_index=process_index,
      process_count=process_count,
    )
    batches = stream.TrainBatches(
      records, make, local_batch_size, options.num_threads, options.prefetch_buffer_size
    )
  return TrainLoader(batches, identity, skips, process_index)


class _Skips:
  """Which images were skipped, and in which batch first; each is logged once."""

  def __init__(self, describe: Callable[[Any], str]):
    self._describe = describe
    self._first: dict[Any, int] = {}  # by index, or by name where files are read in order
    self._restored = 0
    self._lock = threading.Lock()

  def note(self, key: Any, batch: int, error: preprocess.CorruptImage) -> None:
    with self._lock:
      known = key in self._first
      # Threads work ahead and not in order.
      self._first[key] = min(batch, self._first.get(key, batch))
    if not known:
      logger.warning("skipped unreadable %s: %s", self._describe(key), error)

  def restore(self, keys: Sequence[Any], count: int) -> None:
    with self._lock:
      self._first |= dict.fromkeys(keys, -1)
      self._restored = max(self._restored, count)

  def before(self, batch: int) -> tuple[list[Any], int]:
    """(those that batches before this one skipped, in order; their number, with restored ones)."""
    with self._lock:
      keys = sorted(key for key, first in self._first.items() if first < batch)
      return keys, max(len(keys), self._restored)

  @property
  def names(self) -> tuple[str, ...]:
    with self._lock:
      keys = sorted(self._first)
    return tuple(map(self._describe, keys))


class _Buffers:
  """Memory for the images of batches, used again when nobody has any of the batch any more.

  New memory costs a page fault for every 4096 bytes, which on some machines is a tenth of all time.
  """

  def __init__(self, shape: tuple[int, ...], most: int):
    """`shape`: of an array of uint8. `most`: unused ones that are kept."""
    self._shape = shape
    self._most = most
    self._free: list[np.ndarray] = []

  def take(self) -> np.ndarray:
    """An array of any content. It is given back when the last view of it is gone."""
    try:
      memory = self._free.pop()
    except IndexError:
      memory = np.empty(self._shape, np.uint8)
    return np.asarray(_Lent(memory, self._give_back))

  def _give_back(self, memory: np.ndarray) -> None:
    if len(self._free) < self._most:
      self._free.append(memory)


class _Lent:
  """What NumPy's views of a buffer keep alive."""

  def __init__(self, memory: np.ndarray, give_back: Callable[[np.ndarray], None]):
    self.__array_interface__ = memory.__array_interface__
    self._memory = memory
    self._give_back = give_back

  def __del__(self) -> None:
    self._give_back(self._memory)


class _TrainReader:
  """Makes a process's batches out of images in any order.

  A whole batch is one element for Grain, whose bookkeeping would else cost a tenth of the time.
  """

  def __init__(
    self,
    source: Source,
    image_size: int,
    crop_scale: tuple[float, float] | None,
    seed: int,
    batch_sizes: tuple[int, int],
    buffers: _Buffers,
    skips: _Skips,
  ):
    """`batch_sizes`: local and global."""
    self._source = source
    self._crop = (image_size, crop_scale)
    self._image_at = _shuffled(len(source), seed)
    # Another word than 1, with which Grain derives the seed of its order.
    self._key = np.random.SeedSequence((seed, 2)).generate_state(2, np.uint64)
    self._batch_sizes = batch_sizes
    self._buffers = buffers
    self._skips = skips

  def __call__(self, part: int) -> Batch:
    """`part`: number of the batch if every process's part of a global batch counts as one."""
    local_batch_size, global_batch_size = self._batch_sizes
    images = self._buffers.take()
    labels = np.empty(local_batch_size, np.int32)
    # To set a generator's counter takes a tenth of the time of making another one.
    bits = np.random.Philox(key=self._key)
    rng, state = np.random.Generator(bits), bits.state
    for row in range(local_batch_size):
      position = part * local_batch_size + row
      # The second of its words, each a 64-bit number: the first counts an image's own draws.
      state["state"]["counter"][1] = position
      bits.state = state
      labels[row] = self._read(images[row], position // global_batch_size, position, rng)
    return {"image": images, "label": labels}

  def _read(self, out: np.ndarray, batch: int, position: int, rng: np.random.Generator) -> int:
    """Puts the image of a position into `out`; returns its label."""
    index = self._image_at(position)
    for attempt in range(min(_MAX_SKIPS, len(self._source))):
      candidate = (index + attempt) % len(self._source)
      try:
        example = self._source[candidate]
        _train_crop(example["image"], rng, *self._crop, out)
        return example["label"]
      except preprocess.CorruptImage as error:
        self._skips.note(candidate, batch, error)
    raise UsageError(
      f"{attempt + 1} images in a row are unreadable, from {_describe(self._source, index)} on; "
      f"{self._source.remedy}"
    )


def _shuffled(count: int, seed: int) -> Callable[[int], int]:
  """Image at each position of an endless stream in which every epoch is another order of all.

  The order of grain.MapDataset.range(count).seed(seed).shuffle().repeat(), for less time. Grain
  computes each place on its own, which needs no memory, but takes long for few images; those have a
  permutation.
  """
  if count < _FEW:
    # Threads may be at work in two epochs at once.
    permutation = functools.lru_cache(maxsize=4)(
      lambda epoch: np.random.default_rng((seed, epoch)).permutation(count)
    )
    return lambda position: int(permutation(position // count)[position % count])

  (derived,) = np.random.SeedSequence((seed, 1)).generate_state(1).tolist()

  def at(position: int) -> int:
    epoch, place = divmod(position, count)
    return grain.experimental.index_shuffle(
      place, max_index=count - 1, seed=(derived + epoch) % 2**32, rounds=4
    )

  return at


class _TrainBatchMaker:
  """Decodes and crops the records of a batch."""

  def __init__(
    self,
    source: RecordStream,
    image_size: int,
    crop_scale: tuple[float, float] | None,
    seed: tuple[int, int],
    buffers: _Buffers,
    skips: _Skips,
  ):
    self._source = source
    self._crop = (image_size, crop_scale)
    self._seed = seed
    self._buffers = buffers
    self._skips = skips

  def __call__(self, number: int, records: Sequence[stream.Record]) -> Batch:
    rng = np.random.default_rng((*self._seed, number))
    images = self._buffers.take()
    labels = np.empty(len(records), np.int32)
    readable = []
    for row, record in enumerate(records):
      try:
        example = self._source.parse(record.data)
        _train_crop(example["image"], rng, *self._crop, images[row])
        labels[row] = example["label"]
        readable.append(row)
      except preprocess.CorruptImage as error:
        self._skips.note(stream.name_of(record), number, error)
    if not readable:
      raise UsageError(
        f"all {len(records)} images of a batch are unreadable, {stream.name_of(records[0])} among "
        f"them. {self._source.remedy}"
      )
    # The next readable one takes the place of one that is not; after the last comes the first.
    following = readable[0]
    for row in reversed(range(len(records))):
      if readable and row == readable[-1]:
        following = readable.pop()
      else:
        images[row], labels[row] = images[following], labels[following]
    return {"image": images, "label": labels}


def _train_crop(
  data: bytes,
  rng: np.random.Generator,
  size: int,
  scale: tuple[float, float] | None,
  out: np.ndarray,
) -> None:
  if scale is None:
    out[...] = preprocess.decode_center_crop(data, size, size)
  else:
    preprocess.decode_random_resized_crop(data, rng, size, scale, out=out)


def eval_batches(
  source: Source | RecordStream,
  *,
  image_size: int,
  resize: int | None = None,
  crops: int = 1,
  global_batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int | None = None,
  prefetch: int | None = None,
) -> Generator[Batch, None, None]:
  """Every image once, in ceil(n / global_batch_size) batches on every process.

  In order over all processes, or within each process where files are read in order.

  Yields "image": uint8 [local batch, S, S, 3], or [local batch, crops, S, S, 3] with several crops,
  the central one first; "label": int32 [local batch]; and "mask": float32 [local batch], 1 for
  images and 0 for the rows that fill up the last batches, which are zero.

  Args:
    source: where the images come from.
    image_size: side of the square that is used, pixels.
    resize: shorter side of the image before the square is cut out; None is `image_size`.
    crops: 1, the centre, or 5, also the corners of the central square of side `resize`
      (Krizhevsky et al. 2012, section 4.1).
    global_batch_size: images of all processes in a step.
    process_index: which process this is.
    process_count: number of processes that share each batch.
    num_threads: as for `train_loader`.
    prefetch: as for `train_loader`.

  Raises:
    UsageError: `global_batch_size` cannot be divided among the processes, `resize` is smaller
      than `image_size`, or `crops` is another number. When iterating: a file is damaged.
    UnreadableImagesError: after the last batch, if there were unreadable images, which are masked;
      it names those of this process.
  """
  local_batch_size = _local_batch_size(global_batch_size, process_index, process_count)
  resize = image_size if resize is None else resize
  if resize < image_size:
    raise UsageError(f"resize={resize} is below image_size={image_size}; expected at least that")
  if crops not in (1, 5):
    raise UsageError(f"crops={crops}; expected 1 or 5")
  shape = (image_size, image_size, 3) if crops == 1 else (crops, image_size, image_size, 3)
  padding: dict[str, Any] = {
    "image": np.zeros(shape, np.uint8),
    "label": np.int32(0),
    "mask": np.float32(0),
  }
  faults: dict[int | str, str] = {}

  def decode(data: bytes) -> np.ndarray:
    if crops == 1:
      return preprocess.decode_center_crop(data, image_size, resize)
    return _five_crops(preprocess.decode_center_crop(data, resize, resize), image_size)

  def read(index: int) -> dict[str, Any]:
    assert isinstance(source, Source)  # said again for mypy
    if index >= len(source):
      return padding
    try:
      example = source[index]
      image = decode(example["image"])
    except preprocess.CorruptImage as error:
      faults[index] = f"{_describe(source, index)}: {error}"
      return padding
    return {"image": image, "label": np.int32(example["label"]), "mask": np.float32(1)}

  def make(records: Sequence[stream.Record]) -> Batch:
    rows = []
    for record in records:
      name = stream.name_of(record)
      try:
        example = source.parse(record.data)
        name += f" ({example['id']})" if "id" in example else ""
        image = decode(example["image"])
      except preprocess.CorruptImage as error:
        faults[name] = f"{name}: {error}"
        rows.append(padding)
        continue
      rows.append({"image": image, "label": np.int32(example["label"]), "mask": np.float32(1)})
    rows += [padding] * (local_batch_size - len(rows))
    return {key: np.stack([row[key] for row in rows]) for key in padding}

  options = _read_options(num_threads, prefetch)
  batches: Any
  if isinstance(source, Source):
    padded = math.ceil(len(source) / global_batch_size) * global_batch_size
    dataset = (
      grain.MapDataset.range(padded).map(read).batch(local_batch_size)[process_index::process_count]
    )
    batches = iter(dataset.to_iter_dataset(options))
  else:
    batches = stream.eval_batches(
      source.shards(),
      make,
      local_batch_size,
      process_index=process_index,
      process_count=process_count,
      num_threads=options.num_threads,
      ahead=options.prefetch_buffer_size,
    )

  def checked() -> Generator[Batch, None, None]:
    """Passes batches on and ends the threads with the last one, an error, or the consumer."""
    with contextlib.closing(batches):
      yield from batches
    if faults:
      raise UnreadableImagesError(source, [faults[key] for key in sorted(faults)])

  return checked()


def _five_crops(square: np.ndarray, size: int) -> np.ndarray:
  """Centre and corners of side `size`: uint8 [5, size, size, 3]."""
  last = square.shape[0] - size
  places = ((last // 2, last // 2), (0, 0), (0, last), (last, 0), (last, last))
  return np.stack([square[top : top + size, left : left + size] for top, left in places])


def _describe(source: Source, index: int) -> str:
  try:
    return source.describe(index)
  except preprocess.CorruptImage:  # so damaged that it does not say its name
    return f"{source.name} image {index}"


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
