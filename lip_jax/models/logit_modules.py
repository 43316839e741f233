"""Networks G(x) that predict the logits of local importance (section 3.3, figures 4d and 4e).

A logit module maps features [N, H, W, in_features] to logits [N, H, W, out_features] and does
nothing else. Each ends in a convolution that starts at zero, so its logits start constant and the
pooling that uses them starts as average pooling (section 4.1). `logit_range` is the interval that
the logits lie in, or None if they are unbounded.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax.models import layers
from lip_jax.models.layers import LayerFactory
from lip_jax.ops.kernels.dispatch import targets
from lip_jax.ops.kernels.gate import GATE
from lip_jax.ops.lip_pool import gated_lip_pool, projected_lip_pool

# What follows the last convolution of a logit module: table 2 of the paper, A to D.
TOPS = ("norm_gate", "norm", "gate", "none")


def gate(x: jax.Array) -> jax.Array:
  """12 * sigmoid(x): logits in [0, 12] (section 3.3)."""
  return GATE * jax.nn.sigmoid(x)


class Projection(nnx.Module):
  """Convolution and its top, by default affine instance norm and gate: figure 4d.

  With a 1x1 kernel it is the paper's projection and the last layer of the bottleneck form; with a
  3x3 kernel it is the form that the published networks use for the LIP of the stem.

  Args:
    top: "norm_gate", "norm", "gate" or "none". Without the gate the logits are unbounded.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    kernel_size: int = 1,
    top: str = "norm_gate",
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    layers.check_choice(TOPS, logit_top=top)
    make = LayerFactory(dtype, rngs, nnx.initializers.zeros)
    self.conv = make.conv(in_features, out_features, kernel_size)
    self.norm = make.instance_norm(out_features) if top in ("norm_gate", "norm") else None
    self.gated = top in ("norm_gate", "gate")

  @property
  def logit_range(self) -> tuple[float, float] | None:
    return (0.0, GATE) if self.gated else None

  def __call__(self, x: jax.Array) -> jax.Array:
    logits = self.conv(x)
    if self.norm is not None:
      logits = self.norm(logits)
    return gate(logits) if self.gated else logits

  def fuses(self, x: jax.Array) -> bool:
    """Whether `pool` of x can be used instead of the logits."""
    own = type(self.conv) is nnx.Conv and type(self.norm) is layers.InstanceNorm
    return own and self.gated and self.conv.out_features == x.shape[3] and self.conv.bias is None

  def pool(self, x: jax.Array, source: jax.Array, **windows: Any) -> jax.Array:
    """`lip_pool` of x by the logits of `source`, which are never in memory as a whole.

    A 1x1 convolution is computed again for the gradient rather than kept: 3 % of the multiply-adds
    of LIP-ResNet-50, and a tenth of its memory. Not so on GPUs, which have the memory and lack the
    bandwidth (nor where programs may be compiled for both); nor one in a form of its own, as
    `fold_batch_norm` gives it.

    Args:
      x: what is pooled, [N, H, W, out_features].
      source: [N, H, W, in_features].
      **windows: of `lip_pool`.
    """
    norm = self.norm
    assert norm is not None, "the caller asks `fuses`"
    tail = (norm.scale[...], norm.bias[...])
    own = self.conv.conv_general_dilated is not jax.lax.conv_general_dilated
    if own or self.conv.kernel_size != (1, 1) or "cuda" in targets():
      return gated_lip_pool(x, self.conv(source), *tail, epsilon=norm.epsilon, **windows)
    kernel, source = self.conv.kernel[...], source.astype(self.conv.dtype)
    return projected_lip_pool(x, source, kernel, *tail, epsilon=norm.epsilon, **windows)


class BottleneckTrunk(nnx.Module):
  """1x1 convolution to `width`, then 3x3, each with affine instance norm and ReLU (figure 4e).

  All of the bottleneck form but its last layer. Two poolings of one block share it (section 3.3).

  Args:
    width: x in "Bottleneck-x", channels of the output.
  """

  def __init__(self, in_features: int, width: int, make: LayerFactory):
    layers.check_sizes(in_features=in_features, width=width)
    self.conv1 = make.conv(in_features, width, 1)
    self.norm1 = make.instance_norm(width)
    self.conv2 = make.conv(width, width, 3)
    self.norm2 = make.instance_norm(width)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = layers.rectified(self.norm1, self.conv1(x))
    return layers.rectified(self.norm2, self.conv2(x))


class Bottleneck(nnx.Module):
  """The whole Bottleneck-x form of figure 4e: trunk, then projection.

  Args:
    width: x in "Bottleneck-x".
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    width: int = 128,
    *,
    top: str = "norm_gate",
    init: nnx.Initializer = layers.kaiming_fan_out,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.trunk = BottleneckTrunk(in_features, width, LayerFactory(dtype, rngs, init))
    self.projection = Projection(width, out_features, top=top, dtype=dtype, rngs=rngs)

  @property
  def logit_range(self) -> tuple[float, float] | None:
    return self.projection.logit_range

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.projection(self.trunk(x))

  def fuses(self, x: jax.Array) -> bool:
    """As `Projection.fuses`."""
    return type(self.projection) is Projection and self.projection.fuses(x)

  def pool(self, x: jax.Array, source: jax.Array, **windows: Any) -> jax.Array:
    """As `Projection.pool`."""
    return self.projection.pool(x, self.trunk(source), **windows)
