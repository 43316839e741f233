"""Deformable convolution, version 1.

Dai et al., "Deformable Convolutional Networks", ICCV 2017.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lip_jax.ops import whole


def deform_conv(
  x: ArrayLike,
  offset: ArrayLike,
  kernel: ArrayLike,
  *,
  stride: int = 1,
  padding: int = 1,
  border_gradient: bool = True,
) -> jax.Array:
  """Convolution whose taps lie off their places by offsets, read bilinearly with zeros outside.

  The derivative by an offset where the sample falls on whole coordinates, at which it has a kink,
  is the one to the right. Positions are at least float32. The backward pass reads the samples again
  rather than keep them, nine times the size of x.

  Args:
    x: [N, H, W, C].
    offset: [N, H', W', 2 * kh * kw], in cells: (dy, dx) of each tap, taps in row order.
    kernel: [kh, kw, C / groups, O]; its shape tells how many groups of channels do not mix.
    border_gradient: whether samples exactly one cell outside, at -1, where zero offsets in the
      padding lie, have a gradient by their offset (torchvision) or none (mmdetection 0.6).

  Returns:
    [N, H', W', O] with H' = (H + 2 * padding - kh) // stride + 1, in the dtype of x and kernel.

  Raises:
    ValueError: shapes that do not match.
  """
  x, offset, kernel = jnp.asarray(x), jnp.asarray(offset), jnp.asarray(kernel)
  _check(x, offset, kernel, stride, padding)
  convolve = functools.partial(
    _convolve, stride=stride, padding=padding, border_gradient=border_gradient
  )
  return whole.call(
    "deform_conv", jax.checkpoint(convolve), x, offset, kernel, stride=stride, padding=padding
  )


def _check(x, offset, kernel, stride, padding):
  shapes = f"x {x.shape} and kernel {kernel.shape}"
  if x.ndim != 4 or kernel.ndim != 4 or x.shape[3] % kernel.shape[2]:
    raise ValueError(f"{shapes} do not match; expected [N, H, W, C], [kh, kw, C / groups, O]")
  if kernel.shape[3] % (x.shape[3] // kernel.shape[2]):
    raise ValueError(f"{shapes}: outputs must be a multiple of the groups")
  spatial = (
    (extent + 2 * padding - taps) // stride + 1
    for extent, taps in zip(x.shape[1:3], kernel.shape[:2], strict=True)
  )
  expected = (x.shape[0], *spatial, 2 * kernel.shape[0] * kernel.shape[1])
  if offset.shape != expected:
    raise ValueError(f"offset has shape {offset.shape}; expected {expected}")


def _convolve(x, offset, kernel, *, stride, padding, border_gradient):
  kernel_height, kernel_width, per_group, outputs = kernel.shape
  channels = x.shape[3]
  groups = channels // per_group
  taps = kernel_height * kernel_width
  images, height, width, _ = offset.shape
  # Taps before pixels, which are one axis: beside the channels, TPUs would pad the nine taps to 16.
  offset = offset.astype(jnp.promote_types(offset.dtype, jnp.float32))
  offset = jnp.moveaxis(offset.reshape(images, height, width, taps, 2), 3, 1)
  tap_y, tap_x = (
    grid.reshape(1, taps, 1, 1)
    for grid in jnp.mgrid[:kernel_height, :kernel_width].astype(offset.dtype)
  )
  top = (jnp.arange(height, dtype=offset.dtype) * stride - padding).reshape(1, 1, height, 1)
  left = (jnp.arange(width, dtype=offset.dtype) * stride - padding).reshape(1, 1, 1, width)
  rows = _corners(top + tap_y + offset[..., 0], x.shape[1], border_gradient)
  columns = _corners(left + tap_x + offset[..., 1], x.shape[2], border_gradient)

  # Gradients by x are sums over samples, in at least float32.
  flat = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  flat = flat.reshape(images, x.shape[1] * x.shape[2], channels)  # no -1: there may be no images
  read = jax.vmap(lambda cells, index: cells.at[index].get(mode="clip"))
  points = taps * height * width
  samples = sum(
    read(flat, (row * x.shape[2] + column).reshape(images, points))
    * (weight * share).reshape(images, points, 1)
    for row, weight in rows
    for column, share in columns
  )
  dtype = jnp.result_type(x, kernel)
  convolved = jnp.einsum(
    "ntpgc,tcgo->npgo",
    samples.astype(dtype).reshape(images, taps, height * width, groups, per_group),
    kernel.astype(dtype).reshape(taps, per_group, groups, outputs // groups),
    preferred_element_type=jnp.promote_types(dtype, jnp.float32),
  )
  return convolved.reshape(images, height, width, outputs).astype(dtype)


def _corners(positions, extent, border_gradient):
  """The cells before and after each position as (index, weight), both of the shape of positions."""
  outside = positions < -1 if border_gradient else positions <= -1
  outside |= positions >= extent
  positions = jnp.where(outside, -2, positions)  # between two cells that are not there
  low = jnp.floor(positions)
  part = positions - low
  return [
    (
      jnp.clip(cell, 0, extent - 1).astype(jnp.int32),
      jnp.where((cell < 0) | (cell >= extent), 0, weight),
    )
    for cell, weight in ((low, 1 - part), (low + 1, part))
  ]
