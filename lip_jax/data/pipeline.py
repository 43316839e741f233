"""From a source on disk to batches: `train_loader` and `eval_batches`.

Grain gives every position of the endless training stream an image and a random generator that
depend on (seed, position) alone. Global batch j of size B is the positions [j * B, (j + 1) * B),
and process p of P has the p-th of its P equal parts. So what a batch holds depends neither on the
number of processes nor on that of threads, and all of a loader's state is the number of its next
batch.
"""

import contextlib
import logging
import math
import os
import threading
from collections.abc import Generator, Iterator
from typing import Any

import grain
import numpy as np

from lip_jax.data import preprocess
from lip_jax.data.source import Source
from lip_jax.errors import UsageError

Batch = dict[str, np.ndarray]

# So many unreadable images in a row are no accident of one file.
_MAX_SKIPS = 100

logger = logging.getLogger(__name__)


class TrainLoader(Iterator[Batch]):
  """Endless iterator over one process's part of the training batches.

  Yields "image": uint8 [local batch, S, S, 3] and "label": int32 [local batch]. Close it, or use it
  as a context manager, to end its threads. After an error it is closed.
  """

  def __init__(self, dataset: grain.IterDataset, stream: dict[str, Any], read: "_TrainReader"):
    """Use `train_loader`. `stream`: what, beside the step, decides on the content of batches."""
    self._iterator = iter(dataset)
    self._stream = stream
    self._read = read

  def __next__(self) -> Batch:
    try:
      return next(self._iterator)
    except BaseException:
      # Grain would go on with the batch after the one that failed.
      self.close()
      raise

  def get_state(self) -> dict[str, Any]:
    """Where the stream stands: JSON, the same on every process and for any number of them.

    Counts the batches that were returned, not those made ahead.
    """
    return {"next_batch": self._iterator.get_state()["next_index"], **self._stream}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where `get_state` was called: the next batch is the one that came next there.

    Raises:
      UsageError: the state is of another stream, which holds no such batch.
    """
    for key, here in self._stream.items():
      if state.get(key) != here:
        raise UsageError(
          f"cannot continue the training data: it was saved with {key}={state.get(key)!r} and is "
          f"now read with {key}={here!r}; use the old value, or start a new run"
        )
    self._iterator.set_state({"next_index": state["next_batch"]})

  @property
  def skipped(self) -> tuple[str, ...]:
    """Names of the unreadable images that this process has met, each once, by index."""
    return self._read.skipped

  def close(self) -> None:
    """Stops reading ahead; threads end when the batches they work on are done."""
    self._iterator.close()

  def __enter__(self) -> "TrainLoader":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def train_loader(
  source: Source,
  *,
  image_size: int,
  crop_scale: tuple[float, float] | None = None,
  global_batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int | None = None,
  prefetch: int | None = None,
) -> TrainLoader:
  """Shuffled, augmented batches without end; epochs follow each other inside a batch.

  Each epoch is another order of all images. An unreadable image is left out: the next readable one
  of the source takes its place, and its name is logged once.

  Args:
    source: where the images come from.
    image_size: side of the images in a batch, pixels.
    crop_scale: least and greatest area of the random crop, in parts of the image's; None takes the
      whole image, scaled, and cut to a square, if its size differs.
    global_batch_size: images of all processes in a step.
    seed: decides on order and crops.
    process_index: which process this is.
    process_count: number of processes that share each batch.
    num_threads: threads that read and decode, each one batch at a time; None is one for each core,
      at most 32.
    prefetch: batches made ahead; None is two more than there are threads.

  Raises:
    UsageError: `global_batch_size` cannot be divided among the processes. When iterating: too many
      images in a row are unreadable.
  """
  local_batch_size = _local_batch_size(global_batch_size, process_index, process_count)
  read = _TrainReader(source, image_size, crop_scale)
  dataset = (
    grain.MapDataset.range(len(source))
    .seed(seed)
    .shuffle()
    .repeat()
    .random_map(read)
    .batch(local_batch_size)[process_index::process_count]
  )
  stream = {
    "source": source.name,
    "num_examples": len(source),
    "seed": seed,
    "global_batch_size": global_batch_size,
  }
  options = _read_options(num_threads, prefetch)
  return TrainLoader(dataset.to_iter_dataset(options), stream, read)


class _TrainReader:
  """Reads, decodes and crops the image at an index; remembers those it could not read."""

  def __init__(self, source: Source, image_size: int, crop_scale: tuple[float, float] | None):
    self._source = source
    self._image_size = image_size
    self._crop_scale = crop_scale
    self._skipped: dict[int, str] = {}
    self._lock = threading.Lock()

  def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    for attempt in range(min(_MAX_SKIPS, len(self._source))):
      candidate = (index + attempt) % len(self._source)
      example = self._source[candidate]
      try:
        image = preprocess.decode_jpeg(example["image"])
      except preprocess.CorruptImage as error:
        self._note(candidate, error)
        continue
      return {"image": self._crop(image, rng), "label": np.int32(example["label"])}
    raise UsageError(
      f"{attempt + 1} images in a row are unreadable, from {self._source.describe(index)} on; "
      f"the files in {self._source.directory} are damaged: delete them and prepare them again"
    )

  @property
  def skipped(self) -> tuple[str, ...]:
    with self._lock:
      return tuple(name for _, name in sorted(self._skipped.items()))

  def _crop(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    size = self._image_size
    if self._crop_scale is None:
      return preprocess.resize_and_center_crop(image, size, size)
    return preprocess.random_resized_crop(image, rng, size, self._crop_scale)

  def _note(self, index: int, error: preprocess.CorruptImage) -> None:
    name = self._source.describe(index)
    with self._lock:
      if index in self._skipped:
        return
      self._skipped[index] = name
    logger.warning("skipped unreadable %s: %s", name, error)


def eval_batches(
  source: Source,
  *,
  image_size: int,
  resize: int | None = None,
  global_batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int | None = None,
  prefetch: int | None = None,
) -> Generator[Batch, None, None]:
  """Every image once, in order, in ceil(n / global_batch_size) batches on every process.

  Yields "image": uint8 [local batch, S, S, 3], "label": int32 [local batch], and "mask": float32
  [local batch], 1 for images and 0 for the rows that fill up the last batch, which are zero.

  Args:
    source: where the images come from.
    image_size: side of the central square that is used, pixels.
    resize: shorter side of the image before the square is cut out; None is `image_size`.
    global_batch_size: images of all processes in a step.
    process_index: which process this is.
    process_count: number of processes that share each batch.
    num_threads: as for `train_loader`.
    prefetch: as for `train_loader`.

  Raises:
    UsageError: `global_batch_size` cannot be divided among the processes, or `resize` is smaller
      than `image_size`. When iterating: an image is unreadable, since every one has to count.
  """
  local_batch_size = _local_batch_size(global_batch_size, process_index, process_count)
  resize = image_size if resize is None else resize
  if resize < image_size:
    raise UsageError(f"resize={resize} is below image_size={image_size}; expected at least that")

  def read(index: int) -> dict[str, Any]:
    if index >= len(source):
      image = np.zeros((image_size, image_size, 3), np.uint8)
      return {"image": image, "label": np.int32(0), "mask": np.float32(0)}
    example = source[index]
    try:
      image = preprocess.decode_jpeg(example["image"])
    except preprocess.CorruptImage as error:
      raise UsageError(
        f"{source.describe(index)} is unreadable: {error}; the files in {source.directory} are "
        "damaged: delete them and prepare them again"
      ) from error
    image = preprocess.resize_and_center_crop(image, image_size, resize)
    return {"image": image, "label": np.int32(example["label"]), "mask": np.float32(1)}

  padded = math.ceil(len(source) / global_batch_size) * global_batch_size
  dataset = (
    grain.MapDataset.range(padded).map(read).batch(local_batch_size)[process_index::process_count]
  )
  return _closing(iter(dataset.to_iter_dataset(_read_options(num_threads, prefetch))))


def _closing(iterator: Any) -> Generator[Batch, None, None]:
  """Passes batches on and ends the threads with the last one, an error, or the consumer."""
  with contextlib.closing(iterator):
    yield from iterator


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
