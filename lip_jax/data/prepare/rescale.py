"""Scales the images of a data set down once, when it is prepared, rather than in every epoch."""

from typing import Any

import cv2
import simplejpeg

from lip_jax.data import preprocess
from lip_jax.errors import UsageError

_DEFAULT_QUALITY = 95


class Rescaler:
  """Scales large images down and leaves the others as they are; remembers what it could not read.

  Args:
    upright: whether those that are scaled are turned as their EXIF orientation says, which is lost.

  Attributes:
    settings: what decides on the result, as JSON.
    description: the same for people.
    unreadable: names of images that are kept as they are because they cannot be decoded.
  """

  def __init__(self, shorter_side: int | None, quality: int | None, *, upright: bool = False):
    if shorter_side is None and quality is not None:
      raise UsageError(f"quality={quality} is for images that are scaled; give shorter_side too")
    if shorter_side is not None and shorter_side < 1:
      raise UsageError(f"shorter_side={shorter_side}, expected a positive number of pixels")
    quality = _DEFAULT_QUALITY if quality is None else quality
    if not 1 <= quality <= 100:
      raise UsageError(f"quality={quality}, expected 1 to 100")
    self._shorter_side, self._quality, self._upright = shorter_side, quality, upright
    self.unreadable: list[str] = []
    self.settings: dict[str, Any] = {}
    self.description = "The images are the bytes of the original files."
    if shorter_side is not None:
      self.settings = {"shorter_side": shorter_side, "quality": quality}
      self.description = (
        f"Images whose shorter side had more than {shorter_side} pixels are scaled down to that "
        f"and saved as JPEG of quality {quality}; the others are the bytes of the original files."
      )

  def __call__(self, name: str, data: bytes) -> bytes:
    if self._shorter_side is None:
      return data
    try:
      image = preprocess.decode_jpeg(data, upright=self._upright)
    except preprocess.CorruptImage:
      self.unreadable.append(name)
      return data
    height, width = image.shape[:2]
    scale = self._shorter_side / min(height, width)
    if scale >= 1:
      return data
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Averages over areas: no aliasing when shrinking.
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(small, quality=self._quality, colorsubsampling="420")
