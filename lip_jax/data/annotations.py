"""A table of what is annotated: images, and the boxes in them."""

import dataclasses
import hashlib
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lip_jax.errors import UsageError

LARGEST_ID = 2**31 - 1
"""Image ids travel as int32, on the devices too."""

COCO_AREA_LIMITS = (32.0**2, 96.0**2)
"""Up to which area an object is small, and medium, in pixels^2."""


def check_area_limits(small: float, medium: float) -> None:
  """Raises UsageError unless they are areas, the second one larger."""
  if not 0 < small < medium < math.inf:
    raise UsageError(
      f"areas of small objects up to {small} and of medium ones up to {medium} pixels^2: expected "
      "two positive numbers, the second one larger"
    )


@dataclasses.dataclass(frozen=True)
class Annotations:
  """n images with m boxes in all, as NumPy arrays.

  Attributes:
    image_ids: int64 [n]; -1 where the data set has none.
    sizes: int32 [n, 2], height and width in pixels as stored; 0, 0 where they cannot be read.
    names: str [n], the images' file names; "" where the data set has none.
    counts: int64 [n], boxes of each image.
    boxes: float64 [m, 4], x, y, width, height in pixels; those of an image are side by side.
    labels: int32 [m], from 0.
    crowd: bool [m].
    areas: float64 [m], pixels^2.
  """

  image_ids: np.ndarray
  sizes: np.ndarray
  names: np.ndarray
  counts: np.ndarray
  boxes: np.ndarray
  labels: np.ndarray
  crowd: np.ndarray
  areas: np.ndarray

  @classmethod
  def of_images(cls, images: Sequence[dict[str, Any]]) -> "Annotations":
    """Of a dict for each image: "image_id", "size", "name"; "boxes" and so on as above."""
    parts = {
      key: [np.asarray(image[key], dtype).reshape(-1, *shape) for image in images]
      for key, dtype, shape in (
        ("boxes", np.float64, (4,)),
        ("labels", np.int32, ()),
        ("crowd", np.bool_, ()),
        ("areas", np.float64, ()),
      )
    }
    empty = [np.zeros((0, 4))]
    return cls(
      image_ids=np.array([image["image_id"] for image in images], np.int64),
      sizes=np.array([image["size"] for image in images], np.int32).reshape(-1, 2),
      names=np.array([image["name"] for image in images], np.str_),
      counts=np.array([len(labels) for labels in parts["labels"]], np.int64),
      boxes=np.concatenate(empty + parts["boxes"]),
      labels=np.concatenate([np.zeros(0, np.int32), *parts["labels"]]),
      crowd=np.concatenate([np.zeros(0, np.bool_), *parts["crowd"]]),
      areas=np.concatenate([np.zeros(0), *parts["areas"]]),
    )

  @classmethod
  def joined(cls, parts: Sequence["Annotations"]) -> "Annotations":
    """Several tables, one after the other."""
    return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in _NAMES})

  def __len__(self) -> int:
    return len(self.sizes)

  @property
  def ends(self) -> np.ndarray:
    """Where the boxes of each image end: int64 [n]."""
    return np.cumsum(self.counts)

  @property
  def owners(self) -> np.ndarray:
    """The image of each box: int64 [m]."""
    return np.repeat(np.arange(len(self)), self.counts)

  def select(self, images: np.ndarray) -> "Annotations":
    """Some of the images, in the given order."""
    counts = self.counts[images]
    # First box of each chosen image, less the boxes that come before it in the new table.
    shifts = (self.ends - self.counts)[images] - (np.cumsum(counts) - counts)
    boxes = np.repeat(shifts, counts) + np.arange(counts.sum())
    of_boxes = {name: getattr(self, name)[boxes] for name in _OF_BOXES}
    of_images = {name: getattr(self, name)[images] for name in _NAMES if name not in _OF_BOXES}
    return Annotations(**of_images, **of_boxes)

  @property
  def corners(self) -> np.ndarray:
    """The boxes as x1, y1, x2, y2, where x2 - x1 is the width: float64 [m, 4]."""
    return np.concatenate([self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]], axis=1)

  @property
  def usable(self) -> np.ndarray:
    """Which boxes can be learned: not degenerate, and not outside their image; bool [m].

    Degenerate is an area of 0 or less, or a side below one pixel.
    """
    sizes = np.repeat(self.sizes[:, ::-1], self.counts, axis=0)
    inside = np.minimum(self.corners[:, 2:], sizes) - np.maximum(self.corners[:, :2], 0)
    whole = (self.areas > 0) & (self.boxes[:, 2:] >= 1).all(axis=1)
    return whole & (inside > 0).all(axis=1)

  @property
  def num_usable(self) -> np.ndarray:
    """Usable boxes of each image, crowds among them: int64 [n]."""
    return np.bincount(self.owners[self.usable], minlength=len(self))

  @property
  def num_objects(self) -> np.ndarray:
    """Usable boxes of each image that are no crowd: int64 [n]."""
    return np.bincount(self.owners[self.usable & ~self.crowd], minlength=len(self))

  def digest(self) -> str:
    """Of all that is annotated, by which it is known again."""
    digest = hashlib.sha256()
    for name in _NAMES:
      array = getattr(self, name)
      if array.dtype.kind == "U":  # whose width is that of the longest
        array = np.frombuffer("\n".join(array.tolist()).encode(errors="surrogatepass"), "u1")
      digest.update(f"{name} {array.shape}".encode())
      digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]

  def to_bytes(self) -> bytes:
    """What `from_bytes` reads."""
    data = io.BytesIO()
    np.savez(data, **{name: getattr(self, name) for name in _NAMES})
    return data.getvalue()

  @classmethod
  def from_bytes(cls, data: bytes) -> "Annotations":
    """What `to_bytes` wrote."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
      return cls(**{name: arrays[name] for name in _NAMES})

  def to_coco(
    self,
    class_names: Sequence[str],
    category_ids: Sequence[int],
    area_limits: Sequence[float],
  ) -> dict[str, Any]:
    """The table in the form of COCO's JSON: "images", "annotations", "categories", "info".

    The annotations are numbered from 1: the metric takes an id of 0 for none. "info" has
    "area_limits", a key of ours: between small and medium, and medium and large, in pixels^2.
    """
    images = [
      {"id": number, "height": height, "width": width, "file_name": name}
      for number, (height, width), name in zip(
        self.image_ids.tolist(), self.sizes.tolist(), self.names.tolist(), strict=True
      )
    ]
    columns = (self.image_ids[self.owners], self.boxes, self.areas, self.labels, self.crowd)
    annotations = [
      {
        "id": number,
        "image_id": image,
        "category_id": category_ids[label],
        "bbox": box,
        "area": area,
        "iscrowd": int(crowd),
      }
      for number, (image, box, area, label, crowd) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True), start=1
      )
    ]
    categories = [
      {"id": number, "name": name} for number, name in zip(category_ids, class_names, strict=True)
    ]
    info = {"area_limits": list(area_limits)}
    return {"images": images, "annotations": annotations, "categories": categories, "info": info}


_OF_BOXES = ("boxes", "labels", "crowd", "areas")
_NAMES = tuple(field.name for field in dataclasses.fields(Annotations))
