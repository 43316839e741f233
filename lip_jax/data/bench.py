"""How fast this machine reads and prepares a data set's images, and what that is enough for."""

import dataclasses
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lip_jax.data import boxes_pipeline, preprocess
from lip_jax.data.boxes import has_boxes, open_boxes
from lip_jax.data.pipeline import TrainLoader, train_loader
from lip_jax.data.source import Source, open_split
from lip_jax.data.transforms import TrainCrop
from lip_jax.errors import UsageError

# images/s of a training, for those who name none: a small GPU to a large slice of a pod.
_STEP_RATES = (1_000, 3_000, 10_000, 30_000)
_SAMPLES = 256  # images that the bare decoder gets
_LONG_SIDE = 1333 / 800  # of images with boxes, over the shorter side: the paper's


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
  """What `bench` has measured; rates in images/s; as a string, for people."""

  name: str  # data set and split
  image_bytes: int  # median size of an encoded image
  preparation: str  # what is done to an image: "decode and crop" or "decode and resize"
  decode_rate: float  # of that alone, of images in memory, for each core
  read_rate: float  # reading records alone, one thread
  pipeline_rate: float  # the whole input pipeline with `num_threads` threads
  core_rate: float  # images for each second of one core's time that the pipeline takes
  num_threads: int
  num_cores: int  # of this machine
  peak_memory_mb: float  # of the process, in 10^6 bytes
  step_rates: tuple[float, ...]  # to feed

  @property
  def efficiency(self) -> float:
    """Pipeline per core / bare decoder per core."""
    return self.core_rate / self.decode_rate

  def cores(self, step_rate: float) -> int:
    """Cores that feed so many images/s."""
    return math.ceil(step_rate / self.core_rate)

  def __str__(self) -> str:
    lines = [
      f"{self.name}: images of {self.image_bytes / 1000:.0f} kB (median)",
      f"read records, one thread       {self.read_rate:,.0f} images/s",
      f"{f'{self.preparation}, for each core':<30} {self.decode_rate:,.0f} images/s",
      f"whole pipeline, {self.num_threads} thread(s){'':<6}  {self.pipeline_rate:,.0f} images/s on "
      f"{self.num_cores} core(s)",
      f"whole pipeline, for each core  {self.core_rate:,.0f} images/s "
      f"({100 * self.efficiency:.0f} % of the bare decoder)",
      f"memory of the process          {self.peak_memory_mb:,.0f} MB at most",
    ]
    for rate in self.step_rates:
      enough = "enough here" if self.pipeline_rate >= rate else "not enough here"
      lines.append(f"to feed {rate:>9,.0f} images/s: {self.cores(rate):>5,} core(s), {enough}")
    return "\n".join(lines)


class _Work(NamedTuple):
  """The training input of a data set."""

  source: Source
  loader: TrainLoader
  preparation: str
  prepare: Callable[[bytes], Any]  # what that does to an encoded image


def bench(
  dataset: str,
  *,
  data_dir: str | None = None,
  split: str = "train",
  image_size: int | None = None,
  crop_scale: tuple[float, float] = (0.08, 1.0),
  batch_size: int | None = None,
  num_threads: int | None = None,
  seconds: float = 10.0,
  step_rates: Sequence[float] = _STEP_RATES,
) -> BenchmarkResult:
  """Measures the training input of a data set: reading, decoding, and the whole pipeline.

  Args:
    dataset: as for `open_split`, or for `open_boxes`.
    data_dir: as for `open_split`.
    image_size: of crops (None: 224), or the shorter side of images with boxes (None: 800).
    batch_size: None is 64, or 16 of images with boxes.
    num_threads: of the pipeline; None is one for each core.

  Raises:
    UsageError: the data set cannot be opened, or a number is not positive.
  """
  boxes = has_boxes(dataset, data_dir)
  image_size = (800 if boxes else 224) if image_size is None else image_size
  batch_size = (16 if boxes else 64) if batch_size is None else batch_size
  numbers = {"image_size": image_size, "batch_size": batch_size, "seconds": seconds}
  numbers |= {"step rate": min(step_rates, default=1)}
  for name, value in numbers.items():
    if value <= 0:
      raise UsageError(f"{name} must be positive, got {value}")
  num_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
  num_threads = num_threads or num_cores
  options = {"global_batch_size": batch_size, "seed": 0, "num_threads": num_threads}
  if boxes:
    work = _resizing(open_boxes(dataset, split, data_dir, prepare=False), image_size, options)
  else:
    source = open_split(dataset, split, data_dir, prepare=False)
    work = _cropping(source, image_size, crop_scale, options)
  pipeline_rate, core_rate = _pipeline_rates(work.loader, num_threads + 2, 0.6 * seconds)
  samples, read_rate = _samples(work.source, 0.1 * seconds)

  def prepare(data: bytes) -> None:
    try:
      work.prepare(data)
    except preprocess.CorruptImage:
      return  # the pipeline skips them, too

  decode_rate = _rate(prepare, samples, 0.3 * seconds)
  kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux
  return BenchmarkResult(
    name=work.source.name,
    image_bytes=round(statistics.median(map(len, samples))),
    preparation=work.preparation,
    decode_rate=decode_rate,
    read_rate=read_rate,
    pipeline_rate=pipeline_rate,
    core_rate=core_rate,
    num_threads=num_threads,
    num_cores=num_cores,
    peak_memory_mb=kilobytes * 1024 / 1e6,
    step_rates=tuple(step_rates),
  )


def _cropping(
  source: Source, size: int, crop_scale: tuple[float, float], options: dict[str, Any]
) -> _Work:
  """What a classifier is trained with."""
  rng = np.random.default_rng(0)
  return _Work(
    source,
    train_loader(source, TrainCrop(size, crop_scale, upright=source.upright), **options),
    "decode and crop",
    lambda data: preprocess.decode_random_resized_crop(
      data, rng, size, crop_scale, upright=source.upright
    ),
  )


def _resizing(source: Any, short: int, options: dict[str, Any]) -> _Work:
  """What a detector is trained with: wide and tall batches."""
  long = round(short * _LONG_SIDE)
  sides = [-(-side // 32) * 32 for side in (short, long)]
  loader = boxes_pipeline.train_loader(
    source,
    buckets=["{}x{}".format(*sides), "{}x{}".format(*sides[::-1])],
    short_side=short,
    long_side=long,
    max_boxes=100,
    flip=0.5,
    **options,
  )

  def prepare(data: bytes) -> np.ndarray:
    return boxes_pipeline.resize(preprocess.decode_jpeg(data), short, long)[0]

  return _Work(source, loader, "decode and resize", prepare)


def _pipeline_rates(loader: TrainLoader, ahead: int, seconds: float) -> tuple[float, float]:
  """Images for each second, and for each of a core's time."""
  with loader:
    for _ in range(ahead):  # what was made ahead while nothing was timed
      next(loader)
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < seconds:
      count += len(next(loader)["image"])
    return count / (time.perf_counter() - wall), count / (time.process_time() - cpu)


def _samples(source: Source, seconds: float) -> tuple[list[bytes], float]:
  """Some encoded images, and how many are read in a second."""
  count = min(_SAMPLES, len(source))
  indices = np.random.default_rng(0).permutation(len(source))[:count]
  start = time.perf_counter()
  samples = []
  for index in indices:
    samples.append(source[int(index)]["image"])
    if time.perf_counter() - start > seconds:
      break
  return samples, len(samples) / (time.perf_counter() - start)


def _rate(function: Callable[[bytes], None], samples: Sequence[bytes], seconds: float) -> float:
  """Calls for each second of a core's time, which others that use the cores do not change."""
  start, cpu, count = time.perf_counter(), time.thread_time(), 0
  while time.perf_counter() - start < seconds:
    function(samples[count % len(samples)])
    count += 1
  return count / (time.thread_time() - cpu)
