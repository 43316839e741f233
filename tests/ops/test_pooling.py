import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_weights import image
from jax.test_util import check_grads

import lip_jax
from lip_jax.distributed import sharding
from lip_jax.ops.kernels import xla
from lip_jax.ops.windows import Geometry

DATA = Path(__file__).parents[1] / "data"
OP_CASES = json.loads((DATA / "reference.json").read_text())["op"]
GEOMETRIES = [
  # window, stride, padding, (H, W)
  (3, 2, 1, (14, 14)),
  (3, 2, 1, (13, 9)),
  (2, 2, 0, (8, 6)),
  (2, 2, 1, (5, 6)),
  (5, 3, 2, (11, 16)),
  (3, 1, 1, (6, 7)),
  (2, 3, 0, (10, 8)),
  (1, 2, 0, (5, 5)),
  ((3, 2), (1, 2), (1, 0), (6, 8)),
  (3, 2, 1, (1, 1)),
]


def random(key, shape, dtype=jnp.float32, scale=1.0):
  return jnp.asarray(scale * np.random.default_rng(key).standard_normal(shape), dtype)


def loop_pool(x, logits, window, stride, padding):
  """Equation 5 in float64, one window at a time."""
  (kh, kw), (sh, sw), (ph, pw) = (
    v if isinstance(v, tuple) else (v, v) for v in (window, stride, padding)
  )
  x = np.asarray(x, np.float64)
  logits = np.broadcast_to(np.asarray(logits, np.float64), x.shape)
  n, height, width, c = x.shape
  out = np.zeros((n, (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1, c))
  for i in range(out.shape[1]):
    for j in range(out.shape[2]):
      rows = slice(max(0, i * sh - ph), i * sh - ph + kh)
      columns = slice(max(0, j * sw - pw), j * sw - pw + kw)
      part = logits[:, rows, columns]
      weights = np.exp(part - part.max(axis=(1, 2), keepdims=True))
      out[:, i, j] = (x[:, rows, columns] * weights).sum(axis=(1, 2)) / weights.sum(axis=(1, 2))
  return out


@pytest.mark.parametrize(
  "options", [{}, {"implementation": "reference"}, {"logit_range": (-25, 25)}]
)
@pytest.mark.parametrize("case", OP_CASES, ids=lambda case: case["name"])
def test_equals_the_authors_implementation(case, options):
  expected = np.load(DATA / "lip_op.npz")
  name, shape = case["name"], tuple(case["shape"])
  to_nhwc = (0, 2, 3, 1)
  x = jnp.asarray(image(f"op/{name}/x", shape).transpose(to_nhwc))
  logits = jnp.asarray(
    (image(f"op/{name}/logit", shape) * np.float32(case["logit_scale"])).transpose(to_nhwc)
  )
  y, vjp = jax.vjp(
    lambda x, logits: lip_jax.lip_pool(
      x,
      logits,
      window=case["window"],
      stride=case["stride"],
      padding=case["padding"],
      **options,
    ),
    x,
    logits,
  )
  cotangent = image(f"op/{name}/cotangent", expected[f"{name}/y"].shape).transpose(to_nhwc)
  dx, dlogits = vjp(jnp.asarray(cotangent))
  for ours, key in ((y, "y"), (dx, "dx"), (dlogits, "dlogit")):
    theirs = expected[f"{name}/{key}"].transpose(to_nhwc)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=key)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("window", "stride", "padding", "size"), GEOMETRIES)
def test_equals_a_loop_over_windows(window, stride, padding, size, channels):
  x = random(0, (2, *size, 3))
  logits = random(1, (2, *size, channels), scale=3.0)
  geometry = {"window": window, "stride": stride, "padding": padding}
  expected = loop_pool(x, logits, **geometry)
  for options in ({}, {"implementation": "reference"}, {"logit_range": (-20, 20)}):
    y = lip_jax.lip_pool(x, logits, **geometry, **options)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("logit_range", [None, (-20, 20)])
@pytest.mark.parametrize(("window", "stride", "padding", "size"), GEOMETRIES)
def test_gradients_against_finite_differences(
  x64, window, stride, padding, size, channels, logit_range
):
  x = random(0, (1, *size, 3), jnp.float64)
  logits = random(1, (1, *size, channels), jnp.float64)
  check_grads(
    lambda x, logits: lip_jax.lip_pool(
      x, logits, window=window, stride=stride, padding=padding, logit_range=logit_range
    ),
    (x, logits),
    order=1,
    modes=["rev"],
  )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("window", "stride", "padding", "size"), GEOMETRIES)
def test_form_for_tpu_equals_the_other(window, stride, padding, size, channels):
  """Window sums, chosen when compiling for TPU, give what strided slices give."""
  geometry = Geometry(*(v if isinstance(v, tuple) else (v, v) for v in (window, stride, padding)))
  x, logits = random(0, (2, *size, 3)), random(1, (2, *size, channels), scale=3.0)
  a = random(2, (2, *geometry.output_size(size), 3))

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def run(forward, backward, x, logits, a):
    y, _, total = forward(x, logits, geometry, 0.5)
    return y, total, *backward(x, logits, y, None, a / total, geometry, 0.5)

  sums = run(xla._forward_sums, xla._backward_sums, x, logits, a)
  slices = run(xla._forward_slices, xla._backward_slices, x, logits, a)
  for one, other in zip(sums, slices, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("magnitude", [1e2, 1e3, 1e4])
def test_large_logits_stay_finite_and_reach_the_limit(dtype, magnitude):
  """Far apart, the largest logit of a window takes it all: neighbours may be 2e4 apart."""
  rng = np.random.default_rng(0)
  shape = (2, 9, 9, 4)
  levels = np.linspace(-magnitude, magnitude, 81)  # distinct by far more than rounding
  logits = np.stack([rng.permutation(levels).reshape(9, 9) for _ in range(8)], axis=-1).reshape(
    9, 9, 2, 4
  )
  logits = jnp.asarray(logits.transpose(2, 0, 1, 3), dtype)
  x = random(0, shape, dtype)
  y, vjp = jax.vjp(lip_jax.lip_pool, x, logits)
  expected = loop_pool(x, logits, 3, 2, 1)
  assert y.dtype == dtype
  np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=1e-2, atol=1e-2)
  if dtype == jnp.float32:
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
  for gradient in vjp(jnp.ones_like(y)):
    assert gradient.dtype == dtype
    assert np.isfinite(np.asarray(gradient, np.float64)).all()


@pytest.mark.parametrize("value", [-1e4, -200.0, 0.0, 7.0, 1e4])
def test_constant_logits_average(value):
  x = random(0, (2, 13, 8, 5))
  y, vjp = jax.vjp(lip_jax.lip_pool, x, jnp.full(x.shape, value))
  expected, expected_vjp = jax.vjp(lip_jax.average_pool, x)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
  g = random(1, y.shape)
  np.testing.assert_allclose(vjp(g)[0], expected_vjp(g)[0], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    expected, loop_pool(x, jnp.zeros_like(x), 3, 2, 1), rtol=1e-5, atol=1e-6
  )


def test_large_multiples_of_the_features_approach_max_pooling():
  x = random(0, (2, 14, 14, 3))
  errors = [
    float(jnp.abs(lip_jax.lip_pool(x, beta * x) - lip_jax.max_pool(x)).max())
    for beta in (1.0, 10.0, 100.0, 3000.0)
  ]
  assert errors == sorted(errors, reverse=True)
  assert errors[-1] < 1e-4


def test_the_features_as_logits_give_softpool():
  x = random(0, (2, 8, 8, 3))
  weights = np.exp(np.asarray(x, np.float64))
  blocks = lambda a: a.reshape(2, 4, 2, 4, 2, 3).sum(axis=(2, 4))  # noqa: E731
  expected = blocks(np.asarray(x) * weights) / blocks(weights)
  y = lip_jax.lip_pool(x, x, window=2, stride=2, padding=0)
  np.testing.assert_allclose(y, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_rounds_once(dtype):
  """Within one rounding of the float64 result for the same inputs, forward and backward."""
  x, logits = random(0, (2, 12, 12, 8), dtype), random(1, (2, 12, 12, 8), dtype, scale=3.0)
  y, vjp = jax.vjp(lip_jax.lip_pool, x, logits)
  g = random(2, y.shape, dtype)
  exact = loop_pool(x, logits, 3, 2, 1)
  unit = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=unit, atol=1e-6)
  wide = jax.vjp(lip_jax.lip_pool, x.astype(jnp.float32), logits.astype(jnp.float32))[1]
  for narrow, full in zip(vjp(g), wide(g.astype(jnp.float32)), strict=True):
    np.testing.assert_allclose(np.asarray(narrow, np.float64), full, rtol=unit, atol=1e-6)


def test_under_jit_and_vmap():
  x, logits = random(0, (3, 2, 9, 9, 4)), random(1, (3, 2, 9, 9, 4))
  expected = jnp.stack([lip_jax.lip_pool(a, b) for a, b in zip(x, logits, strict=True)])
  for options in ({}, {"logit_range": (-10, 10)}):
    pool = lambda a, b, options=options: lip_jax.lip_pool(a, b, **options)  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.vmap(pool))(x, logits), expected, rtol=1e-5, atol=1e-6)
    loss = lambda a, b, pool=pool: jnp.square(pool(a, b)).sum()  # noqa: E731
    batched = jax.vmap(jax.grad(loss, argnums=(0, 1)))(x, logits)
    single = jax.grad(loss, argnums=(0, 1))(x[1], logits[1])
    for one, other in zip(batched, single, strict=True):
      np.testing.assert_allclose(one[1], other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("logit_range", [None, (-10, 10)])
def test_sharded_over_the_batch_without_communication(logit_range):
  mesh = sharding.make_mesh()
  assert mesh.size == 8
  x, logits = random(0, (16, 9, 9, 4)), random(1, (16, 9, 9, 4))

  @jax.jit
  def gradients(x, logits):
    y, vjp = jax.vjp(lambda a, b: lip_jax.lip_pool(a, b, logit_range=logit_range), x, logits)
    return y, vjp(y)

  split = jax.device_put((x, logits), sharding.over_batch(mesh))
  compiled = gradients.lower(*split).compile()
  assert not any(name in compiled.as_text() for name in ("all-reduce", "all-gather", "permute"))
  y, (dx, dlogits) = compiled(*split)
  assert y.sharding.is_equivalent_to(sharding.over_batch(mesh), y.ndim)
  whole = gradients(x, logits)
  for one, other in zip((y, dx, dlogits), (whole[0], *whole[1]), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_max_pool_against_windows():
  x = random(0, (2, 9, 12, 3))
  np.testing.assert_allclose(
    lip_jax.max_pool(x), loop_pool(x, 1e6 * x.astype(jnp.float32), 3, 2, 1), rtol=1e-6
  )


X = jnp.zeros((1, 8, 8, 2))


@pytest.mark.parametrize(
  ("error", "arguments", "message"),
  [
    (ValueError, {"padding": 2}, r"between 0 and window // 2 = 1 for window 3, got 2"),
    (ValueError, {"window": (2, 5), "padding": (1, 3)}, r"window // 2 = 2 for window 5, got 3"),
    (ValueError, {"padding": -1}, "got -1"),
    (ValueError, {"stride": 0}, "at least 1"),
    (ValueError, {"window": (3, 3, 3)}, r"a pair \(h, w\) of ints, got \(3, 3, 3\)"),
    (ValueError, {"window": 2.5}, "ints, got 2.5"),
    (ValueError, {"window": 9, "padding": 0}, "does not fit into an image of"),
    (ValueError, {"implementation": "fast"}, "'fast'; choose one of 'auto', 'reference', 'xla'"),
    (ValueError, {"logits": jnp.zeros((1, 8, 8, 3))}, r"\(1, 8, 8, 1\); got \(1, 8, 8, 3\)"),
    (ValueError, {"x": jnp.zeros((8, 8, 2))}, r"\[N, H, W, C\], got shape \(8, 8, 2\)"),
    (ValueError, {"logit_range": (0, 200)}, "at most 80 apart"),
    (ValueError, {"logit_range": (1, 0)}, "logit_range"),
    (ValueError, {"logit_range": 5}, "a pair"),
    (TypeError, {"x": jnp.zeros((1, 8, 8, 2), jnp.int32)}, "x must be floating point, got int32"),
  ],
)
def test_errors_say_what_was_given_and_expected(error, arguments, message):
  with pytest.raises(error, match=message):
    lip_jax.lip_pool(**{"x": X, "logits": X, **arguments})
