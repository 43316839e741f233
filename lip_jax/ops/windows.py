"""Windows of a pooling: their geometry, sums over them, and their pixels one by one."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

IntOrPair = int | tuple[int, int]

# Below every logit, and finite: what is below it less itself is zero, and not NaN.
LOWEST_LOGIT = -3e38


class Geometry(NamedTuple):
  """Window, stride and padding of a pooling, each as a (height, width) pair."""

  window: tuple[int, int]
  stride: tuple[int, int]
  padding: tuple[int, int]

  def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
    """Output (height, width) for an input (height, width)."""
    height, width = (
      (n + 2 * p - k) // s + 1
      for n, k, s, p in zip(size, self.window, self.stride, self.padding, strict=True)
    )
    return height, width


def make_geometry(
  x: jax.Array, window: IntOrPair, stride: IntOrPair, padding: IntOrPair
) -> Geometry:
  """Geometry of a pooling of x, [N, H, W, C].

  Raises:
    ValueError: padding above window // 2, an image smaller than the window, sizes below one.
    TypeError: x that is not floating point.
  """
  check_array("x", x)
  geometry = Geometry(pair("window", window), pair("stride", stride), pair("padding", padding))
  if min(geometry.window) < 1 or min(geometry.stride) < 1:
    raise ValueError(f"window and stride must be at least 1, got {window} and {stride}")
  for k, p in zip(geometry.window, geometry.padding, strict=True):
    if not 0 <= p <= k // 2:
      raise ValueError(
        f"padding must be between 0 and window // 2 = {k // 2} for window {k}, got {p}"
      )
  if min(geometry.output_size((x.shape[1], x.shape[2]))) < 1:
    raise ValueError(
      f"window {geometry.window} does not fit into an image of {tuple(x.shape[1:3])} with padding "
      f"{geometry.padding}"
    )
  return geometry


def check_array(name: str, array: jax.Array) -> None:
  """Raises unless `array` is [N, H, W, C] and floating point."""
  if array.ndim != 4:
    raise ValueError(f"{name} must be [N, H, W, C], got shape {tuple(array.shape)}")
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise TypeError(
      f"{name} must be floating point, got {array.dtype}; cast it first, for example "
      f"{name}.astype(jnp.float32)"
    )


def check_shape(name: str, array: jax.Array, shape: tuple[int, ...], x: jax.Array) -> None:
  """Raises unless `array`, which belongs to x, has this shape."""
  if array.shape != shape:
    raise ValueError(
      f"{name} must be {tuple(shape)} for x {tuple(x.shape)}; got {tuple(array.shape)}"
    )


def check_logits(x: jax.Array, logits: jax.Array) -> None:
  """Raises unless logits are [N, H, W, C] as x, or [N, H, W, 1], and floating point."""
  check_array("logits", logits)
  if logits.shape[:3] != x.shape[:3] or logits.shape[3] not in (1, x.shape[3]):
    raise ValueError(
      f"logits must have the shape of x, {tuple(x.shape)}, or one channel, "
      f"{(*x.shape[:3], 1)}; got {tuple(logits.shape)}"
    )


def pair(name: str, value: IntOrPair) -> tuple[int, int]:
  """`value` as a pair (h, w); raises ValueError unless it is an int or a pair of ints."""
  values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
  if len(values) != 2 or not all(isinstance(v, (int, np.integer)) for v in values):
    raise ValueError(f"{name} must be an int or a pair (h, w) of ints, got {value!r}")
  return int(values[0]), int(values[1])


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
  """float64 if any input is, float32 otherwise."""
  return functools.reduce(jnp.promote_types, (a.dtype for a in arrays), jnp.dtype(jnp.float32))


def reduce_windows(
  x: jax.Array, outside: float, combine: Callable[..., jax.Array], geometry: Geometry
) -> jax.Array:
  """Each window of x, [N, H, W, C], reduced to [N, H', W', C]; `outside` is the neutral element."""
  (kh, kw), (sh, sw), (ph, pw) = geometry
  pads = ((0, 0), (ph, ph), (pw, pw), (0, 0))
  init = np.asarray(outside, x.dtype)
  return lax.reduce_window(x, init, combine, (1, kh, kw, 1), (1, sh, sw, 1), pads)


def window_sum(x: jax.Array, geometry: Geometry) -> jax.Array:
  """Sum of x, [N, H, W, C], over each window; positions outside the image count as zero."""
  return reduce_windows(x, 0, lax.add, geometry)


def window_sum_transpose(
  g: jax.Array, geometry: Geometry, input_size: tuple[int, int]
) -> jax.Array:
  """Transpose of `window_sum`, [N, H', W', C] -> [N, H, W, C]: pixels sum up their windows.

  A gather: one `reduce_window` over the base-dilated g.
  """
  pads = []
  for n, m, k, s, p in zip(input_size, g.shape[1:3], *geometry, strict=True):
    dilated = (m - 1) * s + 1
    low = k - 1 - p
    pads.append((low, n + k - 1 - low - dilated))
  (kh, kw), (sh, sw), _ = geometry
  return lax.reduce_window(
    g,
    np.zeros((), g.dtype),
    lax.add,
    (1, kh, kw, 1),
    (1, 1, 1, 1),
    ((0, 0), *pads, (0, 0)),
    base_dilation=(1, sh, sw, 1),
  )


def phase_offsets(window: int, stride: int, padding: int) -> list[list[int]]:
  """Along an axis, the windows that a pixel belongs to: for each phase of it modulo the stride.

  Their numbers are relative to pixel // stride, the largest one first.
  """
  return [
    [
      (phase + padding - tap) // stride
      for tap in range(window)
      if (phase + padding - tap) % stride == 0
    ]
    for phase in range(stride)
  ]


def taps(a: jax.Array, geometry: Geometry, outside: float) -> list[jax.Array]:
  """The `tap` of each place in the window, row by row."""
  rows, columns = map(range, geometry.window)
  return [tap(a, geometry, (i, j), outside) for i in rows for j in columns]


def tap(a: jax.Array, geometry: Geometry, place: tuple[int, int], outside: float) -> jax.Array:
  """The pixel at `place` (row, column) of every window, [N, H, W, C] -> [N, H', W', C].

  A strided slice, with `outside` for positions outside the image.
  """
  n, *sizes, c = a.shape
  windows = geometry.output_size((sizes[0], sizes[1]))
  axes = zip(place, sizes, windows, geometry.stride, geometry.padding, strict=True)
  (top, bottom, *rows), (left, right, *columns) = (_tap(*axis) for axis in axes)
  start, limit = (0, rows[0], columns[0], 0), (n, rows[1], columns[1], c)
  # Not by indexing, which is a gather where the number of images is a symbol (`jax.export`).
  part = lax.slice(a, start, limit, (1, *geometry.stride, 1))
  around = ((0, 0), (top, bottom), (left, right), (0, 0))
  # Padding the slices, of which most need none, and not `a`: XLA for CPUs would compute what
  # follows pixel by pixel.
  return jnp.pad(part, around, constant_values=outside) if any(map(any, around)) else part


def _tap(tap: int, size: int, windows: int, stride: int, padding: int) -> tuple[int, int, int, int]:
  """Where a pixel of each window lies along an axis of the image.

  Returns:
    How many windows have it before the image, how many behind, and the slice of the others.
  """
  first = tap - padding  # of the first window
  before = min(max(0, -(first // stride)), windows)
  inside = min(max(0, (size - 1 - first) // stride + 1), windows) - before
  if inside <= 0:
    return before, windows - before, 0, 0
  start = before * stride + first
  return before, windows - before - inside, start, start + (inside - 1) * stride + 1
