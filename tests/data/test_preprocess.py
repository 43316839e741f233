"""Decoding, cropping and resizing on the host."""

import io
import math

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_images

from lip_jax.data import image_parts, preprocess
from lip_jax.data.preprocess import CorruptImage


def smooth_image(height, width, channels=3):
  """A smooth image, which JPEG keeps nearly unchanged: uint8 [height, width, channels]."""
  coarse = np.random.default_rng(0).integers(0, 256, (5, 6, channels), np.uint8)
  return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


IMAGE = smooth_image(60, 80)
JPEG = simplejpeg.encode_jpeg(IMAGE, quality=95)
PNG = cv2.imencode(".png", IMAGE[..., ::-1])[1].tobytes()
PROGRESSIVE = cv2.imencode(".jpg", IMAGE[..., ::-1], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()


def saved(image, file_format, **options):
  """A Pillow image's bytes in a format."""
  file = io.BytesIO()
  image.save(file, file_format, **options)
  return file.getvalue()


def pillow_pixels(data):
  return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def torchvision_center_crop(data, size, resize):
  """What torchvision's Resize and CenterCrop do to a Pillow image, written down from their rules.

  Resize: the shorter side becomes `resize`, the longer int(resize * longer / shorter), and nothing
  happens if the shorter one has that size already. CenterCrop rounds half to even.
  """
  image = Image.open(io.BytesIO(data)).convert("RGB")
  shorter, longer = sorted(image.size)
  if shorter != resize:
    other = int(resize * longer / shorter)
    new = (resize, other) if image.width <= image.height else (other, resize)
    image = image.resize(new, Image.Resampling.BILINEAR)
  left, top = (round((side - size) / 2.0) for side in image.size)
  return np.asarray(image.crop((left, top, left + size, top + size)))


def psnr(image, reference):
  """Peak signal-to-noise ratio, dB."""
  return 10 * math.log10(255**2 / max(((image.astype(float) - reference) ** 2).mean(), 1e-9))


@pytest.fixture(scope="module")
def photographs():
  """Two photographs of 640 x 427 pixels: uint8 [427, 640, 3]."""
  return load_sample_images().images


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


@pytest.mark.parametrize("transform", [pytest.param(0, id="cmyk"), pytest.param(2, id="ycck")])
def test_decodes_cmyk_as_rgb(transform):
  # Adobe's convention, the only one in use: 255 is no ink. So RGB is the product with the key.
  cmyk = smooth_image(30, 40, 4)
  if transform == 2:
    data = simplejpeg.encode_jpeg(cmyk, colorspace="CMYK", quality=95)
  else:
    data = saved(Image.fromarray(255 - cmyk, "CMYK"), "JPEG", quality=95)
  # The last byte of Adobe's segment says which of the two it is.
  assert data[data.index(b"Adobe") + 11] == transform
  image = preprocess.decode_jpeg(data)
  expected = cmyk[..., :3].astype(float) * cmyk[..., 3:] / 255
  assert image.shape == (30, 40, 3)
  assert np.abs(image - expected).mean() < 3
  np.testing.assert_array_equal(image, pillow_pixels(data))


def test_drops_transparency():
  data = cv2.imencode(".png", smooth_image(30, 40, 4))[1].tobytes()
  assert preprocess.decode_jpeg(data).shape == (30, 40, 3)


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
def test_decodes_as_pillow_does(photographs, subsampling):
  image, colorspace = photographs[0], "RGB"
  if subsampling == "Gray":
    image, colorspace = image[..., 1:2].copy(), "GRAY"
  data = simplejpeg.encode_jpeg(image, colorspace=colorspace, colorsubsampling=subsampling)
  np.testing.assert_array_equal(preprocess.decode_jpeg(data), pillow_pixels(data))


def test_ignores_the_orientation():
  exif = Image.Exif()
  exif[0x0112] = 6  # Orientation: turned by a quarter.
  data = saved(Image.fromarray(IMAGE), "JPEG", exif=exif)
  assert preprocess.decode_jpeg(data).shape == (60, 80, 3)


def test_decodes_unusual_subsampling():
  # Half of one colour, a quarter of the other: libjpeg's wrapper does not know it. A grey image of
  # 16 x 16 pixels whose blocks (4, 2 and 1) are written by hand: 6 bits each, and 4 for colours.
  data = saved(Image.new("RGB", (16, 16), (128, 128, 128)), "JPEG", subsampling=2)
  frame = data.index(b"\xff\xc0")
  assert data[frame + 13 : frame + 16] == b"\x02\x11\x01"
  scan = data.index(b"\xff\xda") + 14
  data = data[: frame + 14] + b"\x12" + data[frame + 15 : scan] + b"\x28\xa2\x8a\x00\x0f\xff\xd9"
  np.testing.assert_array_equal(preprocess.decode_jpeg(data), np.full((16, 16, 3), 128))


def test_decodes_16_bits():
  ramp = np.linspace(0, 65535, 12 * 10).astype(np.uint16).reshape(12, 10)
  data = saved(Image.fromarray(ramp), "PNG")
  expected = np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, -1)
  np.testing.assert_array_equal(preprocess.decode_jpeg(data), expected)


def test_decodes_a_palette_with_transparency():
  image = Image.fromarray(IMAGE).quantize(16)
  for transparency in (3, bytes(range(0, 160, 10))):
    decoded = preprocess.decode_jpeg(saved(image, "PNG", transparency=transparency))
    np.testing.assert_array_equal(decoded, np.asarray(image.convert("RGB")))


def test_refuses_what_would_fill_the_memory():
  # A header that promises more pixels than there are bytes in the machine.
  at = JPEG.index(b"\xff\xc0") + 5
  jpeg = JPEG[:at] + b"\xff\x00\xff\x00" + JPEG[at + 4 :]
  png = saved(Image.new("1", (20_000, 5_000)), "PNG")
  for data, pixels in [(jpeg, "65280 x 65280"), (png, "20000 x 5000|100000000 pixels")]:
    for decode in (
      preprocess.decode_jpeg,
      lambda data: preprocess.decode_center_crop(data, 32, 32),
      lambda data: preprocess.decode_random_resized_crop(
        data, np.random.default_rng(0), 32, (0.08, 1.0)
      ),
    ):
      with pytest.raises(CorruptImage, match=pixels):
        decode(data)


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
    pytest.param(JPEG[: len(JPEG) // 2] + bytes(500) + JPEG[-2:], id="half of it, and the end"),
    pytest.param(PROGRESSIVE[: len(PROGRESSIVE) // 2], id="half of a progressive JPEG"),
    pytest.param(PNG[: len(PNG) // 2], id="half of a PNG"),
    pytest.param(PNG[: len(PNG) // 2] + bytes(len(PNG) // 2), id="PNG, padded with zeros"),
  ],
)
@pytest.mark.parametrize(
  "decode",
  [
    pytest.param(preprocess.decode_jpeg, id="whole"),
    pytest.param(lambda data: preprocess.decode_center_crop(data, 32, 40), id="centre"),
    # All of the image: damage below a crop need not be found.
    pytest.param(
      lambda data: preprocess.decode_random_resized_crop(
        data, np.random.default_rng(0), 32, (1.0, 1.0), (4 / 3, 4 / 3)
      ),
      id="crop",
    ),
  ],
)
def test_refuses_what_is_no_whole_image(data, decode):
  with pytest.raises(CorruptImage, match=rf"\({len(data)} bytes\)"):
    decode(data)


def test_a_cut_file_is_refused_whatever_the_crop(photographs):
  data = simplejpeg.encode_jpeg(photographs[0])
  for seed in range(30):
    with pytest.raises(CorruptImage, match="Premature end"):
      preprocess.decode_random_resized_crop(
        data[: len(data) * 9 // 10], np.random.default_rng(seed), 64, (0.08, 0.2)
      )


def with_preview(data):
  """A JPEG with a preview of the same size, in front of the image, as cameras write it."""
  segment = b"Exif\0\0" + simplejpeg.encode_jpeg(np.zeros((427, 640, 3), np.uint8), quality=10)
  return data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]


@pytest.mark.parametrize(
  "encode",
  [
    pytest.param(lambda image: saved(image, "JPEG", subsampling=2), id="4:2:0"),
    pytest.param(lambda image: saved(image, "JPEG", subsampling=1), id="4:2:2"),
    pytest.param(lambda image: saved(image, "JPEG", subsampling=0), id="4:4:4"),
    pytest.param(lambda image: saved(image, "JPEG", progressive=True), id="progressive"),
    pytest.param(lambda image: saved(image, "JPEG", restart_marker_blocks=9), id="restart marks"),
    pytest.param(lambda image: with_preview(saved(image, "JPEG")), id="preview"),
    pytest.param(lambda image: saved(image, "JPEG") + b"junk" * 50, id="bytes after the end"),
    pytest.param(lambda image: saved(image.convert("L"), "JPEG"), id="grey"),
    pytest.param(lambda image: saved(image.convert("CMYK"), "JPEG"), id="cmyk"),
    pytest.param(lambda image: saved(image, "PNG"), id="png"),
  ],
)
@pytest.mark.parametrize("size", [160, 40])
def test_decoding_a_crop_is_cropping_the_decoded(photographs, encode, size):
  # The same parts, nearly the same pixels: at size 160, a part that is off by one pixel of the
  # photograph has 22 to 32 dB (once 39), and these have at least 36.
  data = encode(Image.fromarray(photographs[0]))
  whole = preprocess.decode_jpeg(data)
  first, second = np.random.default_rng(0), np.random.default_rng(0)
  for _ in range(8):
    crop = preprocess.decode_random_resized_crop(data, first, size, (0.08, 1.0))
    expected = preprocess.random_resized_crop(whole, second, size, (0.08, 1.0))
    assert crop.shape == (size, size, 3)
    assert crop.dtype == np.uint8
    assert psnr(crop, expected) > 35
  assert first.random() == second.random()


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
def test_rows_that_are_decoded_are_those_of_the_whole(photographs, subsampling):
  image = photographs[0][:75, :60].copy()
  data = simplejpeg.encode_jpeg(image, colorsubsampling=subsampling)
  header = preprocess._read_header(data)
  for reduction in (1, 2, 4, 8):
    whole = preprocess._decode(data, header, reduction=reduction, fast=True)
    lengths = set()
    for rows in range(1, 76):
      part = preprocess._decode_rows(data, header, rows, reduction)
      needed = -(-rows // reduction)
      np.testing.assert_array_equal(part[:needed], whole[:needed])
      lengths.add(len(part))
    assert len(lengths) > 2  # Not always all of it.


def test_crops_are_smoothed_as_pillow_smoothes(photographs):
  rng = np.random.default_rng(0)
  for image in photographs:
    data = simplejpeg.encode_jpeg(image, quality=95)
    for size in (32, 100, 224, 500):
      for _ in range(5):
        state = rng.bit_generator.state
        top, left, height, width = image_parts.random_part(427, 640, rng, (0.08, 1.0), (0.75, 1.33))
        rng.bit_generator.state = state
        crop = preprocess.decode_random_resized_crop(data, rng, size, (0.08, 1.0), (0.75, 1.33))
        box = (left, top, left + width, top + height)
        whole = Image.fromarray(preprocess.decode_jpeg(data)).crop(box)
        expected = np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR))
        assert psnr(crop, expected) > 33


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (2000, 10), (10, 2000), (17, 16)])
def test_decodes_crops_of_odd_shapes(shape):
  data = simplejpeg.encode_jpeg(smooth_image(*shape))
  rng = np.random.default_rng(0)
  for size in (1, 8, 48):
    for _ in range(10):
      crop = preprocess.decode_random_resized_crop(data, rng, size, (0.08, 1.0))
      assert crop.shape == (size, size, 3)


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
    [image_parts.random_part(1000, 1000, rng, (0.1, 0.5), (3 / 4, 4 / 3)) for _ in range(4000)]
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
  part = image_parts.random_part(*shape, np.random.default_rng(0), (1.0, 1.0), (3 / 4, 4 / 3))
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


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (225, 257), (64, 72), (64, 64)])
def test_center_crop_is_that_of_torchvision(photographs, size, resize):
  # Byte by byte: all of the difference is in what the network computes.
  rng = np.random.default_rng(size)
  for index in range(12):
    height, width = (int(side) for side in rng.integers(20, 700, 2))
    image = cv2.resize(photographs[index % 2], (width, height), interpolation=cv2.INTER_AREA)
    data = simplejpeg.encode_jpeg(image, quality=90, colorsubsampling=("420", "444")[index // 6])
    crop = preprocess.decode_center_crop(data, size, resize)
    np.testing.assert_array_equal(crop, torchvision_center_crop(data, size, resize))


@pytest.mark.parametrize("shape", [(1, 1), (10_000, 10), (10, 10_000), (3, 250), (256, 256)])
def test_center_crop_of_odd_shapes(shape):
  data = simplejpeg.encode_jpeg(smooth_image(*shape))
  crop = preprocess.decode_center_crop(data, 224, 256)
  difference = np.abs(crop.astype(int) - torchvision_center_crop(data, 224, 256))
  # Strips that would become huge are resized in single precision.
  assert difference.max() <= (1 if max(shape) == 10_000 else 0)


def test_center_crop_larger_than_the_side_is_refused():
  with pytest.raises(ValueError, match=r"224.* pixels from .*200"):
    preprocess.resize_and_center_crop(IMAGE, 224, 200)


# Images that are not square.


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (33, 120), (427, 640)])
@pytest.mark.parametrize(
  ("size", "resize"), [((24, 40), (30, 50)), ((40, 24), (40, 24)), ((30, 30), (30, 60))]
)
def test_center_crop_of_another_shape_covers_and_takes_the_middle(shape, size, resize):
  image = smooth_image(*shape)
  found = preprocess.resize_and_center_crop(image, size, resize)
  assert found.shape == (*size, 3)
  scale = max(resize[0] / shape[0], resize[1] / shape[1])
  height, width = int(shape[0] * scale + 1e-6), int(shape[1] * scale + 1e-6)
  whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
  top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
  np.testing.assert_array_equal(found, whole[top : top + size[0], left : left + size[1]])


@pytest.mark.parametrize("size", [(48, 96), (96, 48), (160, 40)])
def test_random_crops_of_another_shape(photographs, size):
  data = simplejpeg.encode_jpeg(photographs[0], quality=95)
  whole = preprocess.decode_jpeg(data)
  first, second, third = (np.random.default_rng(0) for _ in range(3))
  for _ in range(8):
    crop = preprocess.decode_random_resized_crop(data, first, size, (0.08, 1.0))
    assert crop.shape == (*size, 3)
    again = preprocess.random_resized_crop(whole, second, size, (0.08, 1.0))
    assert psnr(crop, again) > 35
    # The same part as of a square of any size, squeezed.
    square = preprocess.random_resized_crop(whole, third, 128, (0.08, 1.0))
    squeezed = Image.fromarray(square).resize(size[::-1], Image.Resampling.BILINEAR)
    small = Image.fromarray(crop).resize((12, 12), Image.Resampling.BOX)
    assert psnr(np.asarray(small), np.asarray(squeezed.resize((12, 12), Image.Resampling.BOX))) > 28
