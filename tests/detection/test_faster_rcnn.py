import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_detectors import MODELS
from fixture_small_detectors import create, detect, gradients, hard_batch, images, losses, targets
from flax import nnx

import lip_jax
from lip_jax.detection.registry import abstract_detector
from lip_jax.models.cost import count_parameters

BOXES = [[3, 4, 30, 40], [20, 10, 45, 60]]


@pytest.mark.parametrize(
  ("backbone", "preset", "parameters"),
  [
    ("resnet50", "mmdet1", 41_757_156),
    ("resnet101", "mmdet1", 60_749_284),
    ("lip_resnet50", "mmdet1", 40_064_356),
    ("lip_resnet101", "mmdet1", 59_056_484),
    ("resnet50", "torchvision", 41_755_286),
  ],
)
def test_number_of_parameters(backbone, preset, parameters):
  model = abstract_detector("faster_rcnn", backbone=backbone, preset=preset)
  assert count_parameters(model) == parameters


def test_an_image_is_found_the_same_in_another_bucket_and_beside_others():
  graph, state = create("faster_rcnn")
  # One that fills its padding: its regions end where the map does.
  alone = detect(graph, state, *images([(96, 64)], 96, 64))
  others = detect(graph, state, *images([(128, 160), (96, 64), (33, 150)], 128, 160))
  assert alone.valid.sum() > 20
  np.testing.assert_array_equal(others.valid[1], alone.valid[0])
  np.testing.assert_array_equal(others.labels[1], alone.labels[0])
  np.testing.assert_allclose(others.boxes[1], alone.boxes[0], rtol=0, atol=1e-3)
  assert alone.boxes[..., 2].max() <= 64
  assert 0 in alone.labels[alone.valid]
  assert alone.labels.max() <= 2


@pytest.mark.parametrize("preset", ["mmdet1", "torchvision"])
def test_losses_and_gradients_are_finite(preset):
  options = {"backbone": "resnet_small"} if preset == "torchvision" else {"mask_padding": True}
  graph, state = create("faster_rcnn", preset=preset, **options)
  pixels, sizes, gts = hard_batch()
  by_parameters, found = gradients(graph, state, pixels, sizes, gts)
  assert set(found) == {"rpn_classification", "rpn_boxes", "classification", "boxes"}
  assert all(loss > 0 for loss in found.values())
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((by_parameters, found)))
  detections = detect(graph, state, pixels, sizes)
  assert all(jnp.isfinite(leaf).all() for leaf in detections)


def test_without_boxes_or_room_for_them_all_is_background():
  graph, state = create("faster_rcnn")
  pixels, sizes = images([(64, 64)], 64, 64)
  no_room, padding = (losses(graph, state, pixels, sizes, targets([], room=n)) for n in (0, 4))
  for found in (no_room, padding):
    assert found["rpn_boxes"] == found["boxes"] == 0
    assert found["rpn_classification"] > 0
    assert found["classification"] > 0


def test_what_is_sampled_depends_on_the_key_and_the_image_alone():
  graph, state = create("faster_rcnn", mask_padding=True)
  pixels, sizes = images([(64, 64), (60, 50), (50, 64)], 64, 64)
  gts = targets(BOXES, BOXES[:1], []) | {"image_id": np.array([7, 3, 5])}

  @functools.partial(jax.jit, static_argnums=0)
  def samples(graph, order, seed):
    model = nnx.merge(graph, state, copy=True)
    chosen = {name: jnp.asarray(values)[order] for name, values in gts.items()}
    found = model.training(
      jnp.asarray(pixels)[order], jnp.asarray(sizes)[order], chosen, key=jax.random.key(seed)
    )
    return found.anchors.indices, found.candidates.indices

  first = samples(graph, np.array([0, 1, 2]), 0)
  again = samples(graph, np.array([2, 0, 1]), 0)
  other = samples(graph, np.array([0, 1, 2]), 1)
  for a, b, c in zip(first, again, other, strict=True):
    np.testing.assert_array_equal(np.asarray(a)[[2, 0, 1]], b)
    assert (np.asarray(a) != np.asarray(c)).any()


def test_no_gradient_flows_through_proposals():
  """Those of the second stage's losses leave the first stage's own layers alone."""
  graph, state = create("faster_rcnn")
  graph, params, others = nnx.split(nnx.merge(graph, state, copy=True), nnx.Param, ...)
  pixels, sizes = images([(64, 64)], 64, 64)

  @jax.jit
  def gradient(params):
    def second(params):
      model = nnx.merge(graph, params, others, copy=True)
      found = model.losses(pixels, sizes, targets(BOXES))
      return found["classification"] + found["boxes"]

    return jax.grad(second)(params)

  found = gradient(params)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(found["rpn"]))
  assert all((leaf != 0).any() for leaf in jax.tree.leaves(found["box_head"]))


def test_weights_under_the_older_names_of_torchvision():
  model = abstract_detector("faster_rcnn", backbone="resnet50", preset="torchvision")
  shapes = MODELS["torchvision_fasterrcnn_resnet50"]["state_dict"]
  older = {
    key.replace("rpn.head.conv.0.0.", "rpn.head.conv.").replace("_blocks.3.0.", "_blocks.3."): shape
    for key, shape in shapes.items()
  }
  assert "rpn.head.conv.weight" in older
  weights = {key: np.broadcast_to(np.float32(0), shape) for key, shape in older.items()}
  weights["rpn.head.conv.bias"] = np.arange(256, dtype=np.float32)
  lip_jax.load_torch_weights(model, weights)
  np.testing.assert_array_equal(model.rpn.conv.bias[...], np.arange(256))
