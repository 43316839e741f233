"""Losses of detectors, element by element."""

import jax
import jax.numpy as jnp


def sigmoid_focal(
  logits: jax.Array, targets: jax.Array, *, alpha: float = 0.25, gamma: float = 2.0
) -> jax.Array:
  """Focal loss of sigmoids, `-alpha_t (1 - p_t)^gamma log p_t` (Lin et al., ICCV 2017, equation 5).

  Finite with finite gradients for logits of any magnitude: computed from the logarithms of p_t and
  of 1 - p_t, which neither underflow nor overflow.

  Args:
    logits: of any shape.
    targets: of the same shape, 1 for what should be found and 0 for all else.
    alpha: weight of targets that are 1; all others weigh 1 - alpha.

  Returns:
    Of the shape of logits, in at least float32.
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  positive = targets > 0.5
  wrong = jnp.where(positive, -logits, logits)  # the logit of 1 - p_t
  discount = jnp.exp(-gamma * jax.nn.softplus(-wrong))
  return jnp.where(positive, alpha, 1 - alpha) * discount * jax.nn.softplus(wrong)


def smooth_l1(difference: jax.Array, *, beta: float) -> jax.Array:
  """`d^2 / (2 beta)` where |d| < beta, else `|d| - beta / 2`; with beta 0 the absolute value.

  Args:
    difference: of any shape.
    beta: where the parabola ends.

  Returns:
    Of the shape of difference, in at least float32.
  """
  difference = difference.astype(jnp.promote_types(difference.dtype, jnp.float32))
  size = difference * jnp.sign(difference)  # whose derivative at 0 is 0, unlike that of jnp.abs
  if beta == 0:
    return size
  inside = jnp.minimum(size, beta)  # the square of what lies outside could overflow
  return jnp.where(size < beta, 0.5 * inside**2 / beta, size - 0.5 * beta)
