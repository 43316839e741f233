"""Encoded image to uint8 pixels of the network's size, on the host.

Pure functions around native calls that release the GIL, so that threads share the work. Flips and
normalisation are not here: the device does them, on a quarter of the bytes that floats would take.

Training decodes no more than its random crop needs and resizes fast; evaluation gives the pixels of
Pillow, which torchvision uses. docs/input_benchmark.md has what both cost.
"""

import contextlib
import io
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from lip_jax.data import orientation
from lip_jax.data.image_parts import copied, random_part, resize_part

# The pipeline's threads are the parallelism. OpenCV's own would compete with them for the cores.
cv2.setNumThreads(0)

MAX_PIXELS = 80_000_000
"""Images with more pixels are refused: they would take more than 240 MB each, on every thread."""

_JPEG_START = b"\xff\xd8"
# What precedes height and width in the frame header of a sequential JPEG with three colours.
_BASELINE_COLOR = b"\xff\xc0\x00\x11\x08"
# libjpeg warnings of files of which all is there, so they are taken. Others mean that some of it is
# lost. A file that was overwritten in the middle can have the same: see `decode_jpeg`.
_HARMLESS = ("extraneous bytes before marker 0xd9", "Invalid SOS parameters")
# What else may hold a photograph. A list, because some of Pillow's formats run other programs.
_OTHER_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_INKS = ("CMYK", "YCCK")

# A decoder that drops frequencies has to leave this many times the pixels that the result has:
# with less, what it loses shows (docs/input_benchmark.md).
_REDUCTION_MARGIN = 1.25
# Pixels of an image after resizing, before the central square is taken, 4 bytes each.
_MAX_RESIZED = 2**24
_BILINEAR = Image.Resampling.BILINEAR
_RATIO = (3 / 4, 4 / 3)


Size = int | tuple[int, int]
"""(height, width) in pixels, or the side of a square."""


class CorruptImage(ValueError):  # noqa: N818
  """The bytes hold no usable image: empty, cut short, of unknown format, or huge."""


def height_and_width(size: Size) -> tuple[int, int]:
  """A size as a pair."""
  return (size, size) if isinstance(size, int) else (size[0], size[1])


def image_size(data: bytes) -> tuple[int, int]:
  """(height, width) of an image as `decode_jpeg` would give it, of its header alone.

  Raises:
    CorruptImage: not an image, or one of more than `MAX_PIXELS` pixels.
  """
  header = _read_header(data) if data.startswith(_JPEG_START) else None
  if header is not None:
    return header.height, header.width
  try:
    with Image.open(io.BytesIO(data), formats=_OTHER_FORMATS) as image:
      _check_size(image.height, image.width, data)
      return image.height, image.width
  except (OSError, SyntaxError, ValueError, *_BOMBS) as error:
    raise CorruptImage(f"{error} ({len(data)} bytes)") from error


def decode_jpeg(
  data: bytes, warnings: list[str] | None = None, *, upright: bool = False
) -> np.ndarray:
  """Decodes a JPEG of any kind, or a PNG, which ImageNet also contains, as Pillow does.

  Grey and CMYK images become RGB, transparency is dropped. Of 16 bits the upper 8 are kept.

  Args:
    warnings: gets what the decoder says of a JPEG that is taken in spite of it. Whole files of
      ImageNet have such warnings, but so have files that were overwritten in the middle.
    upright: whether to turn the image as its EXIF orientation says, which the usual ImageNet
      pipelines ignore.

  Returns:
    RGB pixels, uint8 [H, W, 3].

  Raises:
    CorruptImage: not an image, not all of one, or one of more than `MAX_PIXELS` pixels.
  """
  header = _read_header(data) if data.startswith(_JPEG_START) else None
  if header is None:
    return _decode_other(data, upright)
  image = _decode_color(data, header, warnings)
  return orientation.turn(image, orientation_of(data)) if upright else image


def orientation_of(data: bytes) -> int:
  """The EXIF orientation of an encoded image, 1 to 8; 1: it is stored upright."""
  return orientation.read(data, _OTHER_FORMATS)


def _decode_color(data: bytes, header: "_Header", warnings: list[str] | None) -> np.ndarray:
  if header.colorspace not in _INKS:
    return _decode(data, header, warnings=warnings)
  # libjpeg leaves the inks to us. Pillow's formula, and Adobe's convention: 255 is no ink.
  inks = _decode(data, header, "CMYK", warnings=warnings)
  size = (header.width, header.height)
  return np.array(Image.frombuffer("CMYK", size, inks, "raw", "CMYK;I", 0, 1).convert("RGB"))


def decode_random_resized_crop(
  data: bytes,
  rng: np.random.Generator,
  size: Size,
  scale: tuple[float, float],
  ratio: tuple[float, float] = _RATIO,
  *,
  out: np.ndarray | None = None,
  upright: bool = False,
) -> np.ndarray:
  """Decodes a random part of an image, resized: for training.

  The same draws from `rng`, and so the same parts, as `random_resized_crop` of the whole image, but
  the rows below the part are not decoded, and a part much larger than the result is decoded at 1/2,
  1/4 or 1/8 of its size.

  Args:
    data: the encoded image, of a kind that `decode_jpeg` takes.
    rng: where the randomness comes from.
    out: contiguous memory for the result, such as an image of a batch; None makes an array.
    upright: as for `decode_jpeg`.

  Returns:
    uint8 [*size, 3]; `out`, if given.

  Raises:
    CorruptImage: as `decode_jpeg`; but damage below the part that leaves the file's length as it
      should be is not noticed.
  """
  header = _read_header(data) if data.startswith(_JPEG_START) else None
  turned = upright and orientation_of(data) != 1
  if header is None or header.colorspace in _INKS or turned:
    image = random_resized_crop(decode_jpeg(data, upright=upright), rng, size, scale, ratio)
    return image if out is None else copied(image, out)
  size = height_and_width(size)
  top, left, height, width = random_part(header.height, header.width, rng, scale, ratio)
  reduction = 1
  least = min(height / size[0], width / size[1])
  while reduction < 8 and least >= 2 * reduction * _REDUCTION_MARGIN:
    reduction *= 2
  image = _decode_rows(data, header, top + height, reduction)
  return resize_part(
    image, top / reduction, left / reduction, height / reduction, width / reduction, size, out
  )


def decode_center_crop(
  data: bytes, size: Size, resize: Size, *, upright: bool = False
) -> np.ndarray:
  """`resize_and_center_crop` of `decode_jpeg`: for evaluation.

  Raises:
    CorruptImage: as `decode_jpeg`, for damage anywhere in the image.
    ValueError: `resize` is smaller than `size`.
  """
  return resize_and_center_crop(decode_jpeg(data, upright=upright), size, resize)


def random_resized_crop(
  image: np.ndarray,
  rng: np.random.Generator,
  size: Size,
  scale: tuple[float, float],
  ratio: tuple[float, float] = _RATIO,
) -> np.ndarray:
  """Resizes a random part of an image, as torchvision's `RandomResizedCrop` does.

  Ten draws of an area and an aspect ratio; if none fits into the image, the largest central part
  whose aspect ratio is allowed. uint8 [H, W, 3] -> [*size, 3]; see `decode_random_resized_crop`.
  """
  top, left, height, width = random_part(image.shape[0], image.shape[1], rng, scale, ratio)
  return resize_part(image, top, left, height, width, height_and_width(size))


def resize_and_center_crop(image: np.ndarray, size: Size, resize: Size) -> np.ndarray:
  """Scales an image to cover just `resize`, and takes the centre.

  The pixels are those of torchvision's `Resize(resize)` and `CenterCrop(size)` on a Pillow image:
  bilinear, over a wider support when shrinking. An image of the right size is returned as it is.

  Args:
    image: uint8 [H, W, 3].
    resize: what the scaled image covers, at least `size`: a number is its shorter side, pixels.

  Returns:
    uint8 [*size, 3].

  Raises:
    ValueError: `resize` is smaller than `size`.
  """
  size, resize = height_and_width(size), height_and_width(resize)
  if resize[0] < size[0] or resize[1] < size[1]:
    raise ValueError(f"cannot take {size} pixels from {resize}")
  image_height, image_width = image.shape[:2]
  if resize[0] * image_width >= resize[1] * image_height:
    height, width = resize[0], image_width * resize[0] // image_height
  else:
    height, width = image_height * resize[1] // image_width, resize[1]
  top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
  if (height, width) == (image_height, image_width):
    return image[top : top + size[0], left : left + size[1]]
  source = Image.fromarray(image)
  if height * width > _MAX_RESIZED:
    # A strip that would become huge. The box is in single precision: a few pixels differ by 1.
    y, x = image_height / height, image_width / width
    box = (left * x, top * y, (left + size[1]) * x, (top + size[0]) * y)
    return np.array(source.resize((size[1], size[0]), _BILINEAR, box))
  resized = source.resize((width, height), _BILINEAR)
  return np.array(resized.crop((left, top, left + size[1], top + size[0])))


class _Header(NamedTuple):
  height: int
  width: int
  colorspace: str


def _read_header(data: bytes | bytearray) -> _Header | None:
  """Reads a JPEG's header; None if it is damaged or of a kind that simplejpeg does not know."""
  try:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
  except (ValueError, KeyError):
    return None
  _check_size(height, width, data)
  return _Header(height, width, colorspace)


def _check_size(height: int, width: int, data: bytes | bytearray) -> None:
  if height * width > MAX_PIXELS:
    raise CorruptImage(
      f"an image of {width} x {height} pixels; expected at most {MAX_PIXELS:,} ({len(data)} bytes)"
    )


def _decode(
  data: bytes | bytearray,
  header: _Header,
  colorspace: str = "RGB",
  *,
  reduction: int = 1,
  fast: bool = False,
  warnings: list[str] | None = None,
) -> np.ndarray:
  """Decodes a whole JPEG: uint8 [ceil(H / reduction), ceil(W / reduction), channels].

  `reduction` (1, 2, 4 or 8) drops the upper frequencies. `fast` repeats colours that were stored at
  half the resolution, instead of interpolating them.
  """
  height, width = -(-header.height // reduction), -(-header.width // reduction)
  options: dict[str, int] = {}
  if reduction > 1:
    options = {"min_factor": reduction, "min_height": height, "min_width": width}
  pixels = np.empty((height, width, len(colorspace)), np.uint8)
  try:
    # Strict, to hear of warnings. What was decoded in spite of them is in the buffer all the same.
    simplejpeg.decode_jpeg(
      data, colorspace, fastupsample=fast, buffer=pixels, strict=True, **options
    )
  except ValueError as error:
    if not any(warning in str(error) for warning in _HARMLESS):
      raise CorruptImage(f"{error} ({len(data)} bytes)") from error
    if warnings is not None:
      warnings.append(str(error))
  return pixels


def _decode_rows(data: bytes, header: _Header, rows: int, reduction: int) -> np.ndarray:
  """Decodes at least the first `rows` rows of a JPEG, fast, at 1 / reduction of their size.

  A JPEG's rows are stored from top to bottom. A header that says that there are fewer makes the
  decoder stop after these, and look for the end of the file, which it finds if none of it is lost.
  """
  # Colours that were stored for several rows may be interpolated, which needs one more of them.
  rows = (-(-rows // reduction) + 2) * reduction
  # Only the kind that nearly all photographs are of, and if it spares a row of 16 x 16 blocks.
  sides = header.height.to_bytes(2, "big") + header.width.to_bytes(2, "big")
  found = data.find(_BASELINE_COLOR + sides)
  if found >= 0 and rows + 16 <= header.height:
    height_at = found + len(_BASELINE_COLOR)
    top = bytearray(data)
    top[height_at : height_at + 2] = rows.to_bytes(2, "big")
    # What was found may be the header of a preview instead. After a warning, which restart marks
    # cause too, the whole image decides.
    if _read_header(top) == header._replace(height=rows):
      with contextlib.suppress(CorruptImage):
        return _decode(top, header._replace(height=rows), reduction=reduction, fast=True)
  return _decode(data, header, reduction=reduction, fast=True)


def _decode_other(data: bytes, upright: bool) -> np.ndarray:
  """Decodes what is no JPEG, or an unusual one, through Pillow."""
  if not data:
    raise CorruptImage("no data (0 bytes)")
  try:
    with Image.open(io.BytesIO(data), formats=_OTHER_FORMATS) as image:
      _check_size(image.height, image.width, data)
      image.load()  # which turns a TIFF
      turn_by = orientation.of_image(image) if upright else 1
      image.info.pop("transparency", None)
      pixels = _upper_bits(image) if image.mode[0] in "IF" else np.array(image.convert("RGB"))
      return orientation.turn(pixels, turn_by)
  except CorruptImage:
    raise
  except UnidentifiedImageError as error:
    raise CorruptImage(
      f"no whole JPEG, nor an image of another kind ({len(data)} bytes)"
    ) from error
  except (OSError, SyntaxError, ValueError, *_BOMBS) as error:
    raise CorruptImage(f"{error} ({len(data)} bytes)") from error


def _upper_bits(image: Image.Image) -> np.ndarray:
  """Grey of up to 16 bits as RGB; Pillow would clip it to 255."""
  tags = getattr(image, "tag_v2", {258: (16,)})  # a TIFF's say how many bits
  bits = tags.get(258, (16,))[0]
  if image.mode == "F" or bits > 16 or (image.mode == "I" and image.format == "TIFF"):
    raise CorruptImage(
      f"grey as {'floats' if image.mode == 'F' else 'whole numbers of 32 bits or with a sign'}, of "
      "which nothing says what is white; save it with 8 or 16 bits"
    )
  grey = (np.asarray(image).astype(np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
  return np.repeat(grey[..., None], 3, axis=-1)
