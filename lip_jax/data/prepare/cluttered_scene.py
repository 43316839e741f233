"""Draws the pictures of cluttered digits: whole digits among fragments, on coloured, noisy grounds.

The digits are the 1,797 8x8 images of the UCI test set that scikit-learn carries. They come ordered
by writer, in blocks of about 130 that each begin with the label run 0..9, 0..9. Such a block begins
at 1415. Training pictures, clutter included, use only the digits before it and validation pictures
only the rest, so that no writer and no source digit is in both.
"""

import colorsys
import dataclasses
import functools
import zlib
from typing import Any, NamedTuple

import cv2
import numpy as np
import tensorflow_datasets as tfds

# Source digits of each split: different writers (see above).
SOURCES = {"train": range(0, 1415), "validation": range(1415, 1797)}

# Ink is drawn once at this height and shrunk from there, so that strokes have smooth edges.
_MASTER_HEIGHT = 64
# A piece of clutter shows this part of its digit's ink and at most this part of its height: nobody
# should take it for a digit.
_FRAGMENT_INK = (0.12, 0.42)
_FRAGMENT_HEIGHT = 0.55
# Random draws before a search for a place or a piece is given up.
_TRIES = 40


class Condition(NamedTuple):
  """One size of the digit and one density of clutter."""

  digit_height: int  # of the digit's ink, pixels
  fragments: int  # pieces of clutter tried

  @property
  def split(self) -> str:
    """Name of the split that shows it."""
    return f"height{self.digit_height}_fragments{self.fragments}"


@dataclasses.dataclass(eq=False, kw_only=True)
class ClutteredDigitsConfig(tfds.core.BuilderConfig):
  """What the images of one configuration look like, and how many there are.

  Pairs are the least and the greatest value. With `light_grounds`, half of the images have dark ink
  on a light ground; without, all have light ink on a dark ground, which a small network learns
  several times faster. Each of the conditions has a split of its own.
  """

  canvas: int  # side of the square image, pixels
  digits: tuple[int, int]  # whole digits in an image
  digit_height: tuple[int, int]  # of a digit's ink, pixels
  fragments: tuple[int, int]  # pieces of clutter tried; one that finds no free place is left out
  light_grounds: bool
  num_train: int
  num_validation: int
  conditions: tuple[Condition, ...] = ()
  num_condition: int = 0  # images of each, with the validation split's digits

  def at(self, condition: Condition) -> "ClutteredDigitsConfig":
    """The look of the images of one condition."""
    height, fragments = condition
    look: dict[str, Any] = {
      "name": f"{self.name}/{condition.split}",
      "digit_height": (height, height),
      "fragments": (fragments, fragments),
    }
    return dataclasses.replace(self, **look)


class Box(NamedTuple):
  """A rectangle in pixels: rows [top, bottom), columns [left, right)."""

  top: int
  left: int
  bottom: int
  right: int

  @property
  def height(self) -> int:
    """Number of rows."""
    return self.bottom - self.top

  @property
  def area(self) -> int:
    """Number of pixels."""
    return self.height * (self.right - self.left)

  @property
  def slices(self) -> tuple[slice, slice]:
    """Index of the box's pixels in an array [height, width, ...]."""
    return slice(self.top, self.bottom), slice(self.left, self.right)


class Scene(NamedTuple):
  """One picture and what is in it."""

  image: np.ndarray  # uint8 [canvas, canvas, 3], RGB
  boxes: list[Box]  # of the ink of the whole digits, the largest first
  labels: list[int]  # of the same
  sources: list[int]  # indices of all the UCI digits that ink was taken from, clutter included


def draw_scene(config: ClutteredDigitsConfig, split: str, k: int) -> Scene:
  """Draws image k of a split; a pure function of (config, split, k).

  Args:
    split: "train" or "validation"; decides which source digits are used.
  """
  rng = np.random.default_rng([zlib.crc32(f"{config.name}/{split}".encode()), k])
  taken = np.zeros((config.canvas, config.canvas), np.bool_)
  digits = _place_digits(rng, config, SOURCES[split], taken)
  heights = [digit.box.height for digit in digits]
  fragments = _place_fragments(rng, config, SOURCES[split], heights, taken)
  dark_ground = not config.light_grounds or rng.random() < 0.5
  image = _draw_ground(rng, config.canvas, dark_ground)
  # Whole digits come last: no clutter covers them.
  for stroke in fragments + digits:
    patch = image[:, *stroke.box.slices]
    opacity = stroke.ink * np.float32(rng.uniform(0.75, 1.0))
    patch += opacity * (_random_colour(rng, dark=not dark_ground) - patch)
  grain = rng.standard_normal((config.canvas, config.canvas), np.float32)
  image += grain * np.float32(rng.uniform(0.01, 0.04))
  digits.sort(key=lambda digit: -digit.box.area)
  return Scene(
    image=np.ascontiguousarray((image.clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)),
    boxes=[digit.box for digit in digits],
    labels=[int(load_digits().labels[digit.source]) for digit in digits],
    sources=[stroke.source for stroke in digits + fragments],
  )


class _Stroke(NamedTuple):
  """Ink at a place: opacity float32 [box height, box width], the box, index of the UCI digit."""

  ink: np.ndarray
  box: Box
  source: int


class Digits(NamedTuple):
  """The UCI digits as smooth masks of ink, float32 [master height, any width], and their labels."""

  masks: list[np.ndarray]
  labels: np.ndarray


@functools.cache
def load_digits() -> Digits:
  """The 1,797 digits, made once in a process."""
  from sklearn import datasets  # a second to import, for those who make the data set

  bunch = datasets.load_digits()
  masks = []
  for pixels in bunch.images.astype(np.float32) / 16:
    mask = cv2.resize(np.pad(pixels, 1), None, fx=12, fy=12, interpolation=cv2.INTER_CUBIC)
    mask = np.clip((cv2.GaussianBlur(mask, (0, 0), 2.5) - 0.4) / 0.25, 0, 1)
    # Cut tight, so that a mask's edges are its ink's.
    rows, columns = (mask > 0.5).any(1).nonzero()[0], (mask > 0.5).any(0).nonzero()[0]
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    masks.append(_resize_mask(mask, _MASTER_HEIGHT, 1.0))
  return Digits(masks, bunch.target)


def _place_digits(
  rng: np.random.Generator, config: ClutteredDigitsConfig, sources: range, taken: np.ndarray
) -> list[_Stroke]:
  """Whole digits that hardly overlap; at least the least number that the configuration names."""
  low, high = config.digit_height
  count = rng.integers(*config.digits, endpoint=True)
  placed: list[_Stroke] = []
  # The largest first, while there is room.
  for height in sorted(rng.integers(low, high, count, endpoint=True).tolist(), reverse=True):
    source = int(rng.integers(sources.start, sources.stop))
    stretch = rng.uniform(0.9, 1.15)
    while True:
      ink = _resize_mask(load_digits().masks[source], height, stretch)
      box = _take_place(rng, taken, ink.shape, overlap=0.05)
      if box is not None:
        placed.append(_Stroke(ink, box, source))
        break
      if height == low and len(placed) >= config.digits[0]:
        break
      height = max(low, height * 4 // 5)
  return placed


def _place_fragments(
  rng: np.random.Generator,
  config: ClutteredDigitsConfig,
  sources: range,
  heights: list[int],
  taken: np.ndarray,
) -> list[_Stroke]:
  """Pieces of digits beside the whole ones, as if cut from digits of about the same heights."""
  placed: list[_Stroke] = []
  for _ in range(rng.integers(*config.fragments, endpoint=True)):
    source = int(rng.integers(sources.start, sources.stop))
    piece = cut_piece(rng, load_digits().masks[source])
    if piece is None:
      continue
    height = heights[rng.integers(len(heights))] * rng.uniform(0.8, 1.1)
    ink = _resize_mask(piece, max(3, round(height * len(piece) / _MASTER_HEIGHT)), 1.0)
    box = _take_place(rng, taken, ink.shape, overlap=0.1)
    if box is not None:
      placed.append(_Stroke(ink, box, source))
  return placed


def cut_piece(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray | None:
  """A rectangle of a mask that shows a small part of its ink, or None if none was found."""
  total = float(mask.sum())
  for tall, wide, down, right in rng.random((_TRIES, 4)).tolist():
    height = int(len(mask) * (0.25 + (_FRAGMENT_HEIGHT - 0.25) * tall))
    width = int(mask.shape[1] * (0.4 + 0.5 * wide))
    top = int((len(mask) - height + 1) * down)
    left = int((mask.shape[1] - width + 1) * right)
    piece = mask[top : top + height, left : left + width]
    if _FRAGMENT_INK[0] <= piece.sum() / total <= _FRAGMENT_INK[1]:
      return piece
  return None


def _resize_mask(mask: np.ndarray, height: int, stretch: float) -> np.ndarray:
  """Resizes a mask to `height` pixels, its width in proportion times `stretch`."""
  width = max(3, round(mask.shape[1] * height / mask.shape[0] * stretch))
  return cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA)


def _take_place(
  rng: np.random.Generator, taken: np.ndarray, shape: tuple[int, ...], overlap: float
) -> Box | None:
  """Finds a random box of which at most the part `overlap` is taken, and takes it.

  None if none was found. `taken` is bool [canvas, canvas], changed in place.
  """
  height, width = shape
  for down, right in rng.random((_TRIES, 2)).tolist():
    # One pixel is left free at the border of the image.
    top = 1 + int((len(taken) - height - 1) * down)
    left = 1 + int((len(taken) - width - 1) * right)
    box = Box(top, left, top + height, left + width)
    if np.count_nonzero(taken[box.slices]) <= overlap * box.area:
      taken[box.slices] = True
      return box
  return None


def _draw_ground(rng: np.random.Generator, canvas: int, dark: bool) -> np.ndarray:
  """A smooth, slightly uneven ground in one tint: RGB planes, float32 [3, canvas, canvas]."""
  coarse = rng.uniform(-1, 1, (4, 4, 3)).astype(np.float32)
  uneven = cv2.resize(coarse, (canvas, canvas), interpolation=cv2.INTER_CUBIC).transpose(2, 0, 1)
  return _random_colour(rng, dark) + uneven * np.float32(rng.uniform(0.03, 0.12))


def _random_colour(rng: np.random.Generator, dark: bool) -> np.ndarray:
  """A colour of any hue whose luminance leaves room for contrast: RGB, float32 [3, 1, 1]."""
  hue, saturation, shade = rng.uniform(size=3).tolist()
  luminance = 0.08 + 0.27 * shade if dark else 0.65 + 0.28 * shade
  red, green, blue = colorsys.hsv_to_rgb(hue, 1.0, 1.0)
  pure = 0.299 * red + 0.587 * green + 0.114 * blue
  if luminance < pure:
    channels = [channel * luminance / pure for channel in (red, green, blue)]
  else:
    whiten = (1 - luminance) / (1 - pure)
    channels = [1 - (1 - channel) * whiten for channel in (red, green, blue)]
  keep = 0.2 + 0.7 * saturation
  mixed = [luminance + keep * (channel - luminance) for channel in channels]
  return np.array(mixed, np.float32)[:, None, None]
