"""RetinaNet against torchvision's and mmdetection 0.6's, weights and all."""

import functools

import jax
import numpy as np
import pytest
from fixture_detection import DATA
from fixture_detectors import (
  MODELS,
  batch,
  check_detections,
  check_gradients,
  convolve_by_products,
  detector,
  targets,
)
from flax import nnx

NAMES = [
  "torchvision_retinanet_resnet50",
  "mmdet1_retinanet_resnet50",
  "mmdet1_retinanet_lip_resnet50",
]
LOSSES = {
  "torchvision": {"classification": "classification", "boxes": "bbox_regression"},
  "mmdet1": {"classification": "loss_cls", "boxes": "loss_reg"},
}


@functools.partial(jax.jit, static_argnums=0)
def train(graph, params, others, images, sizes, gts):
  def total(params):
    losses = nnx.merge(graph, params, others, copy=True).losses(images, sizes, gts)
    return losses["classification"] + losses["boxes"], losses

  gradients, losses = jax.grad(total, has_aux=True)(params)
  matches = nnx.merge(graph, params, others, copy=True).match(images, sizes, gts)
  return losses, gradients, matches


@functools.partial(jax.jit, static_argnums=0)
def detect(graph, state, images, sizes):
  return nnx.merge(graph, state, copy=True).detect(images, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_losses_gradients_matches_and_detections_are_the_originals(x64, name):
  model = detector(name)
  convolve_by_products(model)
  preset, spec = MODELS[name]["preset"], MODELS[name]
  stored = np.load(DATA / f"{name}.npz")
  graph, params, others = nnx.split(model, nnx.Param, ...)
  for case, expected in spec["train"].items():
    gts = targets(expected["images"], preset)
    losses, gradients, matches = train(graph, params, others, *batch(expected["images"]), gts)
    for ours, theirs in LOSSES[preset].items():
      np.testing.assert_allclose(losses[ours], expected["losses"][theirs], rtol=1e-8)
    for k in range(2):
      np.testing.assert_array_equal(matches[k], stored[f"train/{case}/{k}/match"])
    check_gradients(nnx.merge(graph, gradients, others, copy=True), name, case)
  # Both in one batch: where mmdetection took one at a time, neither changes the other's.
  graph, state = nnx.split(model)
  check_detections(detect(graph, state, *batch(spec["eval"]["images"])), name, 1e-8)


@pytest.mark.slow
def test_float32_finds_the_same():
  name = "mmdet1_retinanet_lip_resnet50"
  graph, state = nnx.split(detector(name, np.float32))
  images, sizes = batch(MODELS[name]["eval"]["images"])
  check_detections(detect(graph, state, images.astype(np.float32), sizes), name, 1e-4)
