"""`lip_pool` of logits whose range is not given: by one shift where it is narrow, else safe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lip_jax
from lip_jax.distributed import sharding
from lip_jax.ops.kernels import xla
from lip_jax.ops.windows import Geometry

SHAPE, OUT = (4, 7, 6, 8), (4, 4, 3, 8)
GEOMETRY = Geometry((3, 3), (2, 2), (1, 1))


def arrays(spread, channels=8, dtype=jnp.float32):
  """x, logits of exactly this spread, and a cotangent."""
  rng = np.random.default_rng(0)
  logits = rng.random((*SHAPE[:3], channels))
  logits = spread * (logits - logits.min()) / (logits.max() - logits.min()) - 3
  values = rng.standard_normal(SHAPE), logits, rng.standard_normal(OUT)
  return [jnp.asarray(value, dtype) for value in values]


@jax.jit
def gradients(x, logits, g):
  y, vjp = jax.vjp(lip_jax.lip_pool, x, logits)
  return y, *vjp(g)


@jax.jit
def safe(x, logits, g):
  y, windows = xla.forward(x, logits, None, GEOMETRY, None)
  return y, *xla.backward(x, logits, None, windows, g, GEOMETRY, None)[:2]


def assert_close(found, expected):
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_a_narrow_range_gives_the_same_up_to_rounding(dtype, channels):
  arguments = arrays(75.0, channels, dtype)
  unit = 4 * float(jnp.finfo(dtype).eps)
  for ours, theirs in zip(gradients(*arguments), safe(*arguments), strict=True):
    assert ours.dtype == dtype
    np.testing.assert_allclose(
      *(np.asarray(a, np.float64) for a in (ours, theirs)), rtol=unit, atol=2 * unit
    )


def test_looks_at_the_range():
  """What is narrow is rounded otherwise than by the safe form, forward and backward."""
  narrow = arrays(75.0)
  for ours, theirs in zip(gradients(*narrow), safe(*narrow), strict=True):
    assert (np.asarray(ours) != np.asarray(theirs)).any()


@pytest.mark.parametrize("change", ["spread", "one", "mask", "nan"])
def test_logits_beyond_give_the_bits_of_the_safe_form(change):
  x, logits, g = arrays(200.0 if change == "spread" else 10.0)
  if change != "spread":
    value = {"one": -1e4, "mask": -jnp.inf, "nan": jnp.nan}[change]
    logits = logits.at[1, 2, 3, 4].set(value)
  for ours, theirs in zip(gradients(x, logits, g), safe(x, logits, g), strict=True):
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("scale", [(1e37, 1.0), (1.0, 1e35)])
def test_large_features_and_gradients_do_not_overflow(scale):
  x, logits, g = arrays(79.0)
  arguments = x * scale[0], logits, g * scale[1]
  y, dx, dlogits = gradients(*arguments)
  expected = safe(x, logits, g)
  assert_close((y / scale[0], dx / scale[1], dlogits / max(scale)), expected)


def test_mapped_examples_may_differ_in_range():
  narrow, wide = arrays(10.0), arrays(300.0)
  for pair in ((narrow, narrow), (narrow, wide)):
    mapped = jax.vmap(gradients)(*(jnp.stack(both) for both in zip(*pair, strict=True)))
    for index, arguments in enumerate(pair):
      assert_close([a[index] for a in mapped], safe(*arguments))


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("places", [("data", None), (None, "data"), ("data", "data")])
def test_split_over_devices_in_any_way(places, channels):
  """Also where arguments lie differently, as one device's part has another range than the rest."""
  mesh = sharding.make_mesh(devices=jax.devices()[:2])
  axis = mesh.axis_names[0]
  x, logits, g = arrays(10.0, channels)
  logits = logits.at[0].mul(30)
  of_x, of_logits = (PartitionSpec(axis if place else None) for place in places)
  split = [
    jax.device_put(a, NamedSharding(mesh, place))
    for a, place in ((x, of_x), (logits, of_logits), (g, of_x))
  ]
  assert_close(gradients(*split), safe(x, logits, g))


def test_split_along_the_channels():
  mesh = sharding.make_mesh(devices=jax.devices()[:2])
  channels = PartitionSpec(None, None, None, mesh.axis_names[0])
  for count in (1, 8):
    x, logits, g = arrays(10.0, count)
    split = [
      jax.device_put(a, NamedSharding(mesh, channels if a.shape[3] > 1 else PartitionSpec()))
      for a in (x, logits, g)
    ]
    assert_close(gradients(*split), safe(x, logits, g))


def test_each_device_of_a_shard_map_looks_at_its_own():
  mesh = sharding.make_mesh(devices=jax.devices()[:2])
  rows = PartitionSpec(mesh.axis_names[0])
  x, logits, g = arrays(10.0)
  logits = logits.at[0].mul(30)
  mapped = jax.jit(
    jax.shard_map(gradients, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
  )
  found, (near, far) = mapped(x, logits, g), (slice(2, 4), slice(0, 2))
  assert_close(found, safe(x, logits, g))
  one_device = [a[far] for a in (x, logits, g)]
  for ours, theirs in zip(found, safe(*one_device), strict=True):
    np.testing.assert_array_equal(ours[far], theirs)
  for ours, theirs in zip(found, gradients(*(a[near] for a in (x, logits, g))), strict=True):
    np.testing.assert_array_equal(ours[near], theirs)
