"""Convolutions in forms that are quicker than XLA's own.

On GPUs those of images, on TPUs and in gradients on CPUs those of channels in groups; on CPUs, for
networks in evaluation, `lip_jax.fold_batch_norm` gives others to its copy.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lip_jax.ops.by_image import by_image, images_at_a_time
from lip_jax.ops.kernels.dispatch import symbolic, targets
from lip_jax.ops.normalization import explicit

# With fewer tiles of 2x2 pixels the kernel's transform costs more than it saves.
_FEWEST_TILES = 128
# Channels of a block of groups: what fills the matrix units of TPUs (half of v6e's).
_BLOCK = 128

Padding = Sequence[tuple[int, int]]  # of rows and columns: before and behind


def conv_general_dilated(
  x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: Any, **options: Any
) -> jax.Array:
  """`jax.lax.conv_general_dilated` of [N, H, W, in] and [h, w, in, out], as `nnx.Conv` calls it.

  On CPUs and in float32, up to rounding: 1x1 kernels are matrix products, and 3x3 kernels of stride
  one take Winograd's form. All others are left to XLA, as are all of programs whose batch is a
  symbol; those of channels in groups are `of_groups`.
  """
  if options["feature_group_count"] > 1:
    return of_groups(x, kernel, strides, padding, **options)

  def general(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)

  if not (x.dtype == kernel.dtype == jnp.float32 and _is_plain(x, padding, options)):
    return general(x, kernel)
  if kernel.shape[:2] == (1, 1) and not any(map(any, padding)):

    def form(x: jax.Array, kernel: jax.Array) -> jax.Array:
      return _product(x[:, :: strides[0], :: strides[1]], kernel[0, 0])

  elif kernel.shape[:2] == (3, 3) and strides == (1, 1) and _tiles(x, padding) >= _FEWEST_TILES:

    def form(x: jax.Array, kernel: jax.Array) -> jax.Array:
      some = functools.partial(_winograd, padding=padding)
      return some(x, kernel) if images_at_a_time(x) == len(x) else by_image(some, (x,), kernel)

  else:
    return general(x, kernel)
  return lax.platform_dependent(x, kernel, cpu=form, default=general)


def _is_plain(x: jax.Array, padding: Any, options: dict[str, Any]) -> bool:
  """Of [N, H, W, C] without dilations, all sizes, padding, dtypes and shardings left to us."""
  dilations = (*options["lhs_dilation"], *options["rhs_dilation"])
  return (
    x.ndim == 4
    and not symbolic(x)
    and set(dilations) == {1}
    and options.get("out_sharding") is None
    and options.get("preferred_element_type") is None
    and not isinstance(padding, str)
    and min(map(min, padding)) >= 0
    and not explicit(x)
  )


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[N, H, W, in] by [in, out]."""
  return (x.reshape(-1, x.shape[3]) @ kernel).reshape(*x.shape[:3], -1)


def _tiles(x: jax.Array, padding: Padding) -> int:
  rows, columns = _outputs(x, padding)
  return x.shape[0] * -(-rows // 2) * -(-columns // 2)


def _outputs(x: jax.Array, padding: Padding) -> tuple[int, int]:
  """Height and width of what a 3x3 kernel makes of x."""
  return x.shape[1] + sum(padding[0]) - 2, x.shape[2] + sum(padding[1]) - 2


def _winograd(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
  """F(2x2, 3x3) of Lavin and Gray, CVPR 2016: 16 products for 2x2 outputs rather than 36.

  A pixel that is not finite makes all four outputs of a tile NaN.
  """
  rows, columns = _outputs(x, padding)
  high, wide = 2 * -(-rows // 2), 2 * -(-columns // 2)
  (top, _), (left, _) = padding
  grow = ((top, high + 2 - top - x.shape[1]), (left, wide + 2 - left - x.shape[2]))
  x = jnp.pad(x, ((0, 0), *grow, (0, 0)))

  sums = []
  of_rows = _of_inputs(*(x[:, i : i + high : 2] for i in range(4)))
  for pixels, weights in zip(of_rows, _of_kernel(*kernel), strict=True):
    of_columns = _of_inputs(*(pixels[:, :, j : j + wide : 2] for j in range(4)))
    pairs = zip(of_columns, _of_kernel(*weights), strict=True)
    sums.append(_to_outputs(*(_product(a, b) for a, b in pairs)))
  by_column = [jnp.stack(_to_outputs(*column), axis=2) for column in zip(*sums, strict=True)]
  y = jnp.stack(by_column, axis=4)  # [N, tile, row in it, tile, column in it, out]
  return y.reshape(len(x), high, wide, -1)[:, :rows, :columns]


# The three transforms along one axis: B^T, G and A^T of the paper's equation 8.


def _of_inputs(a, b, c, d):
  return a - c, b + c, c - b, b - d


def _of_kernel(a, b, c):
  return a, (a + b + c) / 2, (a - b + c) / 2, c


def _to_outputs(a, b, c, d):
  return a + b + c, b - c - d


def of_images(
  x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: Any, **options: Any
) -> jax.Array:
  """As `conv_general_dilated`, for the first of a network: few channels, a large kernel, stride 2.

  On NVIDIA GPUs it is `over_cells`, but for images of odd sizes and programs whose batch is a
  symbol; elsewhere XLA's own.
  """

  def general(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)

  size = len(kernel)
  fits = kernel.shape[1] == size and size % 2 and strides == (2, 2) and x.ndim == 4
  fits = fits and tuple(padding) == ((size // 2, size // 2),) * 2 and "cuda" in targets()
  if not fits or symbolic(x) or x.shape[1] % 2 or x.shape[2] % 2:
    return general(x, kernel)
  return lax.platform_dependent(
    x, kernel, cuda=lambda x, kernel: over_cells(x, kernel, **options), default=general
  )


def over_cells(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
  """Convolution with stride 2 as one of stride 1 over cells of 2x2 pixels, equal up to rounding.

  The cells have four times the channels, and some of zeros to make them a multiple of 8: cuDNN's
  fast kernels ask for that, and are twice as quick on images.

  Args:
    x: [N, H, W, in], H and W even.
    kernel: [size, size, in, out], size odd; padding is size // 2.
    options: further ones of `jax.lax.conv_general_dilated`.

  Returns:
    [N, H / 2, W / 2, out].
  """
  size, padding = len(kernel), len(kernel) // 2
  grow = ((padding % 2, (size + padding) % 2),) * 2  # to whole cells
  kernel = _to_cells(jnp.pad(kernel, (*grow, (0, 0), (0, 0)))[None])[0]
  x = _to_cells(x)
  zeros = (0, -x.shape[3] % 8)
  x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), zeros))
  kernel = jnp.pad(kernel, ((0, 0), (0, 0), zeros, (0, 0)))
  before = (padding + 1) // 2
  rows = (before, len(kernel) - 1 - before)
  return lax.conv_general_dilated(x, kernel, (1, 1), (rows, rows), **options)


def _to_cells(a: jax.Array) -> jax.Array:
  """[N, H, W, C, ...] to [N, H / 2, W / 2, 4 C, ...]."""
  n, height, width, *rest = a.shape
  a = a.reshape(n, height // 2, 2, width // 2, 2, *rest).swapaxes(2, 3)
  return a.reshape(n, height // 2, width // 2, 4 * rest[0], *rest[1:])


def of_groups(
  x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: Any, **options: Any
) -> jax.Array:
  """As `conv_general_dilated`, for channels in groups: kernels [h, w, in / groups, out].

  On TPUs it is `in_blocks`; elsewhere XLA's own, whose gradient by the kernel takes up to 130 times
  as long as the convolution on CPUs: there it is that of `by_products`. A batch that is a symbol,
  dilations and padding by a name have XLA's own everywhere.
  """

  def general(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)

  if not _is_plain(x, padding, options):
    return general(x, kernel)

  def by_kernel(tangent: jax.Array, _: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
    products = functools.partial(
      by_products,
      strides=strides,
      padding=padding,
      groups=options["feature_group_count"],
      precision=options["precision"],
    )
    return lax.platform_dependent(x, tangent, cpu=products, default=general)

  grouped = jax.custom_jvp(general)
  grouped.defjvps(lambda tangent, _, x, kernel: general(tangent, kernel), by_kernel)
  if "tpu" not in targets():
    return grouped(x, kernel)
  blocks = functools.partial(in_blocks, strides=strides, padding=padding, **options)
  return lax.platform_dependent(x, kernel, tpu=blocks, default=grouped)


def in_blocks(
  x: jax.Array,
  kernel: jax.Array,
  strides: tuple[int, ...],
  padding: Any,
  feature_group_count: int,
  **options: Any,
) -> jax.Array:
  """A convolution of groups of few channels as one of blocks of up to 128, equal up to rounding.

  The weights between the groups of a block are zero. A matrix unit for 128 channels makes their
  products in the time of one group's, for a small part of the memory traffic. What is not finite
  reaches the other groups of its block.

  Args:
    x: [N, H, W, in].
    kernel: [h, w, in / groups, out].
    feature_group_count: groups.
    options: further ones of `jax.lax.conv_general_dilated`.

  Returns:
    [N, H', W', out].
  """
  h, w, inputs, outputs = kernel.shape
  fit = max(1, _BLOCK // max(inputs, outputs // feature_group_count))
  together = max(k for k in range(1, fit + 1) if feature_group_count % k == 0)  # groups in a block
  blocks = feature_group_count // together
  of_block = kernel.reshape(h, w, 1, inputs, blocks, together, -1)
  own = jnp.eye(together, dtype=kernel.dtype)[None, None, :, None, None, :, None]
  kernel = (of_block * own).reshape(h, w, together * inputs, outputs)
  return lax.conv_general_dilated(
    x, kernel, strides, padding, feature_group_count=blocks, **options
  )


def by_products(
  x: jax.Array,
  kernel: jax.Array,
  strides: tuple[int, ...],
  padding: Padding,
  groups: int,
  precision: Any = None,
) -> jax.Array:
  """A convolution of groups as products of matrices: of each group and pixel of the kernel.

  Args:
    x: [N, H, W, in].
    kernel: [h, w, in / groups, out].

  Returns:
    [N, H', W', out].
  """
  h, w, inputs, outputs = kernel.shape
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  x = jnp.moveaxis(x.reshape(*x.shape[:3], groups, inputs), 3, 0)
  of_group = jnp.moveaxis(kernel.reshape(h, w, inputs, groups, outputs // groups), 3, 0)
  rows, columns = (
    max(0, (x.shape[k] - size) // strides[k - 2] + 1) for k, size in ((2, h), (3, w))
  )
  products = [
    jnp.einsum(
      "gnhwi,gio->gnhwo",
      x[:, :, i :: strides[0], j :: strides[1]][:, :, :rows, :columns],
      of_group[:, i, j],
      precision=precision,
    )
    for i, j in itertools.product(range(h), range(w))
  ]
  y = functools.reduce(jnp.add, products)
  return jnp.moveaxis(y, 0, 3).reshape(*y.shape[1:4], outputs)
