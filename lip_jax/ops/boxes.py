"""Boxes x1, y1, x2, y2 in pixels: areas, overlaps, clipping, and the coder of R-CNN.

Two conventions. Exact (the default): the width is x2 - x1. Inclusive (mmdetection 0.6): x2 and y2
are the last pixels of the box, and the width is x2 - x1 + 1. All compute in at least float32.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

_LARGEST_LOG_SCALE = math.log(1000 / 16)  # a box grows at most 62.5 times


def sizes(boxes: ArrayLike, *, inclusive: bool = False) -> tuple[jax.Array, jax.Array]:
  """Widths and heights: [..., 4] -> [...], [...]; negative where x2 lies before x1."""
  x1, y1, x2, y2 = _coordinates(boxes)
  pixel = 1 if inclusive else 0
  return x2 - x1 + pixel, y2 - y1 + pixel


def area(boxes: ArrayLike, *, inclusive: bool = False) -> jax.Array:
  """Width times height: [..., 4] -> [...]."""
  width, height = sizes(boxes, inclusive=inclusive)
  return width * height


def clip(
  boxes: ArrayLike, size: Sequence[float] | jax.Array, *, inclusive: bool = False
) -> jax.Array:
  """Boxes [..., 4] moved into an image of `size` (height, width).

  To [0, width] and [0, height]; inclusive: to the last pixels, width - 1 and height - 1.
  """
  x1, y1, x2, y2 = _coordinates(boxes)
  pixel = 1 if inclusive else 0
  bottom, right = (jnp.asarray(size[k], x1.dtype) - pixel for k in range(2))
  return jnp.stack(
    [
      jnp.clip(x1, 0, right),
      jnp.clip(y1, 0, bottom),
      jnp.clip(x2, 0, right),
      jnp.clip(y2, 0, bottom),
    ],
    axis=-1,
  )


def iou(a: ArrayLike, b: ArrayLike, *, inclusive: bool = False) -> jax.Array:
  """Intersection over union of each box of a with each of b: [A, 4], [B, 4] -> [A, B].

  Zero for boxes that do not overlap, also where the union has no area or a coordinate is NaN.
  """
  shared, either = _overlap(a, b, inclusive)
  return _ratio(shared, either - shared)


def coverage(a: ArrayLike, b: ArrayLike, *, inclusive: bool = False) -> jax.Array:
  """Share of each box of a that lies in each of b: [A, 4], [B, 4] -> [A, B]; zero if it is empty.

  What decides about boxes in a crowd, of which an annotation gives the outline of many.
  """
  shared, _ = _overlap(a, b, inclusive)
  whole = area(a, inclusive=inclusive)[:, None]
  return _ratio(shared, jnp.broadcast_to(whole, shared.shape))


def encode(
  boxes: ArrayLike, gts: ArrayLike, *, stds: Sequence[float], inclusive: bool = False
) -> jax.Array:
  """Regression targets (dx, dy, dw, dh) / stds that take each box to its ground truth.

  Shifts of the centre are relative to the box's size; dw and dh are logarithms of ratios (equations
  6 to 9 of Girshick et al., "Rich feature hierarchies", CVPR 2014).

  Args:
    boxes: [..., 4], anchors or proposals.
    gts: [..., 4], the ground truth of each.
    inclusive: whether x2 and y2 are last pixels.

  Returns:
    [..., 4]. Finite for finite boxes: a side without length counts as one pixel.
  """
  x, y, width, height = _centre_form(boxes, inclusive)
  gt_x, gt_y, gt_width, gt_height = _centre_form(gts, inclusive)
  width, height, gt_width, gt_height = (
    jnp.where(side > 0, side, 1) for side in (width, height, gt_width, gt_height)
  )
  deltas = (
    (gt_x - x) / width,
    (gt_y - y) / height,
    jnp.log(gt_width / width),
    jnp.log(gt_height / height),
  )
  return jnp.stack([delta / std for delta, std in zip(deltas, stds, strict=True)], axis=-1)


def decode(
  boxes: ArrayLike,
  deltas: ArrayLike,
  *,
  stds: Sequence[float],
  inclusive: bool = False,
  size: Sequence[float] | jax.Array | None = None,
) -> jax.Array:
  """Boxes moved and scaled by deltas: the inverse of `encode`.

  A side grows at most 1000 / 16 times; inclusive: it shrinks at most as much, too.

  Args:
    boxes: [..., 4], anchors or proposals.
    deltas: [..., 4], (dx, dy, dw, dh) / stds; its leading axes broadcast with those of boxes.
    inclusive: whether x2 and y2 are last pixels.
    size: height and width of the image to `clip` to; None: boxes may leave it.

  Returns:
    [..., 4].
  """
  x, y, width, height = _centre_form(boxes, inclusive)
  dx, dy, dw, dh = (delta * std for delta, std in zip(_coordinates(deltas), stds, strict=True))
  if inclusive:
    dw, dh = jnp.maximum(dw, -_LARGEST_LOG_SCALE), jnp.maximum(dh, -_LARGEST_LOG_SCALE)
  new_width = width * jnp.exp(jnp.minimum(dw, _LARGEST_LOG_SCALE))
  new_height = height * jnp.exp(jnp.minimum(dh, _LARGEST_LOG_SCALE))
  x, y = x + dx * width, y + dy * height
  pixel = 1 if inclusive else 0
  right, below = 0.5 * (new_width - pixel), 0.5 * (new_height - pixel)
  decoded = jnp.stack([x - right, y - below, x + right, y + below], axis=-1)
  return decoded if size is None else clip(decoded, size, inclusive=inclusive)


def _coordinates(boxes: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """The four columns, each [...]: arrays whose last axis is 4 waste most of a TPU's registers."""
  boxes = jnp.asarray(boxes)
  boxes = boxes.astype(jnp.promote_types(boxes.dtype, jnp.float32))
  return boxes[..., 0], boxes[..., 1], boxes[..., 2], boxes[..., 3]


def _centre_form(boxes, inclusive):
  x1, y1, x2, y2 = _coordinates(boxes)
  return 0.5 * (x1 + x2), 0.5 * (y1 + y2), *sizes(boxes, inclusive=inclusive)


def _overlap(a, b, inclusive):
  """Areas of all intersections, and the sums of the two areas: both [A, B]."""
  pixel = 1 if inclusive else 0
  a_x1, a_y1, a_x2, a_y2 = (column[:, None] for column in _coordinates(a))
  b_x1, b_y1, b_x2, b_y2 = (column[None, :] for column in _coordinates(b))
  width = jnp.minimum(a_x2, b_x2) - jnp.maximum(a_x1, b_x1) + pixel
  height = jnp.minimum(a_y2, b_y2) - jnp.maximum(a_y1, b_y1) + pixel
  # Maxima keep the compiler from fusing a product with the sum that takes it, which rounds the sum
  # in another way: overlaps that are equal, or equal to a threshold, would come apart.
  shared = jnp.maximum(jnp.maximum(width, 0) * jnp.maximum(height, 0), 0)
  a_area, b_area = (jnp.maximum(area(one, inclusive=inclusive), 0) for one in (a, b))
  return shared, a_area[:, None] + b_area[None, :]


def _ratio(part, whole):
  return jnp.where(part > 0, part / jnp.where(part > 0, whole, 1), 0)
