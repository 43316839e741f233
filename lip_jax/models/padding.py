"""Images of different sizes in one batch: what networks make of the padding behind each of them."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp


class _Extents(NamedTuple):
  sizes: jax.Array  # [N, 2], height and width of each image
  padded: tuple[int, int]  # of the batch


_extents: contextvars.ContextVar[_Extents | None] = contextvars.ContextVar(
  "extents_of_images", default=None
)


@contextlib.contextmanager
def masked(sizes: jax.Array, padded: tuple[int, int]) -> Iterator[None]:
  """Inside, networks compute each image of a batch as if it were alone and not padded.

  Beyond its size features are zero, and part of no average and of no instance norm. (A batch norm
  that is not frozen takes its statistics over everything.)

  Args:
    sizes: [N, 2], height and width of each image in pixels, multiples of the network's strides.
    padded: height and width of the batch, likewise.
  """
  token = _extents.set(_Extents(sizes, padded))
  try:
    yield
  finally:
    _extents.reset(token)


def inside(x: jax.Array, stride: int | None = None) -> jax.Array | None:
  """Which pixels of features x [N, H, W, C] belong to their image: [N, H, W, 1] bool.

  None where no `masked` is around: all of them.

  Args:
    x: features of the whole batch.
    stride: of x in pixels; None: what H and the height of the batch tell.
  """
  extents = _extents.get()
  if extents is None:
    return None

  def along(axis: int) -> jax.Array:
    step = stride or extents.padded[axis] // x.shape[axis + 1]
    start = jnp.arange(x.shape[axis + 1]) * step
    return start[None, :] < extents.sizes[:, axis, None]

  return along(0)[:, :, None, None] & along(1)[:, None, :, None]


def blank(x: jax.Array, stride: int | None = None) -> jax.Array:
  """Features x [N, H, W, C] with zeros where it is not `inside`."""
  mask = inside(x, stride)
  return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))
