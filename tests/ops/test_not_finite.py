"""NaN and infinity in the features: no pooling hides them, nor spreads them to other windows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax

SIZE = 9
WINDOWS = np.zeros((5, SIZE), bool)  # along an axis: which pixels a window of 3, stride 2, has
for _window in range(5):
  WINDOWS[_window, max(0, 2 * _window - 1) : 2 * _window + 2] = True
ADAPTIVE = np.zeros((4, SIZE), bool)  # of 9 pixels to 4
for _window in range(4):
  ADAPTIVE[_window, _window * SIZE // 4 : -((-(_window + 1) * SIZE) // 4)] = True


def _logits(x):
  return jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)


def _ones(x):
  return jnp.ones(x.shape[3])


POOLS = {
  "lip": lambda x: lip_jax.lip_pool(x, _logits(x)),
  "lip, reference": lambda x: lip_jax.lip_pool(x, _logits(x), implementation="reference"),
  "lip, range": lambda x: lip_jax.lip_pool(x, _logits(x), logit_range=(-1, 1)),
  "lip, mask": lambda x: lip_jax.lip_pool(x, _logits(x).at[0, 0, 0].set(-jnp.inf)),
  "gated": lambda x: lip_jax.gated_lip_pool(x, _logits(x), _ones(x), _ones(x)),
  "projected": lambda x: lip_jax.projected_lip_pool(
    x, _logits(x), jnp.eye(x.shape[3])[None, None], _ones(x), _ones(x)
  ),
  "adaptive": lambda x: lip_jax.adaptive_lip_pool(x, _logits(x), 4),
  "global": lambda x: lip_jax.global_lip_pool(x, _logits(x))[:, None, None],
  "average": lip_jax.average_pool,
  "max": lip_jax.max_pool,
  "strided": lip_jax.strided_pool,
  "exp": lambda x: lip_jax.exp_pool(x, 0.5),
  "exp, average": lambda x: lip_jax.exp_pool(x, 0.0),
  "soft": lip_jax.soft_pool,
  "lp, 1": lambda x: lip_jax.lp_pool(x, 1.0),
  "lp, 3": lambda x: lip_jax.lp_pool(x, 3.0),
  "detail-preserving": lip_jax.detail_preserving_pool,
  "detail-preserving, asymmetric": functools.partial(
    lip_jax.detail_preserving_pool, symmetric=False
  ),
  "detail-preserving, full": lambda x: lip_jax.detail_preserving_pool(
    x, kernel=jnp.full((3, 3, x.shape[3]), 0.2)
  ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("name", POOLS)
def test_what_is_not_finite_is_in_its_windows_and_in_no_other(name, dtype):
  windows = {"adaptive": ADAPTIVE, "global": np.ones((1, SIZE), bool)}.get(name, WINDOWS)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, SIZE, SIZE, 2)), dtype)
  pool = jax.jit(POOLS[name])
  clean = np.asarray(pool(x))
  assert np.isfinite(clean).all()
  for row, column in ((4, 4), (4, 6), (3, 8), (8, 1)):
    here = windows[:, row, None] & windows[None, :, column]
    if name == "strided":  # takes a window's central pixel and looks at no other
      here = (2 * np.arange(5) == row)[:, None] & (2 * np.arange(5) == column)[None]
    for value in (np.nan, np.inf):
      y = np.asarray(pool(x.at[1, row, column, 0].set(value)))
      expected = np.full(y[1, ..., 0].shape, False)
      expected |= here
      np.testing.assert_array_equal(np.isnan(y[1, ..., 0]), expected & np.isnan(value))
      np.testing.assert_array_equal(np.isposinf(y[1, ..., 0]), expected & np.isinf(value))
      np.testing.assert_allclose(y[0], clean[0], rtol=4 * float(jnp.finfo(dtype).eps), atol=1e-6)
      assert np.isfinite(y[1, ..., 1]).all()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("axis", [1, 2])
def test_adaptive_pooling_of_partly_masked_windows(size, axis):
  """5 to 2 and 8 to 3: whole rows or columns of a window are masked, by minus infinity."""
  pixels = {2: 5, 3: 8}[size]
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((1, pixels, pixels, 2)), jnp.float32)
  first = (slice(None),) * axis + (slice(0, 1),)
  masked, low = (_logits(x).at[first].set(value) for value in (-jnp.inf, -1e4))

  @jax.jit
  def run(x, logits):
    y, vjp = jax.vjp(lambda x, logits: lip_jax.adaptive_lip_pool(x, logits, size), x, logits)
    return y, *vjp(jnp.ones_like(y))

  for ours, theirs in zip(run(x, masked), run(x, low), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("pool", "value"),
  [
    (lip_jax.soft_pool, -np.inf),
    (lambda x: lip_jax.exp_pool(x, 0.5), -np.inf),
    (lambda x: lip_jax.exp_pool(x, -0.5), np.inf),
  ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_infinity_that_weighs_nothing_is_left_out(pool, value, dtype):
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, SIZE, SIZE, 2)), dtype)
  largest = jnp.finfo(dtype).max
  pool = jax.jit(pool)
  found, expected = (
    pool(x.at[0, 4, 4, 0].set(jnp.asarray(v, dtype))) for v in (value, np.sign(value) * largest)
  )
  assert np.isfinite(found).all()
  np.testing.assert_array_equal(found, expected)
  everywhere = pool(jnp.full((1, 5, 5, 1), value, dtype))  # or the largest number, in float16
  assert (np.sign(value) * everywhere >= largest).all()
