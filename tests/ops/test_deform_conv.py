import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_detection import OPERATIONS, nhwc, noise, reference
from fixture_weights import weight
from jax.test_util import check_grads

from lip_jax.ops.deform_conv import deform_conv

CASES = {case["name"]: case for case in OPERATIONS["deform_conv"]["cases"]}


def case_arrays(case):
  """(x, offset, kernel), cotangent, in float64."""
  arrays, name = reference("deform_conv"), case["name"]
  x = noise(case["x"], case["shape"])
  offset = noise(case["offset"], arrays[f"{name}/doffset"].shape) * case["offset_scale"]
  kernel = weight(case["weight"], (case["outputs"], case["shape"][1], 3, 3)).astype(np.float64)
  cotangent = noise(case["cotangent"], arrays[f"{name}/y"].shape)
  return (x, offset, kernel.transpose(2, 3, 1, 0)), cotangent


def loop_deform_conv(x, offset, kernel, stride, padding):
  images, height, width, _ = offset.shape
  taps_y, taps_x, _, outputs = kernel.shape
  offset = offset.reshape(images, height, width, taps_y, taps_x, 2)
  out = np.zeros((images, height, width, outputs))
  for n, i, j, a, b in np.ndindex(images, height, width, taps_y, taps_x):
    y = i * stride - padding + a + offset[n, i, j, a, b, 0]
    left = j * stride - padding + b + offset[n, i, j, a, b, 1]
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
      for column in (int(np.floor(left)), int(np.floor(left)) + 1):
        if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
          share = (1 - abs(y - row)) * (1 - abs(left - column))
          out[n, i, j] += share * x[n, row, column] @ kernel[a, b]
  return out


@pytest.mark.parametrize("border_gradient", [True, False], ids=["torchvision", "mmdet1"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(x64, name, border_gradient):
  case, arrays = CASES[name], reference("deform_conv")
  inputs, cotangent = case_arrays(case)
  convolve = functools.partial(
    deform_conv, stride=case["stride"], padding=case["padding"], border_gradient=border_gradient
  )
  own = f"{name}/doffset_mmdet1"
  expected = {
    "y": nhwc(arrays[f"{name}/y"]),
    "dx": nhwc(arrays[f"{name}/dx"]),
    "doffset": nhwc(arrays[own if own in arrays and not border_gradient else f"{name}/doffset"]),
    "dkernel": arrays[f"{name}/dweight"].transpose(2, 3, 1, 0),
  }

  @jax.jit
  def run(inputs, cotangent):
    y, vjp = jax.vjp(convolve, *inputs)
    return y, *vjp(cotangent)

  for dtype, tolerance in ((jnp.float64, 2e-14), (jnp.float32, 2e-6)):
    cast = functools.partial(jnp.asarray, dtype=dtype)
    found = run(*jax.tree.map(cast, (inputs, cotangent)))
    for ours, (key, theirs) in zip(found, expected.items(), strict=True):
      assert ours.dtype == dtype
      limit = tolerance * np.abs(theirs).max()
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit, err_msg=key)


@pytest.mark.parametrize(
  ("stride", "padding", "kernel_size"), [(1, 1, (3, 3)), (2, 0, (3, 3)), (2, 2, (2, 3))]
)
def test_equals_a_loop_over_taps(x64, stride, padding, kernel_size):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(2, 6, 7, 2)), rng.normal(size=(*kernel_size, 2, 3))
  spatial = ((n + 2 * padding - k) // stride + 1 for n, k in zip((6, 7), kernel_size, strict=True))
  shape = (2, *spatial, 2 * kernel_size[0] * kernel_size[1])
  offset = np.round(4 * rng.normal(scale=2, size=shape)) / 4  # whole offsets among them
  convolve = jax.jit(functools.partial(deform_conv, stride=stride, padding=padding))
  found = convolve(x, offset, kernel)
  np.testing.assert_allclose(
    found, loop_deform_conv(x, offset, kernel, stride, padding), atol=1e-12
  )


@pytest.mark.parametrize("stride", [1, 2])
def test_without_offsets_it_is_a_convolution(x64, stride):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(1, 7, 6, 3)), rng.normal(size=(3, 3, 3, 2))
  expected = jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  offset = np.zeros((*expected.shape[:3], 18))
  convolve = jax.jit(functools.partial(deform_conv, stride=stride))
  np.testing.assert_allclose(convolve(x, offset, kernel), expected, atol=1e-12)


def test_gradients_against_finite_differences(x64):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(1, 4, 5, 2)), rng.normal(size=(3, 3, 2, 2))
  # Away from whole positions, where the derivative jumps.
  offset = rng.integers(-2, 3, (1, 4, 5, 18)) + rng.uniform(0.1, 0.9, (1, 4, 5, 18))
  check_grads(jax.jit(deform_conv), tuple(map(jnp.asarray, (x, offset, kernel))), 1, ["rev"])


def test_offsets_beyond_all_bounds():
  x, kernel = np.ones((1, 3, 3, 1), np.float32), np.ones((3, 3, 1, 1), np.float32)

  @jax.jit
  def run(*inputs):
    y, vjp = jax.vjp(deform_conv, *inputs)
    return y, *vjp(jnp.ones_like(y))

  for value in (1e30, -1e30, np.inf):
    offset = np.full((1, 3, 3, 18), value, np.float32)
    y, *gradients = run(x, offset, kernel)
    assert not y.any()
    assert not any(one.any() for one in gradients)
  offset = np.zeros((1, 3, 3, 18), np.float32)
  offset[0, 0, 0, 8] = np.nan  # of the middle tap
  y = np.asarray(run(x, offset, kernel)[0])[0, :, :, 0]
  assert np.isnan(y[0, 0])
  assert np.isfinite(y.ravel()[1:]).all()


def test_vmap_and_bfloat16():
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(2, 1, 4, 5, 2)), rng.normal(size=(3, 3, 2, 2))
  offset = rng.normal(size=(2, 1, 4, 5, 18)).astype(np.float32)
  x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
  together = jax.jit(jax.vmap(deform_conv, (0, 0, None)))(x, offset, kernel)
  assert together.dtype == jnp.bfloat16
  for k in range(2):
    precise = loop_deform_conv(*(np.float64(one) for one in (x[k], offset[k], kernel)), 1, 1)
    np.testing.assert_allclose(np.float32(together[k]), precise, rtol=0.02, atol=0.05)


def test_no_images():
  x, offset, kernel = np.zeros((0, 4, 5, 2)), np.zeros((0, 4, 5, 18)), np.zeros((3, 3, 2, 3))
  y, vjp = jax.vjp(deform_conv, x, offset, kernel)
  assert y.shape == (0, 4, 5, 3)
  assert [one.shape for one in vjp(y)] == [x.shape, offset.shape, kernel.shape]


def test_shapes_that_do_not_match():
  x, kernel = np.zeros((1, 4, 5, 2)), np.zeros((3, 3, 2, 2))
  with pytest.raises(ValueError, match=r"offset has shape .*; expected \(1, 4, 5, 18\)"):
    deform_conv(x, np.zeros((1, 4, 5, 9)), kernel)
  with pytest.raises(ValueError, match=r"x .* and kernel .* do not match"):
    deform_conv(x, np.zeros((1, 4, 5, 18)), np.zeros((3, 3, 3, 2)))
  with pytest.raises(ValueError, match="outputs must be a multiple of the groups"):
    deform_conv(x, np.zeros((1, 4, 5, 18)), np.zeros((3, 3, 1, 3)))
