"""What is made of an example: the arrays of its row in a batch.

The loader takes any `Transform`. Those here are for classification: an image and its label.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import cv2
import numpy as np

from lip_jax.data import preprocess
from lip_jax.data.preprocess import Size
from lip_jax.errors import UsageError

Example = Mapping[str, Any]
Shapes = dict[str, tuple[tuple[int, ...], type[np.generic]]]
Row = Mapping[str, np.ndarray]


class Transform(Protocol):
  """Turns an example of a source into a row of a batch.

  Attributes:
    shapes: name of each array of a row -> (its shape, its type), the same for all examples.
  """

  shapes: Shapes

  def __call__(self, example: Example, rng: np.random.Generator, out: Row) -> None:
    """Fills `out`, which has any content before.

    Args:
      example: of the source, such as {"image": encoded, bytes; "label": int}.
      rng: the only randomness to use; depends on seed and position alone.
      out: an array of each name in `shapes`, to be written to.

    Raises:
      CorruptImage: the example cannot be used.
    """


class TrainCrop:
  """A random part of the image, scaled, and the label: "image" uint8 [H, W, C], "label" int32.

  Args:
    scale: least and greatest area of the part, in parts of the image's; None takes the whole
      image, scaled, and cut to shape.
    channels: 3, or 1 for grey.
    upright: whether images are turned as their EXIF orientation says.
  """

  def __init__(
    self,
    size: Size,
    scale: tuple[float, float] | None = None,
    *,
    channels: int = 3,
    upright: bool = False,
  ):
    self._size = height, width = preprocess.height_and_width(size)
    self._upright = upright
    self._scale = scale
    # So that images are stretched as little as for a square.
    self._ratio = (3 / 4 * (width / height), 4 / 3 * (width / height))
    self.shapes: Shapes = _labelled((height, width), channels)

  def __call__(self, example: Example, rng: np.random.Generator, out: Row) -> None:
    image, data, upright = out["image"], example["image"], self._upright
    if self._scale is None:
      crop = preprocess.decode_center_crop(data, self._size, self._size, upright=upright)
    else:
      crop = preprocess.decode_random_resized_crop(
        data,
        rng,
        self._size,
        self._scale,
        self._ratio,
        out=image if image.shape[-1] == 3 else None,
        upright=upright,
      )
    if crop is not image:
      _write(crop, image)
    out["label"][...] = example["label"]


class EvalCrop:
  """The centre of the image, and the label; with five crops "image" is uint8 [5, H, W, C].

  Args:
    resize: the image is scaled to cover just this before the crop: (height, width), or its shorter
      side; None is `size`.
    crops: 1, the centre, or 5, also the corners of the central part of the size `resize`
      (Krizhevsky et al. 2012, section 4.1).
    channels: 3, or 1 for grey.
    upright: whether images are turned as their EXIF orientation says.

  Raises:
    UsageError: `resize` is smaller than `size`, or `crops` is another number.
  """

  def __init__(
    self,
    size: Size,
    resize: Size | None = None,
    *,
    crops: int = 1,
    channels: int = 3,
    upright: bool = False,
  ):
    self._upright = upright
    self._size = preprocess.height_and_width(size)
    self._resize = preprocess.height_and_width(size if resize is None else resize)
    if self._resize[0] < self._size[0] or self._resize[1] < self._size[1]:
      raise UsageError(f"resize={resize} is below image_size={size}; expected at least that")
    if crops not in (1, 5):
      raise UsageError(f"crops={crops}; expected 1 or 5")
    self._crops = crops
    self.shapes: Shapes = _labelled((5,) * (crops == 5) + self._size, channels)

  def __call__(self, example: Example, rng: np.random.Generator, out: Row) -> None:
    size = self._size if self._crops == 1 else self._resize
    whole = preprocess.decode_center_crop(
      example["image"], size, self._resize, upright=self._upright
    )
    if self._crops == 1:
      _write(whole, out["image"])
    else:
      height, width = self._size
      bottom, right = self._resize[0] - height, self._resize[1] - width
      corners = ((0, 0), (0, right), (bottom, 0), (bottom, right))
      for place, crop in zip(((bottom // 2, right // 2), *corners), out["image"], strict=True):
        _write(whole[place[0] : place[0] + height, place[1] : place[1] + width], crop)
    out["label"][...] = example["label"]


def _labelled(shape: tuple[int, ...], channels: int) -> Shapes:
  if channels not in (1, 3):
    raise UsageError(f"channels={channels}; expected 3, or 1 for grey")
  return {"image": ((*shape, channels), np.uint8), "label": ((), np.int32)}


def in_channels(image: np.ndarray, channels: int) -> np.ndarray:
  """RGB pixels [H, W, 3] as they are, or as grey ones [H, W, 1]."""
  return image if channels == 3 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]


def _write(image: np.ndarray, out: np.ndarray) -> None:
  out[...] = in_channels(image, out.shape[-1])
