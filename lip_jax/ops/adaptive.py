"""LIP to a given output size, and over whole images, as pure functions.

Equation 5 of Gao, Wang and Wu, "LIP: Local Importance-based Pooling", ICCV 2019, over windows that
are cut to divide the image instead of having a fixed size. With constant logits both are averages:
adaptive average pooling, and the global average pooling in front of a classifier.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lip_jax.ops.lip_pool import lip_pool
from lip_jax.ops.windows import IntOrPair, accumulation_dtype, check_array, check_logits, pair

# lip_pool unrolls the pixels of a window: forward and backward compile in a second up to here, in
# more than a minute for windows of 14x14 (one CPU).
UNROLLED = 16


def adaptive_lip_pool(
  x: jax.Array,
  logits: jax.Array,
  output_size: IntOrPair,
  *,
  logit_range: tuple[float, float] | None = None,
) -> jax.Array:
  """Computes `sum(x * exp(logits)) / sum(exp(logits))` over each of h x w windows.

  Window i of h covers the rows from floor(i * H / h) up to, but without, ceil((i + 1) * H / h), and
  columns alike: as PyTorch's AdaptiveAvgPool2d, which constant logits give. Neighbouring windows
  share a row where h does not divide H.

  Sums run in float32 (float64 for float64 inputs) and are cast once, at the end. The result and
  both gradients are finite for logits of magnitude up to 1e4 in float32, bfloat16 and float16.

  Args:
    x: features, [N, H, W, C], floating point.
    logits: as for `lip_pool`.
    output_size: of the result in pixels, an int or a pair (h, w), at most (H, W).
    logit_range: as for `lip_pool`.

  Returns:
    [N, h, w, C], in the dtype of x.

  Raises:
    ValueError: shapes that do not match, or an output_size below 1 or larger than the image.
    TypeError: x or logits that are not floating point.
  """
  size = pair("output_size", output_size)
  check_array("x", x)
  check_logits(x, logits)
  image = (x.shape[1], x.shape[2])
  for out, n in zip(size, image, strict=True):
    if not 1 <= out <= n:
      raise ValueError(
        f"output_size must be between 1 and the size of the image, {image}, got {output_size}; "
        "pooling only makes images smaller"
      )
  if image[0] % size[0] == 0 and image[1] % size[1] == 0:
    window = (image[0] // size[0], image[1] // size[1])
    if window[0] * window[1] <= UNROLLED:
      return lip_pool(x, logits, window=window, stride=window, padding=0, logit_range=logit_range)
  dtype = accumulation_dtype(x, logits)
  wide = logits.astype(dtype)
  sums = x.astype(dtype), jnp.ones_like(wide), wide
  for axis, out in zip((1, 2), size, strict=True):
    sums = _pool_axis(*sums, axis, out)
  weighted, total, _ = sums
  return (weighted / total).astype(x.dtype)


def global_lip_pool(x: jax.Array, logits: jax.Array) -> jax.Array:
  """Computes `sum(x * exp(logits)) / sum(exp(logits))` over all pixels of each image.

  The 1 x 1 case of `adaptive_lip_pool`, with its precision, range and errors: [N, C], in the dtype
  of x.
  """
  check_array("x", x)
  check_logits(x, logits)
  if 0 in x.shape[1:3]:
    raise ValueError(f"an image needs at least one pixel, got x of shape {tuple(x.shape)}")
  dtype = accumulation_dtype(x, logits)
  importance = jax.nn.softmax(logits.astype(dtype), axis=(1, 2))
  return jnp.sum(x.astype(dtype) * importance, axis=(1, 2)).astype(x.dtype)


def _pool_axis(
  weighted: jax.Array, total: jax.Array, shift: jax.Array, axis: int, out: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Merges partial sums along one axis into those of `out` windows.

  Partial sums are (sum(x * exp(l - shift)), sum(exp(l - shift)), shift), a pixel's being (x, 1, l).
  Their merging is associative, so rows go first and columns second: that gathers each pixel at most
  twice per axis. A window's own largest shift is subtracted before exp, so nothing overflows; it
  cancels in the ratio, so no gradient flows through it.
  """
  n = weighted.shape[axis]
  if n % out == 0:

    def windows(a):
      return a.reshape(*a.shape[:axis], out, n // out, *a.shape[axis + 1 :])

    shifts = windows(shift)
  else:
    starts = np.arange(out) * n // out
    ends = -(np.arange(1, out + 1) * -n // out)
    pixels = starts[:, None] + np.arange(np.max(ends - starts))
    others = tuple(d for d in range(weighted.ndim + 1) if d not in (axis, axis + 1))
    inside = np.expand_dims(pixels < ends[:, None], others)
    pixels = np.minimum(pixels, ends[:, None] - 1)  # no other window's: NaN stays where it is

    def windows(a):
      return jnp.take(a, pixels, axis=axis)

    shifts = jnp.where(inside, windows(shift), -jnp.inf)
  largest = lax.stop_gradient(shifts.max(axis=axis + 1, keepdims=True))
  # Where all are masked, by minus infinity, sums are zero: others of the window may follow.
  scale = jnp.exp(shifts - jnp.where(jnp.isneginf(largest), 0, largest))
  return (
    (windows(weighted) * scale).sum(axis=axis + 1),
    (windows(total) * scale).sum(axis=axis + 1),
    largest.squeeze(axis + 1),
  )
