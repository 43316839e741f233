"""Measures the input pipeline: decoding and cropping, against other libraries, and memory.

  python benchmarks/input.py             # about two minutes
  python benchmarks/input.py --memory    # memory over 20,000 batches as well, docs/input_memory.png

Needs the `train` extra and scikit-image, which ships some of the photographs. With TensorFlow in
the same environment, tf.data is measured too. Everything runs on one thread and is timed in CPU
seconds of the process, in turns, so that other work on the machine does not favour anybody:
"images/s" is the median over the rounds, with the quartiles; "ours / this" is the median of the
ratios in a round.
"""

import argparse
import importlib.util
import io
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from lip_jax.data import image_parts, preprocess

SIZE = 224
SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
BYTES = 100_000
BATCH = 32

Part = tuple[int, int, int, int]


class Item(NamedTuple):
  """A JPEG, the part of it that everybody has to deliver, and the generator that draws it."""

  data: bytes
  part: Part
  seed: int
  rng: np.random.Generator

  def fresh(self) -> "Item":
    """The same item, whose generator has drawn nothing yet."""
    return self._replace(rng=np.random.default_rng(self.seed))


Method = Callable[[Item], np.ndarray]


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=160, help="turns of each method (default: 160)")
  parser.add_argument("--images", type=int, default=6, help="images in a turn (default: 6)")
  parser.add_argument("--no-tensorflow", action="store_true", help="leave tf.data out")
  parser.add_argument("--memory", action="store_true", help="measure memory, too: some minutes")
  parser.add_argument(
    "--batches", type=int, default=20_000, help="batches for --memory (default: 20,000)"
  )
  parser.add_argument(
    "--figure",
    type=Path,
    default=Path(__file__).parents[1] / "docs" / "input_memory.png",
    help="where --memory draws its figure (default: docs/input_memory.png)",
  )
  args = parser.parse_args()
  if args.rounds < 1 or args.images < 1 or args.batches < 10:
    parser.error("expected --rounds and --images of at least 1, and --batches of at least 10")
  if importlib.util.find_spec("skimage") is None:
    parser.error("the photographs need scikit-image: pip install scikit-image")
  with_tensorflow = not args.no_tensorflow and importlib.util.find_spec("tensorflow") is not None

  encoded = [fitted_jpeg(photograph) for photograph in photographs()]
  kilobytes = [len(data) / 1000 for data in encoded]
  print(
    f"\n## Decode and random resized crop to {SIZE}: {len(encoded)} photographs, 500 x 375, "
    f"{min(kilobytes):.0f} to {max(kilobytes):.0f} kB\n"
  )
  methods = {"lip_jax": ours, **LIBRARIES}
  compare(draw_items(encoded, 240), methods, args, tf_data_methods if with_tensorflow else None)

  large = large_jpegs()
  print(f"\n## The same of {len(large)} large photographs, of 1411 x 1411 and 1000 x 872\n")
  methods = {"lip_jax": ours}
  for margin in (1.0, 1.5, math.inf):
    name = f"reduced from {2 * margin:g} x on" if margin < math.inf else "never reduced"
    methods[f"lip_jax, {name}"] = with_margin(margin)
  methods["Pillow"] = LIBRARIES["Pillow"]
  methods["Pillow, draft"] = LIBRARIES["Pillow, draft"]
  compare(
    draw_items(large, 60),
    methods,
    argparse.Namespace(rounds=max(1, args.rounds // 4), images=min(args.images, 12)),
    tf_data_methods if with_tensorflow else None,
  )

  print("\n## Evaluation: decode, shorter side 256, centre 224\n")
  compare_evaluation(encoded, args)

  print(f"\n## The whole pipeline, batches of {BATCH}\n")
  with tempfile.TemporaryDirectory() as directory:
    compare_pipeline(encoded, directory, args)
    if args.memory:
      print(f"\n## Memory over {args.batches:,} batches\n")
      measure_memory(directory, args)


def photographs() -> Iterator[np.ndarray]:
  """Photographs that scikit-learn and scikit-image ship: uint8 [H, W, 3]."""
  from skimage import data
  from sklearn.datasets import load_sample_images

  yield from load_sample_images().images
  for load in (data.astronaut, data.coffee, data.chelsea, data.rocket):
    yield load()


def fitted_jpeg(photograph: np.ndarray) -> bytes:
  """A JPEG of 500 x 375 pixels whose size is as near to `BYTES` as its quality can bring it."""
  image = Image.fromarray(photograph)
  width, height = min(image.width, image.height * 4 // 3), min(image.height, image.width * 3 // 4)
  left, top = (image.width - width) // 2, (image.height - height) // 2
  image = image.resize(
    (500, 375), Image.Resampling.LANCZOS, (left, top, left + width, top + height)
  )
  attempts = []
  for quality in range(60, 100):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling=2)
    attempts.append(file.getvalue())
  return min(attempts, key=lambda data: abs(len(data) - BYTES))


def large_jpegs() -> list[bytes]:
  """The large photographs that scikit-image ships, as JPEGs of quality 92."""
  from skimage import data

  return [
    simplejpeg.encode_jpeg(load(), quality=92, colorsubsampling="420")
    for load in (data.retina, data.hubble_deep_field)
  ]


def draw_items(encoded: list[bytes], count: int) -> list[Item]:
  """Draws a part for each of `count` images, as training does."""
  items = []
  for seed in range(count):
    data = encoded[seed % len(encoded)]
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    rng = np.random.default_rng(seed)
    part = image_parts.random_part(height, width, rng, SCALE, RATIO)
    items.append(Item(data, part, seed, rng))
  return items


def cut(image: np.ndarray, part: Part) -> np.ndarray:
  """The part of an image."""
  top, left, height, width = part
  return image[top : top + height, left : left + width]


def resized(image: np.ndarray, interpolation: int) -> np.ndarray:
  """OpenCV's resizing to a square."""
  return cv2.resize(image, (SIZE, SIZE), interpolation=interpolation)


def ours(item: Item) -> np.ndarray:
  """What training does; draws the part itself."""
  return preprocess.decode_random_resized_crop(item.data, item.rng, SIZE, SCALE, RATIO)


def with_margin(margin: float) -> Method:
  """What training would do with another `_REDUCTION_MARGIN`."""

  def method(item: Item) -> np.ndarray:
    default = preprocess._REDUCTION_MARGIN
    preprocess._REDUCTION_MARGIN = margin
    try:
      return ours(item)
    finally:
      preprocess._REDUCTION_MARGIN = default

  return method


def two_steps(item: Item) -> np.ndarray:
  """Ours, of the completely decoded image."""
  image = preprocess.decode_jpeg(item.data)
  return preprocess.random_resized_crop(image, item.rng, SIZE, SCALE, RATIO)


def simplejpeg_scaled(item: Item) -> np.ndarray:
  """The smallest scale, in eighths, that leaves enough pixels."""
  height, width, _, _ = simplejpeg.decode_jpeg_header(item.data)
  scale = min(1.0, max(SIZE / item.part[2], SIZE / item.part[3]))
  image = simplejpeg.decode_jpeg(
    item.data, min_height=math.ceil(height * scale), min_width=math.ceil(width * scale)
  )
  top, left, part_height, part_width = (round(side * len(image) / height) for side in item.part)
  return resized(cut(image, (top, left, part_height, part_width)), cv2.INTER_AREA)


def imdecode(data: bytes, flags: int) -> np.ndarray:
  """OpenCV's decoder."""
  image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
  assert image is not None
  return image


def opencv(item: Item) -> np.ndarray:
  """OpenCV alone."""
  return resized(cut(imdecode(item.data, cv2.IMREAD_COLOR_RGB), item.part), cv2.INTER_AREA)


def opencv_reduced(item: Item) -> np.ndarray:
  """OpenCV at half the size, whether or not that leaves enough pixels."""
  image = imdecode(item.data, cv2.IMREAD_REDUCED_COLOR_2)
  top, left, height, width = (side // 2 for side in item.part)
  return resized(cut(image[..., ::-1], (top, left, height, width)), cv2.INTER_LINEAR)


def pillow(item: Item, *, draft: bool = False) -> np.ndarray:
  """What torchvision does."""
  image = Image.open(io.BytesIO(item.data))
  top, left, height, width = item.part
  reduction = 1.0
  if draft:
    full_width = image.width
    scale = max(SIZE / height, SIZE / width)
    image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    reduction = full_width / image.width
  right, bottom = (left + width) / reduction, (top + height) / reduction
  box = (left / reduction, top / reduction, right, bottom)
  return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box))


LIBRARIES: dict[str, Method] = {
  "lip_jax, in two steps": two_steps,
  "simplejpeg, area": lambda item: resized(
    cut(simplejpeg.decode_jpeg(item.data), item.part), cv2.INTER_AREA
  ),
  "simplejpeg, bilinear": lambda item: resized(
    cut(simplejpeg.decode_jpeg(item.data), item.part), cv2.INTER_LINEAR
  ),
  "simplejpeg scaled, area": simplejpeg_scaled,
  "OpenCV, area": opencv,
  "OpenCV 1/2, bilinear": opencv_reduced,
  "Pillow": pillow,
  "Pillow, draft": lambda item: pillow(item, draft=True),
}


def tf_data_methods(items: list[Item]) -> dict[str, Method]:
  """tf.data with TensorFlow's partial decoding, on one thread, nothing read ahead."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  import tensorflow as tf

  tf.config.threading.set_intra_op_parallelism_threads(1)
  tf.config.threading.set_inter_op_parallelism_threads(1)

  def stream(dtype: Any, antialias: bool) -> Method:
    encoded = sorted({item.data for item in items})
    table = tf.constant(encoded)

    def decode(index: Any, part: Any) -> Any:
      image = tf.image.decode_and_crop_jpeg(table[index], part, channels=3)
      image = tf.image.resize(image, [SIZE, SIZE], antialias=antialias)
      return image if dtype is None else tf.cast(image, dtype)

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    # Otherwise tf.data goes on while others are timed.
    options.autotune.enabled = False
    options.experimental_optimization.inject_prefetch = False
    options.experimental_warm_start = False
    indices = [encoded.index(item.data) for item in items]
    parts = np.array([item.part for item in items], np.int32)
    dataset = tf.data.Dataset.from_tensor_slices((indices, parts)).repeat().map(decode)
    iterator = iter(dataset.with_options(options))
    # The data set has the items in the order in which they are asked for.
    return lambda item: next(iterator).numpy()

  return {
    "tf.data, float32": stream(None, False),
    "tf.data, uint8": stream(tf.uint8, False),
    "tf.data, uint8, antialiased": stream(tf.uint8, True),
  }


def compare(
  items: list[Item],
  methods: dict[str, Method],
  args: argparse.Namespace,
  more: Callable[[list[Item]], dict[str, Method]] | None,
) -> None:
  """Prints a table of speed and of the difference from Pillow's pixels."""
  # A whole number of rounds goes through all items, so that every method stays in step with them.
  items = items[: len(items) // args.images * args.images] or items
  if more is not None:
    methods = methods | more(items)
  references = [pillow(item).astype(np.float64) for item in items]
  quality = {}
  for name, method in methods.items():
    quality[name] = [
      psnr(method(item.fresh()), reference)
      for item, reference in zip(items, references, strict=True)
    ]
  seconds = interleave(
    {name: each(method) for name, method in methods.items()},
    [items[k : k + args.images] for k in range(0, len(items), args.images)],
    args.rounds,
  )
  print("| method | images/s per core | quartiles | ours / this | PSNR, mean | PSNR, least |")
  print("|---|---|---|---|---|---|")
  for name, values in quality.items():
    finite = [value for value in values if value < 100]
    exact = len(finite) < len(values) / 2
    mean, least = (
      ("exact", "exact") if exact else (f"{statistics.mean(finite):.1f}", f"{min(finite):.1f}")
    )
    print(f"| {name} | {speed(seconds, name, 'lip_jax')} | {mean} | {least} |", flush=True)


def each(method: Callable[[Any], object]) -> Callable[[list[Any]], None]:
  """Applies a method to all items of a list, and drops the results."""

  def run(items: list[Any]) -> None:
    for item in items:
      method(item)

  return run


def interleave(
  runs: dict[str, Callable[[list[Any]], None]], chunks: list[list[Any]], rounds: int
) -> dict[str, list[float]]:
  """CPU seconds per item of each run in each round; the order in a round is random."""
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  shuffled = random.Random(0)
  for k in range(rounds):
    chunk = chunks[k % len(chunks)]
    for name in shuffled.sample(list(runs), len(runs)):
      items = [item.fresh() if isinstance(item, Item) else item for item in chunk]
      start = time.process_time()
      runs[name](items)
      seconds[name].append((time.process_time() - start) / len(chunk))
  return seconds


def speed(seconds: dict[str, list[float]], name: str, reference: str) -> str:
  """Three cells: images/s, their quartiles, and the ratio of the reference's speed to it."""
  rates = np.quantile([1 / value for value in seconds[name]], [0.25, 0.5, 0.75])
  ratio = statistics.median(
    this / ours for this, ours in zip(seconds[name], seconds[reference], strict=True)
  )
  return f"{rates[1]:.0f} | {rates[0]:.0f} - {rates[2]:.0f} | {ratio:.2f}"


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
  """Peak signal-to-noise ratio in dB; infinite if nothing differs."""
  error = ((image.astype(np.float64) - reference) ** 2).mean()
  return 10 * math.log10(255**2 / error) if error else math.inf


def pillow_center_crop(data: bytes) -> np.ndarray:
  """What torchvision does for evaluation: Resize(256) and CenterCrop(224)."""
  image = Image.open(io.BytesIO(data)).convert("RGB")
  shorter, longer = sorted(image.size)
  if shorter != 256:
    other = int(256 * longer / shorter)
    new = (256, other) if image.width <= image.height else (other, 256)
    image = image.resize(new, Image.Resampling.BILINEAR)
  left, top = (round((side - SIZE) / 2) for side in image.size)
  return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))


def compare_evaluation(encoded: list[bytes], args: argparse.Namespace) -> None:
  """Prints speed, and how many bytes differ from Pillow's, over many sizes and shapes."""
  methods = {
    "lip_jax": lambda data: preprocess.decode_center_crop(data, SIZE, 256),
    "Pillow": pillow_center_crop,
  }
  seconds = interleave(
    {name: each(method) for name, method in methods.items()},
    [encoded],
    args.rounds,
  )
  print("| method | images/s per core | quartiles | ours / this |\n|---|---|---|---|")
  for name in methods:
    print(f"| {name} | {speed(seconds, name, 'lip_jax')} |")
  rng = np.random.default_rng(0)
  differ = total = images = 0
  for data in encoded:
    photograph = Image.fromarray(simplejpeg.decode_jpeg(data))
    for k in range(25):
      width, height = (int(side) for side in rng.integers(20, 1200, 2))
      other = simplejpeg.encode_jpeg(
        np.asarray(photograph.resize((width, height))),
        quality=int(rng.integers(60, 98)),
        colorsubsampling=("420", "444", "422")[k % 3],
      )
      difference = methods["lip_jax"](other) != methods["Pillow"](other)
      differ, total, images = differ + difference.sum(), total + difference.size, images + 1
  print(
    f"\n{differ:,} of {total:,} bytes differ from Pillow's, over {images} images with sides from "
    "20 to 1,199 pixels and shapes from tall to wide."
  )


def write_data_set(name: str, encoded: list[bytes], directory: str) -> None:
  """Writes JPEGs as a data set in ArrayRecord files, as `lip-jax data prepare folder` does."""
  from lip_jax.data.prepare.folder import prepare_folder

  with tempfile.TemporaryDirectory() as folder:
    for k, data in enumerate(encoded):
      path = Path(folder) / "train" / f"class{k % 2}" / f"{k}.jpg"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data)
    prepare_folder(folder, name, directory)


def open_loader(name: str, directory: str, size: int, batch: int, num_threads: int) -> Any:
  """The training pipeline over a data set of `write_data_set`."""
  from lip_jax.data import pipeline, transforms
  from lip_jax.data.source import open_split

  source = open_split(name, "train", directory, prepare=False)
  return pipeline.train_loader(
    source,
    transforms.TrainCrop(size, SCALE),
    global_batch_size=batch,
    seed=0,
    num_threads=num_threads,
  )


def compare_pipeline(encoded: list[bytes], directory: str, args: argparse.Namespace) -> None:
  """Prints CPU time per image of the pipeline against that of the bare function."""
  write_data_set("photographs", encoded * 100, directory)
  batches = 4
  # As many copies in memory, so that no side finds its images in the processor's cache.
  copies = [bytes(bytearray(data)) for data in encoded * 100]
  items = draw_items(copies, len(copies))
  threads = sorted({1, os.cpu_count() or 1})
  loaders = {count: open_loader("photographs", directory, SIZE, BATCH, count) for count in threads}

  def take_batches(loader: Any) -> Callable[[list[Any]], None]:
    def run(_unused: list[Any]) -> None:
      for _ in range(batches):
        next(loader)
      # As many batches are made as were taken, once those ahead are complete again.
      wait_until_idle()

    return run

  runs = {"bare function": each(ours)}
  for count, loader in loaders.items():
    runs[f"pipeline, {count} thread{'s' * (count > 1)}"] = take_batches(loader)
    next(loader)
  wait_until_idle()
  rounds = max(3, args.rounds // 16)
  count = batches * BATCH
  chunks = [items[k : k + count] for k in range(0, len(items) - count + 1, count)]
  seconds = interleave(runs, chunks, rounds)
  for loader in loaders.values():
    loader.close()
  print("| | images/s per core | quartiles | pipeline / bare |\n|---|---|---|---|")
  for name in runs:
    rate, quartiles, ratio = speed(seconds, name, "bare function").split(" | ")
    print(f"| {name} | {rate} | {quartiles} | {1 / float(ratio):.2f} |", flush=True)


def wait_until_idle() -> None:
  """Waits until the threads of this process have nothing to do."""
  before = time.process_time()
  while True:
    time.sleep(0.05)
    now = time.process_time()
    if now - before < 0.002:
      return
    before = now


def measure_memory(directory: str, args: argparse.Namespace) -> None:
  """Reads many small batches; prints and draws the memory that the process holds."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  small = []
  for photograph in photographs():
    image = Image.fromarray(photograph).resize((48, 40))
    small.append(simplejpeg.encode_jpeg(np.asarray(image), colorsubsampling="420"))
  write_data_set("small", small * 200, directory)
  step = max(1, args.batches // 200)
  counts, megabytes = [], []
  with open_loader("small", directory, 32, 8, os.cpu_count() or 1) as loader:
    for count in range(1, args.batches + 1):
      next(loader)
      if count % step == 0:
        counts.append(count)
        megabytes.append(resident_megabytes())
  tenth = len(counts) // 10
  growth = statistics.mean(megabytes[-tenth:]) - statistics.mean(megabytes[tenth : 2 * tenth])
  print(
    f"batches of 8 images of 32 pixels: {megabytes[0]:.1f} MB after {counts[0]:,} batches, "
    f"{megabytes[tenth]:.1f} MB after {counts[tenth]:,}, {megabytes[-1]:.1f} MB after "
    f"{counts[-1]:,}; from the second tenth to the last it grows by {growth:.1f} MB "
    f"(largest value: {max(megabytes):.1f} MB)"
  )
  figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
  axes.plot(counts, megabytes)
  axes.set(xlabel="batches", ylabel="resident memory (MB)", ylim=(0, 1.2 * max(megabytes)))
  figure.savefig(args.figure, dpi=120)
  print(f"figure: {args.figure}")


def resident_megabytes() -> float:
  """Memory of this process that is in use now, MB; Linux only."""
  with open("/proc/self/statm", encoding="ascii") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
  main()
