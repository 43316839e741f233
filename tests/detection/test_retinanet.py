import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_detectors import MODELS
from fixture_small_detectors import (
  SMALL,
  create,
  detect,
  gradients,
  hard_batch,
  images,
  losses,
  targets,
)
from flax import nnx

import lip_jax
from lip_jax.detection import postprocess, presets
from lip_jax.detection.matching import BACKGROUND, UNUSED
from lip_jax.detection.registry import abstract_detector
from lip_jax.errors import UsageError


@pytest.mark.parametrize(
  ("backbone", "preset", "parameters"),
  [
    ("resnet50", "mmdet1", 37_968_692),
    ("resnet101", "mmdet1", 56_960_820),
    ("lip_resnet50", "mmdet1", 36_275_892),
    ("lip_resnet101", "mmdet1", 55_268_020),
    ("resnet50", "torchvision", 34_014_999),
  ],
)
def test_number_of_parameters(backbone, preset, parameters):
  model = abstract_detector("retinanet", backbone=backbone, preset=preset)
  leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert sum(np.prod(leaf.shape) for leaf in leaves) == parameters


@pytest.mark.parametrize(
  "options", [{}, {"backbone": "resnet_small", "pool": "average"}], ids=["lip", "average"]
)
def test_an_image_is_found_the_same_in_another_bucket_and_beside_others(options):
  graph, state = create(**options)
  alone = detect(graph, state, *images([(70, 50)], 96, 64))
  others = detect(graph, state, *images([(128, 160), (70, 50), (33, 150)], 128, 160))
  assert alone.valid.sum() > 20
  np.testing.assert_array_equal(others.valid[1], alone.valid[0])
  np.testing.assert_array_equal(others.labels[1], alone.labels[0])
  np.testing.assert_allclose(others.boxes[1], alone.boxes[0], rtol=0, atol=1e-3)
  assert alone.boxes.max() <= 70
  assert alone.boxes[..., 2].max() <= 50


def test_losses_do_not_depend_on_the_bucket_where_padding_is_masked():
  graph, state = create(mask_padding=True)
  gts = targets([[3, 4, 30, 40], [20, 10, 45, 60]])
  narrow, wide = (
    losses(graph, state, *images([(70, 50)], *size), gts) for size in ((96, 64), (128, 96))
  )
  for name in ("classification", "boxes"):
    np.testing.assert_allclose(narrow[name], wide[name], rtol=1e-5)


def test_losses_are_divided_by_pairs_of_images():
  graph, state = create()
  sizes = [(64, 64), (64, 60), (60, 64), (50, 50)]
  gts = targets([[3, 4, 30, 40]], [], [[0, 0, 60, 60], [5, 5, 20, 20]], [[30, 30, 45, 49]])
  pixels, sizes = images(sizes, 64, 64)

  def of(part):
    return losses(graph, state, pixels[part], sizes[part], {k: v[part] for k, v in gts.items()})

  together, first, second = of(slice(4)), of(slice(2)), of(slice(2, 4))
  for name in together:
    np.testing.assert_allclose(together[name], (first[name] + second[name]) / 2, rtol=1e-5)


@pytest.mark.parametrize(
  "options",
  [{"mask_padding": True}, {"backbone": "resnet_small", "preset": "torchvision"}],
  ids=["mmdet1", "torchvision"],
)
def test_losses_and_gradients_are_finite(options):
  graph, state = create(**options)
  pixels, sizes, gts = hard_batch()
  by_parameters, found = gradients(graph, state, pixels, sizes, gts)
  assert found["classification"] > 0
  assert found["boxes"] > 0
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((by_parameters, found)))
  detections = detect(graph, state, pixels, sizes)
  assert all(jnp.isfinite(leaf).all() for leaf in detections)


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_a_batch_of_no_images_is_refused(name):
  gts = {key: values[:0] for key, values in targets([]).items()}
  with pytest.raises(UsageError, match="a batch of no images; give at least one"):
    losses(*create(name), np.zeros((0, 64, 64, 3), np.float32), np.zeros((0, 2), np.int32), gts)


def test_crowds_and_degenerate_boxes_are_not_matched():
  _, state = create()
  pixels, sizes = images([(64, 64)], 64, 64)
  box, crowd, degenerate = [3, 4, 30, 40], [32, 0, 64, 64], [50, 50, 50, 60]

  @functools.partial(jax.jit, static_argnums=0)
  def run(graph, gts):
    return nnx.merge(graph, state, copy=True).match(pixels, sizes, gts)

  def match(gts, **options):
    return np.asarray(run(create(**options)[0], gts))

  alone = match(targets([box]))
  gts = targets([box, crowd, degenerate])
  gts["crowd"][0, 1] = True
  np.testing.assert_array_equal(match(gts), alone)
  ignoring = match(gts, ignore_crowd=True)
  changed = ignoring != alone
  assert changed.any()
  assert BACKGROUND in alone[changed]
  assert set(ignoring[changed]) == {UNUSED}


def test_precision():
  model = abstract_detector(
    "retinanet", backbone="lip_resnet_small", dtype=jnp.bfloat16, **SMALL["retinanet"]
  )
  graph, state = nnx.split(model)
  pixels, sizes = images([(64, 50)], 64, 64)

  def run(state):
    model = nnx.merge(graph, state, copy=True)
    return (
      model.features(pixels, sizes),
      model.losses(pixels, sizes, targets([[3, 4, 30, 40]])),
      model.detect(pixels, sizes),
    )

  features, found, detections = jax.eval_shape(run, state)
  assert {x.dtype for x in features.values()} == {jnp.dtype(jnp.bfloat16)}
  assert {x.dtype for x in found.values()} == {jnp.dtype(jnp.float32)}
  assert detections.boxes.dtype == detections.scores.dtype == jnp.float32
  assert detections.boxes.shape == (1, 100, 4)
  assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(jnp.float32)}


def renamed(name):
  """As torchvision's published files name it."""
  name = name.replace("_blocks.0.0.", "_blocks.0.").replace("_blocks.1.0.", "_blocks.1.")
  name = name.replace("_blocks.2.0.", "_blocks.2.")
  for k in range(4):
    name = name.replace(f"_head.conv.{k}.0.", f"_head.conv.{2 * k}.")
  return name


def test_weights_under_the_older_names_of_torchvision():
  model = abstract_detector("retinanet", backbone="resnet50", preset="torchvision")
  shapes = MODELS["torchvision_retinanet_resnet50"]["state_dict"]
  weights = {renamed(key): np.zeros(shape, np.float32) for key, shape in shapes.items()}
  assert "head.classification_head.conv.6.weight" in weights
  bias = np.arange(36, dtype=np.float32)
  weights["head.regression_head.bbox_reg.bias"] = bias
  lip_jax.load_torch_weights(model, weights)
  np.testing.assert_array_equal(model.head.box_deltas.bias[...], bias)
  del weights["backbone.fpn.extra_blocks.p6.weight"]
  with pytest.raises(UsageError, match=r"missing backbone\.fpn\.extra_blocks\.p6\.weight"):
    lip_jax.load_torch_weights(model, weights)


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"name": "ssd"}, "faster_rcnn, retinanet"),
    ({"preset": "detectron2"}, "mmdet1, torchvision"),
    ({"backbone": "resnet49"}, "resnet50"),
    ({"fpn_chanels": 64}, "fpn_channels"),
    ({"anchor_scale": 0}, "anchor_scale"),
  ],
)
def test_what_does_not_exist_is_refused_with_what_does(options, named):
  given = {"name": "retinanet", "backbone": "resnet_small", **SMALL["retinanet"], **options}
  with pytest.raises(UsageError, match=named):
    abstract_detector(**given)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_pairs_of_a_level_go_to_nms(seed, monkeypatch):
  """Many are equal, of which the first are taken; of 40 anchors apart, so that none suppresses."""
  monkeypatch.setattr(postprocess, "PER_LEVEL", 7)
  rng = np.random.default_rng(seed)
  logits = rng.integers(-6, 3, (40, 5)).astype(np.float32)
  logits[rng.integers(0, 40, 3), 0] = np.nan
  usable = rng.random(40) < 0.8
  left = 10.0 * np.arange(40, dtype=np.float32)[:, None]
  anchors = np.hstack([left, 0 * left, left + 5, 0 * left + 5])
  level = postprocess.Level(*map(jnp.asarray, (logits, np.zeros((40, 4)), anchors, usable)))
  found = postprocess.dense_detections(
    [level], jnp.array([10.0, 400.0]), presets.find("torchvision")
  )
  scores = np.where(usable[:, None] & (logits > -3), logits, -np.inf)  # sigmoid(-2) > 0.05
  scores = np.where(np.isnan(scores), -np.inf, scores).ravel()
  expected = np.argsort(-scores, kind="stable")[:7]
  assert found.valid.sum() == 7
  pairs = np.asarray(found.boxes[:7, 0]) // 10 * 5 + np.asarray(found.labels[:7])
  assert pairs.tolist() == expected.tolist()
