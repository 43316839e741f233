"""Batches of images with boxes: resized, perhaps flipped, and padded to one of a few shapes.

A global batch is of one bucket, a shape that is wide, tall or square: each image goes to the
smallest that holds it. So a step is compiled once for each bucket, and little of it is padding.
"""

import contextlib
import logging
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from lip_jax.data import pipeline, preprocess
from lip_jax.data.boxes import BoxSource
from lip_jax.data.buckets import parse_buckets
from lip_jax.data.order import ShuffledGroups
from lip_jax.data.preprocess import CorruptImage
from lip_jax.data.transforms import Example, Row, Shapes
from lip_jax.errors import UsageError

logger = logging.getLogger(__name__)


class TrainImages(NamedTuple):
  """Which images are trained, and what is left out of them.

  Attributes:
    groups: the images of each bucket, int [n].
    without_objects: number of images left out because no box is to be learned: there is none, or
      all are degenerate, outside the image, or crowds.
    small: number left out because a side is below `min_side`, or they are unreadable.
    degenerate: number of boxes that are left out of the other images.
    crowded: number of images with more than `max_boxes` boxes, of which the rest is left out.
    most_boxes: the largest number of boxes in an image.
  """

  groups: list[np.ndarray]
  without_objects: int
  small: int
  degenerate: int
  crowded: int
  most_boxes: int

  def num_train(self, global_batch_size: int) -> int:
    """Images of an epoch, with those that are repeated to fill each bucket's last batch."""
    return sum(-(-len(group) // global_batch_size) for group in self.groups) * global_batch_size


def resized(
  sizes: np.ndarray, short_side: float, long_side: float
) -> tuple[np.ndarray, np.ndarray]:
  """(sizes after resizing int [n, 2], factors float64 [n]) of images.

  An image becomes as large as it can with a shorter side of at most `short_side` pixels and a
  longer one of at most `long_side`.

  Args:
    sizes: int [n, 2], height and width.
  """
  sizes = np.maximum(sizes, 1)
  scales = np.minimum(long_side / sizes.max(axis=1), short_side / sizes.min(axis=1))
  return np.maximum((sizes * scales[:, None] + 0.5).astype(np.int64), 1), scales


def resize(image: np.ndarray, short_side: float, long_side: float) -> tuple[np.ndarray, float]:
  """(image uint8 [H', W', 3], factor): as `resized` says, bilinear, without antialiasing.

  Args:
    image: uint8 [H, W, 3].
  """
  sizes, scales = resized(np.array([image.shape[:2]]), short_side, long_side)
  height, width = sizes[0].tolist()
  return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR), float(scales[0])


def assign_buckets(
  source: BoxSource, buckets: Sequence[str], short_side: float, long_side: float
) -> np.ndarray:
  """The smallest bucket that holds each image after resizing: int [n].

  Raises:
    UsageError: an image fits into none.
  """
  shapes = np.array(parse_buckets(buckets))
  sizes, _ = resized(source.image_sizes(), short_side, long_side)
  order = np.argsort(shapes.prod(axis=1), kind="stable")
  fits = (sizes[:, None] <= shapes[order]).all(axis=2)
  lost = np.flatnonzero(fits.sum(axis=1) == 0)
  if len(lost):
    height, width = sizes[lost[0]]
    raise UsageError(
      f"{source.describe(int(lost[0]))} has {height}x{width} pixels after resizing to "
      f"short_side={short_side}, long_side={long_side}, and {len(lost) - 1:,} others are too large "
      f"as well: more than each of buckets={tuple(buckets)}; add a bucket that holds it"
    )
  return order[fits.argmax(axis=1)]


def train_images(
  source: BoxSource,
  *,
  buckets: Sequence[str],
  short_side: float,
  long_side: float,
  max_boxes: int,
  min_side: int = 32,
) -> TrainImages:
  """Which images of a source are trained, by their annotations alone; as for `train_loader`."""
  table = source.table
  bucket = assign_buckets(source, buckets, short_side, long_side)
  large = table.sizes.min(axis=1) >= max(min_side, 1)
  chosen = large & (table.num_objects > 0)
  if not chosen.any():
    raise UsageError(
      f"{source.name} has no image to train on: none of {len(source):,} has sides of at least "
      f"{min_side} pixels and a box that is at least one pixel wide and high and no crowd"
    )
  return TrainImages(
    groups=[np.flatnonzero(chosen & (bucket == k)) for k in range(len(buckets))],
    without_objects=int((large & ~chosen).sum()),
    small=int((~large).sum()),
    degenerate=int((table.counts - table.num_usable)[chosen].sum()),
    crowded=int((table.num_usable[chosen] > max_boxes).sum()),
    most_boxes=int(table.num_usable[chosen].max()),
  )


def train_loader(
  source: BoxSource,
  *,
  buckets: Sequence[str],
  short_side: float,
  long_side: float,
  max_boxes: int,
  flip: float,
  global_batch_size: int,
  seed: int,
  min_side: int = 32,
  num_threads: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> pipeline.TrainLoader:
  """Shuffled batches without end, each of one bucket's shape H x W.

  Yields "image" uint8 [B, H, W, 3], zero beyond "size" int32 [B, 2], height and width; "boxes"
  float32 [B, max_boxes, 4], x1, y1, x2, y2 in its pixels, where x2 - x1 is the width; "labels"
  int32, "valid" bool and "crowd" bool [B, max_boxes]; "image_id" int32 [B].

  An epoch has each image once, and a few of each bucket again where they do not make whole batches.
  Images and boxes that cannot be learned are left out: see `TrainImages`, which is logged.

  Args:
    buckets: the shapes, such as ("800x1344", "1344x800").
    short_side: of a resized image, at most; see `resized`.
    long_side: see `short_side`.
    max_boxes: of an image; crowds, then later boxes are left out of those with more.
    flip: probability that left and right are swapped.
    min_side: least shorter side of an image as stored.
    num_threads: this and the others as for `pipeline.train_loader`.

  Raises:
    UsageError: there is nothing to train on, an image fits into no bucket, or as for
      `pipeline.train_loader`.
  """
  options: dict[str, Any] = {"short_side": short_side, "long_side": long_side}
  images = train_images(source, buckets=buckets, max_boxes=max_boxes, min_side=min_side, **options)
  _log(source, images, max_boxes, min_side)
  return pipeline.train_loader(
    source,
    [_TrainBoxes(shape, max_boxes, flip, **options) for shape in parse_buckets(buckets)],
    order=ShuffledGroups(images.groups, global_batch_size, seed),
    global_batch_size=global_batch_size,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
    num_threads=num_threads,
  )


def eval_batches(
  source: BoxSource,
  *,
  buckets: Sequence[str],
  short_side: float,
  long_side: float,
  global_batch_size: int,
  flip: bool = False,
  num_threads: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Generator[pipeline.Batch, None, None]:
  """Every image once, bucket by bucket; all processes have as many batches, of the same shapes.

  Yields "image" uint8 [B, H, W, 3], zero beyond "size" int32 [B, 2]; "scale" float32 [B], of the
  resizing; "original" int32 [B, 2], height and width before it; "image_id" int32 [B]; and "mask"
  float32 [B], 0 for rows that hold no image, whose "image_id" is -1.

  Args:
    flip: whether to swap left and right of all; the others as for `train_loader`.

  Raises:
    UsageError, UnreadableImagesError: as `pipeline.eval_batches`; or an image fits into no bucket.
  """
  batches = pipeline.eval_batches(
    source,
    [_EvalImage(shape, short_side, long_side, flip) for shape in parse_buckets(buckets)],
    groups=_groups(source, buckets, short_side, long_side),
    global_batch_size=global_batch_size,
    process_index=process_index,
    process_count=process_count,
    num_threads=num_threads,
  )

  def marked() -> Generator[pipeline.Batch, None, None]:
    with contextlib.closing(batches):
      for batch in batches:
        batch["image_id"][batch["mask"] == 0] = -1
        yield batch

  return marked()


def num_eval_batches(
  source: BoxSource,
  *,
  buckets: Sequence[str],
  short_side: float,
  long_side: float,
  global_batch_size: int,
) -> int:
  """How many batches `eval_batches` has: those of a bucket are filled up."""
  groups = _groups(source, buckets, short_side, long_side)
  return sum(-(-len(group) // global_batch_size) for group in groups)


def _groups(
  source: BoxSource, buckets: Sequence[str], short_side: float, long_side: float
) -> list[np.ndarray]:
  """The images of each bucket."""
  bucket = assign_buckets(source, buckets, short_side, long_side)
  return [np.flatnonzero(bucket == k) for k in range(len(buckets))]


def _log(source: BoxSource, images: TrainImages, max_boxes: int, min_side: int) -> None:
  facts = (
    (images.without_objects, "images without a box to learn are left out"),
    (images.small, f"images with a side below {min_side} pixels, or unreadable, are left out"),
    (images.degenerate, "boxes without an area, or outside their image, are left out"),
  )
  for count, what in facts:
    if count:
      logger.info("%s: %d %s", source.name, count, what)
  if images.crowded:
    logger.warning(
      "%s: %d images have more than max_boxes=%d boxes, up to %d; the rest is left out of them",
      source.name,
      images.crowded,
      max_boxes,
      images.most_boxes,
    )


class _Resize:
  """Decodes an image, resizes it, and writes it into the corner of a bucket."""

  def __init__(self, shape: tuple[int, int], short_side: float, long_side: float):
    self._sides = short_side, long_side
    self.shapes: Shapes = {
      "image": ((*shape, 3), np.uint8),
      "size": ((2,), np.int32),
      "image_id": ((), np.int32),
    }

  def write(self, example: Example, row: Row, *, flip: bool = False) -> float:
    """Fills the row's "image", "size" and "image_id"; returns the factor.

    Raises:
      CorruptImage: the image is unreadable, or of another size than is annotated.
    """
    image = preprocess.decode_jpeg(example["image"])
    stored, annotated = image.shape[:2], tuple(example["size"].tolist())
    if stored != annotated:
      raise CorruptImage(
        f"it has {stored[1]}x{stored[0]} pixels as stored, and its boxes are of "
        f"{annotated[1]}x{annotated[0]} pixels"
        + (", turned as its EXIF orientation says" if stored == annotated[::-1] else "")
      )
    image, scale = resize(image, *self._sides)
    height, width = image.shape[:2]
    if flip:  # NumPy takes 40 times as long
      cv2.flip(image, 1, dst=image)
    out = row["image"]
    out[:height, :width] = image
    out[height:] = 0
    out[:height, width:] = 0
    row["size"][...] = height, width
    row["image_id"][...] = example["image_id"]
    return scale


class _TrainBoxes(_Resize):
  """An image and its boxes, perhaps flipped; see `train_loader`."""

  def __init__(
    self,
    shape: tuple[int, int],
    max_boxes: int,
    flip: float,
    short_side: float,
    long_side: float,
  ):
    super().__init__(shape, short_side, long_side)
    self._max_boxes = max_boxes
    self._flip = flip
    self.shapes |= {
      "boxes": ((max_boxes, 4), np.float32),
      "labels": ((max_boxes,), np.int32),
      "valid": ((max_boxes,), np.bool_),
      "crowd": ((max_boxes,), np.bool_),
    }

  def __call__(self, example: Example, rng: np.random.Generator, out: Row) -> None:
    flip = bool(rng.random() < self._flip)
    scale = self.write(example, out, flip=flip)
    height, width = out["size"].tolist()
    chosen = self._choose(example)
    boxes = np.clip(example["boxes"][chosen] * np.float32(scale), 0, (width, height) * 2)
    if flip:
      boxes[:, 0], boxes[:, 2] = width - boxes[:, 2], width - boxes[:, 0].copy()
    values: Mapping[str, Any] = {
      "boxes": boxes,
      "labels": example["labels"][chosen],
      "crowd": example["crowd"][chosen],
      "valid": True,
    }
    for name, value in values.items():
      out[name][...] = 0
      out[name][: len(chosen)] = value

  def _choose(self, example: Example) -> np.ndarray:
    """Indices of the boxes to learn, in order; crowds are the first to be left out."""
    chosen = np.flatnonzero(example["usable"])
    if len(chosen) > self._max_boxes:
      crowds_last = np.argsort(example["crowd"][chosen], kind="stable")
      chosen = np.sort(chosen[crowds_last[: self._max_boxes]])
    return chosen


class _EvalImage(_Resize):
  """An image and how it was resized; see `eval_batches`."""

  def __init__(self, shape: tuple[int, int], short_side: float, long_side: float, flip: bool):
    super().__init__(shape, short_side, long_side)
    self._flip = flip
    self.shapes |= {"scale": ((), np.float32), "original": ((2,), np.int32)}

  def __call__(self, example: Example, rng: np.random.Generator, out: Row) -> None:
    out["scale"][...] = self.write(example, out, flip=self._flip)
    out["original"][...] = example["size"]
