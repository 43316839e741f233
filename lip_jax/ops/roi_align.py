"""RoIAlign (He et al., "Mask R-CNN", ICCV 2017): features of regions, bilinear, on a fixed grid.

Three modes hold the conventions apart:

- "unaligned" (torchvision's detectors): no half-cell shift; a region is at least one cell wide.
- "aligned": shifted by half a cell, so that pixel centres meet cell centres; no least size.
- "legacy" (mmdetection 0.6): no shift; x2 and y2 are last pixels, the region ends at x2 + 1.

A sample more than a cell outside the map is 0; otherwise it is moved to the nearest cell.
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from lip_jax.ops.boxes import area

Mode = Literal["unaligned", "aligned", "legacy"]
Implementation = Literal["auto", "gather", "one_hot"]

_ROIS_AT_A_TIME = 32  # of the one-hot form, whose intermediate has a row of the map for each bin


class _Taps(NamedTuple):
  """Along one axis: out[bin] = sum over taps of weight * map[cell]."""

  cell: jax.Array  # [R, bins, 2 * samples] int32
  weight: jax.Array  # [R, bins, 2 * samples]


def roi_align(
  features: ArrayLike,
  rois: ArrayLike,
  *,
  stride: float,
  size: int | tuple[int, int] = 7,
  samples: int = 2,
  mode: Mode = "unaligned",
  implementation: Implementation = "auto",
) -> jax.Array:
  """Averages of bilinear samples in the bins of each region: [H, W, C], [R, 4] -> [R, h, w, C].

  Differentiable in the features alone. Coordinates and sums are at least float32.

  Args:
    features: [H, W, C], of one image.
    rois: [R, 4], x1, y1, x2, y2 in pixels of the image. A region of NaN gives 0.
    size: bins, an int or a pair (h, w).
    implementation: "gather"; "one_hot", products with matrices of weights, whose gradient is
      deterministic everywhere, and which needs finite features; or "auto", the latter on TPU.

  Returns:
    [R, h, w, C], in the dtype of features.

  Raises:
    ValueError: an unknown mode or implementation.
  """
  rois = jnp.asarray(rois)
  return multilevel_roi_align(
    (features,),
    rois,
    jnp.zeros(len(rois), jnp.int32),
    strides=(stride,),
    size=size,
    samples=samples,
    mode=mode,
    implementation=implementation,
  )


def multilevel_roi_align(
  features: Sequence[ArrayLike],
  rois: ArrayLike,
  levels: ArrayLike,
  *,
  strides: Sequence[float],
  size: int | tuple[int, int] = 7,
  samples: int = 2,
  mode: Mode = "unaligned",
  extents: ArrayLike | None = None,
  implementation: Implementation = "auto",
) -> jax.Array:
  """`roi_align` of each region on its own level of a pyramid.

  The gather form reads all levels at once, as one table.

  Args:
    features: of L levels, [H_l, W_l, C] each, of one dtype.
    rois: [R, 4].
    levels: [R] integers from 0 to L - 1, see `roi_levels`.
    size: as for `roi_align`, and so are all others.
    extents: [L, 2] integers, the rows and columns of each level that the image has if the maps are
      padded: they count as if they ended there; None: they do not.
    implementation: "gather", "one_hot" or "auto".

  Returns:
    [R, h, w, C], in the dtype of features.
  """
  for name, given, known in (
    ("mode", mode, get_args(Mode)),
    ("implementation", implementation, get_args(Implementation)),
  ):
    if given not in known:
      raise ValueError(f"unknown {name} {given!r}; expected one of {', '.join(known)}")
  if len(features) != len(strides):
    raise ValueError(f"{len(features)} levels of features and {len(strides)} strides; give as many")
  maps = tuple(jnp.asarray(one) for one in features)
  dtype = maps[0].dtype
  # Sums of gradients over many regions, too, are at least float32.
  rois = lax.stop_gradient(jnp.asarray(rois))
  precise = jnp.promote_types(jnp.promote_types(dtype, rois.dtype), jnp.float32)
  maps = tuple(one.astype(precise) for one in maps)
  bins = (size, size) if isinstance(size, int) else tuple(size)
  forms = {
    name: functools.partial(form, strides=strides, bins=bins, samples=samples, mode=mode)
    for name, form in (("gather", _gather), ("one_hot", _one_hot))
  }
  whole = np.array([one.shape[:2] for one in maps])
  ends = jnp.asarray(whole if extents is None else extents, jnp.int32)
  arguments = (maps, rois.astype(precise), jnp.asarray(levels), ends)
  if implementation == "auto":
    pooled = lax.platform_dependent(*arguments, tpu=forms["one_hot"], default=forms["gather"])
  else:
    pooled = forms[implementation](*arguments)
  return pooled.astype(dtype)


def roi_levels(boxes: ArrayLike, *, inclusive: bool = False, levels: int = 4) -> jax.Array:
  """Level of the pyramid for each box by its size: [..., 4] -> [...] int32, from 0.

  A box of 224 x 224 pixels belongs to level 2, one of half that side to level 1 (equation 1 of Lin
  et al., "Feature Pyramid Networks", CVPR 2017), with level 0 of stride 4. Boxes without an area
  belong to level 0.

  Args:
    boxes: [..., 4], x1, y1, x2, y2.
    inclusive: mmdetection 0.6's map: sizes include the last pixel, and the constant that lets exact
      powers of two pass is added to the ratio of sizes rather than to its logarithm.
    levels: how many there are; larger boxes belong to the last.
  """
  side = jnp.sqrt(jnp.maximum(area(boxes, inclusive=inclusive), 0))
  # Compared with the powers of two, as floor(log2) is not the same on all hardware.
  if inclusive:
    reached = [side / 56 + 1e-6 >= 2.0**level for level in range(1, levels)]
  else:
    reached = [side / 224 >= 2.0 ** (level - 2 - 1e-6) for level in range(1, levels)]
  return sum((one.astype(jnp.int32) for one in reached), jnp.zeros(side.shape, jnp.int32))


def _gather(maps, rois, levels, ends, *, strides, bins, samples, mode):
  """Reads the cells from a table of all levels, one tap of the rows at a time."""
  heights, widths = zip(*(one.shape[:2] for one in maps), strict=True)
  starts = [0]
  for height, width in zip(heights, widths, strict=True):
    starts.append(starts[-1] + height * width)
  table = jnp.concatenate([one.reshape(-1, one.shape[-1]) for one in maps])

  def of_level(values, dtype=jnp.int32):
    return jnp.asarray(values, dtype)[levels]

  width = of_level(widths)
  bottom, right = ends[levels, 0], ends[levels, 1]
  scale = of_level(strides, rois.dtype)
  rows, columns = _taps(rois, scale, bottom, right, bins, samples, mode)
  start = of_level(starts[:-1])[:, None, None, None]

  def add(total, tap):
    row, weight = tap  # [R, h]
    first = start + row[:, :, None, None] * width[:, None, None, None]
    read = table.at[first + columns.cell[:, None]].get(mode="clip")  # [R, h, w, taps, C]
    line = (read * columns.weight[:, None, :, :, None]).sum(axis=3)
    return total + line * weight[:, :, None, None], None

  shape = (len(rois), *bins, table.shape[-1])
  by_tap = tuple(jnp.moveaxis(array, -1, 0) for array in rows)
  return lax.scan(add, jnp.zeros(shape, table.dtype), by_tap)[0]


def _one_hot(maps, rois, levels, ends, *, strides, bins, samples, mode):
  """Multiplies each map by the weights of rows and of columns, zero for regions of other levels."""

  def pool(region):
    roi, level = region
    total = jnp.zeros((*bins, maps[0].shape[-1]), roi.dtype)
    for number, (one, stride) in enumerate(zip(maps, strides, strict=True)):
      scale = jnp.full(1, stride, roi.dtype)
      bottom, right = ends[number, :1], ends[number, 1:]
      taps = _taps(roi[None], scale, bottom, right, bins, samples, mode)
      rows, columns = (
        _matrix(tap, extent) for tap, extent in zip(taps, one.shape[:2], strict=True)
      )
      rows = jnp.where(level == number, rows, 0)
      lines = jnp.einsum("ih,hwc->iwc", rows, one, precision=lax.Precision.HIGHEST)
      total += jnp.einsum("jw,iwc->ijc", columns, lines, precision=lax.Precision.HIGHEST)
    return total

  return lax.map(pool, (rois, levels), batch_size=_ROIS_AT_A_TIME)


def _matrix(taps: _Taps, extent: int) -> jax.Array:
  """Weights of one region as a matrix: [1, bins, taps] -> [bins, extent]."""
  cells = jnp.arange(extent, dtype=jnp.int32)[None, None, :]
  hits = taps.cell[0][:, :, None] == cells
  return jnp.where(hits, taps.weight[0][:, :, None], 0).sum(axis=1)


def _taps(rois, stride, height, width, bins, samples, mode):
  """Taps of the rows and of the columns, for regions of maps [R] high and wide."""
  x1, y1, x2, y2 = rois.T
  if mode == "aligned":
    x2, y2 = jnp.maximum(x2, x1), jnp.maximum(y2, y1)
  last = 1 if mode == "legacy" else 0
  shift = 0.5 if mode == "aligned" else 0.0
  least = 1 if mode == "unaligned" else 0
  scale = 1 / stride
  found = []
  for first, end, extent, count in ((y1, y2, height, bins[0]), (x1, x2, width, bins[1])):
    first, end = first * scale - shift, (end + last) * scale - shift
    step = _divide(jnp.maximum(end - first, least), count)[:, None, None]
    number = jnp.arange(count, dtype=rois.dtype)[None, :, None]
    sample = (jnp.arange(samples, dtype=rois.dtype) + 0.5)[None, None, :]
    # The maximum keeps the product from being fused with the sum. Samples at quarters of a region
    # often fall on the edge of what counts, where every bit decides.
    bin_start = first[:, None, None] + jnp.maximum(number * step, 0)
    positions = bin_start + _divide(sample * step, samples)
    found.append(_corners(positions, extent[:, None, None]))
  return found


def _divide(x: jax.Array, count: int) -> jax.Array:
  """The quotient, rounded once: the compiler multiplies by the reciprocal of a constant instead."""
  return x / jnp.where(jnp.isnan(x), 1, count).astype(x.dtype)


def _corners(positions: jax.Array, extent: jax.Array) -> _Taps:
  """The two cells around each sample: [R, bins, samples], [R, 1, 1] -> taps [R, bins, 2 * samples].

  The weights of a bin add up to one where all its samples count.
  """
  inside = (positions >= -1) & (positions <= extent.astype(positions.dtype))
  last = (extent - 1).astype(positions.dtype)
  positions = jnp.where(inside, jnp.clip(positions, 0, last), 0)
  low = jnp.floor(positions)
  high = jnp.minimum(low + 1, last)
  share = jnp.where(inside, 1 / positions.shape[-1], 0).astype(positions.dtype)
  part = positions - low
  return _Taps(
    jnp.concatenate([low, high], axis=-1).astype(jnp.int32),
    jnp.concatenate([(1 - part) * share, part * share], axis=-1),
  )
