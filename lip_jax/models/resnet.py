"""ResNets whose down-sampling is an argument: plain, pooled in any way, or LIP.

Sources: He et al. 2016 in the form of fb.resnet.torch (the stride sits in the 3x3 convolution), and
section 3.3 with figure 4 of the LIP paper.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax.errors import UsageError
from lip_jax.models import layers
from lip_jax.models.downsample import Convolutions, Downsample

Stem = Literal["imagenet", "small"]
NormFactory = Callable[..., layers.BatchNorm]


class ResidualBlock(nnx.Module):
  """What ends both kinds of block: the norm of the shortcut, the sum, and a pooling behind it.

  Args:
    in_features: channels of the block's input.
    out_features: channels of its output.
    downsample: of a block that halves the resolution, or None.
    norm: makes a batch norm from its number of features.
    dtype: of the computation.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    downsample: Downsample | None,
    norm: NormFactory,
    dtype: Dtype,
    rngs: nnx.Rngs,
  ):
    identity = downsample is None and in_features == out_features
    self.shortcut_bn = None if identity else norm(out_features)
    self.pool = (
      None if downsample is None else downsample.after_block(out_features, dtype=dtype, rngs=rngs)
    )

  def _join(self, h: jax.Array, shortcut: jax.Array) -> jax.Array:
    if self.shortcut_bn is not None:
      shortcut = self.shortcut_bn(shortcut)
    y = nnx.relu(h + shortcut)
    return y if self.pool is None else self.pool(y)


class BasicBlock(ResidualBlock):
  """Residual block 3x3, 3x3; [N, H, W, in] -> [N, H', W', width].

  Where a block halves the resolution, its first convolution is what the bottleneck block's second
  is: a transition, here of the block's input itself.

  Args:
    in_features: channels of the input.
    width: channels inside the block.
    downsample: makes the transition of a block that halves the resolution; None keeps it.
    norm: makes a batch norm from its number of features.
    zero_init_residual: start the last batch norm's scale at zero, so the block starts as identity.
    dtype: of the computation.
    rngs: source of the initial weights.
  """

  expansion = 1  # output channels / width
  transition_name = "conv1"  # of the convolution that the transition replaces

  def __init__(
    self,
    in_features: int,
    width: int,
    *,
    downsample: Downsample | None,
    norm: NormFactory,
    zero_init_residual: bool,
    dtype: Dtype,
    rngs: nnx.Rngs,
  ):
    make_spatial = Convolutions if downsample is None else downsample.transition
    self.spatial = make_spatial(in_features, in_features, width, width, dtype=dtype, rngs=rngs)
    self.bn1 = norm(width)
    self.conv2 = layers.conv(width, width, 3, dtype=dtype, rngs=rngs)
    self.bn2 = norm(width, zero_init=zero_init_residual)
    super().__init__(in_features, width, downsample=downsample, norm=norm, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    h, shortcut = self.spatial(x, x)
    h = nnx.relu(self.bn1(h))
    return self._join(self.bn2(self.conv2(h)), shortcut)


class BottleneckBlock(ResidualBlock):
  """Residual block 1x1, 3x3, 1x1; [N, H, W, in] -> [N, H', W', 4 * width].

  Args:
    in_features: channels of the input.
    width: channels inside the block.
    downsample: makes the transition of a block that halves the resolution; None keeps it.
    norm: makes a batch norm from its number of features.
    zero_init_residual: start the last batch norm's scale at zero, so the block starts as identity.
    dtype: of the computation.
    rngs: source of the initial weights.
  """

  expansion = 4  # output channels / width
  transition_name = "conv2"  # of the convolution that the transition replaces

  def __init__(
    self,
    in_features: int,
    width: int,
    *,
    downsample: Downsample | None,
    norm: NormFactory,
    zero_init_residual: bool,
    dtype: Dtype,
    rngs: nnx.Rngs,
  ):
    out_features = self.expansion * width
    self.conv1 = layers.conv(in_features, width, 1, dtype=dtype, rngs=rngs)
    self.bn1 = norm(width)
    make_spatial = Convolutions if downsample is None else downsample.transition
    self.spatial = make_spatial(in_features, width, width, out_features, dtype=dtype, rngs=rngs)
    self.bn2 = norm(width)
    self.conv3 = layers.conv(width, out_features, 1, dtype=dtype, rngs=rngs)
    self.bn3 = norm(out_features, zero_init=zero_init_residual)
    super().__init__(
      in_features, out_features, downsample=downsample, norm=norm, dtype=dtype, rngs=rngs
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    h = nnx.relu(self.bn1(self.conv1(x)))
    h, shortcut = self.spatial(x, h)
    h = nnx.relu(self.bn2(h))
    return self._join(self.bn3(self.conv3(h)), shortcut)


class ResNet(nnx.Module):
  """ResNet with a choice of down-sampling.

  Networks with another `downsample` differ in the stem's pooling and in the first blocks of the
  second, third and fourth stage, and in nothing else.

  Args:
    num_classes: number of logits.
    downsample: for each of "stem", "c3", "c4" and "c5", what halves the resolution there:
      `lip_jax.models.downsample.make_downsamples`.
    stage_sizes: blocks in each of the four stages.
    block: "bottleneck" or "basic".
    width: channels after the stem, and inside the first stage's blocks; doubles at each stage.
    stem: "imagenet" (7x7 convolution, stride 2) or "small" (3x3, stride 1, for images of 32-64 px:
      the strides of `features` are then half of those named).
    bn_group_size: images per batch-norm group in training; None or 0 for the whole batch.
    bn_axis_name: `layers.BatchNorm`'s axis_name.
    remat: in training, keep the activations between blocks only, and compute the others again in
      the backward pass.
    zero_init_residual: start every block as identity (Goyal et al. 2017).
    dtype: of the computation: float32, bfloat16, float16, or float64 where JAX has x64 enabled.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    num_classes: int = 1000,
    *,
    downsample: Mapping[str, Downsample],
    stage_sizes: Sequence[int],
    block: Literal["bottleneck", "basic"] = "bottleneck",
    width: int = 64,
    stem: Stem = "imagenet",
    bn_group_size: int | None = None,
    bn_axis_name: tuple[str, ...] | None = None,
    remat: bool = False,
    zero_init_residual: bool = False,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    layers.check_four("stage_sizes", stage_sizes)
    if stem not in ("imagenet", "small"):
      raise UsageError(f"unknown stem {stem!r}; choose one of imagenet, small")
    if block not in ("bottleneck", "basic"):
      raise UsageError(f"unknown block {block!r}; choose one of bottleneck, basic")
    layers.check_sizes(width=width, num_classes=num_classes)
    self.dtype = dtype
    self.remat = remat
    norm = layers.norm_factory(bn_group_size, bn_axis_name, dtype)
    make_block: type[BottleneckBlock] | type[BasicBlock] = (
      BottleneckBlock if block == "bottleneck" else BasicBlock
    )

    kernel_size, stride = (7, 2) if stem == "imagenet" else (3, 1)
    self.conv1 = layers.conv(3, width, kernel_size, stride=stride, dtype=dtype, rngs=rngs)
    self.bn1 = norm(width)
    self.pool = downsample["stem"].stem(width, dtype=dtype, rngs=rngs)
    features = width
    for stage, blocks in enumerate(stage_sizes):
      layer = []
      for index in range(blocks):
        halves = stage > 0 and index == 0
        layer.append(
          make_block(
            features,
            width * 2**stage,
            downsample=downsample[f"c{stage + 2}"] if halves else None,
            norm=norm,
            zero_init_residual=zero_init_residual,
            dtype=dtype,
            rngs=rngs,
          )
        )
        features = make_block.expansion * width * 2**stage
      setattr(self, f"layer{stage + 1}", nnx.List(layer))
    self.fc = layers.linear(features, num_classes, dtype=dtype, rngs=rngs)

  def features(self, images: jax.Array) -> dict[str, jax.Array]:
    """Outputs of the stem and of the four stages.

    Args:
      images: [N, H, W, 3], normalized.

    Returns:
      "stem" and "c2" at stride 4, "c3" at 8, "c4" at 16, "c5" at 32, each [N, H', W', C] in the
      compute dtype.
    """
    layers.check_images(images)
    x = self.pool(nnx.relu(self.bn1(self.conv1(images.astype(self.dtype)))))
    outputs = {"stem": x}
    for stage in range(4):
      for block in getattr(self, f"layer{stage + 1}"):
        x = layers.apply(block, x, remat=self.remat)
      outputs[f"c{stage + 2}"] = x
    return outputs

  def __call__(self, images: jax.Array) -> jax.Array:
    """Class logits.

    Args:
      images: [N, H, W, 3], normalized.

    Returns:
      [N, num_classes], float32 (float64 in a float64 model).
    """
    c5 = self.features(images)["c5"]
    return self.fc(c5.mean(axis=(1, 2), dtype=layers.param_dtype(self.dtype)))
