"""What happens to images on the device, inside the training and evaluation steps.

All randomness comes from a key, and so from (seed, step): a resumed run draws what the first one
would have drawn, on any number of devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lip_jax.classification.config import Augment, Data
from lip_jax.ops.images import normalize

# Luma of RGB, as in ITU-R BT.601, which Pillow and torchvision use for "grey".
_GREY = (0.299, 0.587, 0.114)


class MixedLabels(NamedTuple):
  """Each image's label, that of the image mixed into it, and how much is left of its own.

  labels, others: int [N]; share: float scalar in [0, 1].
  """

  labels: jax.Array
  others: jax.Array
  share: jax.Array

  @property
  def dominant(self) -> jax.Array:
    """Label of the greater part, int [N]."""
    return jnp.where(self.share >= 0.5, self.labels, self.others)

  def targets(self, num_classes: int, dtype=jnp.float32) -> jax.Array:
    """Probabilities, float [N, num_classes]."""
    own, other = (
      jax.nn.one_hot(labels, num_classes, dtype=dtype) for labels in (self.labels, self.others)
    )
    share = self.share.astype(dtype)
    return share * own + (1 - share) * other


def training_images(images: jax.Array, key: jax.Array, data: Data) -> jax.Array:
  """Augments and normalizes images, each for itself.

  In this order: mirror, RandAugment, colour jitter, normalize, erase; what is off costs nothing.

  Args:
    images: uint8 RGB [N, H, W, 3].

  Returns:
    float32 [N, H, W, 3].
  """
  augment = data.augment
  if data.flip:
    images = random_flip(images, key)
  if augment.randaugment_ops:
    images = randaugment(
      images, jax.random.fold_in(key, 1), augment.randaugment_ops, augment.randaugment_magnitude
    )
  if augment.brightness or augment.contrast or augment.saturation:
    images = color_jitter(
      images,
      jax.random.fold_in(key, 2),
      brightness=augment.brightness,
      contrast=augment.contrast,
      saturation=augment.saturation,
    )
  images = normalize(images, data.mean, data.std)
  if augment.erasing:
    images = random_erasing(images, jax.random.fold_in(key, 3), augment.erasing)
  return images


def random_flip(images: jax.Array, key: jax.Array) -> jax.Array:
  """Images [N, H, W, C], each mirrored left to right with probability 1/2."""
  mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
  return jnp.where(mirrored, images[:, :, ::-1], images)


def mix(
  images: jax.Array, labels: jax.Array, key: jax.Array, augment: Augment
) -> tuple[jax.Array, MixedLabels]:
  """Mixes each image with the one before it in the batch, in one way for the whole batch.

  mixup (Zhang et al., ICLR 2018): a weighted mean, the weight drawn from Beta(alpha, alpha).
  CutMix (Yun et al., ICCV 2019): a rectangle of the other image, of an area drawn likewise, around
  a point drawn from all of the image; the share is that of the pixels that are left.
  Batches are shuffled, so the neighbour is a random partner, and one that lies on the same device
  but for a row.

  Args:
    images: float [N, H, W, C].
    labels: int [N].

  Returns:
    The images and their labels; unchanged, with share 1, where both are off.
  """
  if not augment.mixup and not augment.cutmix:
    return images, MixedLabels(labels, labels, jnp.ones(()))
  others = jnp.roll(images, 1, axis=0)
  mixup_key, cutmix_key, box_key, choice_key = jax.random.split(key, 4)

  def mixup() -> tuple[jax.Array, jax.Array]:
    share = jax.random.beta(mixup_key, augment.mixup, augment.mixup)
    return share * images + (1 - share) * others, share

  def cutmix() -> tuple[jax.Array, jax.Array]:
    area = 1 - jax.random.beta(cutmix_key, augment.cutmix, augment.cutmix)
    height, width = images.shape[1:3]
    center = jax.random.uniform(box_key, (2,)) * jnp.asarray([height, width])
    half = jnp.sqrt(area) * jnp.asarray([height, width]) / 2
    rows, columns = (
      jnp.abs(jnp.arange(size) + 0.5 - center[axis]) < half[axis]
      for axis, size in enumerate((height, width))
    )
    inside = (rows[:, None] & columns[None, :])[None, :, :, None]
    return jnp.where(inside, others, images), 1 - inside.mean()

  if augment.mixup and augment.cutmix:
    cut = jax.random.bernoulli(choice_key, augment.cutmix_probability)
    mixed, share = jax.lax.cond(cut, cutmix, mixup)
  else:
    mixed, share = cutmix() if augment.cutmix else mixup()
  return mixed, MixedLabels(labels, jnp.roll(labels, 1), share)


def random_erasing(images: jax.Array, key: jax.Array, probability: float) -> jax.Array:
  """Sets a random rectangle of some images to zero, the mean of normalized pixels.

  Zhong et al., AAAI 2020: area 0.02 to 1/3 of the image's, height / width 0.3 to 1 / 0.3; what
  would not fit is cut down to the image.

  Args:
    images: float [N, H, W, C].
  """
  count, height, width = images.shape[:3]
  on, area, aspect, top, left = jax.random.uniform(key, (5, count, 1))
  area = (0.02 + (1 / 3 - 0.02) * area) * height * width
  aspect = jnp.exp((2 * aspect - 1) * jnp.log(1 / 0.3))

  def inside(length: jax.Array, start: jax.Array, size: int) -> jax.Array:
    length = jnp.clip(jnp.round(length), 1, size)
    start = jnp.floor(start * (size - length + 1))
    at = jnp.arange(size)[None, :]
    return (at >= start) & (at < start + length)

  rows = inside(jnp.sqrt(area * aspect), top, height)
  columns = inside(jnp.sqrt(area / aspect), left, width)
  erased = (on < probability)[:, :, None] & rows[:, :, None] & columns[:, None, :]
  return jnp.where(erased[..., None], 0, images)


def color_jitter(
  images: jax.Array, key: jax.Array, *, brightness: float, contrast: float, saturation: float
) -> jax.Array:
  """Changes brightness, then contrast, then saturation, of each image by random factors.

  A factor is drawn from [1 - x, 1 + x], x being the argument. The result is a mixture with black,
  with the image's mean grey, and with its own grey, extrapolated where the factor is above one.

  Args:
    images: RGB [N, H, W, 3], 0 to 255.
    brightness: x for the brightness; 0 leaves it.

  Returns:
    float32 [N, H, W, 3], 0 to 255.
  """
  images = images.astype(jnp.float32)
  factors = jax.random.uniform(key, (3, images.shape[0], 1, 1, 1), minval=-1.0, maxval=1.0)
  if brightness:
    images = _blend(jnp.zeros_like(images), images, 1 + brightness * factors[0])
  if contrast:
    images = _blend(_mean_grey(images), images, 1 + contrast * factors[1])
  if saturation:
    images = _blend(_grey(images), images, 1 + saturation * factors[2])
  return images


def randaugment(images: jax.Array, key: jax.Array, num_ops: int, magnitude: float) -> jax.Array:
  """RandAugment (Cubuk et al., 2020): random operations on each image, of a given strength.

  Each is one of thirteen: none, autocontrast, solarize, posterize, colour, contrast, brightness,
  sharpness, rotation, shear and shift in x and y; equalize is left out, for histograms are slow on
  accelerators. Rotations, shears and shifts are done last, as one bilinear warp over grey.

  Args:
    images: RGB [N, H, W, 3], 0 to 255.
    magnitude: 0 to 30, at which a rotation is 30 degrees, a shear 0.3, a shift 0.45 of the side, a
      factor 0.1 or 1.9, posterization 4 bits, and solarization all of the image.

  Returns:
    float32 [N, H, W, 3], 0 to 255.
  """
  images = images.astype(jnp.float32)
  count, height, width = images.shape[:3]
  level = magnitude / 30
  # From output to input coordinates, (y, x) relative to the centre.
  warp = jnp.broadcast_to(jnp.eye(3), (count, 3, 3))
  for slot in range(num_ops):
    op_key, sign_key = jax.random.split(jax.random.fold_in(key, slot))
    op = jax.random.randint(op_key, (count,), 0, 13)
    signed = level * jax.random.rademacher(sign_key, (count,), jnp.float32)
    images = _change_colors(images, op[:, None, None, None], level, signed[:, None, None, None])
    angle = jnp.where(op == 8, signed, 0) * (jnp.pi / 6)
    shear_x, shear_y = (jnp.where(op == number, 0.3 * signed, 0) for number in (9, 10))
    shift_x, shift_y = (
      jnp.where(op == number, 0.45 * side * signed, 0)
      for number, side in ((11, width), (12, height))
    )
    zero, one = jnp.zeros(count), jnp.ones(count)
    rows = (
      (jnp.cos(angle), -jnp.sin(angle) + shear_y, shift_y),
      (jnp.sin(angle) + shear_x, jnp.cos(angle), shift_x),
      (zero, zero, one),
    )
    step = jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)
    # Einsum in full precision: on TPU products are rounded to bfloat16 otherwise.
    warp = jnp.einsum("nij,njk->nik", warp, step, precision=jax.lax.Precision.HIGHEST)
  return jax.vmap(_warp)(images, warp)


def _change_colors(images: jax.Array, op: jax.Array, level: float, signed: jax.Array) -> jax.Array:
  """The operation `op` of `randaugment`, if it is one on colours; op, signed: [N, 1, 1, 1]."""
  low = images.min(axis=(1, 2), keepdims=True)
  high = images.max(axis=(1, 2), keepdims=True)
  stretched = (images - low) * (255 / jnp.maximum(high - low, 1))
  bits = 2.0 ** round(4 * level)  # dropped
  factor = 1 + 0.9 * signed
  results = {
    1: jnp.where(high > low, stretched, images),
    2: jnp.where(images >= 255 * (1 - level), 255 - images, images) if level else images,
    3: jnp.floor(images / bits) * bits,
    4: _blend(_grey(images), images, factor),
    5: _blend(_mean_grey(images), images, factor),
    6: _blend(jnp.zeros_like(images), images, factor),
    7: _blend(_smooth(images), images, factor),
  }
  changed = images
  for number, result in results.items():
    changed = jnp.where(op == number, result, changed)
  return changed


def _blend(zero: jax.Array, one: jax.Array, factor: jax.Array) -> jax.Array:
  """`zero` for factor 0, `one` for factor 1, in a line, within 0 to 255."""
  return jnp.clip(zero + factor * (one - zero), 0, 255)


def _grey(images: jax.Array) -> jax.Array:
  weights = jnp.asarray(_GREY, images.dtype).reshape(1, 1, 1, 3)
  return jnp.broadcast_to((images * weights).sum(axis=-1, keepdims=True), images.shape)


def _mean_grey(images: jax.Array) -> jax.Array:
  return jnp.broadcast_to(_grey(images).mean(axis=(1, 2), keepdims=True), images.shape)


def _smooth(images: jax.Array) -> jax.Array:
  """Pillow's SMOOTH filter: 3x3, the centre weighing 5 of 13; the border is left as it is."""
  inner = 4 * images[:, 1:-1, 1:-1]
  height, width = images.shape[1:3]
  for y in range(3):
    for x in range(3):
      inner = inner + images[:, y : height - 2 + y, x : width - 2 + x]
  return images.at[:, 1:-1, 1:-1].set(inner / 13)


def _warp(image: jax.Array, matrix: jax.Array) -> jax.Array:
  """Bilinear samples of an image [H, W, C] at `matrix @ (y, x, 1)` about its centre."""
  height, width = image.shape[:2]
  y, x = jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2
  rows = matrix[0, 0] * y[:, None] + (matrix[0, 1] * x + matrix[0, 2])[None, :] + (height - 1) / 2
  columns = matrix[1, 0] * y[:, None] + (matrix[1, 1] * x + matrix[1, 2])[None, :] + (width - 1) / 2
  sample = lambda plane: jax.scipy.ndimage.map_coordinates(  # noqa: E731
    plane, [rows, columns], order=1, mode="constant", cval=128.0
  )
  return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)
