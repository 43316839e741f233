"""Images of different sizes in one batch: as if each were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lip_jax
from lip_jax import lan
from lip_jax.errors import UsageError
from lip_jax.models import layers, padding

SIZE, PADDED = (8, 12), (16, 16)  # of the first image, and of the batch; the second fills it


def images(channels=4):
  x = np.random.default_rng(0).normal(size=(2, *PADDED, channels)).astype(np.float32)
  return jnp.asarray(x)  # not zero behind the first image


def masked(function, x):
  with padding.masked(jnp.array([SIZE, PADDED]), PADDED):
    return function(x)


def norm(kind):
  made = kind(4)
  made.scale[...] = jnp.arange(1.0, 5.0)
  made.bias[...] = jnp.arange(-2.0, 2.0)
  return made


LAYERS = {
  "instance norm": lambda: norm(layers.InstanceNorm),
  "batch norm": lambda: norm(lambda size: layers.BatchNorm(size, frozen=True)),
  "average": lan.AveragePool,
  "max": lan.MaxPool,
  "strided": lan.StridedPool,
  "soft": lan.SoftPool,
  "exp": lambda: lan.ExpPool(0.5),
  "lip": lambda: lip_jax.LIP(random_logits("norm_gate")),
  "lip, unbounded": lambda: lip_jax.LIP(random_logits("norm")),
}


def random_logits(top):
  made = lip_jax.Projection(4, 4, top=top, rngs=nnx.Rngs(0))
  made.conv.kernel[...] = jax.random.normal(jax.random.key(0), made.conv.kernel.shape)
  return made


@pytest.mark.parametrize("name", LAYERS)
def test_each_image_is_computed_as_if_it_were_alone(name):
  layer, x = LAYERS[name](), images()
  alone = [layer(x[:1, : SIZE[0], : SIZE[1]]), layer(x[1:])]
  together = masked(layer, x)
  for k, expected in enumerate(alone):
    _, height, width, _ = expected.shape
    np.testing.assert_allclose(together[k, :height, :width], expected[0], rtol=2e-5, atol=2e-6)
    # A window that begins behind the image sees its last pixels, and what comes next must not.
    assert not together[k, height:].any()
    assert not together[k, :, width:].any()


def test_gradient_of_masked_instance_norm():
  layer, x = norm(layers.InstanceNorm), images()
  graph, state = nnx.split(layer)
  weights = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

  def loss(state, x, weights):
    return (nnx.merge(graph, state, copy=True)(x) * weights).sum()

  def together(state, x):
    return masked(lambda x: loss(state, x, weights), x)

  of_state, of_x = jax.grad(together, (0, 1))(state, x)
  inside = (slice(0, 1), slice(SIZE[0]), slice(SIZE[1]))
  first, of_first = jax.grad(loss, (0, 1))(state, x[inside], weights[inside])
  second, of_second = jax.grad(loss, (0, 1))(state, x[1:], weights[1:])
  np.testing.assert_allclose(of_x[inside], of_first, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(of_x[1:], of_second, rtol=1e-4, atol=1e-5)
  assert not of_x[0, SIZE[0] :].any()
  assert not of_x[0, :, SIZE[1] :].any()
  expected = jax.tree.map(jnp.add, first, second)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), of_state, expected)


def test_a_pool_without_such_a_form_says_so():
  with pytest.raises(UsageError, match="LpPool"):
    masked(lan.LpPool(), images())
