"""Networks G(x) that predict the logits of local importance (section 3.2 and figure 3).

A logit module maps features [N, H, W, in_features] to logits [N, H, W, out_features] and does
nothing else. Each ends in a convolution that starts at zero, so its logits start constant and the
pooling that uses them starts as average pooling. `logit_range` is the interval that the logits lie
in, or None if they are unbounded.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax import layers

# "a sigmoid function with a fixed amplification coefficient": exp(12) bounds the ratio of the most
# to the least important pixel.
GATE = 12.0


def gate(x: jax.Array) -> jax.Array:
  """12 * sigmoid(x): logits in [0, 12] (section 3.2)."""
  return GATE * jax.nn.sigmoid(x)


class Projection(nnx.Module):
  """Convolution, affine instance norm, gate: the projection form of figure 3(a).

  With a 1x1 kernel it is the paper's projection and the last layer of the bottleneck form; with a
  3x3 kernel it is the form that the published networks use for the LIP of the stem.

  Args:
    in_features: channels that the logits are predicted from.
    out_features: channels that are to be pooled.
    kernel_size: of the convolution, in pixels.
    dtype: of the computation.
    rngs: source of the initial weights.
  """

  logit_range: tuple[float, float] | None = (0.0, GATE)

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    kernel_size: int = 1,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.conv = layers.conv(
      in_features, out_features, kernel_size, zero_init=True, dtype=dtype, rngs=rngs
    )
    self.norm = layers.InstanceNorm(out_features, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    return gate(self.norm(self.conv(x)))


class BottleneckTrunk(nnx.Module):
  """1x1 convolution to `width`, then 3x3, each with affine instance norm and ReLU (figure 3(b)).

  All of the bottleneck form but its last layer. Two poolings of one block share it (figure 4).

  Args:
    in_features: channels of the input.
    width: x in "bottleneck-x", channels of the output.
    dtype: of the computation.
    rngs: source of the initial weights.
  """

  def __init__(
    self, in_features: int, width: int = 128, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs
  ):
    self.conv1 = layers.conv(in_features, width, 1, dtype=dtype, rngs=rngs)
    self.norm1 = layers.InstanceNorm(width, dtype=dtype)
    self.conv2 = layers.conv(width, width, 3, dtype=dtype, rngs=rngs)
    self.norm2 = layers.InstanceNorm(width, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = nnx.relu(self.norm1(self.conv1(x)))
    return nnx.relu(self.norm2(self.conv2(x)))


class Bottleneck(nnx.Module):
  """The whole bottleneck-x form of figure 3(b): trunk, then projection.

  Args:
    in_features: channels that the logits are predicted from.
    out_features: channels that are to be pooled.
    width: x in "bottleneck-x".
    dtype: of the computation.
    rngs: source of the initial weights.
  """

  logit_range: tuple[float, float] | None = (0.0, GATE)

  def __init__(
    self,
    in_features: int,
    out_features: int,
    width: int = 128,
    *,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.trunk = BottleneckTrunk(in_features, width, dtype=dtype, rngs=rngs)
    self.projection = Projection(width, out_features, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.projection(self.trunk(x))
