import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_detection import OPERATIONS, PRESETS, loop_iou, random_boxes, reference
from jax.test_util import check_grads

from lip_jax.ops import boxes

decode = jax.jit(boxes.decode, static_argnames=("stds", "inclusive"))
encode = jax.jit(boxes.encode, static_argnames=("stds", "inclusive"))
iou = jax.jit(boxes.iou, static_argnames="inclusive")

CODER = OPERATIONS["coder"]


@pytest.mark.parametrize("stds", CODER["stds"])
@pytest.mark.parametrize("preset", PRESETS)
def test_coder_equals_the_reference(x64, preset, stds):
  arrays = reference("coder")
  values = {"stds": CODER["stds"][stds], "inclusive": preset == "mmdet1"}

  @jax.jit
  def code(anchors, gts, deltas):
    return {
      "encode": boxes.encode(anchors, gts, **values),
      "decode": boxes.decode(anchors, deltas, **values),
      "clip": boxes.decode(anchors, deltas, **values, size=CODER["size"]),
    }

  for dtype, tolerance in ((np.float64, 1e-14), (np.float32, 2e-6)):
    found = code(*(arrays[name].astype(dtype) for name in ("boxes", "gts", "deltas")))
    for name, ours in found.items():
      theirs = arrays[f"{preset}/{stds}/{name}"]
      assert ours.dtype == dtype
      limit = tolerance * np.abs(theirs).max()
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit, err_msg=name)


@pytest.mark.parametrize("inclusive", [False, True])
def test_decode_inverts_encode(x64, inclusive):
  anchors, gts = random_boxes(0, 40) + [0, 0, 7, 7], random_boxes(1, 40) + [0, 0, 5, 5]
  stds = (0.1, 0.1, 0.2, 0.2)
  deltas = encode(anchors, gts, stds=stds, inclusive=inclusive)
  decoded = decode(anchors, deltas, stds=stds, inclusive=inclusive)
  np.testing.assert_allclose(decoded, gts, atol=1e-12)


def test_clamps_of_the_conventions(x64):
  anchor, deltas = np.array([[10.0, 10, 20, 20]]), np.array([[0.0, 0, 9, -9]])
  exact = decode(anchor, deltas, stds=(1, 1, 1, 1))[0]
  assert exact[2] - exact[0] == pytest.approx(10 * 62.5)
  assert exact[3] - exact[1] == pytest.approx(10 * np.exp(-9))
  inclusive = decode(anchor, deltas, stds=(1, 1, 1, 1), inclusive=True)[0]
  assert inclusive[2] - inclusive[0] + 1 == pytest.approx(11 * 62.5)
  assert inclusive[3] - inclusive[1] + 1 == pytest.approx(11 / 62.5)


def test_boxes_of_classes_share_their_anchor():
  anchors, deltas = random_boxes(0, 5) + [0, 0, 1, 1], np.ones((5, 3, 4), np.float32)
  decoded = decode(anchors[:, None], deltas, stds=(1, 1, 1, 1))
  assert decoded.shape == (5, 3, 4)
  np.testing.assert_array_equal(decoded[:, 0], decoded[:, 2])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("inclusive", [False, True])
def test_iou_equals_a_loop_in_every_bit(x64, inclusive, dtype):
  """Ties and thresholds are decided by the last one."""
  a = np.concatenate([random_boxes(0, 30), np.random.default_rng(1).normal(50, 30, (30, 4))])
  b = np.concatenate([random_boxes(0, 10), a[30:] + [0, 0, 40, 40]])
  a[30:] += [0, 0, 30, 30]
  a, b = a.astype(dtype), b.astype(dtype)
  found = iou(a, b, inclusive=inclusive)
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, loop_iou(a, b, inclusive))


def test_iou_of_degenerate_boxes():
  a = np.array([[5, 5, 5, 5], [3, 3, 1, 1], [np.nan, 0, 4, 4], [0, 0, 4, 4]], np.float32)
  found = np.array(iou(a, a))
  assert found[3, 3] == 1
  found[3, 3] = 0
  assert not found.any()
  assert iou(a[:0], a).shape == (0, 4)
  assert iou(a, a[:0]).shape == (4, 0)


def test_coverage_is_the_share_of_the_first():
  inner, outer = np.array([[2.0, 2, 4, 6], [9, 9, 9, 9]]), np.array([[0.0, 0, 4, 4]])
  np.testing.assert_array_equal(boxes.coverage(inner, outer), [[0.5], [0]])
  np.testing.assert_array_equal(boxes.coverage(outer, inner), [[0.25, 0]])


def test_encode_of_degenerate_boxes_is_finite():
  points = np.zeros((3, 4), np.float32)
  full = np.array([[0, 0, 8, 8]] * 3, np.float32)
  for a, b in ((points, full), (full, points), (points, points)):
    assert np.isfinite(encode(a, b, stds=(1, 1, 1, 1))).all()


@pytest.mark.parametrize("inclusive", [False, True])
def test_gradients_of_the_coder(x64, inclusive):
  rng = np.random.default_rng(0)
  anchors = jnp.asarray(random_boxes(0, 4) + [0, 0, 6, 6])
  options = {"stds": (0.1, 0.1, 0.2, 0.2), "inclusive": inclusive}
  deltas = jnp.asarray(rng.normal(size=(4, 4)))
  check_grads(jax.jit(lambda d: boxes.decode(anchors, d, **options)), (deltas,), 1, ["rev"])
  gts = jnp.asarray(random_boxes(1, 4) + [0, 0, 6, 6])
  check_grads(jax.jit(lambda g: boxes.encode(anchors, g, **options)), (gts,), 1, ["rev"])


def test_vmap_over_images_of_different_sizes():
  anchors = np.stack([random_boxes(seed, 6) for seed in range(2)]).astype(np.float32)
  deltas = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
  sizes = np.array([[60, 80], [90, 40]])

  one = functools.partial(boxes.decode, stds=(1, 1, 1, 1), inclusive=True)
  together = jax.jit(jax.vmap(lambda b, d, s: one(b, d, size=s)))(anchors, deltas, sizes)
  for k in range(2):
    alone = one(anchors[k], deltas[k], size=sizes[k])
    np.testing.assert_allclose(together[k], alone, rtol=1e-6)
    assert together[k][:, 0::2].max() <= sizes[k, 1] - 1
    assert together[k][:, 1::2].max() <= sizes[k, 0] - 1
