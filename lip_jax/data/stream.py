"""Batches from files that can only be read in order: who reads which records, and when.

The unit of shuffling is first the file, then the window: every epoch takes the files in another
order, reads several at a time in turns, and shuffles each `window` records that come out of them.
"""

import itertools
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import grain
import numpy as np

from lip_jax.data import tfrecord
from lip_jax.data.source import Shard
from lip_jax.errors import UsageError

# Files that are read in turns, and records read ahead of each: enough to hide a bucket's latency.
_FILES_IN_TURNS = 16
_RECORDS_AHEAD = 4


class Record(NamedTuple):
  """A serialised example and where it was found."""

  path: str
  number: int  # in the file, from 0
  data: bytes


def share(
  shards: Sequence[Shard], process_index: int, process_count: int, epoch: int = 0
) -> list[Shard]:
  """The records that one process reads in an epoch.

  The files, end to end, are cut into one piece for each process. So a process has whole files, but
  for the first and the last, of which its neighbours may have the rest; and every record is in one
  piece. In epochs 0 to e - 1 together, process p of P has floor((e n + p) / P) of the n records
  each: at any time, all have had equally many, but for one.
  """
  total = sum(shard.take for shard in shards)
  ends = [
    ((epoch + 1) * total + p) // process_count - (epoch * total + p) // process_count
    for p in range(process_index + 1)
  ]
  start, stop = sum(ends[:-1]), sum(ends)
  parts, offset = [], 0
  for shard in shards:
    first, last = max(start - offset, 0), min(stop - offset, shard.take)
    if first < last:
      parts.append(Shard(shard.path, shard.skip + first, last - first))
    offset += shard.take
  return parts


def read(shard: Shard) -> Generator[Record, None, None]:
  """The records of (part of) a file, in order.

  Raises:
    UsageError: the file is damaged.
  """
  records = tfrecord.read_records(shard.path, skip=shard.skip, take=shard.take)
  try:
    for number, data in enumerate(records, shard.skip):
      yield Record(shard.path, number, data)
  except tfrecord.CorruptFile as error:
    raise UsageError(f"{error}; the file is damaged: copy or prepare it again") from error


class _File(grain.IterDataset[Record]):
  """Part of a file, for Grain."""

  def __init__(self, shard: Shard):
    super().__init__()
    self._shard = shard

  def __iter__(self) -> "_FileIterator":
    return _FileIterator(self._shard)


class _FileIterator(grain.DatasetIterator[Record]):
  """Its state is the number of records read: to skip others means to read their lengths only."""

  def __init__(self, shard: Shard):
    super().__init__()
    self._shard = shard
    self.set_state({"records": 0})

  def __next__(self) -> Record:
    record = next(self._records)
    self._count += 1
    return record

  def get_state(self) -> dict[str, Any]:
    return {"records": self._count}

  def set_state(self, state: dict[str, Any]) -> None:
    self._count = count = state["records"]
    path, skip, take = self._shard
    self._records = read(Shard(path, skip + count, take - count))

  def close(self) -> None:
    super().close()
    self._records.close()


class ShuffledRecords(Iterator[Record]):
  """One process's records, epoch after epoch without end, each in another order.

  Args:
    shards: all files.
    seed: decides on the orders.
    window: records that are shuffled among each other, all of them in memory.
    process_index: which process this is.
    process_count: number of processes.
  """

  def __init__(
    self, shards: Sequence[Shard], *, seed: int, window: int, process_index: int, process_count: int
  ):
    self._shards = shards
    self._seed = seed
    self._window = window
    self._process = (process_index, process_count)
    self._epoch = 0
    self._records = self._open()

  def _open(self) -> grain.DatasetIterator[Record]:
    order = np.random.default_rng((self._seed, self._epoch)).permutation(len(self._shards))
    parts = share([self._shards[i] for i in order], *self._process, self._epoch)
    if not parts:  # fewer records than processes
      return iter(grain.MapDataset.source([]).to_iter_dataset())
    in_turns = grain.experimental.InterleaveIterDataset(
      [_File(part) for part in parts],
      cycle_length=_FILES_IN_TURNS,
      iter_buffer_size=_RECORDS_AHEAD,
    )
    # Grain adds the number of the window, and takes 32 bits.
    (seed,) = np.random.SeedSequence((self._seed, self._epoch, *self._process)).generate_state(1)
    return iter(
      grain.experimental.WindowShuffleIterDataset(
        in_turns, window_size=self._window, seed=int(seed) >> 1
      )
    )

  def __next__(self) -> Record:
    while True:
      try:
        return next(self._records)
      except StopIteration:
        self._records.close()
        self._epoch += 1
        self._records = self._open()

  def get_state(self) -> dict[str, Any]:
    """Where it stands: JSON."""
    return {"epoch": self._epoch, "records": self._records.get_state()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes there; reads what had been read of the window again."""
    self._records.close()
    self._epoch = state["epoch"]
    self._records = self._open()
    self._records.set_state(state["records"])

  def close(self) -> None:
    """Ends the threads that read ahead; nothing else may be called then."""
    self._records.close()
    # Grain's iterators close themselves again when they are freed: not after its modules are gone.
    del self._records


def in_threads(
  function: Callable[[Any], Any], items: Iterable[Any], num_threads: int, ahead: int
) -> Generator[Any, None, None]:
  """`function` of each item, in order, made ahead.

  One thread goes through `items`, so that reading goes on while others work and the results are
  used. Closing the iterator ends the threads, and `items` if that is a generator.

  Args:
    function: called in threads.
    items: iterated in a thread.
    num_threads: that call `function`; with 0 nothing is done ahead.
    ahead: results made, or being made, before they are asked for; likewise.
  """
  if num_threads < 1 or ahead < 1:
    yield from map(function, items)
    return
  pool = futures.ThreadPoolExecutor(num_threads, thread_name_prefix="lip-decode")
  results: queue.Queue[futures.Future | None] = queue.Queue()
  free = threading.Semaphore(ahead)
  stop = threading.Event()

  def feed() -> None:
    try:
      for item in items:
        free.acquire()
        if stop.is_set():
          return
        results.put(pool.submit(function, item))
      results.put(None)
    except BaseException as error:
      failed: futures.Future = futures.Future()
      failed.set_exception(error)
      results.put(failed)

  reader = threading.Thread(target=feed, name="lip-read", daemon=True)
  reader.start()
  try:
    while (result := results.get()) is not None:
      yield result.result()
      free.release()
  finally:
    stop.set()
    free.release()
    reader.join()
    pool.shutdown(wait=True, cancel_futures=True)
    if isinstance(items, Generator):
      items.close()


class TrainBatches(Iterator[Any]):
  """Batches out of shuffled records, made ahead by threads; knows where it stands.

  Args:
    records: where they come from; closed with this.
    make: turns (number of the batch, its records) into the batch.
    batch_size: records in a batch.
    num_threads: that call `make`.
    ahead: batches made ahead.
  """

  def __init__(
    self,
    records: ShuffledRecords,
    make: Callable[[int, list[Record]], Any],
    batch_size: int,
    num_threads: int,
    ahead: int,
  ):
    self._records = records
    self._make = make
    self._batch_size = batch_size
    self._threads = (num_threads, ahead)
    self._closed = False
    self._start({"next_batch": 0, "reader": records.get_state()})

  def _start(self, state: dict[str, Any]) -> None:
    self._state = state
    self._batches = in_threads(self._finish, self._read(state["next_batch"]), *self._threads)

  def _read(self, number: int) -> Iterator[tuple[int, list[Record], dict[str, Any]]]:
    while True:
      records = [next(self._records) for _ in range(self._batch_size)]
      yield number, records, self._records.get_state()
      number += 1

  def _finish(self, item: tuple[int, list[Record], dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    number, records, reader = item
    return self._make(number, records), {"next_batch": number + 1, "reader": reader}

  def __next__(self) -> Any:
    if self._closed:
      raise ValueError("these batches are closed")
    batch, self._state = next(self._batches)
    return batch

  def get_state(self) -> dict[str, Any]:
    """Number of the next batch, and where the reader stands after those that were returned."""
    return self._state

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where `get_state` was called."""
    self._batches.close()
    self._records.set_state(state["reader"])
    self._start(state)

  def close(self) -> None:
    """Ends the threads."""
    if not self._closed:
      self._closed = True
      self._batches.close()
      self._records.close()


def eval_batches(
  shards: Sequence[Shard],
  make: Callable[[list[Record]], Any],
  batch_size: int,
  *,
  process_index: int,
  process_count: int,
  num_threads: int,
  ahead: int,
) -> Generator[Any, None, None]:
  """A process's part of all records, in order, `make`d in batches: equally many on every process.

  The last batches may be short or empty.
  """
  total = sum(shard.take for shard in shards)
  longest = -(-total // process_count)
  records = (
    record for shard in share(shards, process_index, process_count) for record in read(shard)
  )

  def lists() -> Iterator[list[Record]]:
    for _ in range(0, longest, batch_size):
      yield list(itertools.islice(records, batch_size))

  return in_threads(make, lists(), num_threads, ahead)


def name_of(record: Record) -> str:
  """Names a record, to a person who has to find it."""
  return f"{os.path.basename(record.path)} record {record.number}"
