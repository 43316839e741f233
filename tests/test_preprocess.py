"""Decoding, cropping and resizing on the host."""

import math

import cv2
import numpy as np
import pytest
import simplejpeg

from lip_jax.data import preprocess
from lip_jax.data.preprocess import CorruptImage


def smooth_image(height, width, channels=3):
  """A smooth image, which JPEG keeps nearly unchanged: uint8 [height, width, channels]."""
  coarse = np.random.default_rng(0).integers(0, 256, (5, 6, channels), np.uint8)
  return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


IMAGE = smooth_image(60, 80)
JPEG = simplejpeg.encode_jpeg(IMAGE, quality=95)
PNG = cv2.imencode(".png", IMAGE[..., ::-1])[1].tobytes()
PROGRESSIVE = cv2.imencode(".jpg", IMAGE[..., ::-1], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()


def test_decodes_a_jpeg():
  image = preprocess.decode_jpeg(JPEG)
  assert image.dtype == np.uint8
  assert image.shape == (60, 80, 3)
  assert np.abs(image.astype(int) - IMAGE).mean() < 2


@pytest.mark.parametrize(
  "data",
  [
    pytest.param(PROGRESSIVE, id="progressive"),
    pytest.param(PNG, id="png"),
    pytest.param(JPEG + b"junk" * 50, id="bytes after the end"),
    pytest.param(JPEG[:-2] + bytes(300) + JPEG[-2:], id="bytes before the end"),
  ],
)
def test_decodes_other_encodings_of_the_same_image(data):
  image = preprocess.decode_jpeg(data)
  assert image.shape == (60, 80, 3)
  assert np.abs(image.astype(int) - IMAGE).mean() < 3


def test_decodes_grey_as_rgb():
  grey = smooth_image(30, 40, 1)
  grey = grey.reshape(30, 40, 1)
  data = simplejpeg.encode_jpeg(grey, colorspace="GRAY", colorsubsampling="Gray")
  image = preprocess.decode_jpeg(data)
  assert image.shape == (30, 40, 3)
  np.testing.assert_array_equal(image[..., 0], image[..., 2])
  assert np.abs(image[..., :1].astype(int) - grey).mean() < 3


def test_decodes_cmyk_as_rgb():
  # Adobe's convention, the only one in use: 255 is no ink. So RGB is the product with the key.
  cmyk = smooth_image(30, 40, 4)
  image = preprocess.decode_jpeg(simplejpeg.encode_jpeg(cmyk, colorspace="CMYK", quality=95))
  expected = cmyk[..., :3].astype(float) * cmyk[..., 3:] / 255
  assert image.shape == (30, 40, 3)
  assert np.abs(image - expected).mean() < 3


def test_drops_transparency():
  data = cv2.imencode(".png", smooth_image(30, 40, 4))[1].tobytes()
  assert preprocess.decode_jpeg(data).shape == (30, 40, 3)


@pytest.mark.parametrize(
  "data",
  [
    pytest.param(b"", id="empty"),
    pytest.param(bytes(1000), id="zeros"),
    pytest.param(b"<html>not found</html>", id="text"),
    pytest.param(JPEG[:2], id="start only"),
    pytest.param(JPEG[:200], id="header only"),
    pytest.param(JPEG[: len(JPEG) // 2], id="half"),
    pytest.param(JPEG[:-2], id="end mark missing"),
    pytest.param(JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), id="half, padded with zeros"),
    pytest.param(JPEG[: len(JPEG) // 2] + bytes(500) + JPEG[-2:], id="middle overwritten"),
    pytest.param(PROGRESSIVE[: len(PROGRESSIVE) // 2], id="half of a progressive JPEG"),
    pytest.param(PNG[: len(PNG) // 2], id="half of a PNG"),
    pytest.param(PNG[: len(PNG) // 2] + bytes(len(PNG) // 2), id="PNG, padded with zeros"),
  ],
)
def test_refuses_what_is_no_whole_image(data):
  with pytest.raises(CorruptImage, match=rf"\({len(data)} bytes\)"):
    preprocess.decode_jpeg(data)


def test_crop_has_the_size_asked_for():
  rng = np.random.default_rng(0)
  for height, width in [(60, 80), (300, 20), (20, 300), (1, 1), (48, 48)]:
    image = smooth_image(height, width)
    for _ in range(20):
      crop = preprocess.random_resized_crop(image, rng, 48, (0.08, 1.0))
      assert crop.shape == (48, 48, 3)
      assert crop.dtype == np.uint8


def test_crop_depends_on_the_generator_alone():
  first = preprocess.random_resized_crop(IMAGE, np.random.default_rng(1), 32, (0.08, 1.0))
  again = preprocess.random_resized_crop(IMAGE, np.random.default_rng(1), 32, (0.08, 1.0))
  other = preprocess.random_resized_crop(IMAGE, np.random.default_rng(2), 32, (0.08, 1.0))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


def test_crops_are_distributed_as_in_torchvision():
  # Area uniform, logarithm of the aspect ratio uniform and symmetric, place uniform. In a square
  # image, scales up to 0.5 never touch the border, so nothing is drawn twice.
  rng = np.random.default_rng(0)
  parts = np.array(
    [preprocess._random_part(1000, 1000, rng, (0.1, 0.5), (3 / 4, 4 / 3)) for _ in range(4000)]
  )
  top, left, height, width = parts.T
  area = height * width / 1e6
  log_ratio = np.log(width / height)
  assert area.min() > 0.099
  assert area.max() < 0.501
  np.testing.assert_allclose(np.quantile(area, [0.25, 0.5, 0.75]), [0.2, 0.3, 0.4], atol=0.015)
  assert np.abs(log_ratio).max() < math.log(4 / 3) + 0.01
  np.testing.assert_allclose(
    np.quantile(log_ratio, [0.25, 0.5, 0.75]), np.array([-0.5, 0, 0.5]) * math.log(4 / 3), atol=0.02
  )
  for start, extent in [(top, height), (left, width)]:
    assert start.min() >= 0
    assert (start + extent).max() <= 1000
    np.testing.assert_allclose((start / (1000 - extent)).mean(), 0.5, atol=0.02)


@pytest.mark.parametrize(
  ("shape", "expected"),
  [
    # Too wide or too tall for any allowed ratio: the central part with the nearest ratio.
    ((30, 300), (0, 130, 30, 40)),
    ((300, 30), (130, 0, 40, 30)),
  ],
)
def test_crop_falls_back_to_the_centre(shape, expected):
  part = preprocess._random_part(*shape, np.random.default_rng(0), (1.0, 1.0), (3 / 4, 4 / 3))
  assert part == expected


def test_crop_of_the_whole_square_changes_nothing():
  square = smooth_image(48, 48)
  crop = preprocess.random_resized_crop(square, np.random.default_rng(0), 48, (1.0, 1.0), (1, 1))
  np.testing.assert_array_equal(crop, square)


def test_center_crop_leaves_the_right_size_alone():
  square = smooth_image(48, 48)
  np.testing.assert_array_equal(preprocess.resize_and_center_crop(square, 48, 48), square)


def test_center_crop_without_resizing_takes_the_middle():
  crop = preprocess.resize_and_center_crop(IMAGE, 40, 60)
  np.testing.assert_array_equal(crop, IMAGE[10:50, 20:60])


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (33, 120), (500, 375), (10, 11)])
@pytest.mark.parametrize(("size", "resize"), [(224, 256), (32, 32), (48, 55)])
def test_center_crop_has_the_size_asked_for(shape, size, resize):
  crop = preprocess.resize_and_center_crop(smooth_image(*shape), size, resize)
  assert crop.shape == (size, size, 3)
  assert crop.dtype == np.uint8


def test_resizing_keeps_the_picture():
  # A horizontal ramp stays one, at any scale: no shift, no ringing.
  ramp = np.tile(np.linspace(0, 255, 200).astype(np.uint8)[None, :, None], (200, 1, 3))
  for resize in (50, 120, 400):
    small = preprocess.resize_and_center_crop(ramp, resize, resize)
    expected = (np.arange(resize) + 0.5) / resize * 255
    assert np.abs(small[resize // 2, :, 0] - expected).max() < 4


def test_shrinking_averages():
  # A checkerboard of single pixels becomes grey instead of aliasing.
  checks = np.indices((96, 96)).sum(0) % 2 * 255
  image = np.repeat(checks[..., None], 3, -1).astype(np.uint8)
  small = preprocess.resize_and_center_crop(image, 32, 32)
  assert np.abs(small.astype(int) - 127).max() < 20


def test_center_crop_larger_than_the_side_is_refused():
  with pytest.raises(ValueError, match="224 pixels from a side of 200"):
    preprocess.resize_and_center_crop(IMAGE, 224, 200)
