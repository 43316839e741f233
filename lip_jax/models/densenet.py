"""DenseNet-BC with a choice of down-sampling: the plain network, or LIP.

Sources: Huang et al. 2017, and section 3.3 of the LIP paper: LIP of 2x2 windows between the dense
blocks, each with a logit module of its own, and of 3x3 windows behind the first convolution.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax.models import layers
from lip_jax.models.downsample import Downsample

_BOTTLENECK = 4  # inner channels of a dense layer, in growth rates


class DenseLayer(nnx.Module):
  """Norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution; [N, H, W, in] -> [..., growth].

  The input comes in parts, the outputs of the layers before, which are joined along the channels.

  Args:
    in_features: channels of the input.
    growth: channels of the output.
    norm: makes a batch norm from its number of features.
    dtype: of the computation.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    in_features: int,
    growth: int,
    *,
    norm: Callable[..., layers.BatchNorm],
    dtype: Dtype,
    rngs: nnx.Rngs,
  ):
    inner = _BOTTLENECK * growth
    self.norm1 = norm(in_features)
    self.conv1 = layers.conv(
      in_features, inner, 1, init=layers.kaiming_fan_in, dtype=dtype, rngs=rngs
    )
    self.norm2 = norm(inner)
    self.conv2 = layers.conv(inner, growth, 3, init=layers.kaiming_fan_in, dtype=dtype, rngs=rngs)

  def __call__(self, *parts: jax.Array) -> jax.Array:
    x = jnp.concatenate(parts, axis=3)
    h = self.conv1(nnx.relu(self.norm1(x)))
    return self.conv2(nnx.relu(self.norm2(h)))


class Transition(nnx.Module):
  """Norm, ReLU, 1x1 convolution to half the channels, pooling.

  Args:
    in_features: channels of the input.
    downsample: makes the pooling.
    norm: makes a batch norm from its number of features.
    dtype: of the computation.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    in_features: int,
    *,
    downsample: Downsample,
    norm: Callable[..., layers.BatchNorm],
    dtype: Dtype,
    rngs: nnx.Rngs,
  ):
    out_features = in_features // 2
    self.norm = norm(in_features)
    self.conv = layers.conv(
      in_features, out_features, 1, init=layers.kaiming_fan_in, dtype=dtype, rngs=rngs
    )
    self.pool = downsample.between_blocks(out_features, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.pool(self.conv(nnx.relu(self.norm(x))))


class DenseNet(nnx.Module):
  """DenseNet-BC with a choice of down-sampling.

  Args:
    num_classes: number of logits.
    downsample: for each of "stem", "c3", "c4" and "c5", what halves the resolution there:
      `lip_jax.models.downsample.make_downsamples`.
    block_sizes: layers in each of the four dense blocks.
    growth: channels that each layer adds.
    width: channels after the first convolution.
    bn_group_size: images per batch-norm group in training; None or 0 for the whole batch.
    bn_axis_name: `layers.BatchNorm`'s axis_name.
    remat: in training, keep the activations between dense layers only, and compute the others
      again in the backward pass.
    dtype: of the computation: float32, bfloat16, float16, or float64 where JAX has x64 enabled.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    num_classes: int = 1000,
    *,
    downsample: Mapping[str, Downsample],
    block_sizes: Sequence[int],
    growth: int = 32,
    width: int = 64,
    bn_group_size: int | None = None,
    bn_axis_name: tuple[str, ...] | None = None,
    remat: bool = False,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    layers.check_four("block_sizes", block_sizes)
    layers.check_sizes(growth=growth, width=width, num_classes=num_classes)
    self.dtype = dtype
    self.remat = remat
    norm = layers.norm_factory(bn_group_size, bn_axis_name, dtype)

    self.conv0 = layers.conv(
      3, width, 7, stride=2, init=layers.kaiming_fan_in, dtype=dtype, rngs=rngs
    )
    self.norm0 = norm(width)
    self.pool0 = downsample["stem"].stem(width, dtype=dtype, rngs=rngs)
    features = width
    for index, size in enumerate(block_sizes):
      if index > 0:
        transition = Transition(
          features, downsample=downsample[f"c{index + 2}"], norm=norm, dtype=dtype, rngs=rngs
        )
        setattr(self, f"transition{index}", transition)
        features //= 2
      block = [
        DenseLayer(features + i * growth, growth, norm=norm, dtype=dtype, rngs=rngs)
        for i in range(size)
      ]
      setattr(self, f"denseblock{index + 1}", nnx.List(block))
      features += size * growth
    self.norm5 = norm(features)
    self.classifier = layers.linear(features, num_classes, dtype=dtype, rngs=rngs)

  def features(self, images: jax.Array) -> dict[str, jax.Array]:
    """Outputs of the stem and of the four dense blocks.

    Args:
      images: [N, H, W, 3], normalized.

    Returns:
      "stem" and "c2" at stride 4, "c3" at 8, "c4" at 16, "c5" (behind the last norm and ReLU) at
      32, each [N, H', W', C] in the compute dtype.
    """
    layers.check_images(images)
    x = self.pool0(nnx.relu(self.norm0(self.conv0(images.astype(self.dtype)))))
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

  def __call__(self, images: jax.Array) -> jax.Array:
    """Class logits.

    Args:
      images: [N, H, W, 3], normalized.

    Returns:
      [N, num_classes], float32 (float64 in a float64 model).
    """
    c5 = self.features(images)["c5"]
    return self.classifier(c5.mean(axis=(1, 2), dtype=layers.param_dtype(self.dtype)))
