"""The kernels for TPU, interpreted, and the fused tail, against float64; and compiled for TPU."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lip_jax
from lip_jax.distributed import sharding

ROOT = Path(__file__).parents[2]
CASES = [
  # window, stride, padding, (N, H, W, C), logit_range
  (3, 2, 1, (3, 7, 9, 5), (-20, 20)),
  (3, 2, 1, (2, 8, 8, 3), None),
  (2, 2, 1, (2, 5, 6, 3), None),
  (3, 1, 1, (2, 4, 5, 3), (-20, 20)),
  (2, 3, 0, (2, 10, 8, 3), None),
  ((3, 2), (1, 2), (1, 0), (2, 6, 8, 3), None),
  (3, 2, 1, (2, 1, 1, 3), None),
  (3, 2, 1, (8, 41, 38, 4), (-20, 20)),  # several blocks along both axes
  (3, 2, 1, (128, 5, 6, 8), None),  # images in the lanes
]
LOGITS = {
  "random": lambda rng, shape: 3 * rng.standard_normal(shape),
  "constant": lambda rng, shape: np.full(shape, 7.0),
  "extreme": lambda rng, shape: rng.choice([-1e4, -3e3, 0.0, 3e3, 1e4], shape),
}


def arrays(seed, dtype, *shapes):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def assert_close(narrow, exact, dtype):
  """Within 2 units in the last place of bfloat16; of float32, 1e-6 of the largest value."""
  narrow, exact = np.asarray(narrow, np.float64), np.asarray(exact, np.float64)
  largest = np.abs(exact).max()
  if dtype == jnp.float32:
    np.testing.assert_allclose(narrow, exact, rtol=0, atol=1e-6 * max(largest, 1))
  else:
    np.testing.assert_allclose(narrow, exact, rtol=2 * 2**-8, atol=1e-6 * max(largest, 1))


def value_and_gradients(function, cotangent, *arguments):
  y, vjp = jax.vjp(function, *arguments)
  return y, *vjp(cotangent.astype(y.dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_float64(x64, case):
  window, stride, padding, shape, logit_range = case
  geometry = {"window": window, "stride": stride, "padding": padding, "logit_range": logit_range}
  pool = functools.partial(lip_jax.lip_pool, **geometry)
  x, logits = arrays(0, jnp.float32, shape, shape)
  wide = [x.astype(jnp.float64), 3 * logits.astype(jnp.float64)]
  g = arrays(1, jnp.float32, jax.eval_shape(pool, x, x).shape)[0]
  exact = value_and_gradients(pool, g, *wide)
  kernel = functools.partial(pool, implementation="pallas")
  for ours, theirs in zip(value_and_gradients(kernel, g, x, 3 * logits), exact, strict=True):
    assert_close(ours, theirs, jnp.float32)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", LOGITS)
def test_any_logits_in_any_dtype(x64, kind, dtype, implementation):
  shape = (2, 9, 8, 16)
  x, g = arrays(0, dtype, shape, (2, 5, 4, 16))
  logits = jnp.asarray(LOGITS[kind](np.random.default_rng(1), shape), dtype)
  exact = value_and_gradients(
    lip_jax.lip_pool, g, x.astype(jnp.float64), logits.astype(jnp.float64)
  )
  pool = functools.partial(lip_jax.lip_pool, implementation=implementation)
  for ours, theirs in zip(value_and_gradients(pool, g, x, logits), exact, strict=True):
    assert ours.dtype == dtype
    assert_close(ours, theirs, dtype)


def unfused(x, features, scale, bias):
  """The tail of a logit module step by step, in the dtype of its arguments."""
  mean = features.mean(axis=(1, 2), keepdims=True)
  var = jnp.square(features - mean).mean(axis=(1, 2), keepdims=True)
  scale, bias = scale.reshape(1, 1, 1, -1), bias.reshape(1, 1, 1, -1)
  normalized = (features - mean) / jnp.sqrt(var + 1e-5) * scale + bias
  return lip_jax.lip_pool(x, 12 * jax.nn.sigmoid(normalized))


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_fused_tail_equals_its_parts(x64, implementation, offset):
  shape = (3, 12, 9, 5)
  x, features, scale, bias, g = arrays(0, jnp.float32, shape, shape, (5,), (5,), (3, 6, 5, 5))
  arguments = (x, features + offset, scale, bias)
  exact = value_and_gradients(unfused, g, *(a.astype(jnp.float64) for a in arguments))
  fused = functools.partial(lip_jax.gated_lip_pool, implementation=implementation)
  for ours, theirs in zip(value_and_gradients(fused, g, *arguments), exact, strict=True):
    # A mean of 100 times the deviation costs float32 two digits of what is left.
    np.testing.assert_allclose(
      ours, theirs, rtol=0, atol=(2e-6 if offset == 0 else 1e-4) * np.abs(theirs).max()
    )


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_projection_is_computed_again_with_the_same_gradients(x64, implementation):
  x, source, kernel = arrays(0, jnp.float32, (2, 6, 7, 5), (2, 6, 7, 4), (1, 1, 4, 5))
  scale, bias, g = arrays(1, jnp.float32, (5,), (5,), (2, 3, 4, 5))
  arguments = (x, source, kernel, scale, bias)
  exact = value_and_gradients(
    lambda x, source, kernel, *norm: unfused(x, source @ kernel[0, 0], *norm),
    g,
    *(a.astype(jnp.float64) for a in arguments),
  )
  fused = functools.partial(lip_jax.projected_lip_pool, implementation=implementation)
  for ours, theirs in zip(value_and_gradients(fused, g, *arguments), exact, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_fused_tail_in_bfloat16_is_as_exact_as_its_arguments(x64, implementation):
  shape = (2, 14, 14, 8)
  x, features, g = arrays(0, jnp.bfloat16, shape, shape, (2, 7, 7, 8))
  scale, bias = arrays(1, jnp.float32, (8,), (8,))
  arguments = (x, features, scale, bias)
  exact = value_and_gradients(unfused, g, *(a.astype(jnp.float64) for a in arguments))
  fused = functools.partial(lip_jax.gated_lip_pool, implementation=implementation)
  for ours, theirs in zip(value_and_gradients(fused, g, *arguments), exact, strict=True):
    difference = np.abs(np.asarray(ours, np.float64) - theirs)
    assert difference.max() <= 2 * 2**-8 * np.abs(theirs).max()


def test_networks_use_the_fused_tail():
  """The same network with the logits in between, as they are recorded for pictures, agrees."""
  model = lip_jax.create_model(
    "lip_resnet_small", num_classes=4, width=8, stage_sizes=(1, 1, 1, 1), rngs=nnx.Rngs(0)
  )
  model.eval()
  images = arrays(0, jnp.float32, (2, 32, 32, 3))[0]
  with lip_jax.lan.record_logits() as records:
    slow = model(images)
  assert records
  text = jax.jit(lambda images: model(images)).lower(images).as_text()
  fused = re.findall(r"@_gated_fwd\w*\((%.*?)\) ->", text)
  # The convolution is part of it but for the stem's, which is 3x3.
  assert {"tensor<1x1x" in arguments for arguments in fused} == {True, False}
  np.testing.assert_allclose(model(images), slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_kernels_are_mapped_and_split_over_devices(fused):
  mesh = sharding.make_mesh()
  x, features = arrays(0, jnp.float32, (16, 6, 6, 4), (16, 6, 6, 4))
  one = jnp.ones(4)

  def pool(x, features, implementation):
    if fused:
      return lip_jax.gated_lip_pool(x, features, one, one, implementation=implementation)
    return lip_jax.lip_pool(x, features, implementation=implementation)

  @functools.partial(jax.jit, static_argnums=2)
  def gradients(x, features, implementation):
    y, vjp = jax.vjp(lambda a, b: pool(a, b, implementation), x, features)
    return y, vjp(y)

  expected = gradients(x, features, "xla")
  split = jax.device_put((x, features), sharding.over_batch(mesh))
  compiled = gradients.lower(*split, "pallas").compile()
  assert not any(name in compiled.as_text() for name in ("all-reduce", "all-gather", "permute"))
  mapped = jax.vmap(lambda a, b: gradients(a, b, "pallas"))(
    x.reshape(2, 8, 6, 6, 4), features.reshape(2, 8, 6, 6, 4)
  )
  mapped = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), mapped)
  for result in (compiled(*split), mapped):
    for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_no_kernel_supports_is_refused_by_name():
  x = jnp.zeros((1, 4, 4, 2))
  with pytest.raises(ValueError, match=r"'pallas' does not support x float32\[1, 4, 4, 2\]"):
    lip_jax.lip_pool(x, x[..., :1], implementation="pallas")
  for features, scale, message in (
    (x[..., :1], jnp.ones(2), r"features must be \(1, 4, 4, 2\)"),
    (x, jnp.ones(3), r"scale must be \(2,\)"),
  ):
    with pytest.raises(ValueError, match=message):
      lip_jax.gated_lip_pool(x, features, scale, jnp.ones(2))


def tail(x, features, **options):
  one = jnp.ones(x.shape[-1])
  return lip_jax.gated_lip_pool(x, features, one, one, **options)


def gradient_of(pool, **options):
  return jax.grad(lambda x, h: jnp.square(pool(x, h, **options)).sum(), argnums=(0, 1))


@pytest.mark.parametrize("implementation", ["auto", "pallas"])
@pytest.mark.parametrize("pool", [lip_jax.lip_pool, tail])
def test_second_derivatives(pool, implementation):
  x, features = arrays(0, jnp.float32, (4, 5, 5, 3), (4, 5, 5, 3))
  gradient = gradient_of(pool, implementation=implementation)
  penalty = lambda x: sum(jnp.square(g).sum() for g in gradient(x, features))  # noqa: E731
  second, step = jax.grad(penalty)(x), 1e-2 * arrays(1, jnp.float32, x.shape)[0]
  slope = (penalty(x + step) - penalty(x - step)) / 2
  np.testing.assert_allclose(jnp.vdot(second, step), slope, rtol=2e-2)


@pytest.mark.parametrize("pool", [lip_jax.lip_pool, tail])
def test_shard_map_and_explicit_meshes_with_their_default_checks(pool):
  x, features = arrays(0, jnp.float32, (4, 5, 5, 3), (4, 5, 5, 3))
  gradient = gradient_of(pool)
  expected = gradient(x, features)
  for axis_type in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("data",), (axis_type,), devices=jax.devices()[:2])
    places = PartitionSpec("data")
    split = jax.device_put((x, features), NamedSharding(mesh, places))
    with jax.set_mesh(mesh):
      mapped = jax.jit(jax.shard_map(gradient, in_specs=places, out_specs=places))
      for ours, theirs in zip(mapped(*split), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(jax.jit(pool)(*split), pool(x, features), rtol=1e-4, atol=1e-5)


def test_kernels_leave_what_does_not_fit_to_xla():
  """A mapped batch of 251 times one image: no multiple of eight, and too much for a block."""
  x, logits = arrays(0, jnp.float32, (251, 1, 8, 8, 256), (251, 1, 8, 8, 256))
  pool = functools.partial(lip_jax.lip_pool, implementation="pallas")
  lowered = jax.jit(jax.vmap(pool)).lower(x, logits)
  assert lowered.out_info.shape == (251, 1, 4, 4, 256)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_logits_of_minus_infinity_mask(implementation):
  x, logits = arrays(0, jnp.float32, (2, 6, 6, 3), (2, 6, 6, 3))
  pool = functools.partial(lip_jax.lip_pool, implementation=implementation)
  masked, low = logits.at[:, :, 2].set(-jnp.inf), logits.at[:, :, 2].set(-1e6)
  g = jnp.ones((2, 3, 3, 3))
  for ours, theirs in zip(
    value_and_gradients(pool, g, x, masked), value_and_gradients(pool, g, x, low), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_fused_tail_keeps_images_apart_and_takes_none():
  """A NaN in one image's gradient stays there; a batch may be empty; one map may be shared."""
  x, source, kernel, g = arrays(
    0, jnp.float32, (2, 6, 6, 3), (2, 6, 6, 4), (1, 1, 4, 3), (2, 3, 3, 3)
  )
  pool = lambda x, source: lip_jax.projected_lip_pool(  # noqa: E731
    x, source, kernel, jnp.ones(3), jnp.ones(3)
  )
  _, dx, dsource = value_and_gradients(pool, g.at[0, 0, 0, 0].set(jnp.nan), x, source)
  assert np.isnan(dx[0]).any()
  assert np.isfinite(dx[1]).all() and np.isfinite(dsource[1]).all()  # noqa: PT018
  assert jax.grad(lambda x: pool(x, source[:0]).sum())(x[:0]).shape == (0, 6, 6, 3)
  shared = lip_jax.LIP(lip_jax.Projection(3, 1, rngs=nnx.Rngs(0)))
  np.testing.assert_allclose(shared(x), lip_jax.average_pool(x), rtol=1e-5)


needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def compiled_for_tpus(*arguments):
  """Rows of the benchmark, in a process of its own, which libtpu changes."""
  command = [sys.executable, str(ROOT / "benchmarks" / "pool_tpu.py"), "--json", *arguments]
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
  done = subprocess.run(command, capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr
  return [json.loads(line) for line in done.stdout.splitlines()]


@needs_compiler
@pytest.mark.parametrize("batch", [3, 20, 64])
def test_compiles_for_tpus_with_any_batch(batch):
  """Neither images nor channels fill the 128 lanes, nor always the 8 rows of a register."""
  shapes = ["--shapes", "56x56x64", "28x28x96", "14x14x256"]
  rows = compiled_for_tpus(
    *("--implementations", "auto", "fused", "--generations", "v5e"),
    *("--batch", str(batch), *shapes),
  )
  assert len(rows) == 6


@needs_compiler
def test_compiles_for_every_tpu_and_moves_little():
  """Within 1.15 of the floor forward and 1.35 with the gradient."""
  rows = compiled_for_tpus(
    *("--implementations", "auto", "fused", "--shapes", "112x112x64", "28x28x256")
  )
  assert [row["tpu"] for row in rows] == [
    name for name in ("v4", "v5e", "v5p", "v6e") for _ in "1234"
  ]
  for row in rows:
    assert row["copies"] == 0
    if row["implementation"] == "auto":
      assert row["forward"]["kernels_over_floor"] <= 1.15
      assert row["with_gradient"]["kernels_over_floor"] <= 1.35
      assert row["forward"]["over_floor"] <= 1.15
      assert row["with_gradient"]["over_floor"] <= 1.35
    else:
      assert "kernels" in row["with_gradient"]
