"""Images with the boxes of what is in them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
  from PIL import Image, ImageDraw, ImageFont

LEAST = 480  # pixels of a picture's longer side
# Of Okabe and Ito, bright enough to be seen on photographs.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")
_INK = {True: "black", False: "white"}  # by whether the ground is light


class Boxes(NamedTuple):
  """Boxes of one image, in its pixels."""

  boxes: np.ndarray  # [n, 4], x1, y1, x2, y2
  labels: np.ndarray  # [n], whole numbers
  scores: np.ndarray | None = None  # [n], of what was found; None: of what is there


class Picture(NamedTuple):
  """A row of `figures.boxes_figure`: an image and what is known of it."""

  title: str
  image: np.ndarray  # uint8 [H, W, 3]
  boxes: Mapping[str, Boxes]  # by the title above them, such as "truth" and "found"
  importance: np.ndarray | None = None  # [H', W'], from border to border, a mean of one


def draw_boxes(
  image: np.ndarray,
  boxes: np.ndarray,
  labels: np.ndarray,
  scores: np.ndarray | None = None,
  class_names: Sequence[str] | None = None,
  *,
  size: int | None = None,
) -> np.ndarray:
  """The image, enlarged or reduced, with boxes in the colours of their classes, and their names.

  Args:
    image: uint8 [H, W, 3].
    boxes: [n, 4], x1, y1, x2, y2 in pixels of `image`.
    labels: [n], indices into `class_names`.
    scores: [n], written beside the names; the best are drawn last, and so are seen.
    class_names: None: labels are written as numbers.
    size: longer side of the result in pixels; None: that of the image, but at least 480.

  Returns:
    uint8 [H', W', 3].
  """
  from PIL import Image, ImageDraw, ImageFont

  height, width = image.shape[:2]
  size = size or max(LEAST, height, width)
  scale = size / max(height, width)
  # Enlarged, pixels stay what they are; reduced, they are averaged.
  method = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BILINEAR
  shape = max(round(width * scale), 1), max(round(height * scale), 1)
  picture = Image.fromarray(image).resize(shape, method)
  draw = ImageDraw.Draw(picture)
  font = ImageFont.load_default(max(11, round(size / 55)))
  thick = max(2, round(size / 400))
  order = range(len(boxes)) if scores is None else np.argsort(scores, kind="stable")
  placed = [(int(k), _corners(boxes[k] * scale, picture)) for k in order]
  for k, corners in placed:
    colour = _COLOURS[int(labels[k]) % len(_COLOURS)]
    draw.rectangle(corners, outline="black", width=thick + 2)  # seen on any ground
    x1, y1, x2, y2 = corners
    draw.rectangle((x1 + 1, y1 + 1, max(x2 - 1, x1 + 1), max(y2 - 1, y1 + 1)), None, colour, thick)
  # Names last: no box crosses them.
  for k, corners in placed:
    label = int(labels[k])
    name = class_names[label] if class_names and label < len(class_names) else str(label)
    text = str(name) if scores is None else f"{name} {100 * float(scores[k]):.0f}%"
    _write(draw, font, text, corners, _COLOURS[label % len(_COLOURS)], picture.size)
  return np.array(picture)


def _corners(box: np.ndarray, picture: "Image.Image") -> tuple[int, int, int, int]:
  """First and last pixels of a box, x1, y1, x2, y2, inside the picture, at least one pixel."""
  last = np.tile(np.asarray(picture.size), 2) - 1
  x1, y1, x2, y2 = np.clip(np.nan_to_num(np.round(box)), 0, last).astype(int).tolist()
  return x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)


def _write(
  draw: "ImageDraw.ImageDraw",
  font: "ImageFont.FreeTypeFont | ImageFont.ImageFont",
  text: str,
  corners: tuple[int, int, int, int],
  colour: str,
  picture: tuple[int, int],
) -> None:
  """Text on a ground of the box's colour, above the box, or inside where there is no room."""
  from PIL import ImageColor

  left, top, right, bottom = font.getbbox(text)
  width, height = int(right - left) + 5, int(bottom - top) + 5
  x = min(corners[0], max(picture[0] - width, 0))
  y = corners[1] - height if corners[1] >= height else corners[1]
  draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
  light = float(np.dot(ImageColor.getrgb(colour)[:3], (0.299, 0.587, 0.114))) > 110
  draw.text((x + 2 - left, y + 2 - top), text, fill=_INK[light], font=font)
