import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lip_jax
from lip_jax import AdaptiveLIP, GlobalLIP, Projection
from lip_jax.ops.adaptive import adaptive_lip_pool, global_lip_pool

SIZES = [
  # (H, W), output size
  ((7, 5), (3, 2)),
  ((9, 4), (4, 4)),  # one axis divides
  ((8, 6), (4, 3)),  # both do
  ((12, 10), (2, 1)),  # both do, with windows too large to unroll
  ((11, 13), (7, 5)),
  ((5, 5), (5, 5)),
  ((6, 7), 1),
]
GLOBAL = ((6, 7), None)


def random(seed, shape, dtype=jnp.float32, scale=1.0):
  return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(array):
  return np.asarray(array, np.float64)


@functools.cache
def pool(output_size):
  """Compiled adaptive pooling; global pooling for None."""
  if output_size is None:
    return jax.jit(global_lip_pool)
  return jax.jit(lambda x, logits: adaptive_lip_pool(x, logits, output_size))


@functools.cache
def gradients(output_size):
  """Compiled (x, logits, g) -> (y, dx, dlogits)."""

  def run(x, logits, g):
    y, vjp = jax.vjp(pool(output_size), x, logits)
    return y, *vjp(g)

  return jax.jit(run)


def loop_pool(x, logits, output_size):
  """Equation 5 in float64, one window at a time."""
  h, w = output_size if isinstance(output_size, tuple) else (1, 1)
  x = wide(x)
  logits = np.broadcast_to(wide(logits), x.shape)
  n, height, width, c = x.shape
  out = np.zeros((n, h, w, c))
  for i in range(h):
    for j in range(w):
      rows = slice(i * height // h, ((i + 1) * height + h - 1) // h)
      columns = slice(j * width // w, ((j + 1) * width + w - 1) // w)
      part = logits[:, rows, columns]
      weights = np.exp(part - part.max(axis=(1, 2), keepdims=True))
      out[:, i, j] = (x[:, rows, columns] * weights).sum(axis=(1, 2)) / weights.sum(axis=(1, 2))
  return out[:, 0, 0] if output_size is None else out


@pytest.mark.parametrize(("size", "output_size"), [*SIZES, GLOBAL, ((1, 1), None)])
def test_equals_a_loop_over_windows(size, output_size):
  x, logits = random(0, (2, *size, 3)), random(1, (2, *size, 3), scale=3.0)
  y = pool(output_size)(x, logits)
  expected = loop_pool(x, logits, output_size)
  assert y.shape == expected.shape
  np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("value", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize(("size", "output_size"), [*SIZES, GLOBAL])
def test_constant_logits_average(size, output_size, value):
  x = random(0, (2, *size, 3))
  y = pool(output_size)(x, jnp.full(x.shape, value))
  np.testing.assert_allclose(y, loop_pool(x, jnp.zeros_like(x), output_size), atol=1e-6)


@pytest.mark.parametrize(("size", "output_size"), SIZES)
def test_constant_logits_give_pytorchs_adaptive_average(size, output_size):
  torch = pytest.importorskip("torch")
  x = random(0, (2, *size, 3))
  theirs = torch.nn.AdaptiveAvgPool2d(output_size)(
    torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())
  )
  y = pool(output_size)(x, jnp.zeros_like(x))
  np.testing.assert_allclose(y, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-6)


def finite_differences(f, array, g, step=1e-5):
  """Gradient of sum(g * f(array)), one element at a time."""
  out = np.zeros_like(array)
  for index in np.ndindex(array.shape):
    moved = np.zeros_like(array)
    moved[index] = step
    out[index] = ((f(array + moved) - f(array - moved)) * g).sum() / (2 * step)
  return out


@pytest.mark.parametrize(
  ("size", "output_size", "channels"),
  [
    ((7, 5), (3, 2), 1),
    ((7, 5), (3, 2), 2),
    ((9, 4), (4, 4), 1),
    ((6, 4), (3, 2), 1),
    ((6, 10), (1, 2), 2),
    ((5, 6), None, 1),
    ((5, 6), None, 2),
  ],
)
def test_gradients_against_finite_differences(x64, size, output_size, channels):
  x = wide(random(0, (1, *size, 2), jnp.float64))
  logits = wide(random(1, (1, *size, channels), jnp.float64))
  expected = loop_pool(x, logits, output_size)
  g = wide(random(2, expected.shape, jnp.float64))
  y, dx, dlogits = gradients(output_size)(x, logits, g)
  assert y.dtype == jnp.float64
  np.testing.assert_allclose(y, expected, rtol=1e-13, atol=1e-14)
  by_x = finite_differences(lambda a: loop_pool(a, logits, output_size), x, g)
  np.testing.assert_allclose(dx, by_x, rtol=1e-7, atol=1e-9)
  by_logits = finite_differences(lambda a: loop_pool(x, a, output_size), logits, g)
  np.testing.assert_allclose(dlogits, by_logits, rtol=1e-7, atol=1e-9)


CASES = [((7, 5), (3, 2)), ((6, 4), (3, 2)), GLOBAL]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("size", "output_size"), CASES)
def test_low_precision_and_large_logits(size, output_size, dtype):
  """One rounding; the largest logit of a window takes it all, ties share, up to 2e4 apart."""
  x = random(0, (2, *size, 4), dtype)
  unit = float(jnp.finfo(dtype).eps)
  largest = jnp.asarray(1e4 * np.random.default_rng(1).integers(-1, 2, x.shape), dtype)
  for logits in (random(1, x.shape, dtype, scale=3.0), largest):
    expected = loop_pool(x, logits, output_size)
    arguments = x, logits, random(2, expected.shape, dtype)
    y, *narrow = gradients(output_size)(*arguments)
    assert y.dtype == dtype
    np.testing.assert_allclose(wide(y), expected, rtol=unit, atol=1e-6)
    _, *full = gradients(output_size)(*(a.astype(jnp.float32) for a in arguments))
    for ours, exact in zip(narrow, full, strict=True):
      assert ours.dtype == dtype
      assert np.isfinite(wide(exact)).all()
      np.testing.assert_allclose(wide(ours), exact, rtol=unit, atol=1e-6)


@pytest.mark.parametrize(("layer", "shape"), [(GlobalLIP, (2, 4)), (AdaptiveLIP, (2, 3, 2, 4))])
def test_layers_start_as_averages_and_learn(layer, shape):
  x = random(0, (2, 7, 6, 4))
  options = () if layer is GlobalLIP else ((3, 2),)
  module = layer(Projection(4, 4, rngs=nnx.Rngs(0)), *options)
  graphdef, state = nnx.split(module)

  @jax.jit
  def run(state):
    def loss(state):
      module = nnx.merge(graphdef, state)
      y = module(x)
      return jnp.square(y).sum(), (y, module.logits(x))

    return jax.grad(loss, has_aux=True)(state)

  gradient, (y, _) = run(state)
  size = options[0] if options else None
  average = loop_pool(x, jnp.zeros_like(x), size)
  assert y.shape == shape
  np.testing.assert_allclose(y, average, atol=1e-6)
  assert np.abs(gradient["logits"]["conv"]["kernel"][...]).max() > 0
  state["logits"]["conv"]["kernel"] = state["logits"]["conv"]["kernel"].replace(
    random(1, (1, 1, 4, 4))
  )
  _, (y, logits) = run(state)
  np.testing.assert_allclose(y, loop_pool(x, logits, size), rtol=1e-5, atol=1e-6)
  assert np.abs(y - average).max() > 0.1


def test_equals_lip_pool_where_windows_are_regular():
  x, logits = random(0, (2, 8, 8, 3)), random(1, (2, 8, 8, 3))
  expected = lip_jax.lip_pool(x, logits, window=2, stride=2, padding=0)
  np.testing.assert_array_equal(adaptive_lip_pool(x, logits, 4), expected)


X = jnp.zeros((1, 8, 6, 2))


@pytest.mark.parametrize(
  ("error", "arguments", "message"),
  [
    (ValueError, {"output_size": 0}, r"between 1 and the size of the image, \(8, 6\), got 0"),
    (ValueError, {"output_size": (2, -1)}, r"got \(2, -1\)"),
    (ValueError, {"output_size": 7}, "got 7; pooling only makes images smaller"),
    (ValueError, {"output_size": (2, 2, 2)}, r"output_size must be an int or a pair \(h, w\)"),
    (ValueError, {"output_size": 2.5}, "ints, got 2.5"),
    (ValueError, {"logits": jnp.zeros((1, 8, 6, 3))}, r"\(1, 8, 6, 1\); got \(1, 8, 6, 3\)"),
    (ValueError, {"logits": jnp.zeros((1, 8, 5, 2))}, r"got \(1, 8, 5, 2\)"),
    (ValueError, {"x": jnp.zeros((8, 6, 2))}, r"\[N, H, W, C\], got shape \(8, 6, 2\)"),
    (ValueError, {"logit_range": (0, 200)}, "at most 80 apart"),
    (TypeError, {"logits": jnp.zeros((1, 8, 6, 2), jnp.int32)}, "logits must be floating point"),
  ],
)
def test_errors_say_what_was_given_and_expected(error, arguments, message):
  arguments = {"x": X, "logits": X, "output_size": 2, **arguments}
  with pytest.raises(error, match=message):
    adaptive_lip_pool(**arguments)


def test_errors_of_global_pooling():
  with pytest.raises(ValueError, match=r"got \(1, 8, 6, 3\)"):
    global_lip_pool(X, jnp.zeros((1, 8, 6, 3)))
  with pytest.raises(ValueError, match=r"at least one pixel, got x of shape \(1, 0, 6, 2\)"):
    global_lip_pool(X[:, :0], X[:, :0])
  with pytest.raises(TypeError, match="x must be floating point, got int32"):
    global_lip_pool(X.astype(jnp.int32), X)
