"""Encoded image to uint8 pixels of the network's size, on the host.

Pure functions around native calls that release the GIL, so that threads share the work. Flips and
normalisation are not here: the device does them, on a quarter of the bytes that floats would take.
"""

import math

import cv2
import numpy as np
import simplejpeg

# The pipeline's threads are the parallelism. OpenCV's own would compete with them for the cores.
cv2.setNumThreads(0)

_JPEG_START = b"\xff\xd8"
# libjpeg warnings after which all of the image is there. Others mean that some of it is lost.
_HARMLESS = ("extraneous bytes before marker 0xd9", "Invalid SOS parameters")


class CorruptImage(ValueError):  # noqa: N818
  """The bytes hold no whole image: empty, cut short, overwritten, or of an unknown format."""


def decode_jpeg(data: bytes) -> np.ndarray:
  """Decodes a JPEG of any kind, or a PNG, which ImageNet also contains.

  Grey and CMYK images become RGB, transparency is dropped, and an EXIF orientation is ignored, as
  the usual ImageNet pipelines do.

  Args:
    data: the encoded image.

  Returns:
    RGB pixels, uint8 [H, W, 3].

  Raises:
    CorruptImage: not an image, or not all of one.
  """
  if not data.startswith(_JPEG_START):
    return _decode_other(data)
  try:
    return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
  except ValueError as error:
    if not any(warning in str(error) for warning in _HARMLESS):
      raise CorruptImage(f"{error} ({len(data)} bytes)") from error
  return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False)


def _decode_other(data: bytes) -> np.ndarray:
  if not data:
    raise CorruptImage("no data (0 bytes)")
  flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
  try:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
  except cv2.error as error:
    raise CorruptImage(f"{error} ({len(data)} bytes)") from error
  if image is None:
    raise CorruptImage(f"neither a JPEG nor another whole image ({len(data)} bytes)")
  return image


def random_resized_crop(
  image: np.ndarray,
  rng: np.random.Generator,
  size: int,
  scale: tuple[float, float],
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
  """Resizes a random part of an image to a square, as torchvision's `RandomResizedCrop` does.

  Ten draws of an area and an aspect ratio; if none fits into the image, the largest central part
  whose aspect ratio is allowed.

  Args:
    image: uint8 [H, W, 3].
    rng: where the randomness comes from.
    size: side of the result, pixels.
    scale: least and greatest area of the part, in parts of the image's.
    ratio: least and greatest width / height of the part.

  Returns:
    uint8 [size, size, 3].
  """
  top, left, height, width = _random_part(image.shape[0], image.shape[1], rng, scale, ratio)
  return _resize(image[top : top + height, left : left + width], size, size)


def _random_part(
  image_height: int,
  image_width: int,
  rng: np.random.Generator,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
  """Draws (top, left, height, width) in pixels."""
  for _ in range(10):
    area = image_height * image_width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    width = round(math.sqrt(area * aspect))
    height = round(math.sqrt(area / aspect))
    if 0 < width <= image_width and 0 < height <= image_height:
      top = int(rng.integers(image_height - height, endpoint=True))
      left = int(rng.integers(image_width - width, endpoint=True))
      return top, left, height, width
  width = min(image_width, max(1, round(image_height * ratio[1])))
  height = min(image_height, max(1, round(image_width / ratio[0])))
  return (image_height - height) // 2, (image_width - width) // 2, height, width


def resize_and_center_crop(image: np.ndarray, size: int, resize: int) -> np.ndarray:
  """Resizes an image's shorter side to `resize` and takes the central square.

  An image that already has the right size is returned as it is.

  Args:
    image: uint8 [H, W, 3].
    size: side of the result, pixels.
    resize: shorter side before the crop, pixels; at least `size`.

  Returns:
    uint8 [size, size, 3].

  Raises:
    ValueError: `resize` is smaller than `size`.
  """
  if resize < size:
    raise ValueError(f"cannot take {size} pixels from a side of {resize}")
  height, width = image.shape[:2]
  shorter = min(height, width)
  height, width = height * resize // shorter, width * resize // shorter
  image = _resize(image, height, width)
  top, left = round((height - size) / 2), round((width - size) / 2)
  return image[top : top + size, left : left + size]


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """Resizes to (height, width): area averages to shrink, bilinear to enlarge in some direction."""
  if image.shape[:2] == (height, width):
    return image
  shrinks = height <= image.shape[0] and width <= image.shape[1]
  interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
  return cv2.resize(image, (width, height), interpolation=interpolation)
