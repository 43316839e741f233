import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_detection import OPERATIONS, reference
from jax.test_util import check_grads

from lip_jax.ops import losses

DTYPES = [(np.float64, 1e-14), (np.float32, 1e-6)]


def value_and_gradient(loss, x):
  @jax.jit
  def run(x):
    y, vjp = jax.vjp(loss, x)
    return y, vjp(jnp.ones_like(y))[0]

  return run(x)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_focal_loss_equals_the_reference(x64, dtype, tolerance):
  arrays, figures = reference("losses"), OPERATIONS["losses"]
  logits, targets = (jnp.asarray(arrays[f"focal/{n}"], dtype) for n in ("logits", "targets"))
  found = value_and_gradient(
    lambda x: losses.sigmoid_focal(x, targets, alpha=figures["alpha"], gamma=figures["gamma"]),
    logits,
  )
  for ours, name in zip(found, ("value", "gradient"), strict=True):
    assert ours.dtype == dtype
    theirs = arrays[f"focal/{name}"]
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("beta", OPERATIONS["losses"]["betas"])
def test_smooth_l1_equals_the_reference(x64, beta, dtype, tolerance):
  arrays = reference("losses")
  found = value_and_gradient(
    lambda x: losses.smooth_l1(x, beta=OPERATIONS["losses"]["betas"][beta]),
    jnp.asarray(arrays["smooth_l1/difference"], dtype),
  )
  for ours, name in zip(found, ("value", "gradient"), strict=True):
    theirs = arrays[f"smooth_l1/{beta}/{name}"]
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_loss_follows_its_formula(x64, gamma):
  logits, targets = np.linspace(-8, 8, 23), np.arange(23) % 2
  p = 1 / (1 + np.exp(-logits))
  p_t, alpha_t = np.where(targets, p, 1 - p), np.where(targets, 0.3, 0.7)
  expected = -alpha_t * (1 - p_t) ** gamma * np.log(p_t)

  @jax.jit
  def loss(x):
    return losses.sigmoid_focal(x, targets, alpha=0.3, gamma=gamma)

  np.testing.assert_allclose(loss(logits), expected, rtol=1e-12)
  check_grads(loss, (jnp.asarray(logits),), 1, ["rev"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_is_finite(dtype, gamma):
  logits = jnp.array([-3e4, -300, -90, 0, 90, 300, 3e4] * 2, dtype)
  targets = jnp.arange(14) < 7
  value, gradient = value_and_gradient(
    lambda x: losses.sigmoid_focal(x, targets, gamma=gamma), logits
  )
  assert value.dtype == jnp.float32
  assert np.isfinite(value).all()
  assert np.isfinite(np.float32(gradient)).all()
  assert value[0] == pytest.approx(0.25 * 3e4, rel=2e-3)
  assert value[6] == 0


def test_smooth_l1_without_a_parabola_and_far_out():
  d = jnp.array([-2.0, 0, 3, 3e38])
  value, gradient = value_and_gradient(lambda x: losses.smooth_l1(x, beta=0.0), d)
  np.testing.assert_array_equal(value, jnp.abs(d))
  np.testing.assert_array_equal(gradient, [-1, 0, 1, 1])
  value, gradient = value_and_gradient(lambda x: losses.smooth_l1(x, beta=1.0), d)
  np.testing.assert_allclose(value, [1.5, 0, 2.5, 3e38])
  np.testing.assert_array_equal(gradient, [-1, 0, 1, 1])
