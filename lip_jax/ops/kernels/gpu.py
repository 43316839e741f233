"""`lip_pool` as kernels in CUDA C++ for NVIDIA GPUs from Ampere on: one forward, one backward.

The image is divided into cells of stride x stride pixels, those that a window and the ones before
it share: window (i, j) begins at cell (i, j). A thread has a few channels of a column of cells, 8
bytes of each pixel, beside threads of other channels and columns, and walks down the rows. It
computes each of its pixels' weights once, and what they add to its own window and to those that
begin to the left of it; the latter are exchanged through shared memory. Of rows that the next
window shares it keeps sums.

Backward, each finished window's y and denominator go to shared memory too, where the pixels wait
until all windows that hold a pixel are there to gather its gradient from. Nothing is kept from the
forward pass, and every sum has a fixed order, so results are the same from run to run.

With `affine` the inputs h are to be normalized instead of logits: u = (h - mean) * gain + bias, and
the weight is exp(12 sigmoid(u) - 6), which never reaches memory.

The kernels are compiled here to PTX for the shapes at hand (`nvrtc`); XLA takes them as they are.
"""

import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lip_jax.ops.kernels import nvrtc
from lip_jax.ops.kernels.gate import GATE, MIDDLE, Affine
from lip_jax.ops.windows import LOWEST_LOGIT, Geometry, phase_offsets

TARGET = "__gpu$xla.gpu.ptx"  # what XLA calls a kernel that is given to it as PTX
SOURCE = Path(__file__).with_suffix(".cu")

_DTYPES = {"float32": "float", "bfloat16": "Bfloat16", "float16": "Float16"}
_LARGEST_WINDOW = 5  # the code of a window's pixels is unrolled
_MOST_WINDOWS = 9  # of one pixel

_BYTES = 8  # that a thread loads at once
# Threads of a program, at most; of these, with channels side by side, at least; and how many
# programs a processor has room for, which limits the registers. As measured on an H100.
_SIZES = {"forward": (512, 8, 1), "backward": (128, 4, 4), "backward, shifted": (256, 8, 2)}
_ROWS = 64  # of cells of a program, at most
_PROGRAMS = 264  # are wanted, two on each of a large GPU's 132 processors
_SHARED = 48 * 1024  # bytes of shared memory of a program, at most


class _Tiling(NamedTuple):
  """How an image is divided among programs, in cells of stride x stride pixels."""

  rows: int
  columns: int  # with those that belong to programs beside it
  before: int  # of these, on the left
  own: int
  groups: int  # of channels, a power of two
  vector: int  # channels of a group
  blocks: tuple[int, int, int]  # programs along height, width and channels


def supports(x: jax.Array, h: jax.Array, geometry: Geometry) -> bool:
  """Whether `forward` and `backward` can do these shapes and dtypes, with what is installed."""
  overlap = math.prod(max(_windows_of(geometry, axis)) for axis in (0, 1))
  return (
    x.shape == h.shape
    and x.size > 0
    and x.dtype.name in _DTYPES
    and h.dtype.name in _DTYPES
    and max(geometry.window) <= _LARGEST_WINDOW
    and overlap <= _MOST_WINDOWS
    and nvrtc.available()
  )


def runs_on(devices: Sequence[Any]) -> bool:
  """Whether all of these GPUs are NVIDIA's, from Ampere on."""
  capabilities = [str(getattr(device, "compute_capability", "")) for device in devices]
  # Of other vendors it is a name.
  return all(re.fullmatch(r"([89]|\d\d+)\.\d+", capability) for capability in capabilities)


@functools.partial(jax.jit, static_argnames=("geometry", "shift"))
def forward(
  x: jax.Array, h: jax.Array, affine: Affine | None, geometry: Geometry, shift: float | None
) -> jax.Array:
  """As `xla.forward`, without what its backward pass keeps."""
  n, height, width, c = x.shape
  size = geometry.output_size((height, width))
  arguments = (x, h, *(affine or ()))
  tiling, macros = program("forward", x, h, affine is not None, geometry, shift)
  results = [jax.ShapeDtypeStruct((n, *size, c), x.dtype)]
  return _call("forward", macros, n * math.prod(tiling.blocks), arguments, results)[0]


@functools.partial(jax.jit, static_argnames=("geometry", "shift"))
def backward(
  x: jax.Array,
  h: jax.Array,
  affine: Affine | None,
  g: jax.Array,
  geometry: Geometry,
  shift: float | None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
  """As `xla.backward`, from the inputs alone."""
  n, c = x.shape[0], x.shape[3]
  tiling, macros = program("backward", x, h, affine is not None, geometry, shift)
  results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, h)]
  if affine is not None:
    tiles = tiling.blocks[0] * tiling.blocks[1]
    results += 2 * [jax.ShapeDtypeStruct((n, tiles, c), jnp.float32)]
  arguments = (x, h, *(affine or ()), g.astype(x.dtype))
  dx, dh, *partial = _call("backward", macros, n * math.prod(tiling.blocks), arguments, results)
  sums = [part.sum(axis=1) for part in partial]
  return dx, dh, (sums[0], sums[1]) if sums else None


def program(
  pass_: str, x: Any, h: Any, gated: bool, geometry: Geometry, shift: float | None
) -> tuple[_Tiling, tuple[str, ...]]:
  """How the work is divided, and the macros of the source: of what has shapes and dtypes."""
  _, height, width, c = x.shape
  (kh, kw), (sh, sw), (ph, pw) = geometry
  size = geometry.output_size((height, width))
  mode = "GATED" if gated else "SAFE" if shift is None else "SHIFTED"
  itemsize = max(x.dtype.itemsize, h.dtype.itemsize)
  tiling = _tiling(pass_, x.shape, itemsize, geometry, mode)
  # Inputs of 16 bits leave little time for each element: the processor's own exp2 and reciprocal,
  # 2 units of float32 off, are a few instructions.
  fast = itemsize == 2
  down, across, channel_blocks = tiling.blocks
  values = {
    **{"X": _DTYPES[x.dtype.name], "H": _DTYPES[h.dtype.name], "FAST": int(fast)},
    **{"MODE": mode, "MODE_IS_GATED": int(gated), "BACKWARD": int(pass_ == "backward")},
    **{"HEIGHT": height, "WIDTH": width, "OUT_HEIGHT": size[0], "OUT_WIDTH": size[1]},
    **{"CHANNELS": c, "KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw},
    **{"VECTOR": tiling.vector, "GROUPS": tiling.groups, "ROWS": tiling.rows},
    **{"COLUMNS": tiling.columns, "BEFORE": tiling.before, "OWN": tiling.own},
    **{"CELLS_DOWN": _cells(height, sh, ph), "DOWN": down, "ACROSS": across},
    **{"CHANNEL_BLOCKS": channel_blocks, "THREADS": tiling.groups * tiling.columns},
    **{"BLOCKS": _sizes(pass_, mode)[2], "LOWEST": f"{LOWEST_LOGIT!r}f", "GATE": f"{GATE!r}f"},
    **{"MIDDLE": f"{MIDDLE!r}f", "SHIFT": f"{float(shift or 0)!r}f"},
  }
  return tiling, tuple(f"{name}={value}" for name, value in values.items())


def _sizes(pass_: str, mode: str) -> tuple[int, int, int]:
  return _SIZES["backward, shifted" if (pass_, mode) == ("backward", "SHIFTED") else pass_]


def _tiling(
  pass_: str, shape: tuple[int, ...], itemsize: int, geometry: Geometry, mode: str
) -> _Tiling:
  n, height, width, c = shape
  vector = math.gcd(c, _BYTES // itemsize)
  (kh, kw), (sh, sw), (ph, pw) = geometry
  up, left = (kh - 1) // sh, (kw - 1) // sw  # cells that a window reaches into beyond its own
  backward = pass_ == "backward"
  threads, groups, _ = _sizes(pass_, mode)
  # Bytes of shared memory for each channel: what threads tell each other of windows, and pixels.
  told = 4 * (left + up + 1 if backward else 2 * left) * (3 if mode == "SAFE" else 2)
  kept = sw * max(kh, sh) * (2 * itemsize + 4 * (mode == "GATED")) if backward else 0
  threads = min(threads, _SHARED // ((told + kept or 1) * vector) - left * groups)
  # Cells 0 to the last one with a pixel; that of a window may be beyond it.
  rows, cells = _cells(height, sh, ph), _cells(width, sw, pw)
  groups = max(groups, 1 << (max(1, threads // cells).bit_length() - 1))
  groups = min(groups, _power_of_2(c // vector))
  columns, own, before = cells, cells, 0
  if columns * groups > threads:
    columns = threads // groups
    before = left if backward else 0
    own = columns - left - before
  across = -(-cells // own)
  channel_blocks = -(-c // (groups * vector))
  down = -(-rows // _ROWS)
  while n * down * across * channel_blocks < _PROGRAMS and rows > 2 * down:
    down *= 2
  rows_of_one = -(-rows // down)
  blocks = -(-rows // rows_of_one), across, channel_blocks
  return _Tiling(rows_of_one, max(columns, 2), before, own, groups, vector, blocks)


def _cells(pixels: int, stride: int, padding: int) -> int:
  """Cell i owns the pixels from i * stride - padding on: the first `stride` ones of window i."""
  return (pixels - 1 + padding) // stride + 1


def _call(pass_: str, macros: tuple[str, ...], programs: int, arguments, results):
  ptx = nvrtc.compiled(SOURCE.read_text(encoding="utf-8"), macros)
  threads = next(macro for macro in macros if macro.startswith("THREADS=")).partition("=")[2]
  quoted = ptx.replace("\0", "").replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\0A")
  config = (
    f'{{name = "lip_pool_{pass_}", kernel_type = "ptx", kernel_data = "{quoted}", '
    f"grid_x = {programs}, grid_y = 1, grid_z = 1, block_x = {threads}, block_y = 1, block_z = 1, "
    "shared_mem_bytes = 0}"
  )
  call = jax.ffi.ffi_call(TARGET, results, custom_call_api_version=2, legacy_backend_config=config)
  return call(*arguments)


def _windows_of(geometry: Geometry, axis: int) -> list[int]:
  """How many windows hold each pixel of a cell along an axis: its own, and those before it."""
  window, stride = geometry.window[axis], geometry.stride[axis]
  return [len(offsets) for offsets in phase_offsets(window, stride, 0)]


def _power_of_2(number: int) -> int:
  """The next one."""
  return 1 << (number - 1).bit_length()
