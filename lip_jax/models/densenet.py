"""DenseNet-BC with a choice of down-sampling: the plain network, or LIP.

Sources: Huang et al. 2017, and section 3.3 of the LIP paper: LIP of 2x2 windows between the dense
blocks, each with a logit module of its own, and of 3x3 windows behind the first convolution.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax.models import layers
from lip_jax.models.downsample import Downsample
from lip_jax.models.layers import LayerFactory
from lip_jax.models.network import Network

_BOTTLENECK = 4  # inner channels of a dense layer, in growth rates


class DenseLayer(nnx.Module):
  """Norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution; [N, H, W, in] -> [..., growth].

  The input comes in parts, the outputs of the layers before, which are joined along the channels.
  """

  norm_inputs: ClassVar = {"norm2": "conv1"}

  def __init__(self, in_features: int, growth: int, make: LayerFactory):
    inner = _BOTTLENECK * growth
    self.norm1 = make.norm(in_features)
    self.conv1 = make.conv(in_features, inner, 1)
    self.norm2 = make.norm(inner)
    self.conv2 = make.conv(inner, growth, 3)

  def __call__(self, *parts: jax.Array) -> jax.Array:
    x = jnp.concatenate(parts, axis=3)
    h = self.conv1(nnx.relu(self.norm1(x)))
    return self.conv2(nnx.relu(self.norm2(h)))


class Transition(nnx.Module):
  """Norm, ReLU, 1x1 convolution to half the channels, pooling."""

  def __init__(self, in_features: int, downsample: Downsample, make: LayerFactory):
    self.norm = make.norm(in_features)
    self.conv = make.conv(in_features, in_features // 2, 1)
    self.pool = downsample.between_blocks(in_features // 2, make)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.pool(self.conv(nnx.relu(self.norm(x))))


class DenseNet(Network):
  """DenseNet-BC with a choice of down-sampling.

  Args:
    downsample: for each of "stem", "c3", "c4" and "c5", what halves the resolution there:
      `lip_jax.models.downsample.make_downsamples`.
    norm: makes the batch norms: `layers.make_batch_norm`.
  """

  stages: ClassVar = {
    "stem": ("conv0", "norm0", "pool0"),
    "c2": ("denseblock1",),
    "c3": ("transition1", "denseblock2"),
    "c4": ("transition2", "denseblock3"),
    "c5": ("transition3", "denseblock4", "norm5"),
    "classifier": ("classifier",),
  }
  norm_inputs: ClassVar = {"norm0": "conv0"}

  def __init__(
    self,
    num_classes: int = 1000,
    *,
    downsample: Mapping[str, Downsample],
    block_sizes: Sequence[int],
    growth: int = 32,
    width: int = 64,
    in_channels: int = 3,
    remat: bool = False,
    norm: Callable[..., layers.BatchNorm] = layers.BatchNorm,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(num_classes, in_channels=in_channels, remat=remat, dtype=dtype)
    layers.check_four("block_sizes", block_sizes)
    layers.check_sizes(growth=growth, width=width)
    make = LayerFactory(dtype, rngs, layers.kaiming_fan_in, norm)

    self.conv0 = make.conv(in_channels, width, 7, stride=2)
    self.norm0 = make.norm(width)
    self.pool0 = downsample["stem"].stem(width, make)
    features = width
    for index, size in enumerate(block_sizes):
      if index > 0:
        transition = Transition(features, downsample[f"c{index + 2}"], make)
        setattr(self, f"transition{index}", transition)
        features //= 2
      block = [DenseLayer(features + i * growth, growth, make) for i in range(size)]
      setattr(self, f"denseblock{index + 1}", nnx.List(block))
      features += size * growth
    self.norm5 = make.norm(features)
    self.classifier = make.classifier(features, num_classes)

  def features(self, images: jax.Array) -> dict[str, jax.Array]:
    x = self.pool0(nnx.relu(self.norm0(self.conv0(self._input(images)))))
    outputs = {"stem": x}
    for index in range(4):
      if index > 0:
        x = getattr(self, f"transition{index}")(x)
      parts = [x]
      for layer in getattr(self, f"denseblock{index + 1}"):
        parts.append(layers.apply(layer, *parts, remat=self.remat))
      x = jnp.concatenate(parts, axis=3)
      outputs[f"c{index + 2}"] = x
    outputs["c5"] = nnx.relu(self.norm5(x))
    return outputs
