import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_detection import OPERATIONS, nhwc, noise, reference
from jax.test_util import check_grads

from lip_jax.ops.roi_align import multilevel_roi_align, roi_align, roi_levels

CASES = {case["name"]: case for case in OPERATIONS["roi_align"]["cases"]}
MODES = ("unaligned", "aligned", "legacy")
FORMS = ("gather", "one_hot")


def loop_roi_align(features, rois, stride, size, samples, mode):
  """In float64, one sample at a time."""
  features = np.asarray(features, np.float64)
  out = np.zeros((len(rois), *size, features.shape[-1]))
  shift = 0.5 if mode == "aligned" else 0
  for r, roi in enumerate(np.asarray(rois, np.float64)):
    axes = []
    for axis in (1, 0):  # y, then x
      low, high = roi[axis], roi[axis + 2]
      if mode == "aligned":
        high = max(low, high)
      low, high = low / stride - shift, (high + (mode == "legacy")) / stride - shift
      length = max(high - low, 1 if mode == "unaligned" else 0)
      bins = size[1 - axis]
      axes.append(
        [
          [
            low + k * (length / bins) + (s + 0.5) * (length / bins) / samples
            for s in range(samples)
          ]
          for k in range(bins)
        ]
      )
    for i, j in np.ndindex(*size):
      values = [bilinear(features, y, x) for y in axes[0][i] for x in axes[1][j]]
      out[r, i, j] = np.mean(values, axis=0)
  return out


def bilinear(features, y, x):
  height, width, _ = features.shape
  if not (-1 <= y <= height and -1 <= x <= width):
    return 0 * features[0, 0]
  y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
  top, left = int(y), int(x)
  bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
  upper = features[top, left] * (1 - (x - left)) + features[top, right] * (x - left)
  lower = features[bottom, left] * (1 - (x - left)) + features[bottom, right] * (x - left)
  return upper * (1 - (y - top)) + lower * (y - top)


def close(ours, theirs, tolerance, message=""):
  limit = tolerance * np.abs(theirs).max()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit, err_msg=message)


def pooled_with_gradient(pool, x, images, cotangent):
  """(y, dx): regions [R] of images [N], each pooled from its own."""
  images = np.asarray(images, int)

  @jax.jit
  def run(x, cotangent):
    y, vjp = jax.vjp(lambda x: jax.vmap(pool)(x)[images, np.arange(len(images))], x)
    return y, vjp(cotangent)[0]

  return run(x, jnp.asarray(cotangent))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(x64, name, mode, form):
  case, arrays = CASES[name], reference("roi_align")
  rois, y = arrays[f"{name}/rois"], arrays[f"{name}/{mode}/y"]
  options = {"stride": case["stride"], "size": tuple(case["size"]), "mode": mode}
  for dtype, tolerance in ((jnp.float64, 2e-14), (jnp.float32, 2e-6)):
    found = pooled_with_gradient(
      lambda x, d=dtype: roi_align(x, rois[:, 1:].astype(d), implementation=form, **options),
      jnp.asarray(noise(case["x"], case["shape"]), dtype),
      rois[:, 0],
      noise(case["cotangent"], y.shape).astype(dtype),
    )
    for ours, theirs in zip(found, (y, arrays[f"{name}/{mode}/dx"]), strict=True):
      assert ours.dtype == dtype
      close(ours, nhwc(theirs), tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("preset", "mode"), [("torchvision", "unaligned"), ("mmdet1", "legacy")])
def test_pyramid_equals_the_reference(x64, preset, mode, form):
  case, arrays = OPERATIONS["roi_align"]["levels"], reference("roi_align")
  rois, y = arrays["levels/rois"], arrays[f"levels/{preset}/y"]
  levels = roi_levels(rois[:, 1:], inclusive=preset == "mmdet1")
  np.testing.assert_array_equal(levels, arrays[f"levels/{preset}/level"])
  ours, gradients = pooled_with_gradient(
    lambda maps: multilevel_roi_align(
      maps, rois[:, 1:], levels, strides=(4, 8, 16, 32), mode=mode, implementation=form
    ),
    [jnp.asarray(noise(*named)) for named in zip(case["x"], case["shapes"], strict=True)],
    rois[:, 0],
    noise(case["cotangent"], y.shape),
  )
  close(ours, nhwc(y), 4e-14)
  for k, gradient in enumerate(gradients):
    close(gradient, nhwc(arrays[f"levels/{preset}/dx{k}"]), 4e-14)


@pytest.mark.parametrize("form", FORMS)
def test_padding_does_not_count(form):
  rng = np.random.default_rng(0)
  maps = [
    rng.normal(size=(rows, columns, 2)).astype(np.float32) for rows, columns in ((8, 6), (4, 3))
  ]
  padded = [np.pad(one, ((0, 4), (0, 7), (0, 0)), constant_values=9) for one in maps]
  rois = np.array([[0, 0, 23, 31], [10, 20, 23.9, 31.9], [0, 0, 23, 31]], np.float32)
  pool = functools.partial(
    multilevel_roi_align, rois=rois, levels=[0, 0, 1], strides=(4, 8), mode="legacy",
    implementation=form,
  )  # fmt: skip
  extents = [one.shape[:2] for one in maps]
  np.testing.assert_allclose(pool(padded, extents=extents), pool(maps), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_equals_a_loop_over_samples(x64, mode):
  """At and beyond the edges: where samples fall on -1 or the height, every bit counts."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(9, 11, 2))
  start = np.round(rng.uniform(-40, 80, (60, 2)))
  rois = np.concatenate([start, start + np.round(rng.uniform(0, 16, (60, 2))) * 8], axis=1)
  rois[:4] += [[0.3, 0.1, 9.7, -2.2]]
  for samples, size, tolerance in ((2, (7, 7), 1e-13), (3, (2, 5), 1e-13)):
    expected = loop_roi_align(x, rois, 8, size, samples, mode)
    for form in FORMS:
      options = {"stride": 8, "size": size, "samples": samples, "mode": mode}
      pool = functools.partial(roi_align, **options, implementation=form)
      close(jax.jit(pool)(x, rois), expected, tolerance, form)


def test_equals_onnx_runtime():
  onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
  rng = np.random.default_rng(3)
  x = rng.normal(size=(1, 3, 12, 10)).astype(np.float32)
  start = rng.uniform(-10, 60, (20, 2))
  rois = np.concatenate([start, start + rng.uniform(0, 60, (20, 2))], axis=1).astype(np.float32)
  helper, kind = onnx.helper, onnx.TensorProto
  inputs = (("x", kind.FLOAT, x.shape), ("rois", kind.FLOAT, (20, 4)), ("n", kind.INT64, (20,)))
  for mode, name in (("unaligned", "output_half_pixel"), ("aligned", "half_pixel")):
    node = helper.make_node(
      "RoiAlign",
      ["x", "rois", "n"],
      ["y"],
      output_height=7,
      output_width=7,
      sampling_ratio=2,
      spatial_scale=0.125,
      coordinate_transformation_mode=name,
    )
    graph = helper.make_graph(
      [node],
      "g",
      [helper.make_tensor_value_info(*one) for one in inputs],
      [helper.make_tensor_value_info("y", kind.FLOAT, (20, 3, 7, 7))],
    )
    opset = [helper.make_opsetid("", 16)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    session = runtime.InferenceSession(model.SerializeToString())
    (theirs,) = session.run(None, {"x": x, "rois": rois, "n": np.zeros(20, np.int64)})
    pool = jax.jit(functools.partial(roi_align, stride=8, mode=mode))
    ours = pool(x[0].transpose(1, 2, 0), rois)
    close(ours, theirs.transpose(0, 2, 3, 1), 2e-6)


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_levels_equal_the_reference(x64, dtype, inclusive):
  arrays = reference("levels")
  levels = roi_levels(arrays["boxes"].astype(dtype), inclusive=inclusive)
  np.testing.assert_array_equal(levels, arrays["mmdet1" if inclusive else "torchvision"])


def test_levels_of_strange_boxes():
  boxes = np.array([[5, 5, 5, 5], [9, 9, 0, 20], [np.nan] * 4, [0, 0, 1e9, 1e9]], np.float32)
  np.testing.assert_array_equal(roi_levels(boxes), [0, 0, 0, 3])
  np.testing.assert_array_equal(roi_levels(boxes, inclusive=True, levels=2), [0, 0, 0, 1])


@pytest.mark.parametrize("form", FORMS)
def test_regions_that_are_not_numbers_or_have_no_place(form):
  x = np.ones((4, 5, 2), np.float32)
  rois = np.array([[np.nan] * 4, [-1e9, -1e9, -9e8, -9e8], [np.inf] * 4, [0, 0, 0, 0]], np.float32)

  @jax.jit
  def run(x):
    y, vjp = jax.vjp(lambda x: roi_align(x, rois, stride=4, size=2, implementation=form), x)
    return y.sum(axis=(1, 2, 3)), vjp(jnp.ones_like(y))[0]

  total, gradient = run(x)
  np.testing.assert_allclose(total, [0, 0, 0, 8], rtol=1e-6)
  assert np.isfinite(gradient).all()
  assert gradient.sum() == pytest.approx(8)
  assert roi_align(x, rois[:0], stride=4, implementation=form).shape == (0, 7, 7, 2)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_against_finite_differences(x64, form):
  rng = np.random.default_rng(0)
  maps = [jnp.asarray(rng.normal(size=(h, w, 1))) for h, w in ((6, 5), (3, 3))]
  rois = np.array([[1.0, 2, 9, 8], [-3, 4, 20, 26], [0, 0, 2, 2]])

  @jax.jit
  def pool(*maps):
    return multilevel_roi_align(
      maps, rois, np.array([0, 1, 1]), strides=(4, 8), size=2, implementation=form
    )

  check_grads(pool, maps, 1, ["rev"])
  coordinates = jax.grad(lambda r: roi_align(maps[0], r, stride=4, implementation=form).sum())
  assert not jax.jit(coordinates)(rois).any()


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_summed_in_float32(form):
  """Many equal regions: a sum in bfloat16 would end at 256 times the summand."""
  x = jnp.ones((3, 3, 1), jnp.bfloat16)
  rois = np.tile(np.array([[0, 0, 3, 3]], np.float32), (1000, 1))

  def total(x):
    y = roi_align(x, rois, stride=1, size=1, implementation=form)
    assert y.dtype == jnp.bfloat16
    return y.astype(jnp.float32).sum()

  gradient = jax.jit(jax.grad(total))(x)
  assert gradient.dtype == jnp.bfloat16
  assert gradient.astype(jnp.float32).sum() == pytest.approx(1000, rel=1e-2)


def test_what_is_not_known_is_named():
  x, rois = np.zeros((2, 2, 1), np.float32), np.zeros((1, 4), np.float32)
  with pytest.raises(ValueError, match="unknown mode 'half'; expected one of unaligned, "):
    roi_align(x, rois, stride=4, mode="half")
  with pytest.raises(ValueError, match="unknown implementation 'xla'"):
    roi_align(x, rois, stride=4, implementation="xla")
  with pytest.raises(ValueError, match="1 levels of features and 2 strides"):
    multilevel_roi_align((x,), rois, np.zeros(1, int), strides=(4, 8))


def test_lists_are_arrays():
  found = roi_align([[[1.0]]], [[0, 0, 4, 4]], stride=4, size=1)
  np.testing.assert_allclose(found, np.ones((1, 1, 1, 1)))
