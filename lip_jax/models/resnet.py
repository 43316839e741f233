"""ResNets whose down-sampling is an argument: plain, average-pooled, max-pooled or LIP.

Sources: He et al. 2016 in the form of fb.resnet.torch (the stride sits in the 3x3 convolution), and
section 3.3 with figure 4 of the LIP paper.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax import layers
from lip_jax.downsample import Convolutions, Downsample, Logit, Pool, make_downsample
from lip_jax.errors import UsageError

EXPANSION = 4  # a bottleneck block puts out this many times its inner width

Stem = Literal["imagenet", "small"]
NormFactory = Callable[..., layers.BatchNorm]


class BottleneckBlock(nnx.Module):
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
    out_features = EXPANSION * width
    self.conv1 = layers.conv(in_features, width, 1, dtype=dtype, rngs=rngs)
    self.bn1 = norm(width)
    make_spatial = Convolutions if downsample is None else downsample.transition
    self.spatial = make_spatial(in_features, width, out_features, dtype=dtype, rngs=rngs)
    self.bn2 = norm(width)
    self.conv3 = layers.conv(width, out_features, 1, dtype=dtype, rngs=rngs)
    self.bn3 = norm(out_features, zero_init=zero_init_residual)
    identity = downsample is None and in_features == out_features
    self.shortcut_bn = None if identity else norm(out_features)

  def __call__(self, x: jax.Array) -> jax.Array:
    h = nnx.relu(self.bn1(self.conv1(x)))
    h, shortcut = self.spatial(x, h)
    h = nnx.relu(self.bn2(h))
    h = self.bn3(self.conv3(h))
    if self.shortcut_bn is not None:
      shortcut = self.shortcut_bn(shortcut)
    return nnx.relu(h + shortcut)


class ResNet(nnx.Module):
  """Bottleneck ResNet with a choice of down-sampling.

  `ResNet(pool="strided")` is the plain network; every other choice differs in the stem's pooling
  and in the first blocks of the second, third and fourth stage, and in nothing else.

  Args:
    num_classes: number of logits.
    stage_sizes: blocks in each of the four stages.
    width: channels after the stem, and inside the first stage's blocks; doubles at each stage.
    stem: "imagenet" (7x7 convolution, stride 2) or "small" (3x3, stride 1, for images of 32-64 px:
      the strides of `features` are then half of those named).
    pool: "strided", "average", "max" or "lip".
    logit: for pool="lip", the logit module: "projection" or "bottleneck".
    logit_width: x in "bottleneck-x".
    bn_group_size: images per batch-norm group in training; None or 0 for the whole batch.
    zero_init_residual: start every block as identity (Goyal et al. 2017).
    dtype: of the computation: float32, bfloat16, float16, or float64 where JAX has x64 enabled.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    num_classes: int = 1000,
    *,
    stage_sizes: Sequence[int],
    width: int = 64,
    stem: Stem = "imagenet",
    pool: Pool = "strided",
    logit: Logit = "bottleneck",
    logit_width: int = 128,
    bn_group_size: int | None = None,
    zero_init_residual: bool = False,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    if len(stage_sizes) != 4 or min(stage_sizes) < 1:
      raise UsageError(f"stage_sizes must be four positive numbers, got {stage_sizes}")
    if stem not in ("imagenet", "small"):
      raise UsageError(f"unknown stem {stem!r}; choose one of imagenet, small")
    sizes = {"width": width, "logit_width": logit_width, "num_classes": num_classes}
    for name, value in sizes.items():
      if value < 1:
        raise UsageError(f"{name} must be positive, got {value}")
    if bn_group_size is not None and bn_group_size < 0:
      raise UsageError(f"bn_group_size must be positive, or 0 for the whole batch: {bn_group_size}")
    self.dtype = dtype
    downsample = make_downsample(pool, logit=logit, logit_width=logit_width)

    def norm(features: int, *, zero_init: bool = False) -> layers.BatchNorm:
      return layers.BatchNorm(features, group_size=bn_group_size, zero_init=zero_init, dtype=dtype)

    kernel_size, stride = (7, 2) if stem == "imagenet" else (3, 1)
    self.conv1 = layers.conv(3, width, kernel_size, stride=stride, dtype=dtype, rngs=rngs)
    self.bn1 = norm(width)
    self.pool = downsample.stem(width, dtype=dtype, rngs=rngs)
    features = width
    for stage, blocks in enumerate(stage_sizes):
      layer = []
      for block in range(blocks):
        halves = stage > 0 and block == 0
        layer.append(
          BottleneckBlock(
            features,
            width * 2**stage,
            downsample=downsample if halves else None,
            norm=norm,
            zero_init_residual=zero_init_residual,
            dtype=dtype,
            rngs=rngs,
          )
        )
        features = EXPANSION * width * 2**stage
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
    if images.ndim != 4 or images.shape[3] != 3:
      raise ValueError(f"images must be [N, H, W, 3], got shape {tuple(images.shape)}")
    x = self.pool(nnx.relu(self.bn1(self.conv1(images.astype(self.dtype)))))
    outputs = {"stem": x}
    for stage in range(4):
      for block in getattr(self, f"layer{stage + 1}"):
        x = block(x)
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
