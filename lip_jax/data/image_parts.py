"""A random part of an image, and how it is resized: without aliasing, faster than Pillow does."""

import math

import cv2
import numpy as np


def random_part(
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


def copied(image: np.ndarray, out: np.ndarray) -> np.ndarray:
  """`out`, with the image in it."""
  out[...] = image
  return out


def resize_part(
  image: np.ndarray,
  top: float,
  left: float,
  height: float,
  width: float,
  size: tuple[int, int],
  out: np.ndarray | None = None,
) -> np.ndarray:
  """Resizes a part of an image, without aliasing.

  Bilinear interpolation of an image that was smoothed as much as it shrinks. Bilinear resizing with
  a support that grows with the factor f, which is Pillow's, smoothes by a triangle of variance
  f^2 / 6 source pixels; interpolation alone by 1 / 6. A Gaussian makes up the difference: faster
  than area averages, and nearer to Pillow (docs/input_benchmark.md).

  The part's edges may lie between pixels. Returns uint8 [*size, 3].
  """
  first_row, first_column = math.floor(top), math.floor(left)
  image = image[first_row : math.ceil(top + height), first_column : math.ceil(left + width)]
  rows, sigma_rows = _smoothing(height / size[0])
  columns, sigma_columns = _smoothing(width / size[1])
  if rows > 1 or columns > 1:
    image = cv2.GaussianBlur(
      image,
      (columns, rows),
      sigmaX=sigma_columns,
      sigmaY=sigma_rows,
      borderType=cv2.BORDER_REPLICATE,
    )
  if image.shape[:2] == (height, width):
    if (height, width) == size:
      return image if out is None else copied(image, out)
    return cv2.resize(image, size[::-1], dst=out, interpolation=cv2.INTER_LINEAR)
  # From the result's coordinates to the image's, whose pixels have their centres at whole numbers.
  y, x = height / size[0], width / size[1]
  to_source = np.array(
    [[x, 0, left - first_column + (x - 1) / 2], [0, y, top - first_row + (y - 1) / 2]]
  )
  return cv2.warpAffine(
    image,
    to_source,
    size[::-1],
    dst=out,
    flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
    borderMode=cv2.BORDER_REPLICATE,
  )


def _smoothing(factor: float) -> tuple[int, float]:
  """Taps and standard deviation of the Gaussian that precedes a shrinking by `factor`."""
  variance = (factor**2 - 1) / 6
  if variance < 0.1:
    # Costs more than it gives, up to a factor of 1.26.
    return 1, 1.0
  if variance < 0.8:
    # Three taps (a, 1 - 2 a, a) have the variance 2 a. OpenCV wants the Gaussian that they are of,
    # and is twice as fast if they are (1, 2, 1) / 4, which serves factors from 1.6 to 2.4.
    a = variance / 2 if variance < 0.26 else 1 / 4
    return 3, math.sqrt(-0.5 / math.log(a / (1 - 2 * a)))
  sigma = math.sqrt(variance)
  return 2 * math.ceil(2 * sigma) + 1, sigma
