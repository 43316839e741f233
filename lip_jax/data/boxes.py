"""Data sets of images with boxes: the examples of one split, and what is known of all of them."""

import functools
import os
import random
import re
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from lip_jax.data import box_records, coco_categories, coco_json, disk, preprocess, splits
from lip_jax.data.annotations import COCO_AREA_LIMITS, LARGEST_ID, Annotations
from lip_jax.data.builder import open_builder
from lip_jax.data.file_index import FileIndex
from lip_jax.data.folder import first_few
from lip_jax.data.preprocess import CorruptImage
from lip_jax.data.source import Joined, Source, is_fake, open_records
from lip_jax.errors import UsageError

# Where they are not COCO's: about a third of the boxes are below the first, and a third above the
# second.
_AREA_LIMITS = {"cluttered_digits/detect_small": (13.0**2, 20.0**2)}

# What the files of a split may be called, beside its name.
_ALIASES = {"validation": ("val", "valid"), "val": ("validation", "valid")}
_ALL = "all"
_HEADERS_AT_ONCE = 32  # threads; they wait for the disk


class BoxSource(Source):
  """A split of a data set of images with boxes.

  An example is a dict: "image", encoded, bytes; "image_id", int; "size", height and width in pixels
  as annotated; "boxes", float32 [n, 4], x1, y1, x2, y2 in pixels of the image as stored, where
  x2 - x1 is the width; "labels", int32 [n], from 0; "crowd", bool [n]; "areas", float32 [n],
  pixels^2, those of the annotations; "usable", bool [n], as in `Annotations`; and "id", str, where
  the image has a name.

  Attributes:
    category_ids: id in annotation files of each class.
    annotations: path of the annotation file, if it is of this very split.
    area_limits: up to which area an object is small, and medium, in pixels^2.
    notes: what is unusual about the annotations, sentences.
    faults: what is wrong with annotations that are left out, sentences.
  """

  def __init__(
    self,
    name: str,
    directory: str,
    examples: Sequence[dict[str, Any]],
    class_names: list[str],
    *,
    table: Callable[[], Annotations],
    category_ids: list[int] | None = None,
    annotations: str | None = None,
    area_limits: tuple[float, float] = COCO_AREA_LIMITS,
    notes: Sequence[str] = (),
    faults: Sequence[str] = (),
    remedy: str | None = None,
    identity: str | None = None,
  ):
    """`table`: of all images, made when it is first asked for."""
    super().__init__(name, directory, examples, class_names, remedy=remedy, identity=identity)
    self.category_ids = category_ids or list(range(1, len(class_names) + 1))
    self.annotations = annotations
    self.area_limits = area_limits
    self.notes = list(notes)
    self.faults = list(faults)
    self._make_table = table

  @functools.cached_property
  def table(self) -> Annotations:
    """All that is annotated.

    Raises:
      UsageError: ids are there twice, or labels of no class.
    """
    return _checked(self._make_table(), self.name, self.num_classes)

  @functools.cached_property
  def _boxes(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(what an example has of all m boxes, where those of each image end int64 [n])."""
    table = self.table
    values = {
      "boxes": table.corners.astype(np.float32),
      "labels": table.labels,
      "crowd": table.crowd,
      "areas": table.areas.astype(np.float32),
      "usable": table.usable,
    }
    return values, table.ends

  def __getitem__(self, index: int) -> dict[str, Any]:
    example = super().__getitem__(index)
    table, (boxes, ends) = self.table, self._boxes
    part = slice(ends[index] - table.counts[index], ends[index])
    return {
      **example,
      "image_id": int(table.image_ids[index]),
      "size": table.sizes[index],
      **{name: values[part] for name, values in boxes.items()},
    }

  def describe(self, index: int) -> str:
    name = self.table.names[index]
    return f"{self.name} image {index}" + (f" ({name})" if name else "")

  def image_sizes(self) -> np.ndarray:
    """Height and width of each image as stored: int32 [n, 2]; 0, 0 of those that are unreadable."""
    return self.table.sizes

  def ground_truth(self) -> dict[str, Any]:
    """The annotations in the form of COCO's JSON, boxes as x, y, width, height in pixels."""
    return self.table.to_coco(self.class_names, self.category_ids, self.area_limits)


def open_boxes(
  dataset: str, split: str, data_dir: str | None = None, *, prepare: bool = True
) -> BoxSource:
  """Opens a split of a data set of images with boxes.

  Args:
    dataset: TFDS name of a data set with "objects", such as "coco/2017" or
      "cluttered_digits/detect_small"; or "coco:ANNOTATIONS.json@IMAGES", an annotation file in
      COCO's format and the folder of its images, in whose names "{split}" stands for the split.
    split: TFDS split, such as "train" or "train[:10%]". With "coco:" a name, which takes the place
      of "{split}" ("val" and "valid" are tried for "validation"), or where the file's name has no
      "{split}" "all"; and parts of these.
    data_dir: directory that holds the TFDS data sets; None is $TFDS_DATA_DIR or
      ~/tensorflow_datasets.
    prepare: as for `open_split`; also whether to read all boxes at once, which is done but once for
      each file, instead of when they are first asked for.

  Raises:
    UsageError: as for `open_split`; or the annotations are not in order, or images are missing.
  """
  if dataset.startswith(disk.COCO):
    return open_coco(dataset, split)
  found = open_records(dataset, split, data_dir, box_records.ImageBoxesParser, prepare=prepare)
  source = BoxSource(
    f"{dataset} {split}",
    found.directory,
    found.examples,
    found.parse.class_names,
    table=lambda: box_records.read_annotations(found.parts, found.file_format, found.parse),
    category_ids=coco_categories.category_ids(found.parse.class_names),
    area_limits=_AREA_LIMITS.get(dataset, COCO_AREA_LIMITS),
  )
  if prepare:
    len(source.table)
  return source


def has_boxes(dataset: str, data_dir: str | None = None) -> bool:
  """Whether a data set is one of images with boxes, and not of images with labels.

  Raises:
    UsageError: as for `open_split`.
  """
  if dataset.startswith(disk.COCO):
    return True
  if dataset.startswith(disk.FOLDER) or is_fake(dataset):
    return False
  features = open_builder(dataset, data_dir).info.features
  return "objects" in features and "label" not in features


class _CocoPart(NamedTuple):
  """An annotation file, and its images: those that `order` lists."""

  path: str
  images: "ImageFiles"
  file: coco_json.CocoFile
  order: list[int]


def open_coco(dataset: str, split: str, *, check_files: bool = True) -> BoxSource:
  """`open_boxes` of annotation files. `check_files`: whether all images have to be there."""
  paths = coco_paths(dataset, split)
  parts = {name: _open_coco_part(*paths[name], check_files) for name in paths}
  first, *others = parts.values()
  for other in others:
    if (other.file.class_names, other.file.category_ids) != (
      first.file.class_names,
      first.file.category_ids,
    ):
      raise UsageError(f"{first.path} and {other.path} have different categories; make them equal")
  lengths = {name: len(part.order) for name, part in parts.items()}
  # "all" has a meaning of its own in TFDS, which knows no parts of it.
  inner = re.sub(r"\ball\b", "images", split)
  try:
    chosen = splits.select_indices(
      {"images" if name == _ALL else name: length for name, length in lengths.items()},
      dataset,
      inner,
    )
  except UsageError as error:
    raise UsageError(str(error).replace("images", _ALL) if _ALL in parts else str(error)) from None
  tables, examples = [], []
  for name, indices in chosen:
    part = parts[_ALL if name == "images" else name]
    order = [part.order[index] for index in indices]
    tables.append(part.file.table.select(np.array(order, np.int64)))
    examples.append((part.images, order))
  table = Annotations.joined(tables)
  whole = len(parts) == 1 and len(table) == lengths[next(iter(parts))]
  return BoxSource(
    f"{dataset} {split}",
    first.images.folder,
    Joined(examples),
    first.file.class_names,
    table=lambda: table,
    category_ids=first.file.category_ids,
    annotations=first.path if whole else None,
    area_limits=first.file.area_limits,
    notes=[note for part in parts.values() for note in part.file.notes],
    faults=[fault for part in parts.values() for fault in part.file.faults],
    remedy=f"Replace these images in {first.images.folder}, or take them out of the annotations",
    identity=f"{len(table)} images, annotations {table.digest()}: {split}",
  )


def coco_paths(dataset: str, split: str) -> dict[str, tuple[str, str]]:
  """The annotation file and the folder of images of each split that is named.

  Raises:
    UsageError: the data set's name has another form, or there are no such files.
  """
  places = disk.coco_places(dataset)
  if places is None:
    raise UsageError(
      f"data set {dataset!r}: expected coco:ANNOTATIONS.json@IMAGES, the annotation file and the "
      "folder of its images, with {split} in place of the split's name"
    )
  file, folder = (os.path.expanduser(path) for path in places)
  names = list(dict.fromkeys(re.findall(r"([\w-]+)(?:\[[^\]]*\])?", split))) or [split]
  if "{split}" not in file:
    if names != [_ALL]:
      raise UsageError(
        f"data set {dataset!r} has one annotation file, so its split is 'all', or a part such as "
        f"'all[:90%]', not {split!r}; or write {{split}} where the files' names have the split"
      )
    if "{split}" in folder:
      raise UsageError(f"data set {dataset!r} has {{split}} in the folder's name only; add it")
  found = {}
  for name in names:
    options = [name, *_ALIASES.get(name, ())]
    files = [(file.replace("{split}", o), folder.replace("{split}", o)) for o in options]
    there = [pair for pair in files if os.path.isfile(pair[0])]
    if not there:
      raise UsageError(
        f"there is no annotation file {files[0][0]}, for split {split!r} of data set {dataset!r}"
      )
    found[name] = there[0]
  return found


def _open_coco_part(path: str, folder: str, check_files: bool) -> _CocoPart:
  if not os.path.isdir(folder):
    raise UsageError(f"there is no folder of images {folder!r}, for the annotation file {path}")
  file = coco_json.read(path)
  if not len(file.table):
    raise UsageError(f"annotation file {path} has no images")
  images = ImageFiles(folder, file.table.names.tolist())
  if check_files:
    missing = images.missing()
    if missing:
      raise UsageError(
        f"{folder} lacks {len(missing):,} of {len(images):,} images of {path}: "
        f"{first_few(missing)}; copy them, or take them out of the annotations"
      )
  unknown = np.flatnonzero((file.table.sizes == 0).any(axis=1))
  if len(unknown):
    file.table.sizes[unknown] = _read_sizes(path, images)[unknown]
  # Shuffled once and for all, so that a part has images of all classes; by the ids alone.
  order = np.argsort(file.table.image_ids, kind="stable").tolist()
  random.Random("coco").shuffle(order)
  return _CocoPart(path, images, file, order)


class ImageFiles(Sequence[dict[str, Any]]):
  """Images of a folder, by their names: examples of `Source` that are read when asked for."""

  def __init__(self, folder: str, names: list[str]):
    self.folder = folder
    self.names = names

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index):
    return {"image": self._read(index), "id": self.names[index]}

  def _read(self, index: int) -> bytes:
    try:
      with open(os.path.join(self.folder, self.names[index]), "rb") as file:
        return file.read()
    except (OSError, ValueError) as error:
      raise CorruptImage(f"{getattr(error, 'strerror', None) or error}") from error

  def missing(self) -> list[str]:
    """Names of which there is no file."""
    places = [os.path.split(name) for name in self.names]
    here: dict[str, set[str]] = {}
    for directory in {directory for directory, _ in places}:
      try:
        here[directory] = set(os.listdir(os.path.join(self.folder, directory)))
      except (OSError, ValueError):
        here[directory] = set()
    return [
      name
      for name, (directory, file) in zip(self.names, places, strict=True)
      if file not in here[directory]
    ]

  def size(self, index: int) -> tuple[int, int]:
    """Height and width; 0, 0 if the image is unreadable."""
    try:
      return preprocess.image_size(self._read(index))
    except CorruptImage:
      return 0, 0


def _read_sizes(path: str, images: ImageFiles) -> np.ndarray:
  """Sizes of the images of an annotation file that does not say them, read once: int32 [n, 2]."""

  def make(_: str) -> bytes:
    with futures.ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
      sizes = pool.map(images.size, range(len(images)))
      found = list(tqdm(sizes, "sizes", len(images), unit=" images", disable=None))
    return np.array(found, "<i4").tobytes()

  (data,) = FileIndex("image_sizes", make, "annotation file").find([path]).values()
  return np.frombuffer(data, "<i4").reshape(-1, 2)


def _checked(table: Annotations, name: str, num_classes: int) -> Annotations:
  """The table with an id for every image, after a look at ids and labels."""
  ids = table.image_ids
  unnamed = ids == -1
  if unnamed.any():  # of a data set without ids, or an image that is damaged
    ids[unnamed] = ids.max() + 1 + np.arange(unnamed.sum())
  outside = ids[(ids < 0) | (ids > LARGEST_ID)]
  if len(outside):
    raise UsageError(f"{name} has an image id {outside[0]}; expected 0 to {LARGEST_ID}")
  unique, counts = np.unique(ids, return_counts=True)
  if len(unique) < len(ids):
    raise UsageError(
      f"{name} has {(counts > 1).sum():,} image ids more than once, the first is "
      f"{unique[counts > 1][0]}; each image needs an id of its own"
    )
  wrong = table.labels[(table.labels < 0) | (table.labels >= num_classes)]
  if len(wrong):
    raise UsageError(
      f"{name} has {len(wrong):,} boxes of no class, the first with label {wrong[0]}; expected 0 "
      f"to {num_classes - 1}"
    )
  return table
