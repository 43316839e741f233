"""The LAN family against plain loops in float64, and what holds for each of its poolings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

import lip_jax
from lip_jax.models import lan

WINDOWS = [
  {"window": 3, "stride": 2, "padding": 1},
  {"window": 2, "stride": 2, "padding": 0},
  {"window": (3, 2), "stride": (2, 1), "padding": (0, 1)},
]


def random(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def loop(pool_window, x, windows):
  """`pool_window` of the pixels [n, C] inside each window, image by image, in float64."""
  (kh, kw), (sh, sw), (ph, pw) = (v if isinstance(v, tuple) else (v, v) for v in windows.values())
  n, height, width, c = x.shape
  y = np.zeros((n, (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1, c))
  for b, i, j in np.ndindex(y.shape[:3]):
    top, left = i * sh - ph, j * sw - pw
    taps = [
      (t, x[b, top + t // kw, left + t % kw])
      for t in range(kh * kw)
      if 0 <= top + t // kw < height and 0 <= left + t % kw < width
    ]
    index, pixels = zip(*taps, strict=True)
    y[b, i, j] = pool_window(np.stack(pixels), list(index))
  return y


def weighted(importance, pixels):
  return (importance * pixels).sum(axis=0) / importance.sum(axis=0)


def detail_preserving(alpha, lam, *, symmetric, kernel=None, epsilon=1e-3):
  """Saeedan et al. 2018 in float64."""

  def pool_window(pixels, index):
    if kernel is None:
      down = pixels.mean(axis=0)
    else:
      down = (kernel.reshape(-1, pixels.shape[1])[index] * pixels).sum(axis=0)
    detail = pixels - down
    if not symmetric:
      detail = np.maximum(detail, 0)
    return weighted(alpha + np.sqrt(detail**2 + epsilon**2) ** lam, pixels)

  return pool_window


ALPHA, LAMBDA = np.array([0.3, 1.0, 0.0]), np.array([0.5, 2.0, 1.5])
KERNEL = random((3, 3, 3), seed=9)
FUNCTIONS = {
  "average": (lip_jax.average_pool, lambda p, _: p.mean(axis=0)),
  "max": (lip_jax.max_pool, lambda p, _: p.max(axis=0)),
  "soft": (lip_jax.soft_pool, lambda p, _: weighted(np.exp(p), p)),
  "exp": (
    lambda x, **w: lip_jax.exp_pool(x, 2.5, **w),
    lambda p, _: weighted(np.exp(2.5 * p), p),
  ),
  "exp_per_channel": (
    lambda x, **w: lip_jax.exp_pool(x, jnp.array([0.0, 1.0, -3.0]), **w),
    lambda p, _: weighted(np.exp(np.array([0.0, 1.0, -3.0]) * p), p),
  ),
  "lp": (
    lambda x, **w: lip_jax.lp_pool(x, 3.5, **w),
    lambda p, _: (np.abs(p) ** 3.5).mean(axis=0) ** (1 / 3.5),
  ),
  "dpp_lite_sym": (
    lambda x, **w: lip_jax.detail_preserving_pool(x, ALPHA, LAMBDA, **w),
    detail_preserving(ALPHA, LAMBDA, symmetric=True),
  ),
  "dpp_lite_asym": (
    lambda x, **w: lip_jax.detail_preserving_pool(x, ALPHA, LAMBDA, symmetric=False, **w),
    detail_preserving(ALPHA, LAMBDA, symmetric=False),
  ),
}


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equals_loops_in_float64(name, windows, dtype, x64):
  function, pool_window = FUNCTIONS[name]
  x = random((2, 7, 6, 3)).astype(dtype)
  y = function(jnp.asarray(x), **windows)
  assert y.dtype == dtype
  tolerance = 1e-12 if dtype == "float64" else 2e-6
  expected = loop(pool_window, x.astype(np.float64), windows)
  np.testing.assert_allclose(y, expected, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("symmetric", [True, False])
def test_full_detail_preserving_pooling_equals_loops(symmetric, x64):
  x = random((2, 7, 6, 3))
  y = lip_jax.detail_preserving_pool(
    jnp.asarray(x), ALPHA, LAMBDA, kernel=jnp.asarray(KERNEL), symmetric=symmetric
  )
  pool_window = detail_preserving(ALPHA, LAMBDA, symmetric=symmetric, kernel=KERNEL)
  np.testing.assert_allclose(y, loop(pool_window, x, WINDOWS[0]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
  ("windows", "expected"),
  [
    ({}, np.s_[:, ::2, ::2]),
    ({"window": 2, "stride": 2, "padding": 0}, np.s_[:, :6:2, ::2]),
    ({"window": 5, "stride": 2, "padding": 1}, np.s_[:, 1:6:2, 1:4:2]),
    ({"window": 1, "stride": 3, "padding": 0}, np.s_[:, ::3, ::3]),
  ],
)
def test_strided_pooling_takes_the_central_pixels(windows, expected):
  x = random((2, 7, 6, 3)).astype(np.float32)
  y = lip_jax.strided_pool(jnp.asarray(x), **windows)
  np.testing.assert_array_equal(y, x[expected])
  assert y.shape == lip_jax.average_pool(jnp.asarray(x), **windows).shape


@pytest.mark.parametrize(("alpha", "lam"), [(0.0, 1.5), (0.4, 0.0), (0.0, 3.0)])
def test_gradient_of_detail_preserving_pooling_at_the_ends_of_its_parameters(alpha, lam, x64):
  x = jnp.asarray(random((1, 5, 5, 2)))

  def total(alpha, lam):
    y = lip_jax.detail_preserving_pool(x, alpha, lam)
    return (y * jnp.asarray(random(y.shape, seed=3))).sum()

  step = 1e-7
  by_alpha, by_lambda = jax.grad(total, argnums=(0, 1))(alpha, lam)
  # One-sided where there is no other side.
  difference = (total(alpha + step, lam) - total(alpha, lam)) / step
  np.testing.assert_allclose(by_alpha, difference, rtol=1e-4, atol=1e-6)
  difference = (total(alpha, lam + step) - total(alpha, lam)) / step
  np.testing.assert_allclose(by_lambda, difference, rtol=1e-4, atol=1e-6)


def make_layers(dtype=jnp.float32, **windows):
  """One layer of each pooling, for three features, with parameters off their initial values."""
  rngs = nnx.Rngs(0)
  full = {"full": True, "dtype": dtype, **windows}
  layers = {
    "average": lan.AveragePool(**windows),
    "max": lan.MaxPool(**windows),
    "strided": lan.StridedPool(**windows),
    "soft": lan.SoftPool(**windows),
    "exp": lan.ExpPool(1.7, dtype=dtype, **windows),
    "lp": lan.LpPool(3.0, **windows),
    "dpp_lite_sym": lan.DetailPreservingPool(3, dtype=dtype, **windows),
    "dpp_lite_asym": lan.DetailPreservingPool(3, symmetric=False, dtype=dtype, **windows),
    "dpp_full_sym": lan.DetailPreservingPool(3, **full),
    "dpp_full_asym": lan.DetailPreservingPool(3, symmetric=False, **full),
    "lip_bottleneck": lan.LIP(lip_jax.Bottleneck(3, 3, 4, dtype=dtype, rngs=rngs), **windows),
    "lip_projection": lan.LIP(lip_jax.Projection(3, 3, dtype=dtype, rngs=rngs), **windows),
  }
  for seed, layer in enumerate(layers.values()):
    for path, variable in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
      noise = 0.5 * np.random.default_rng([seed, len(str(path))]).standard_normal(variable.shape)
      variable.set_value(variable[...] + jnp.asarray(noise, variable.dtype))
  return layers


NAMES = tuple(make_layers())


@pytest.mark.parametrize("name", NAMES)
def test_output_is_the_sum_of_importance_times_pixels(name, x64):
  layer = make_layers(jnp.float64)[name]
  x = jnp.asarray(random((2, 7, 6, 3)))
  importance = layer.importance(x)
  assert importance.shape == (2, 4, 3, 9, 3)
  assert (importance >= 0).all()
  if name != "lp":  # normalized by another norm: see its docstring
    np.testing.assert_allclose(importance.sum(axis=3), 1, rtol=1e-12)
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1e6)  # must not count
  pixels = np.stack(
    [padded[:, i : i + 7 : 2, j : j + 5 : 2] for i in range(3) for j in range(3)], axis=3
  )
  pixels = np.abs(pixels) if name == "lp" else pixels
  y = (np.asarray(importance) * pixels).sum(axis=3)
  np.testing.assert_allclose(layer(x), y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(name, x64):
  """With respect to the features and to all parameters."""
  layer = make_layers(jnp.float64)[name]
  graph, state = nnx.split(layer)
  x = jnp.asarray(random((1, 4, 5, 3), seed=1))

  @jax.jit
  def pool(x, state):
    return nnx.merge(graph, state, copy=True)(x)

  check_grads(pool, (x, nnx.to_pure_dict(state)), order=1, modes=["rev"], eps=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("name", NAMES)
def test_finite_where_features_are_zero_or_large(name, dtype):
  """Values and gradients: dead channels, constant windows and large activations are common."""
  graph, state = nnx.split(make_layers(window=2, padding=0)[name])

  @jax.jit
  def total(x):
    return nnx.merge(graph, state, copy=True)(x).astype(jnp.float32).sum()

  for value in (0.0, 1.0, -3.0, 1e3):
    x = jnp.full((1, 4, 4, 3), value, dtype).at[0, 1, 1, 0].add(1)
    y, gradient = jax.value_and_grad(total)(x)
    assert np.isfinite(y)
    assert np.isfinite(gradient.astype(np.float32)).all()


def test_exp_pooling_goes_from_average_to_maximum():
  x = jnp.asarray(random((2, 8, 8, 3)), jnp.float32)
  np.testing.assert_allclose(lip_jax.exp_pool(x, 0.0), lip_jax.average_pool(x), atol=1e-6)
  np.testing.assert_allclose(lip_jax.exp_pool(x, 1e4), lip_jax.max_pool(x), atol=1e-3)
  np.testing.assert_allclose(lip_jax.exp_pool(x, 1.0), lip_jax.soft_pool(x), atol=1e-6)


def test_lp_pooling_goes_from_mean_to_maximum_of_magnitudes():
  x = jnp.asarray(random((2, 8, 8, 3)), jnp.float32)
  np.testing.assert_allclose(lip_jax.lp_pool(x, 1), lip_jax.average_pool(jnp.abs(x)), atol=1e-6)
  np.testing.assert_allclose(lip_jax.lp_pool(x, 1e4), lip_jax.max_pool(jnp.abs(x)), atol=1e-2)


def test_detail_preserving_pooling_without_exponent_is_the_average():
  x = jnp.asarray(random((2, 8, 8, 3)), jnp.float32)
  y = lip_jax.detail_preserving_pool(x, 0.7, 0.0)
  np.testing.assert_allclose(y, lip_jax.average_pool(x), atol=1e-6)


def test_detail_preserving_pooling_with_tiny_details_and_no_average():
  """epsilon^lambda underflows in float32; the weights' ratio does not."""
  x = jnp.full((1, 4, 4, 1), 2.0)
  np.testing.assert_allclose(lip_jax.detail_preserving_pool(x, 0.0, 60.0), 2.0, rtol=1e-6)


def test_lip_pools_by_averages_in_its_first_training_steps():
  """Table 2, D: the step counter is part of the state and stands still in evaluation."""
  logits = lip_jax.Projection(3, 3, top="none", rngs=nnx.Rngs(0))
  logits.conv.kernel[...] = jnp.asarray(random((1, 1, 3, 3)), jnp.float32)
  layer = lan.LIP(logits, average_steps=2)
  x = jnp.asarray(random((1, 6, 6, 3)), jnp.float32)
  average, lip = lip_jax.average_pool(x), lip_jax.lip_pool(x, logits(x))
  assert abs(average - lip).max() > 0.1
  layer.eval()
  np.testing.assert_allclose(layer(x), average, atol=1e-6)
  layer.train()
  for expected in (average, average, lip, lip):
    np.testing.assert_allclose(layer(x), expected, atol=1e-6)
  layer.eval()
  np.testing.assert_allclose(layer(x), lip, atol=1e-6)
  assert int(layer.steps[...]) == 4


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda x: lip_jax.lp_pool(x, 0.5), "p must be at least 1, got 0.5"),
    (
      lambda x: lip_jax.exp_pool(x, jnp.ones(4)),
      r"beta must be .* per channel, \[3\], got .*\(4,\)",
    ),
    (lambda x: lip_jax.detail_preserving_pool(x, jnp.ones(2)), "alpha must be"),
    (
      lambda x: lip_jax.detail_preserving_pool(x, kernel=jnp.ones((2, 2, 3))),
      r"kernel \[window_h, window_w, C\] must be \(3, 3, 3\) for .* got \(2, 2, 3\)",
    ),
    (lambda x: lip_jax.detail_preserving_pool(x, epsilon=0.0), "epsilon must be positive"),
    (lambda x: lip_jax.strided_pool(x, padding=2), "padding must be between 0 and"),
    (
      lambda x: lip_jax.strided_pool(x, window=2),
      "central pixel to lie inside .* window \\(2, 2\\)",
    ),
  ],
)
def test_errors_say_what_was_expected(call, message):
  with pytest.raises(ValueError, match=message):
    call(jnp.zeros((1, 4, 4, 3)))
