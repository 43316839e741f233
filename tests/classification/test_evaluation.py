"""Exact evaluation: sums and counts, masked, divided once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lip_jax.classification import evaluation
from lip_jax.classification.config import Data
from lip_jax.distributed import sharding
from lip_jax.training import train_state

IDENTITY = Data(
  dataset="none",
  image_size=4,
  crop_scale=None,
  eval_resize=None,
  mean=(0.0, 0.0, 0.0),
  std=(1.0, 1.0, 1.0),
)


class ReadsTheMiddle(nnx.Module):
  """A model whose logits are the values of the pixel (1, 2)."""

  def __init__(self):
    self.scale = nnx.Param(jnp.ones(()))

  def __call__(self, images):
    return images[:, 1, 2] * self.scale[...]


class ReadsTheFirstPixels(nnx.Module):
  """A model whose logits are the red values of the first row and column of the image."""

  def __init__(self, num_classes):
    self.scale = nnx.Param(jnp.ones(()))
    self.num_classes = num_classes

  def __call__(self, images):
    return images[:, :, :, 0].reshape(images.shape[0], -1)[:, : self.num_classes] * self.scale[...]


def run(images, labels, batch_size, devices=1, num_classes=8):
  model = ReadsTheFirstPixels(num_classes)
  mesh = sharding.make_mesh(jax.devices()[:devices])
  step = evaluation.jitted_step(IDENTITY, nnx.graphdef(model), mesh)

  def batches():
    for start in range(0, len(images), batch_size):
      part, marks = images[start : start + batch_size], labels[start : start + batch_size]
      missing = batch_size - len(part)
      yield {
        "image": np.pad(part, ((0, missing), (0, 0), (0, 0), (0, 0))),
        "label": np.pad(marks, (0, missing)),
        "mask": np.pad(np.ones(len(part), np.float32), (0, missing)),
      }

  return evaluation.evaluate(step, *train_state.split(model), batches(), mesh)


@pytest.mark.parametrize(("batch_size", "devices"), [(4, 1), (4, 4), (8, 8), (16, 2), (10, 1)])
@pytest.mark.parametrize("num_classes", [8, 3])
def test_ten_images_count_ten(batch_size, devices, num_classes):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (10, 4, 4, 3), np.uint8)
  labels = rng.integers(0, num_classes, 10).astype(np.int32)
  logits = images[:, :, :, 0].reshape(10, 16)[:, :num_classes].astype(np.float64)
  shifted = logits - logits.max(axis=1, keepdims=True)
  losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(10), labels]
  ranks = (logits > logits[np.arange(10), labels][:, None]).sum(axis=1)
  result = run(images, labels, batch_size, devices, num_classes)
  assert result["count"] == 10
  assert result["top1"] == pytest.approx((ranks == 0).mean())
  assert result["top5"] == pytest.approx((ranks < 5).mean())
  assert result["loss"] == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize("devices", [1, 2])
def test_logits_are_averaged_over_crops_and_their_mirror_images(devices):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 9, (6, 5, 4, 4, 3), np.uint8)
  labels = rng.integers(0, 3, 6).astype(np.int32)
  batch = {"image": images, "label": labels, "mask": np.asarray([1, 1, 1, 1, 1, 0], np.float32)}
  model, mesh = ReadsTheMiddle(), sharding.make_mesh(jax.devices()[:devices])
  own, mirrored = (images[:, :, 1, column].astype(np.float64) for column in (2, 1))
  for crops, logits in ((5, own.mean(1)), (10, (own.mean(1) + mirrored.mean(1)) / 2)):
    data = dataclasses.replace(IDENTITY, eval_crops=crops)
    step = evaluation.jitted_step(data, nnx.graphdef(model), mesh)
    sums = step(*train_state.split(model), batch, np.arange(devices, dtype=np.int32))
    loss = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(6), labels]
    np.testing.assert_allclose(sums["loss"][:5], loss[:5], rtol=1e-5)
    assert float(sums["loss"][5]) == 0
    assert int(sums["count"]) == 5
    assert int(sums["stop"]) == devices - 1


def test_the_loss_does_not_depend_on_the_order_of_images():
  """Losses of very different size, whose sum in float32 or float64 would."""
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (40, 4, 4, 3), np.uint8)
  images[::2] //= 255
  labels = rng.integers(0, 8, 40).astype(np.int32)
  reference = run(images, labels, 8)
  for _ in range(3):
    order = rng.permutation(40)
    assert run(images[order], labels[order], 8) == reference
