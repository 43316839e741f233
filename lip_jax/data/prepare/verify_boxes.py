"""Checks a data set of images with boxes: `lip-jax data verify`."""

import concurrent.futures
import dataclasses
import glob
import os
import re
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from lip_jax.data import boxes, disk, preprocess
from lip_jax.data.boxes import BoxSource
from lip_jax.data.builder import open_builder
from lip_jax.data.folder import first_few
from lip_jax.data.prepare.verify import (
  MOST_NAMED,
  SAMPLE_EVERY,
  SplitResult,
  VerificationResult,
  looks_damaged,
)
from lip_jax.errors import UsageError

_PART = 500  # images that a thread takes at a time


@dataclasses.dataclass
class _Images:
  """What was found in some images."""

  num_bytes: int = 0
  decoded: int = 0
  unreadable: list[str] = dataclasses.field(default_factory=list)
  turned: list[str] = dataclasses.field(default_factory=list)
  fault: str | None = None


def verify_boxes(
  dataset: str, data_dir: str | None, decode: str, num_workers: int
) -> VerificationResult:
  """Reads all images and boxes of a data set; as for `verify`.

  Checked are: that ids are there once, that annotations are of images and classes that there are,
  that images are there, readable and of the annotated size. Counted are degenerate boxes and
  crowds, images without boxes, the most boxes of an image, classes without boxes, and images with
  an EXIF orientation, which is ignored.
  """
  result = VerificationResult(dataset, "", 0)
  with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
    for name in _splits(dataset, data_dir):
      try:
        source = _open(dataset, name, data_dir)
        len(source.table)
      except UsageError as error:
        result.faults.append(f"{name}: {error}")
        continue
      result.directory, result.num_classes = source.directory, source.num_classes
      _add_split(result, name, source, _read_images(source, decode, pool))
  return result


def _splits(dataset: str, data_dir: str | None) -> list[str]:
  """Those that there are."""
  if not dataset.startswith(disk.COCO):
    return list(open_builder(dataset, data_dir).info.splits)
  file = os.path.expanduser(dataset.removeprefix(disk.COCO).partition("@")[0])
  before, found, after = file.partition("{split}")
  if not found:
    return ["all"]
  # The name may be there several times: the first place decides.
  pattern = re.compile(re.escape(file).replace(re.escape("{split}"), r"([\w-]+)", 1).replace(
    re.escape("{split}"), r"\1"
  ))  # fmt: skip
  paths = glob.glob(glob.escape(before) + "*" + "*".join(map(glob.escape, after.split("{split}"))))
  names = sorted({match[1] for match in map(pattern.fullmatch, paths) if match})
  if not names:
    raise UsageError(f"there is no annotation file {file}")
  return names


def _open(dataset: str, split: str, data_dir: str | None) -> BoxSource:
  if dataset.startswith(disk.COCO):
    return boxes.open_coco(dataset, split, check_files=False)
  return boxes.open_boxes(dataset, split, data_dir, prepare=False)


def _read_images(
  source: BoxSource, decode: str, pool: concurrent.futures.Executor
) -> list[_Images]:
  starts = range(0, len(source), _PART)
  with tqdm(total=len(source), unit=" images", disable=None) as progress:
    jobs = [pool.submit(_check_images, source, start, decode, progress) for start in starts]
    return [job.result() for job in jobs]


def _check_images(source: BoxSource, start: int, decode: str, progress: tqdm) -> _Images:
  found = _Images()
  for index in range(start, min(len(source), start + _PART)):
    progress.update()
    where = source.describe(index).removeprefix(f"{source.name} ")
    try:
      example = source[index]
      data = example["image"]
      found.num_bytes += len(data)
      sampled = decode == "sample" and (index % SAMPLE_EVERY == 0 or looks_damaged(data))
      if decode == "all" or sampled:
        found.decoded += 1
        size = preprocess.decode_jpeg(data).shape[:2]
      else:
        size = preprocess.image_size(data)
    except preprocess.CorruptImage as error:
      found.unreadable.append(f"unreadable {where}: {error}")
      continue
    except UsageError as error:
      found.fault = str(error)
      break
    height, width = example["size"].tolist()
    if size != (height, width):
      found.unreadable.append(
        f"{where} has {size[1]}x{size[0]} pixels as stored, its boxes are of {width}x{height}"
      )
    if preprocess.orientation_of(data) != 1:
      found.turned.append(where)
  return found


def _add_split(
  result: VerificationResult, name: str, source: BoxSource, parts: Sequence[_Images]
) -> None:
  """Joins what was found in a split's images and annotations, and judges it."""
  table = source.table
  faults = [*source.faults, *sorted({part.fault for part in parts if part.fault})]
  unreadable = [image for part in parts for image in part.unreadable]
  faults += unreadable[:MOST_NAMED]
  if len(unreadable) > MOST_NAMED:
    faults.append(f"and {len(unreadable) - MOST_NAMED:,} more such images")
  result.faults += [f"{name}: {fault}" for fault in faults]
  counts = np.bincount(table.labels, minlength=source.num_classes)
  result.splits.append(
    SplitResult(
      name,
      expected=len(source),
      found=len(source) - len(unreadable),
      classes=int((counts > 0).sum()),
      decoded=sum(part.decoded for part in parts),
      num_files=len(source),
      num_bytes=sum(part.num_bytes for part in parts),
    )
  )
  turned = [image for part in parts for image in part.turned]
  if turned:
    text = f"{len(turned):,} images have an EXIF orientation, which is ignored: "
    result.notes.append(f"{name}: {text}{first_few(turned)}")
  add_notes(result, name, source)


def add_notes(result: VerificationResult, name: str, source: BoxSource) -> None:
  """Notes what is to be known of a split's boxes."""
  table = source.table

  def named(index: int) -> str:
    return source.describe(index).removeprefix(f"{source.name} ")

  notes = [
    f"{len(table.labels):,} boxes, {table.crowd.sum():,} of them crowds; at most "
    f"{table.counts.max():,} in an image: {named(int(table.counts.argmax()))}",
    *source.notes,
  ]
  counts = np.bincount(table.labels, minlength=source.num_classes)
  missing = [source.class_names[label] for label in np.flatnonzero(counts == 0)]
  degenerate = [named(k) for k in np.unique(table.owners[~table.usable]).tolist()]
  for count, text, examples in (
    ((table.counts == 0).sum(), "images have no boxes", []),
    (((table.counts > 0) & (table.num_objects == 0)).sum(), "images have no boxes to learn", []),
    ((~table.usable).sum(), "boxes are degenerate or outside their image", degenerate),
    (len(missing), "classes have no boxes", missing),
  ):
    if count:
      notes.append(f"{count:,} {text}" + (f": {first_few(examples)}" if examples else ""))
  result.notes += [f"{name}: {note}" for note in notes]
