"""The GPU kernels, interpreted, against float64; and through Triton, as far as no GPU is needed."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pooling import GEOMETRIES

from lip_jax.ops.kernels import dispatch, gpu
from lip_jax.ops.kernels.gate import Affine
from lip_jax.ops.windows import Geometry


def geometry_of(window, stride, padding):
  return Geometry(*(v if isinstance(v, tuple) else (v, v) for v in (window, stride, padding)))


THREE = geometry_of(3, 2, 1)


def random(key, shape, dtype=jnp.float32, scale=1.0):
  return jnp.asarray(scale * np.random.default_rng(key).standard_normal(shape), dtype)


def interpreted(x, h, affine, g, geometry, shift):
  assert gpu.supports(x, h, geometry)
  y = gpu.forward(x, h, affine, geometry, shift, interpret=True)
  dx, dh, sums = gpu.backward(x, h, affine, g, geometry, shift, interpret=True)
  assert y.dtype == dx.dtype == x.dtype
  assert dh.dtype == h.dtype
  return [y, dx, dh, *(sums or ())]


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


def check(x, h, affine, g, geometry, shift):
  results = interpreted(x, h, affine, g, geometry, shift)
  expected = in_float64(x, h, affine, g, geometry)
  for name, one, other in zip(("y", "dx", "dh"), results[:3], expected[:3], strict=True):
    largest = np.abs(other).max()
    atol = 1e-6 * (largest if largest > 1e-12 else 1.0)  # windows of one pixel have no gradient
    rtol = 0.0
    if one.dtype != jnp.float32:  # two units in the last place, of a number that is not subnormal
      rtol, least = 2 * float(jnp.finfo(one.dtype).eps), float(jnp.finfo(one.dtype).smallest_normal)
      atol = max(atol, rtol * least)
    one = np.asarray(one, np.float64)
    np.testing.assert_allclose(one, other, rtol=rtol, atol=atol, err_msg=name)
  if affine is not None:  # the sums' terms cancel, so their size is what rounding is relative to
    for one, other, each in zip(results[3:], expected[3:5], (1, np.abs(h).max() + 3), strict=True):
      atol = 1e-6 * (float(expected[5]) or 1.0) * float(each)
      np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def inputs(geometry, size, channels, dtype, scale=2.0):
  shape = (2, *size, channels)
  x, h = random(0, shape, dtype), random(1, shape, dtype, scale)
  return x, h, random(2, (2, *geometry.output_size(size), channels), dtype)


@pytest.mark.parametrize(
  ("case", "gated"), list(zip(GEOMETRIES[2:], itertools.cycle([False, True]), strict=False))
)
def test_equals_float64(x64, case, gated):
  window, stride, padding, size = case
  geometry = geometry_of(window, stride, padding)
  x, h, g = inputs(geometry, size, 3, jnp.float32)
  check(x, h, Affine(*(random(i, (2, 3)) for i in (3, 4, 5))) if gated else None, g, geometry, None)


@pytest.mark.parametrize("logits", ["random", "constant", "extreme"])
@pytest.mark.parametrize(
  ("dtype", "gated", "shift"),
  [(jnp.float32, False, None), (jnp.bfloat16, True, None), (jnp.float16, False, None)],
)
def test_constant_and_extreme_logits(x64, dtype, gated, shift, logits):
  x, h, g = inputs(THREE, (14, 14), 3, dtype)
  if logits == "constant":
    h = jnp.full_like(h, 100.0)
  elif logits == "extreme":
    h = (h * 5000).clip(-1e4, 1e4)
  affine = Affine(*(random(i, (2, 3)) for i in (3, 4, 5))) if gated else None
  check(x, h, affine, g, THREE, shift)


def test_one_shift_for_all_windows(x64):
  x, h, g = inputs(THREE, (14, 14), 3, jnp.bfloat16)
  check(x, h, None, g, THREE, 0.5)


def test_several_programs_per_image(x64, monkeypatch):
  """Blocks of rows, columns and channels that fit the image unevenly."""
  monkeypatch.setattr(gpu, "_CHANNELS", 4)
  monkeypatch.setattr(gpu, "_WARPS", 1)
  monkeypatch.setattr(gpu, "_ROWS", 3)
  monkeypatch.setattr(gpu, "_PROGRAMS", 1)
  jax.clear_caches()
  x, h, g = inputs(THREE, (17, 83), 7, jnp.float32)
  check(x, h, Affine(*(random(i, (2, 7)) for i in (3, 4, 5))), g, THREE, None)
  jax.clear_caches()


@pytest.mark.parametrize(
  ("shape", "gated", "shift"),
  [
    ((128, 112, 112, 64), True, None),
    ((128, 14, 14, 1024), False, None),
    ((2, 13, 9, 3), False, 6.0),
  ],
)
def test_lowers_through_triton(shape, gated, shift):
  x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  n, height, width, c = shape
  g = jax.ShapeDtypeStruct((n, *THREE.output_size((height, width)), c), jnp.bfloat16)
  affine = Affine(*[jax.ShapeDtypeStruct((n, c), jnp.float32)] * 3) if gated else None

  @jax.jit
  def run(x, h, affine, g):
    y = gpu.forward(x, h, affine, THREE, shift)
    return y, gpu.backward(x, h, affine, g, THREE, shift)

  device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
  mesh = jax.sharding.AbstractMesh(
    (1,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=device
  )
  with jax.sharding.use_abstract_mesh(mesh):
    text = run.trace(x, x, affine, g).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @__gpu$xla.gpu.triton") == 2


def test_supports():
  x = jnp.zeros((2, 8, 8, 4), jnp.bfloat16)
  assert gpu.supports(x, x, THREE)
  assert not gpu.supports(x, x[..., :1], THREE)
  assert not gpu.supports(x.astype(jnp.int32), x, THREE)
  assert not gpu.supports(x[:0], x[:0], THREE)
  assert not gpu.supports(x, x, geometry_of(7, 2, 3))
  assert not gpu.supports(x, x, geometry_of(5, 1, 2))
