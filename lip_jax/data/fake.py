"""Fake data: a few photographs over and over, to measure everything but the reading of files."""

import functools
import importlib.resources
from typing import Any

import numpy as np
import simplejpeg

NUM_CLASSES = 1000

# ImageNet's usual height and width, in pixels.
_SIZE = (375, 500)
# JPEG quality of each photograph that gives about ImageNet's mean size, 110,000 bytes.
_QUALITIES = {"china.jpg": 95, "flower.jpg": 98}


class FakeImages:
  """Examples of `Source`: image k is photograph k modulo their number and has label k mod 1000."""

  def __init__(self, split: str, count: int):
    self._split = split
    self._count = count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < self._count:
      raise IndexError(index)
    photographs = _photographs()
    return {
      "image": photographs[index % len(photographs)],
      "label": index % NUM_CLASSES,
      "id": f"{self._split}/{index:07d}",
    }


@functools.cache
def _photographs() -> tuple[bytes, ...]:
  """Eight JPEGs of 500x375 pixels, cut from the photographs that scikit-learn carries."""
  height, width = _SIZE
  files = importlib.resources.files("sklearn.datasets.images")
  cuts = []
  for name, quality in _QUALITIES.items():
    image = simplejpeg.decode_jpeg((files / name).read_bytes())
    for top in (0, image.shape[0] - height):
      for left in (0, image.shape[1] - width):
        cut = np.ascontiguousarray(image[top : top + height, left : left + width])
        cuts.append(simplejpeg.encode_jpeg(cut, quality=quality, colorsubsampling="420"))
  return tuple(cuts)
