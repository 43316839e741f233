"""Faster R-CNN against torchvision's and mmdetection 0.6's, weights and all."""

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
  priorities,
  targets,
)
from flax import nnx

NAMES = [
  "torchvision_fasterrcnn_resnet50",
  "mmdet1_fasterrcnn_resnet50",
  "mmdet1_fasterrcnn_lip_resnet50",
]
LOSSES = {
  "torchvision": {
    "rpn_classification": "loss_objectness",
    "rpn_boxes": "loss_rpn_box_reg",
    "classification": "loss_classifier",
    "boxes": "loss_box_reg",
  },
  "mmdet1": {
    "rpn_classification": "loss_rpn_cls",
    "rpn_boxes": "loss_rpn_reg",
    "classification": "loss_cls",
    "boxes": "loss_reg",
  },
}


@functools.partial(jax.jit, static_argnums=0)
def train(graph, params, others, images, sizes, gts, drawn):
  def total(params):
    model = nnx.merge(graph, params, others, copy=True)
    found = model.training(images, sizes, gts, drawn)
    losses = model.mean_losses(found.losses)
    return sum(losses.values()), (losses, found.anchors, found.proposals, found.candidates)

  gradients, found = jax.grad(total, has_aux=True)(params)
  matches = nnx.merge(graph, params, others, copy=True).match(images, sizes, gts)
  return gradients, matches, *found


@functools.partial(jax.jit, static_argnums=0)
def detect(graph, state, images, sizes):
  model = nnx.merge(graph, state, copy=True)
  return model.detect(images, sizes), model.proposals(images, sizes)


def check_proposals(found, stored, names, rtol):
  for k, name in enumerate(names):
    count = len(stored[f"{name}proposals"])
    assert found.valid[k].sum() == count
    boxes = stored[f"{name}proposals"]
    np.testing.assert_allclose(found.boxes[k, :count], boxes, rtol=rtol, atol=rtol)
    if f"{name}proposal_scores" in stored:
      scores = stored[f"{name}proposal_scores"]
      np.testing.assert_allclose(found.scores[k, :count], scores, rtol=rtol)


def check_sample(found, positive, negative, place=lambda index: index):
  """Against indices into candidates without padding; `place` tells where these are with it."""
  np.testing.assert_array_equal(np.asarray(found.indices)[found.positive], place(positive))
  background = found.valid & ~found.positive
  np.testing.assert_array_equal(np.asarray(found.indices)[background], place(negative))


def candidate(preset, proposals, gts, room):
  """Where a candidate is with padding to 2,000 proposals and so much room for ground truth."""
  first, own = (proposals, 2000) if preset == "torchvision" else (gts, room)
  return lambda index: np.where(index < first, index, index - first + own)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_losses_gradients_samples_and_detections_are_the_originals(x64, name):
  model = detector(name)
  convolve_by_products(model)
  preset, spec = MODELS[name]["preset"], MODELS[name]
  stored = np.load(DATA / f"{name}.npz")
  graph, params, others = nnx.split(model, nnx.Param, ...)
  for case, expected in spec["train"].items():
    images, sizes = batch(expected["images"])
    gts = targets(expected["images"], preset)
    anchors = jax.eval_shape(model.match, images, sizes, gts).shape[1]
    drawn = priorities(name, case, anchors, gts["labels"].shape[1])
    found = train(graph, params, others, images, sizes, gts, drawn)
    gradients, matches, losses, anchors, proposals, candidates = jax.device_get(found)
    check_proposals(proposals, stored, [f"train/{case}/{k}/" for k in range(2)], 1e-8)
    for k in range(2):
      of = f"train/{case}/{k}"
      if f"{of}/rpn_match" in stored:
        np.testing.assert_array_equal(matches[k], stored[f"{of}/rpn_match"])
      first = jax.tree.map(lambda leaf, k=k: leaf[k], (anchors, candidates))
      check_sample(first[0], stored[f"{of}/rpn_positive"], stored[f"{of}/rpn_negative"])
      count = gts["valid"][k].sum()
      place = candidate(preset, len(stored[f"{of}/proposals"]), count, len(gts["valid"][k]))
      check_sample(first[1], stored[f"{of}/positive"], stored[f"{of}/negative"], place)
    for ours, theirs in LOSSES[preset].items():
      np.testing.assert_allclose(losses[ours], expected["losses"][theirs], rtol=1e-8)
    check_gradients(nnx.merge(graph, gradients, others, copy=True), name, case)
  # Both in one batch: where mmdetection took one at a time, neither changes the other's.
  graph, state = nnx.split(model)
  detections, proposals = detect(graph, state, *batch(spec["eval"]["images"]))
  check_proposals(proposals, stored, [f"eval/{k}/" for k in range(2)], 1e-8)
  check_detections(detections, name, 1e-8)


@pytest.mark.slow
def test_float32_finds_the_same():
  name = "mmdet1_fasterrcnn_lip_resnet50"
  graph, state = nnx.split(detector(name, np.float32))
  images, sizes = batch(MODELS[name]["eval"]["images"])
  check_detections(detect(graph, state, images.astype(np.float32), sizes)[0], name, 1e-4)
