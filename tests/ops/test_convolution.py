import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from lip_jax.ops import convolution
from lip_jax.ops.convolution import conv_general_dilated, in_blocks, of_groups, over_cells

# Kernel, stride, padding, image: what CPUs compute in another form, and what they do not.
FORMS = {
  "1x1": (1, 1, (0, 0), (9, 7)),
  "1x1, stride 2": (1, 2, (0, 0), (9, 8)),
  "1x1, padded": (1, 1, (1, 1), (9, 7)),
  "3x3": (3, 1, (1, 1), (24, 26)),
  "3x3, odd size": (3, 1, (1, 1), (23, 25)),
  "3x3, without padding": (3, 1, (0, 0), (27, 24)),
  "3x3, padded on one side": (3, 1, (0, 2), (24, 25)),
  "3x3, few pixels": (3, 1, (1, 1), (5, 4)),
  "3x3, image by image": (3, 1, (1, 1), (259, 260)),
  "3x3, stride 2": (3, 2, (1, 1), (25, 24)),
  "7x7": (7, 2, (3, 3), (24, 24)),
}


def layers(size, stride, padding, **options):
  """The same convolution by XLA and in the forms for CPUs."""
  both = []
  for function in (lax.conv_general_dilated, conv_general_dilated):
    layer = nnx.Conv(
      8,
      6,
      (size, size),
      strides=stride,
      padding=(padding, padding),
      rngs=nnx.Rngs(0),
      conv_general_dilated=function,
      **options,
    )
    both.append(layer)
  return both


def images(*size, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(0).standard_normal((2, *size, 8)), dtype)


@pytest.mark.parametrize("name", FORMS)
def test_equals_the_general_convolution(name):
  *kernel, size = FORMS[name]
  general, ours = layers(*kernel)
  x = images(*size)
  expected = general(x)
  np.testing.assert_allclose(ours(x), expected, rtol=0, atol=4e-6)

  def loss(layer, x):
    return jnp.sum(jnp.square(layer(x)))

  expected, found = (jax.grad(loss, 1)(layer, x) for layer in (general, ours))
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
  ("options", "dtype"),
  [({"feature_group_count": 2}, jnp.float32), ({"kernel_dilation": 2}, jnp.float32)]
  + [({}, jnp.bfloat16), ({"input_dilation": 2}, jnp.float32)]
  + [({"feature_group_count": 2, "kernel_dilation": 2}, jnp.float32)],
)
def test_others_are_those_of_xla(options, dtype):
  general, ours = layers(3, 1, (1, 1), dtype=dtype, **options)
  x = images(24, 24, dtype=dtype)
  np.testing.assert_array_equal(ours(x), general(x))


@pytest.mark.parametrize("size", [1, 3])
def test_only_cpus_compute_the_forms(size):
  """What is compiled for other platforms has the convolution itself."""
  _, ours = layers(size, 1, (size // 2, size // 2))
  traced = jax.jit(ours).trace(images(24, 24))
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("stablehlo.convolution") == 1
  assert "dot_general" not in text
  assert "stablehlo.convolution" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_over_cells_equals_stride_two(size, channels):
  rng = np.random.default_rng(size)
  x = jnp.asarray(rng.standard_normal((2, 12, 10, channels)), jnp.float32)
  kernel = jnp.asarray(rng.standard_normal((size, size, channels, 5)), jnp.float32)
  g = jnp.asarray(rng.standard_normal((2, 6, 5, 5)), jnp.float32)
  options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
  padding = ((size // 2, size // 2),) * 2

  def general(x, kernel):
    return lax.conv_general_dilated(x, kernel, (2, 2), padding, **options)

  expected, back = jax.vjp(general, x, kernel)
  found, ours = jax.vjp(lambda x, kernel: over_cells(x, kernel, **options), x, kernel)
  for one, other in zip((found, *ours(g)), (expected, *back(g)), strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * float(jnp.abs(other).max()))


# Groups, channels in and out, and groups in a block of 128 channels.
GROUPS = {
  "ResNeXt": (32, 128, 128, 32),
  "two blocks": (32, 256, 256, 16),
  "some in a block": (6, 120, 240, 3),
  "wide": (2, 300, 300, 1),
  "one channel each": (8, 8, 16, 8),
}


def grouped(name, function, size=3, stride=1):
  """(convolution, images, kernel) of a row of GROUPS."""
  groups, inputs, outputs, _ = GROUPS[name]
  rng = np.random.default_rng(size)
  x = jnp.asarray(rng.standard_normal((2, 9, 8, inputs)), jnp.float32)
  kernel = jnp.asarray(rng.standard_normal((size, size, inputs // groups, outputs)), jnp.float32)
  options = {
    "lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "precision": None,
    "dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups,
  }  # fmt: skip
  padding = ((size // 2, size // 2),) * 2
  return lambda x, kernel: function(x, kernel, (stride, stride), padding, **options), x, kernel


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (5, 2)])
@pytest.mark.parametrize("form", [of_groups, in_blocks])
def test_groups_equal_those_of_xla(name, size, stride, form):
  """Output, gradients and derivatives along a direction."""
  found = []
  for function in (lax.conv_general_dilated, form):
    call, x, kernel = grouped(name, function, size, stride)
    y, back = jax.vjp(call, x, kernel)
    g = jnp.asarray(np.random.default_rng(0).standard_normal(y.shape), jnp.float32)
    found.append((y, *back(g), jax.jvp(call, (x, kernel), (jnp.cos(x), jnp.sin(kernel)))[1]))
  for expected, ours in zip(*found, strict=True):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_in_blocks_on_tpus(name, monkeypatch):
  """And there alone; on CPUs the gradient by the kernel is of products, where it is wanted."""
  monkeypatch.setattr(convolution, "targets", lambda: {"tpu"})
  groups, _, _, together = GROUPS[name]
  call, x, kernel = grouped(name, of_groups)
  traced = jax.jit(jax.grad(lambda k, x: jnp.sum(jnp.square(call(x, k))))).trace(kernel, x)
  for platform, convolutions in (("cpu", 1), ("tpu", 2), ("cuda", 2)):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    expected = groups // together if platform == "tpu" else groups
    assert f"feature_group_count = {expected} :" in text, platform
    assert text.count("stablehlo.convolution") == convolutions
    assert ("dot_general" in text) == (platform == "cpu")
  by_images = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(call(x, kernel)))))
  assert "dot_general" not in by_images.lower(x).as_text()
