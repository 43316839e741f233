"""Annotation files in COCO's format: read, checked, and kept as a table."""

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

from etils import epath

from lip_jax.data import disk
from lip_jax.data.annotations import (
  COCO_AREA_LIMITS,
  LARGEST_ID,
  Annotations,
  check_area_limits,
)
from lip_jax.data.file_index import FileIndex
from lip_jax.errors import UsageError, one_line, shown

logger = logging.getLogger(__name__)


class CocoFile(NamedTuple):
  """What an annotation file holds."""

  table: Annotations  # sizes are 0, 0 where the file does not say them
  class_names: list[str]  # in the order of their ids
  category_ids: list[int]
  notes: list[str]  # what is unusual
  area_limits: tuple[float, float]  # COCO's, unless the file's "info" has others: see `to_coco`
  faults: list[str]  # what is wrong, and is left out


def read(path: str) -> CocoFile:
  """Reads an annotation file, from the second time on its table only.

  Segmentations are not looked at. Annotations of categories that the file does not have are left
  out, as pycocotools does, with a warning.

  Raises:
    UsageError: there is no such file, it is no COCO annotation file, or annotations are of images
      that it does not have, or ids are there twice.
  """
  try:
    (data,) = _INDEX.find([path]).values()
  except OSError as error:
    raise UsageError(f"cannot read the annotation file {path}: {error.strerror or error}") from None
  head, _, table = data.partition(b"\n")
  values = json.loads(head)
  small, medium = values.get("area_limits", COCO_AREA_LIMITS)  # of a table from before there were
  faults = values.get("faults", [])
  for fault in faults:
    logger.warning("annotation file %s: %s", path, fault)
  return CocoFile(
    Annotations.from_bytes(table),
    values["class_names"],
    values["category_ids"],
    values["notes"],
    (small, medium),
    faults,
  )


_HEAD = ("class_names", "category_ids", "notes", "area_limits", "faults")


def _make(path: str) -> bytes:
  try:
    content = json.loads(epath.Path(path).read_bytes())
  except (ValueError, RecursionError) as error:
    raise UsageError(f"{path} is not JSON: {one_line(error)}") from None
  try:
    found = _parse(content)
  except UsageError as error:
    raise UsageError(f"annotation file {path}: {error}") from None
  head = json.dumps({key: getattr(found, key) for key in _HEAD})
  return head.encode() + b"\n" + found.table.to_bytes()


_INDEX = FileIndex("annotations_index", _make, "annotation file")


def _parse(content: Any) -> CocoFile:
  lists: dict[str, Any] = content if isinstance(content, dict) else {}
  # Without annotations: the files of images to be submitted.
  images, annotations, categories = (
    lists.get(key, default)
    for key, default in (("images", 0), ("annotations", []), ("categories", 0))
  )
  for value in (images, annotations, categories):
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
      raise UsageError(
        "it is not in COCO's format; expected lists of objects images, annotations and categories"
      )
  for kind, items in (("image", images), ("category", categories)):
    _check_ids(kind, [item.get("id") for item in items])
  labels: dict[int, int] = {}
  class_names = []
  for category in sorted(categories, key=lambda category: category["id"]):
    labels[category["id"]] = len(labels)
    name = str(category.get("name", category["id"]))
    if not disk.is_utf8(name):  # as JSON's escapes can have it: no file of a run could hold it
      raise UsageError(f"category {category['id']} is called {shown(name)}, not UTF-8; rename it")
    class_names.append(name)
  rows = {image["id"]: _row(image) for image in images}
  faults = _add_boxes(rows, annotations, labels)
  twice = _twice(annotation.get("id") for annotation in annotations if "id" in annotation)
  notes = [f"{len(twice):,} ids of annotations are there more than once"] if twice else []
  table = Annotations.of_images(list(rows.values()))
  limits = _area_limits(lists.get("info"))
  return CocoFile(table, class_names, list(labels), notes, limits, faults)


def _area_limits(info: Any) -> tuple[float, float]:
  found = info.get("area_limits") if isinstance(info, dict) else None
  if found is None:
    return COCO_AREA_LIMITS
  if not isinstance(found, list) or len(found) != 2 or not all(map(_is_number, found)):
    raise UsageError(f"info has area_limits {shown(found)}; expected two numbers of pixels^2")
  check_area_limits(*found)
  return found[0], found[1]


def _row(image: dict[str, Any]) -> dict[str, Any]:
  name = image.get("file_name")
  if not isinstance(name, str) or not name:
    raise UsageError(f"image {image['id']} has file_name {shown(name)}; expected a file's name")
  size = image.get("height"), image.get("width")
  if not all(side is None or (_is_whole(side) and 0 < side < 2**31) for side in size):
    raise UsageError(f"image {image['id']} has height and width {size}; expected whole pixels")
  row = {"image_id": image["id"], "name": name, "size": (0, 0) if None in size else size}
  return {**row, "boxes": [], "labels": [], "crowd": [], "areas": []}


def _add_boxes(
  rows: dict[int, dict[str, Any]], annotations: Sequence[dict[str, Any]], labels: dict[int, int]
) -> list[str]:
  """Appends each annotation to its image's row; returns what is wrong with those left out."""
  strays, unknown = [], []
  for number, annotation in enumerate(annotations):
    image, category = annotation.get("image_id"), annotation.get("category_id")
    name = f"annotation {shown(annotation.get('id', f'at place {number}'))}"
    row = rows.get(image) if _is_whole(image) else None
    label = labels.get(category) if _is_whole(category) else None
    if row is None:
      strays.append(f"{name} of image {shown(repr(image))}")
      continue
    if label is None:
      unknown.append(f"{name} of category {shown(repr(category))}")
      continue
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
      raise UsageError(f"{name} has bbox {shown(box)}; expected [x, y, width, height] in pixels")
    area = annotation.get("area", box[2] * box[3])
    if not _is_number(area):
      raise UsageError(f"{name} has area {shown(area)}; expected a number, in pixels")
    row["boxes"].append(box)
    row["labels"].append(label)
    row["crowd"].append(bool(annotation.get("iscrowd", 0)))
    row["areas"].append(area)
  if strays:
    raise UsageError(
      f"{len(strays):,} annotations are of an image that it does not have, the first is "
      f"{strays[0]}; mend them, or take them out"
    )
  if not unknown:
    return []
  return [
    f"{len(unknown):,} annotations are of a category that it does not have and are left out, the "
    f"first is {unknown[0]}"
  ]


def _check_ids(kind: str, ids: Sequence[Any]) -> None:
  wrong = [number for number in ids if not _is_whole(number) or not 0 <= number <= LARGEST_ID]
  if wrong:
    raise UsageError(
      f"{len(wrong):,} ids of {kind} entries are not whole numbers from 0 to {LARGEST_ID}, the "
      f"first is {shown(repr(wrong[0]))}; number them anew"
    )
  twice = _twice(ids)
  if twice:
    raise UsageError(
      f"{len(twice):,} ids of {kind} entries are there more than once, the first is {twice[0]}; "
      "each has to be another"
    )


def _twice(ids: Iterable[Any]) -> list[Any]:
  return [number for number, count in Counter(map(_hashable, ids)).items() if count > 1]


def _hashable(value: Any) -> Any:
  return value if isinstance(value, int | str) else repr(value)


def _is_whole(value: Any) -> TypeGuard[int]:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  if not isinstance(value, int | float) or isinstance(value, bool):
    return False
  return abs(value) <= sys.float_info.max  # an int may be larger; NaN is not at most that
