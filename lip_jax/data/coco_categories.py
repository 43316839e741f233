"""COCO's 80 classes of objects and the numbers they have in its annotation files."""

from collections.abc import Sequence

NAMES = (
  "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
  "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
  "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
  "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
  "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
  "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
  "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
  "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
  "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
  "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""In the order of their ids."""

# Numbers up to 90 of classes that were named but are not annotated.
_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}

IDS = tuple(number for number in range(1, 91) if number not in _UNUSED)
"""Of the classes in `NAMES`."""


def category_ids(class_names: Sequence[str]) -> list[int] | None:
  """The ids of classes that are COCO's, in any order; None if they are others."""
  by_name = dict(zip(NAMES, IDS, strict=True))
  if set(class_names) != set(NAMES):
    return None
  return [by_name[name] for name in class_names]
