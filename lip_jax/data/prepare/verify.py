"""Checks a data set on disk from end to end: `lip-jax data verify`."""

import collections
import concurrent.futures
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lip_jax.data import disk, imagenet, preprocess, tfrecord
from lip_jax.data.boxes import open_boxes
from lip_jax.data.builder import open_builder, record_format
from lip_jax.data.folder import FolderImages, ImageFolder, first_few
from lip_jax.data.prepare import array_record_writer
from lip_jax.data.records import ImageLabelParser, read_file
from lip_jax.data.source import is_fake
from lip_jax.errors import UsageError

# With decode="sample": one image in so many, and all that look damaged.
SAMPLE_EVERY = 64

MOST_NAMED = 10  # faults of one kind that are named one by one
_FILES_PART = 500  # images of a folder that a thread takes at a time


@dataclasses.dataclass
class SplitResult:
  """What was found in one split."""

  name: str
  expected: int  # images that there should be
  found: int = 0  # images that there are
  classes: int = 0  # of which there is an image
  decoded: int = 0  # images that were decoded
  num_files: int = 0  # or image files of a folder
  num_bytes: int = 0  # of the encoded images


@dataclasses.dataclass
class VerificationResult:
  """What `verify` found; as a string, for people."""

  dataset: str
  directory: str
  num_classes: int
  splits: list[SplitResult] = dataclasses.field(default_factory=list)
  faults: list[str] = dataclasses.field(default_factory=list)  # what is wrong, one line each
  notes: list[str] = dataclasses.field(default_factory=list)  # what is unusual

  @property
  def ok(self) -> bool:
    """Whether nothing is wrong."""
    return not self.faults

  def __str__(self) -> str:
    lines = [f"{self.dataset} in {self.directory}, {self.num_classes:,} classes"]
    for split in self.splits:
      lines.append(
        f"  {split.name}: {split.found:,} of {split.expected:,} images of {split.classes:,} "
        f"classes, {split.num_files:,} files, {split.num_bytes / 1e9:,.2f} GB; "
        f"{split.decoded:,} decoded"
      )
    lines += [f"  note: {note}" for note in self.notes]
    lines += [f"  fault: {fault}" for fault in self.faults]
    lines.append("  all is well" if self.ok else f"  {len(self.faults)} faults")
    return "\n".join(lines)


@dataclasses.dataclass
class _Found:
  """What one file, or part of a folder, holds."""

  labels: list[int] = dataclasses.field(default_factory=list)
  ids: list[str] = dataclasses.field(default_factory=list)
  num_bytes: int = 0
  decoded: int = 0
  unreadable: list[str] = dataclasses.field(default_factory=list)
  doubtful: list[str] = dataclasses.field(default_factory=list)
  turned: list[str] = dataclasses.field(default_factory=list)  # by their EXIF orientation
  fault: str | None = None


def verify(
  dataset: str,
  data_dir: str | Path | None,
  *,
  decode: str = "sample",
  num_workers: int | None = None,
) -> VerificationResult:
  """Reads a whole data set and says what is wrong with it.

  Images with boxes: see `verify_boxes.verify_boxes`. Others:

  Every record is read, whatever `decode` says: its checksums, label and name are looked at. Checked
  are: that all files are there and whole, the numbers of images (of `imagenet2012` the 1,281,167
  and 50,000, of others what the data set says of itself), that labels are in range and training
  images of every class exist, that no image is there twice, and of `imagenet2012` that classes have
  TFDS's order, that there are 50 validation images of each, and that each image's label is the one
  that belongs to its file name.

  Args:
    dataset: as for `open_split`.
    data_dir: as for `open_split`.
    decode: "all" decodes every image, "sample" one in 64 and those that look damaged, "none" none.
    num_workers: threads; None is one for each core, at most 16.

  Raises:
    UsageError: there is no such data set, or `decode` is something else.
  """
  if decode not in ("all", "sample", "none"):
    raise UsageError(f"decode={decode!r}, expected all, sample or none")
  if is_fake(dataset):
    raise UsageError("fake data is generated: there is nothing to verify")
  workers = num_workers or min(os.cpu_count() or 1, 16)
  from lip_jax.data.prepare import verify_boxes  # which builds on this module

  if dataset.startswith(disk.COCO):
    return verify_boxes.verify_boxes(dataset, None, decode, workers)
  if dataset.startswith(disk.FOLDER):
    return _verify_folder(dataset, decode, workers)
  root = None if data_dir is None else os.fspath(data_dir)
  if root is not None and "://" in root:
    raise UsageError(f"{root} is a bucket: mount it, for example with gcsfuse, to verify it")
  builder = open_builder(dataset, root)
  has_boxes = "objects" in builder.info.features
  if has_boxes and "label" not in builder.info.features:
    return verify_boxes.verify_boxes(dataset, root, decode, workers)
  result = _verify_records(dataset, builder, decode, workers)
  if has_boxes and result.ok:
    for split in builder.info.splits:
      verify_boxes.add_notes(result, split, open_boxes(dataset, split, root, prepare=False))
  return result


def _verify_records(dataset: str, builder: Any, decode: str, workers: int) -> VerificationResult:
  file_format = record_format(builder)
  parse = ImageLabelParser(dict(builder.info.features), dataset, any_label=True)
  result = VerificationResult(dataset, str(builder.data_dir), len(parse.class_names))
  upright = array_record_writer.made_from(result.directory) == "image folder"
  is_imagenet = builder.info.name == imagenet.NAME
  if is_imagenet:
    _check_class_names(result, parse.class_names)
  splits = builder.info.splits
  total = sum(info.num_examples for info in splits.values())
  with (
    concurrent.futures.ThreadPoolExecutor(workers) as pool,
    tqdm(total=total, unit=" images", disable=None) as progress,
  ):
    for name, info in splits.items():
      paths = [str(path) for path in info.filepaths]
      jobs = [
        pool.submit(_check_file, path, length, file_format, parse, decode, progress)
        for path, length in zip(paths, info.shard_lengths, strict=True)
      ]
      parts = _results(jobs)
      expected = imagenet.COUNTS.get(name, info.num_examples) if is_imagenet else info.num_examples
      _add_split(result, name, expected, len(paths), parts)
      _note_turned(result, name, parts, upright)
      if is_imagenet:
        _check_imagenet_split(result, name, parse.class_names, parts)
  if is_imagenet:
    for name in imagenet.COUNTS.keys() - set(splits):
      result.faults.append(f"there is no split {name}")
  _note_strangers(result, builder)
  return result


def _results(jobs: Sequence[concurrent.futures.Future[_Found]]) -> list[_Found]:
  """What all jobs found; the first error ends those that wait."""
  try:
    return [job.result() for job in jobs]
  finally:
    for job in jobs:
      job.cancel()


def _check_file(
  path: str, length: int, file_format: str, parse: ImageLabelParser, decode: str, progress: Any
) -> _Found:
  """Reads all records of a file that should have `length` of them."""
  found = _Found()
  name = os.path.basename(path)
  count = 0
  try:
    for record in read_file(path, file_format):
      where = f"{name}, record {count}"
      count += 1
      progress.update()
      try:
        example = parse(record)
      except preprocess.CorruptImage as error:
        found.unreadable.append(f"{where}: {error}")
        continue
      if "id" in example:
        found.ids.append(example["id"])
        where = f"{where} ({example['id']})"
      _check_example(found, example, where, count - 1, decode)
  except FileNotFoundError:
    found.fault = f"{name} is missing"
  except (OSError, RuntimeError, tfrecord.CorruptFile) as error:
    # A file's own words may name it again.
    reason = str(error).splitlines()[0].removeprefix(f"{path}, ")
    found.fault = f"{name} is damaged after {count} of {length} records: {reason}"
  else:
    if count != length:
      found.fault = f"{name} holds {count} records, expected {length}"
  return found


def _check_example(
  found: _Found, example: dict[str, Any], where: str, index: int, decode: str
) -> None:
  data = example["image"]
  found.labels.append(example["label"])
  found.num_bytes += len(data)
  if preprocess.orientation_of(data) != 1:
    found.turned.append(where)
  if not data:
    found.unreadable.append(f"{where}: no data (0 bytes)")
    return
  if decode == "all" or (decode == "sample" and (index % SAMPLE_EVERY == 0 or looks_damaged(data))):
    found.decoded += 1
    warnings: list[str] = []
    try:
      preprocess.decode_jpeg(data, warnings)
      found.doubtful += [f"{where} ({warning})" for warning in warnings]
    except preprocess.CorruptImage as error:
      found.unreadable.append(f"{where}: {error}")


def looks_damaged(data: bytes) -> bool:
  """Whether the bytes are no JPEG, or one whose end is not where it should be."""
  return not data.startswith(b"\xff\xd8") or not data.endswith(b"\xff\xd9")


def _add_split(
  result: VerificationResult, name: str, expected: int, num_files: int, parts: Sequence[_Found]
) -> None:
  """Joins what was found in a split's files, and judges it."""
  labels = np.array([label for part in parts for label in part.labels], np.int64)
  inside = labels[(labels >= 0) & (labels < result.num_classes)]
  unreadable = [image for part in parts for image in part.unreadable]
  split = SplitResult(
    name,
    expected,
    found=len(labels),
    classes=len(np.unique(inside)),
    decoded=sum(part.decoded for part in parts),
    num_files=num_files,
    num_bytes=sum(part.num_bytes for part in parts),
  )
  result.splits.append(split)
  faults = [part.fault for part in parts if part.fault]
  if split.found != expected:
    faults.append(f"{split.found:,} images, expected {expected:,}")
  unlabelled = len(labels) > 0 and bool((labels == -1).all())
  if unlabelled and name == "test":
    result.notes.append("test: no labels")  # so TFDS writes those of a competition
  elif len(inside) < len(labels):
    outside = sorted(set(labels.tolist()) - set(inside.tolist()))
    faults.append(
      f"{len(labels) - len(inside):,} labels are not in 0 to {result.num_classes - 1}: "
      f"{first_few(map(str, outside))}"
    )
  missing = sorted(set(range(result.num_classes)) - set(inside.tolist()))
  if missing and not (unlabelled and name == "test"):
    text = f"no image of {len(missing):,} classes: labels {first_few(map(str, missing))}"
    # A small validation split may well lack a class; training cannot do without.
    (faults if name == "train" else result.notes).append(
      text if name == "train" else f"{name}: {text}"
    )
  counts = collections.Counter(image for part in parts for image in part.ids)
  twice = sorted(image for image, count in counts.items() if count > 1)
  if twice:
    faults.append(f"{len(twice):,} images are there more than once: {first_few(twice)}")
  faults += [f"unreadable image in {image}" for image in unreadable[:MOST_NAMED]]
  if len(unreadable) > MOST_NAMED:
    faults.append(f"and {len(unreadable) - MOST_NAMED:,} more unreadable images")
  result.faults += [f"{name}: {fault}" for fault in faults]
  doubtful = [image for part in parts for image in part.doubtful]
  if doubtful:
    result.notes.append(
      f"{name}: {len(doubtful):,} of the decoded images have a warning that whole files have, and "
      f"files that were overwritten in the middle; look at them: {first_few(doubtful)}"
    )


def _note_turned(
  result: VerificationResult, name: str, parts: Sequence[_Found], upright: bool
) -> None:
  turned = [image for part in parts for image in part.turned]
  if turned:
    what = "are turned by it" if upright else "are read as they are stored"
    result.notes.append(
      f"{name}: {len(turned):,} images have an EXIF orientation and {what} (config.data.upright="
      f"{not upright} for the other): {first_few(turned)}"
    )


def _check_class_names(result: VerificationResult, class_names: Sequence[str]) -> None:
  official = imagenet.synsets()
  if list(class_names) == official:
    return
  wrong = [k for k, (a, b) in enumerate(zip(class_names, official, strict=False)) if a != b]
  where = ""
  if wrong:
    where = f"label {wrong[0]} is {class_names[wrong[0]]}, expected {official[wrong[0]]}; "
  result.faults.append(
    f"the classes are not those of ImageNet in TFDS's order: {where}{len(class_names)} names, "
    f"expected {len(official)}"
  )


def _check_imagenet_split(
  result: VerificationResult, name: str, class_names: Sequence[str], parts: Sequence[_Found]
) -> None:
  """Labels against file names, which say the class, or the number that decides on it."""
  pairs = [pair for part in parts if part.ids for pair in zip(part.ids, part.labels, strict=True)]
  official = imagenet.validation_labels()
  wrong = []
  for image, label in pairs:
    match = re.fullmatch(r"(n\d{8})_\d+\.JPEG|ILSVRC2012_(?:val|test)_(\d{8})\.JPEG", image)
    if match is None:
      continue
    if match[1]:
      expected = match[1]
    elif name == "validation" and 1 <= int(match[2]) <= len(official):
      expected = official[int(match[2]) - 1]
    else:
      continue
    if not 0 <= label < len(class_names) or class_names[label] != expected:
      wrong.append(f"{image} has label {label}, expected that of {expected}")
  if wrong:
    result.faults.append(f"{name}: {len(wrong):,} labels are wrong: {first_few(wrong)}")
  if name == "validation":
    counts = collections.Counter(label for part in parts for label in part.labels)
    uneven = [k for k in range(len(class_names)) if counts[k] != 50]
    if uneven:
      result.faults.append(
        f"validation: {len(uneven):,} classes do not have 50 images: "
        f"labels {first_few(map(str, uneven))}"
      )


def _note_strangers(result: VerificationResult, builder: Any) -> None:
  """Notes record files that belong to no split, as an interrupted copy leaves them."""
  known = {path.name for info in builder.info.splits.values() for path in info.filepaths}
  suffix = builder.info.file_format.value
  strangers = sorted(
    path.name
    for path in Path(result.directory).iterdir()
    if f".{suffix}" in path.name and path.name not in known
  )
  if strangers:
    result.notes.append(f"{len(strangers):,} files belong to no split: {first_few(strangers)}")


def _verify_folder(dataset: str, decode: str, workers: int) -> VerificationResult:
  folder = ImageFolder(dataset.removeprefix(disk.FOLDER))
  splits = {name: folder.images(name) for name in folder.splits}
  result = VerificationResult(dataset, folder.directory, len(folder.class_names))
  with (
    concurrent.futures.ThreadPoolExecutor(workers) as pool,
    tqdm(total=sum(map(len, splits.values())), unit=" images", disable=None) as progress,
  ):
    for name, images in splits.items():
      starts = range(0, len(images), _FILES_PART)
      jobs = [pool.submit(_check_images, images, start, decode, progress) for start in starts]
      parts = _results(jobs)
      _add_split(result, name, len(images), len(images), parts)
      _note_turned(result, name, parts, upright=True)
  result.faults += folder.faults()
  result.notes += folder.notes()
  return result


def _check_images(images: FolderImages, start: int, decode: str, progress: Any) -> _Found:
  found = _Found()
  for index in range(start, min(len(images), start + _FILES_PART)):
    progress.update()
    try:
      example = images[index]
    except preprocess.CorruptImage as error:
      found.labels.append(int(images.labels[index]))
      found.unreadable.append(f"{images.names[index]}: {error}")
      continue
    found.ids.append(example["id"])
    _check_example(found, example, example["id"], index, decode)
  return found
