"""Boxes in the records of TFDS data sets, such as `coco/2017`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from lip_jax.data import preprocess, tfrecord
from lip_jax.data.annotations import Annotations
from lip_jax.data.file_index import FileIndex
from lip_jax.data.preprocess import CorruptImage
from lip_jax.data.records import find_id, parse_example, read_file
from lip_jax.data.splits import FilePart
from lip_jax.errors import UsageError


class ImageBoxesParser:
  """For detection: "image", encoded, bytes; and "id", str, where there is one.

  Raises:
    UsageError: the data set has no images with boxes.
  """

  def __init__(self, features: Mapping[str, Any], dataset: str):
    objects = dict(getattr(features.get("objects"), "feature", None) or {})
    label = objects.get("label")
    if (
      "image" not in features
      or not isinstance(label, tfds.features.ClassLabel)
      or not isinstance(objects.get("bbox"), tfds.features.BBoxFeature)
    ):
      raise UsageError(
        f"data set {dataset!r} has the features {', '.join(sorted(features))}; detection needs "
        "'image' and a sequence 'objects' of 'bbox' and a class 'label'"
      )
    self.class_names: list[str] = label.names
    self._has_area = "area" in objects
    self._has_crowd = "is_crowd" in objects
    self._has_image_id = "image/id" in features
    self._id = find_id(features)

  def __call__(self, record: bytes) -> dict[str, Any]:
    return parse_example(record, self._get_image)

  def annotations(self, record: bytes) -> dict[str, Any]:
    """The row of `Annotations.of_images` for a record."""
    try:
      return parse_example(record, self._get_row)
    except CorruptImage:
      return {"image_id": -1, "size": (0, 0), "name": "", **_boxes()}

  def _get_image(self, feature: Mapping[str, Any]) -> dict[str, Any]:
    result = {"image": feature["image"].bytes_list.value[0]}
    if self._id is not None:
      result["id"] = feature[self._id].bytes_list.value[0].decode()
    return result

  def _get_row(self, feature: Mapping[str, Any]) -> dict[str, Any]:
    example = self._get_image(feature)
    try:
      size = preprocess.image_size(example["image"])
    except CorruptImage:
      size = 0, 0
    height, width = size
    ymin, xmin, ymax, xmax = (
      np.array(feature["objects/bbox"].float_list.value, np.float64).reshape(-1, 4).T
    )
    boxes = np.stack([xmin * width, ymin * height, xmax * width, ymax * height], axis=1)
    boxes[:, 2:] -= boxes[:, :2]
    # Parts of a side in single precision are exact to 1e-4 pixels or so.
    boxes = boxes.round(3)
    areas = boxes[:, 2] * boxes[:, 3]
    if self._has_area:
      areas = np.array(feature["objects/area"].int64_list.value, np.float64)
      # Whole numbers, cut: 0 is anything below 1.
      areas = np.where(areas == 0, 0.5, areas)
    labels = np.array(feature["objects/label"].int64_list.value, np.int32)
    crowd = np.zeros(len(labels), np.bool_)
    if self._has_crowd:
      crowd = np.array(feature["objects/is_crowd"].int64_list.value, np.bool_)
    return {
      "image_id": feature["image/id"].int64_list.value[0] if self._has_image_id else -1,
      "size": size,
      "name": example.get("id", ""),
      **_boxes(boxes, labels, crowd, areas),
    }


def _boxes(boxes: Any = (), labels: Any = (), crowd: Any = (), areas: Any = ()) -> dict[str, Any]:
  if not len(boxes) == len(labels) == len(crowd) == len(areas):
    raise ValueError("boxes, labels, crowd and areas are not as many")
  return {"boxes": boxes, "labels": labels, "crowd": crowd, "areas": areas}


def read_annotations(
  parts: Sequence[FilePart], file_format: str, parse: ImageBoxesParser
) -> Annotations:
  """What is annotated in parts of record files; each file is read once and its table kept.

  Raises:
    UsageError: a file is damaged.
  """
  tables = FileIndex(
    "box_index",
    lambda path: Annotations.of_images(
      [parse.annotations(record) for record in read_file(path, file_format)]
    ).to_bytes(),
    "files with boxes",
  )
  try:
    found = tables.find({part.path for part in parts})
  except (OSError, RuntimeError, tfrecord.CorruptFile) as error:
    raise UsageError(
      f"cannot read the boxes: {error}; the file is damaged: copy or prepare it again"
    ) from error
  selected = []
  for path, skip, take in parts:
    table = Annotations.from_bytes(found[path])
    if len(table) < skip + take:
      raise UsageError(
        f"{path} holds {len(table)} records, expected {skip + take}; the file is damaged: copy or "
        "prepare it again"
      )
    selected.append(table.select(np.arange(skip, skip + take)))
  return Annotations.joined(selected)
