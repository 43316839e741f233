"""The GPU kernels against float64, their source run on the CPU; and compiled for GPUs."""

import functools
import itertools
import re
from types import SimpleNamespace

import fixture_cuda
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pooling import GEOMETRIES

from lip_jax.ops.kernels import dispatch, gpu, nvrtc
from lip_jax.ops.kernels.gate import Affine
from lip_jax.ops.windows import Geometry
from lip_jax.tools import ptx


def geometry_of(window, stride, padding):
  return Geometry(*(v if isinstance(v, tuple) else (v, v) for v in (window, stride, padding)))


THREE = geometry_of(3, 2, 1)
# That LIP-ResNet-50 pools.
SHAPES = [
  *((128, 112, 112, 64), (128, 56, 56, 128), (128, 56, 56, 256), (128, 28, 28, 256)),
  *((128, 28, 28, 512), (128, 14, 14, 512), (128, 14, 14, 1024)),
]


def random(key, shape, dtype=jnp.float32, scale=1.0):
  return jnp.asarray(scale * np.random.default_rng(key).standard_normal(shape), dtype)


@pytest.fixture(scope="module")
def check(tmp_path_factory):
  """Compares all results of the kernels with those in float64."""
  if fixture_cuda.COMPILER is None:
    pytest.skip("there is no g++")
  folder = tmp_path_factory.mktemp("cuda")

  def run(x, h, affine, g, geometry, shift):
    y = fixture_cuda.forward(folder, x, h, affine, geometry, shift)
    dx, dh, sums = fixture_cuda.backward(folder, x, h, affine, g, geometry, shift)
    compare([y, dx, dh, *sums], x, h, affine, g, geometry)

  return run


@functools.partial(jax.jit, static_argnums=4)
def in_float64(x, h, affine, g, geometry):
  """The same, from the safe form and the chain rule."""
  x, h, g = (a.astype(jnp.float64) for a in (x, h, g))
  if affine is None:
    y, vjp = jax.vjp(lambda x, h: dispatch.lip_pool(x, h, geometry, None, "xla"), x, h)
    return [y, *vjp(g)]
  mean, gain, bias = (a.astype(jnp.float64)[:, None, None] for a in affine)
  h -= mean
  y, vjp = jax.vjp(
    lambda x, u: dispatch.lip_pool(x, 12 * jax.nn.sigmoid(u), geometry, None, "xla"),
    x,
    h * gain + bias,
  )
  dx, du = vjp(g)
  return [y, dx, du, du.sum(axis=(1, 2)), (du * h).sum(axis=(1, 2)), abs(du).sum(axis=(1, 2)).max()]


def compare(results, x, h, affine, g, geometry):
  expected = in_float64(x, h, affine, g, geometry)
  for name, one, other in zip(("y", "dx", "dh"), results[:3], expected[:3], strict=True):
    largest = np.abs(other).max()  # windows of one pixel have no gradient, up to rounding
    atol = 1e-6 * (largest if largest > 1e-9 else 1.0)
    rtol = 0.0
    if one.dtype != jnp.float32:  # two units in the last place, of a number that is not subnormal
      rtol, least = 2 * float(jnp.finfo(one.dtype).eps), float(jnp.finfo(one.dtype).smallest_normal)
      atol = max(atol, rtol * least)
    one = np.asarray(one, np.float64)
    np.testing.assert_allclose(one, other, rtol=rtol, atol=atol, err_msg=name)
  if affine is not None:  # the sums' terms cancel, so their size is what rounding is relative to
    for one, other, each in zip(results[3:], expected[3:5], (1, np.abs(h).max() + 3), strict=True):
      largest = float(expected[5])
      atol = 1e-6 * (largest if largest > 1e-9 else 1.0) * float(each)
      np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def inputs(geometry, size, channels, dtype, scale=2.0):
  shape = (2, *size, channels)
  x, h = random(0, shape, dtype), random(1, shape, dtype, scale)
  return x, h, random(2, (2, *geometry.output_size(size), channels), dtype)


@pytest.mark.parametrize(
  ("case", "gated"), list(zip(GEOMETRIES[2:], itertools.cycle([False, True]), strict=False))
)
def test_equals_float64(x64, check, case, gated):
  window, stride, padding, size = case
  geometry = geometry_of(window, stride, padding)
  x, h, g = inputs(geometry, size, 3, jnp.float32)
  check(x, h, Affine(*(random(i, (2, 3)) for i in (3, 4, 5))) if gated else None, g, geometry, None)


@pytest.mark.parametrize("logits", ["random", "constant", "extreme"])
@pytest.mark.parametrize(
  ("dtype", "gated", "shift"),
  [(jnp.float32, False, None), (jnp.bfloat16, True, None), (jnp.float16, False, None)],
)
def test_constant_and_extreme_logits(x64, check, dtype, gated, shift, logits):
  x, h, g = inputs(THREE, (14, 14), 3, dtype)
  if logits == "constant":
    h = jnp.full_like(h, 100.0)
  elif logits == "extreme":
    h = (h * 5000).clip(-1e4, 1e4)
  affine = Affine(*(random(i, (2, 3)) for i in (3, 4, 5))) if gated else None
  check(x, h, affine, g, THREE, shift)


@pytest.mark.parametrize("shift", [0.5, -120.0, 120.0])
def test_one_shift_for_all_windows(x64, check, shift):
  """Also where exp(0 - shift), of a pixel that is not there, would overflow."""
  x, h, g = inputs(THREE, (14, 14), 3, jnp.bfloat16)
  check(x, h + jnp.asarray(shift, h.dtype), None, g, THREE, shift)


@pytest.mark.parametrize(
  ("size", "channels", "gated"),
  [
    *(((37, 43), channels, True) for channels in (3, 12, 72)),
    ((9, 131), 72, True),
    ((9, 131), 72, False),
  ],
)
def test_several_programs_per_image(x64, check, size, channels, gated):
  """Blocks of rows, columns and channels that fit the image unevenly."""
  x, h, g = inputs(THREE, size, channels, jnp.bfloat16)
  affine = Affine(*(random(i, (2, channels)) for i in (3, 4, 5))) if gated else None
  check(x, h, affine, g, THREE, None)


def test_dtypes_may_differ(x64, check):
  x, h, g = inputs(THREE, (9, 8), 8, jnp.bfloat16)
  check(x, h.astype(jnp.float32), None, g, THREE, None)
  check(x.astype(jnp.float32), h, None, g.astype(jnp.float32), THREE, None)


@pytest.mark.skipif(
  not (nvrtc.available() and ptx.assembler()),
  reason="nvidia-cuda-nvrtc and nvidia-cuda-nvcc, of the gpu-compile extra, are not installed",
)
@pytest.mark.parametrize(
  ("shape", "dtype", "mode", "window"),
  [
    *((shape, jnp.bfloat16, "gated", 3) for shape in SHAPES),
    ((128, 112, 112, 64), jnp.float32, "gated", 3),
    ((128, 56, 56, 256), jnp.bfloat16, "shifted", 3),
    ((128, 56, 56, 256), jnp.bfloat16, "safe", 3),
    ((128, 56, 56, 256), jnp.float32, "safe", 3),
    ((1, 56, 56, 256), jnp.bfloat16, "gated", 2),
    ((1, 13, 9, 24), jnp.float16, "safe", 2),
    ((4, 112, 112, 64), jnp.bfloat16, "safe", 2),
    ((2, 7, 7, 3), jnp.bfloat16, "gated", 3),
    ((2, 20, 20, 8), jnp.bfloat16, "safe", 5),
  ],
)
def test_compiles_for_all_gpus(shape, dtype, mode, window):
  """Without spills, with registers for 512 threads on a processor, and 8 bytes at a time."""
  x = jax.ShapeDtypeStruct(shape, dtype)
  geometry, shift = geometry_of(window, 2, window // 2), 6.0 if mode == "shifted" else None
  sources = []
  for pass_ in ("forward", "backward"):
    _, macros = gpu.program(pass_, x, x, mode == "gated", geometry, shift)
    sources.append(nvrtc.compiled(gpu.SOURCE.read_text(), macros))
    accesses = re.findall(r"(?:ld|st)\.global\.(\S+) ", sources[-1])
    if shape[3] * x.dtype.itemsize % 8 == 0:
      # Single numbers: statistics, and the sums of gradients.
      assert sum(not re.match(r"(nc\.)?v2", access) for access in accesses) <= 16 * (
        mode == "gated"
      )
  for architecture in ("sm_80", "sm_89", "sm_90", "sm_100"):
    for kernel in ptx.kernels(sources, architecture):
      assert kernel.spilled == 0, (architecture, kernel)
      assert kernel.registers <= 128 or window > 3, (architecture, kernel)


@pytest.mark.parametrize(
  ("capability", "runs"),
  [("7.5", False), ("8.0", True), ("8.9", True), ("10.0", True), ("12.1", True), ("gfx942", False)],
)
def test_runs_on_ampere_and_newer(capability, runs):
  assert gpu.runs_on([SimpleNamespace(compute_capability=capability)]) == runs


def test_supports(monkeypatch):
  monkeypatch.setattr(nvrtc, "available", lambda: True)
  x = jnp.zeros((2, 8, 8, 4), jnp.bfloat16)
  assert gpu.supports(x, x, THREE)
  assert not gpu.supports(x, x[..., :1], THREE)
  assert not gpu.supports(x.astype(jnp.int32), x, THREE)
  assert not gpu.supports(x[:0], x[:0], THREE)
  assert not gpu.supports(x, x, geometry_of(7, 2, 3))
  assert not gpu.supports(x, x, geometry_of(5, 1, 2))
  monkeypatch.setattr(nvrtc, "available", lambda: False)
  assert not gpu.supports(x, x, THREE)
