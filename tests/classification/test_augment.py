"""Augmentation on the device: what each option does, and that a key decides on all of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image, ImageEnhance, ImageOps

from lip_jax.classification import augment
from lip_jax.classification.config import Augment, Config, Data
from lip_jax.classification.task import Classification
from lip_jax.distributed import sharding
from lip_jax.training import train_state
from lip_jax.training.train_step import train_step

KEY = jax.random.key(7)


def data_config(flip=False, **changes):
  return Data(
    dataset="none",
    image_size=12,
    crop_scale=None,
    eval_resize=None,
    flip=flip,
    mean=(128.0, 120.0, 110.0),
    std=(60.0, 61.0, 62.0),
    augment=Augment(**changes),
  )


def random_images(count=16, size=12):
  return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


ALL = Augment(
  mixup=0.2, cutmix=1.0, erasing=0.5, brightness=0.4, contrast=0.4, saturation=0.4,
  randaugment_ops=1,
)  # fmt: skip


def test_by_default_images_are_normalized_and_nothing_else():
  images, data = random_images(), data_config()
  ours = augment.training_images(images, KEY, data)
  expected = (images - np.float32([128, 120, 110])) / np.float32([60, 61, 62])
  np.testing.assert_allclose(ours, expected, rtol=1e-6)
  labels = jnp.arange(16)
  mixed, mixed_labels = augment.mix(ours, labels, KEY, data.augment)
  assert mixed is ours
  np.testing.assert_array_equal(mixed_labels.targets(16), np.eye(16))
  np.testing.assert_array_equal(mixed_labels.dominant, labels)


def test_a_key_decides_on_everything_on_any_number_of_devices():
  images, labels = random_images(), np.arange(16, dtype=np.int32)
  data = dataclasses.replace(data_config(flip=True), augment=ALL)

  @jax.jit
  def run(batch, step):
    key = jax.random.fold_in(KEY, step)
    changed = augment.training_images(batch["image"], key, data)
    mixed, mixed_labels = augment.mix(changed, batch["label"], key, data.augment)
    return mixed, mixed_labels.targets(16)

  def on(devices, step):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    batch = sharding.put_batch({"image": images, "label": labels}, mesh)
    return jax.device_get(run(batch, step))

  one, again, eight, other = on(1, 3), on(1, 3), on(8, 3), on(1, 4)
  np.testing.assert_array_equal(one[0], again[0])
  np.testing.assert_allclose(one[0], eight[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(one[1], eight[1])
  assert (one[0] != other[0]).mean() > 0.5
  np.testing.assert_allclose(one[1].sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_images_and_labels_are_mixed_in_the_same_proportion(name):
  # Image k is k everywhere, so a mixed pixel says how much of which.
  count = 8
  images = jnp.broadcast_to(
    jnp.arange(count, dtype=jnp.float32)[:, None, None, None], (8, 10, 12, 3)
  )
  mix = jax.jit(lambda key: augment.mix(images, jnp.arange(count), key, Augment(**{name: 1.0})))
  shares = []
  for k in range(20):
    mixed, labels = mix(jax.random.key(k))
    targets = np.asarray(labels.targets(count))
    share = float(labels.share)
    shares.append(share)
    others = np.roll(np.arange(count), 1)
    np.testing.assert_allclose(targets[np.arange(count), np.arange(count)], share, atol=1e-6)
    np.testing.assert_allclose(targets[np.arange(count), others], 1 - share, atol=1e-6)
    expected = share * np.arange(count) + (1 - share) * others
    np.testing.assert_allclose(np.asarray(mixed).mean(axis=(1, 2, 3)), expected, atol=1e-4)
    if name == "cutmix":
      assert all(
        set(np.unique(image)) <= {k, others[k]} for k, image in enumerate(np.asarray(mixed))
      )
    else:
      assert np.ptp(np.asarray(mixed), axis=(1, 2, 3)).max() < 1e-5
    dominant = np.arange(count) if share >= 0.5 else others
    np.testing.assert_array_equal(labels.dominant, dominant)
  assert min(shares) < 0.4
  assert max(shares) > 0.6


def test_both_ways_of_mixing_are_chosen_at_random():
  images = jnp.broadcast_to(jnp.arange(4, dtype=jnp.float32)[:, None, None, None], (4, 10, 10, 3))
  options = Augment(mixup=1.0, cutmix=1.0, cutmix_probability=0.5)
  mix = jax.jit(lambda key: augment.mix(images, jnp.arange(4), key, options)[0])
  cut = [bool((mix(jax.random.key(k)) % 1 == 0).all()) for k in range(30)]
  assert 5 < sum(cut) < 25


def test_erasing_leaves_rectangles_of_the_mean():
  images = jnp.ones((200, 20, 20, 3))
  erased = np.asarray(augment.random_erasing(images, KEY, 0.25))
  hit = [image for image in erased if (image == 0).any()]
  assert 25 < len(hit) < 75
  for image in hit:
    rows, columns, _ = np.nonzero(image == 0)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert (image == 0).sum() == height * width * 3
    assert 1 <= height * width <= 0.4 * 400
  np.testing.assert_array_equal(augment.random_erasing(images, KEY, 0.0), images)


def test_color_jitter_draws_factors_from_its_range():
  grey = jnp.full((500, 2, 2, 3), 100.0)
  jitter = functools.partial(augment.color_jitter, brightness=0.0, contrast=0.0, saturation=0.0)
  brighter = np.asarray(jitter(grey, KEY, brightness=0.4))[:, 0, 0, 0]
  assert 60 <= brighter.min() < 65
  assert 135 < brighter.max() <= 140
  # A grey image has no contrast nor colour to change.
  np.testing.assert_allclose(jitter(grey, KEY, contrast=0.4, saturation=0.4), grey, rtol=1e-5)
  images = jnp.asarray(random_images(), jnp.float32)
  images = 100 + (images - 100) * 0.3  # so that nothing is clipped
  contrast = np.asarray(jitter(images, KEY, contrast=0.4))
  ratios = contrast.std(axis=(1, 2, 3)) / np.asarray(images).std(axis=(1, 2, 3))
  assert (np.abs(ratios - 1) > 0.01).mean() > 0.8
  saturation = np.asarray(jitter(images, KEY, saturation=0.4))
  weights = np.float32([0.299, 0.587, 0.114])
  np.testing.assert_allclose(saturation @ weights, np.asarray(images) @ weights, rtol=1e-4)
  assert np.abs(saturation - np.asarray(images)).max() > 1


def change(images, op, level, sign=1.0):
  ops = jnp.full((len(images), 1, 1, 1), op)
  return np.asarray(augment._change_colors(images, ops, level, sign * level * jnp.ones_like(ops)))


def test_color_operations_are_those_of_pillow():
  images = random_images(2) // 2 + 30
  ours = functools.partial(change, jnp.asarray(images, jnp.float32))
  for index in range(2):
    image = Image.fromarray(images[index])
    for op, level, expected in (
      (0, 0.5, image),
      (1, 0.5, ImageOps.autocontrast(image)),
      (2, 0.5, ImageOps.solarize(image, 128)),
      (3, 0.5, ImageOps.posterize(image, 6)),
      (4, 0.5, ImageEnhance.Color(image).enhance(1.45)),
      (5, 0.5, ImageEnhance.Contrast(image).enhance(1.45)),
      (6, 0.5, ImageEnhance.Brightness(image).enhance(1.45)),
      (7, 0.5, ImageEnhance.Sharpness(image).enhance(1.45)),
    ):
      difference = np.abs(ours(op, level)[index] - np.asarray(expected))
      assert difference.max() <= 2, op  # Pillow rounds
    darker = np.asarray(ImageEnhance.Brightness(image).enhance(0.55))
    assert np.abs(ours(6, 0.5, sign=-1.0)[index] - darker).max() <= 1


def test_warps_move_pixels_where_they_should():
  image = jnp.asarray(random_images(1, 9)[0], jnp.float32)
  shift = jnp.asarray([[1.0, 0, 2], [0, 1, -1], [0, 0, 1]])
  moved = np.asarray(augment._warp(image, shift))
  np.testing.assert_allclose(moved[:7, 1:], image[2:, :-1], atol=1e-3)
  np.testing.assert_allclose(moved[7:], 128.0)
  quarter = jnp.asarray([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
  np.testing.assert_allclose(augment._warp(image, quarter), np.rot90(image, -1), atol=1e-3)
  np.testing.assert_allclose(augment._warp(image, jnp.eye(3)), image, atol=1e-3)


def test_randaugment_changes_images_by_its_magnitude():
  images = jnp.asarray(random_images(32))
  run = jax.jit(augment.randaugment, static_argnums=(2, 3))
  np.testing.assert_array_equal(run(images, KEY, 0, 9.0), images)
  changed = np.asarray(run(images, KEY, 2, 9.0))
  assert changed.min() >= 0
  assert changed.max() <= 255
  differs = np.abs(changed - np.asarray(images)).max(axis=(1, 2, 3)) > 1
  assert differs.mean() > 0.8  # one operation of thirteen does nothing
  more = np.asarray(run(images, KEY, 2, 27.0))
  assert np.abs(more - np.asarray(images)).mean() > np.abs(changed - np.asarray(images)).mean()


class MeanColor(nnx.Module):
  """Logits are ten times the mean of each colour."""

  def __init__(self):
    self.scale = nnx.Param(jnp.full((), 10.0))

  def __call__(self, images):
    return images.mean(axis=(1, 2)) * self.scale[...]


def test_training_on_mixed_images_has_soft_targets_and_the_dominant_label():
  smoothing = 0.3
  model = MeanColor()
  params, batch_stats = train_state.split(model)
  optimizer = optax.sgd(0.0)
  # Image k is of colour k, so that the logits tell how much of which colour there is.
  labels = np.tile(np.arange(3, dtype=np.int32), 4)
  images = np.broadcast_to(255 * np.eye(3, dtype=np.uint8)[labels, None, None], (12, 4, 4, 3))
  data = dataclasses.replace(data_config(mixup=1.0), mean=(0.0, 0.0, 0.0), std=(255.0,) * 3)
  config = Config(model={"name": "resnet50"}, data=data, label_smoothing=smoothing)
  step = jax.jit(
    functools.partial(
      train_step,
      graph=nnx.graphdef(model),
      optimizer=optimizer,
      mesh=sharding.make_mesh(jax.devices()[:1]),
      group_span=1,
      task=Classification(config, num_classes=3),
    )
  )
  shares = []
  for number in range(6):
    state = train_state.TrainState(jnp.asarray(number), params, batch_stats, optimizer.init(params))
    _, metrics = step(state, {"image": images, "label": labels}, jnp.zeros(1, jnp.int32))
    assert float(metrics["top1"]) == 1.0  # the greater part is always seen
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), number), 4)
    share = float(augment.mix(jnp.ones((12, 4, 4, 3)), labels, key, data.augment)[1].share)
    shares.append(share)
    parts = np.asarray([share, 1 - share, 0])
    targets = parts * (1 - smoothing) + smoothing / 3
    expected = -(targets * (10 * parts - np.log(np.exp(10 * parts).sum()))).sum()
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4)
  assert min(shares) < 0.5 < max(shares)
