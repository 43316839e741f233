"""ResNets whose down-sampling is an argument: plain, pooled in any way, or LIP.

Sources: He et al. 2016 in the form of fb.resnet.torch (the stride sits in the 3x3 convolution), and
section 3.3 with figure 4 of the LIP paper; ResNeXts: Xie et al. 2017; deformable layers: Dai et al.
2017.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax.errors import UsageError
from lip_jax.models import layers
from lip_jax.models.downsample import Convolutions, Downsample
from lip_jax.models.layers import LayerFactory
from lip_jax.models.network import Network


class ResidualBlock(nnx.Module):
  """What ends both kinds of block: the norm of the shortcut, the sum, and a pooling behind it.

  Attributes:
    norm_inputs: as `Network.norm_inputs`.
  """

  norm_inputs: ClassVar[Mapping[str, str]]

  def __init__(
    self, in_features: int, out_features: int, downsample: Downsample | None, make: LayerFactory
  ):
    identity = downsample is None and in_features == out_features
    self.shortcut_bn = None if identity else make.norm(out_features)
    self.pool = None if downsample is None else downsample.after_block(out_features, make)

  def _join(self, h: jax.Array, shortcut: jax.Array) -> jax.Array:
    if self.shortcut_bn is not None:
      shortcut = self.shortcut_bn(shortcut)
    y = layers.relu(h + shortcut)
    return y if self.pool is None else self.pool(y)


class BasicBlock(ResidualBlock):
  """Residual block 3x3, 3x3; [N, H, W, in] -> [N, H', W', width].

  Where a block halves the resolution, its first convolution is what the bottleneck block's second
  is: a transition, here of the block's input itself.

  Args:
    downsample: makes the transition of a block that halves the resolution; None keeps it.
  """

  expansion = 1  # output channels / width
  transition_name = "conv1"  # of the convolution that the transition replaces
  norm_inputs: ClassVar = {
    "bn1": "spatial.residual_conv",
    "bn2": "conv2",
    "shortcut_bn": "spatial.shortcut_conv",
  }

  def __init__(
    self, in_features: int, width: int, downsample: Downsample | None, make: LayerFactory
  ):
    make_spatial = Convolutions if downsample is None else downsample.transition
    self.spatial = make_spatial(in_features, in_features, width, width, make)
    self.bn1 = make.norm(width)
    self.conv2 = make.conv3x3(width, width)
    self.bn2 = make.norm(width, ends_branch=True)
    super().__init__(in_features, width, downsample, make)

  def __call__(self, x: jax.Array) -> jax.Array:
    h, shortcut = self.spatial(x, x)
    h = layers.rectified(self.bn1, h)
    return self._join(self.bn2(self.conv2(h)), shortcut)


class BottleneckBlock(ResidualBlock):
  """Residual block 1x1, 3x3, 1x1; [N, H, W, in] -> [N, H', W', 4 * width]; as `BasicBlock`.

  Args:
    inside: channels of the 3x3 convolution.
  """

  expansion = 4
  transition_name = "conv2"
  norm_inputs: ClassVar = {
    "bn1": "conv1",
    "bn2": "spatial.residual_conv",
    "bn3": "conv3",
    "shortcut_bn": "spatial.shortcut_conv",
  }

  def __init__(
    self,
    in_features: int,
    width: int,
    downsample: Downsample | None,
    make: LayerFactory,
    inside: int,
  ):
    out_features = self.expansion * width
    self.conv1 = make.conv(in_features, inside, 1)
    self.bn1 = make.norm(inside)
    make_spatial = Convolutions if downsample is None else downsample.transition
    self.spatial = make_spatial(in_features, inside, inside, out_features, make)
    self.bn2 = make.norm(inside)
    self.conv3 = make.conv(inside, out_features, 1)
    self.bn3 = make.norm(out_features, ends_branch=True)
    super().__init__(in_features, out_features, downsample, make)

  def __call__(self, x: jax.Array) -> jax.Array:
    first, x = layers.fork(x, self.bn1)
    h = layers.rectified(self.bn1, self.conv1(first))
    h, shortcut = self.spatial(x, h)
    h = layers.rectified(self.bn2, h)
    return self._join(self.bn3(self.conv3(h)), shortcut)


class ResNet(Network):
  """ResNet with a choice of down-sampling.

  Networks with another `downsample` differ in the stem's pooling and in the first blocks of the
  second, third and fourth stage, and in nothing else.

  Args:
    downsample: for each of "stem", "c3", "c4" and "c5", what halves the resolution there:
      `lip_jax.models.downsample.make_downsamples`.
    block: "bottleneck" or "basic".
    width: channels after the stem, and inside the first stage's blocks; doubles at each stage.
    stem: "imagenet" (7x7 convolution, stride 2) or "small" (3x3, stride 1, for images of 32-64 px:
      the strides of `features` are then half of those named).
    groups: of channels that do not mix in the 3x3 convolutions of "bottleneck" blocks: ResNeXts.
    group_width: channels of each in the first stage; doubles at each stage. None: width / groups.
    deformable_stages: of "c3", "c4" and "c5", those whose blocks' 3x3 convolutions are deformable.
    zero_init_residual: start every block as identity (Goyal et al. 2017).
    norm: makes the batch norms: `layers.make_batch_norm`.
  """

  stages: ClassVar = {
    "stem": ("conv1", "bn1", "pool"),
    **{f"c{stage + 1}": (f"layer{stage}",) for stage in (1, 2, 3, 4)},
    "classifier": ("fc",),
  }
  norm_inputs: ClassVar = {"bn1": "conv1"}

  def __init__(
    self,
    num_classes: int = 1000,
    *,
    downsample: Mapping[str, Downsample],
    stage_sizes: Sequence[int],
    block: Literal["bottleneck", "basic"] = "bottleneck",
    width: int = 64,
    stem: Literal["imagenet", "small"] = "imagenet",
    groups: int = 1,
    group_width: int | None = None,
    deformable_stages: Sequence[str] = (),
    zero_init_residual: bool = False,
    in_channels: int = 3,
    remat: bool = False,
    norm: Callable[..., layers.BatchNorm] = layers.BatchNorm,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(num_classes, in_channels=in_channels, remat=remat, dtype=dtype)
    layers.check_four("stage_sizes", stage_sizes)
    layers.check_choice(("imagenet", "small"), stem=stem)
    layers.check_choice(("bottleneck", "basic"), block=block)
    layers.check_sizes(width=width)
    make = LayerFactory(dtype, rngs, layers.kaiming_fan_out, norm, zero_init_residual)
    inside = _inside(width, groups, group_width, block)
    if not set(deformable_stages) <= {"c3", "c4", "c5"}:
      raise UsageError(f"deformable_stages must be some of c3, c4, c5, got {deformable_stages!r}")
    make_block = BottleneckBlock if block == "bottleneck" else BasicBlock

    kernel_size, stride = (7, 2) if stem == "imagenet" else (3, 1)
    self.conv1 = make.conv(in_channels, width, kernel_size, stride)
    self.bn1 = make.norm(width)
    self.pool = downsample["stem"].stem(width, make)
    features = width
    for stage, blocks in enumerate(stage_sizes):
      layer = []
      deformable = f"c{stage + 2}" in deformable_stages
      make = make._replace(groups=groups, deformable=deformable)
      options = {"inside": inside * 2**stage} if block == "bottleneck" else {}
      for index in range(blocks):
        here = downsample[f"c{stage + 2}"] if stage > 0 and index == 0 else None
        layer.append(make_block(features, width * 2**stage, here, make, **options))
        features = make_block.expansion * width * 2**stage
      setattr(self, f"layer{stage + 1}", nnx.List(layer))
    self.fc = make.classifier(features, num_classes)

  def features(self, images: jax.Array) -> dict[str, jax.Array]:
    x = self.pool(layers.rectified(self.bn1, self.conv1(self._input(images))))
    outputs = {"stem": x}
    for stage in range(4):
      for block in getattr(self, f"layer{stage + 1}"):
        x = layers.apply(block, x, remat=self.remat)
      outputs[f"c{stage + 2}"] = x
    return outputs


def _inside(width: int, groups: int, group_width: int | None, block: str) -> int:
  """Channels of the 3x3 convolutions in the first stage's blocks."""
  layers.check_sizes(groups=groups)
  if group_width is None:
    if width % groups:
      raise UsageError(f"width {width} cannot be divided into {groups} groups; give group_width")
    group_width = width // groups
  layers.check_sizes(group_width=group_width)
  if block == "basic" and (groups, group_width) != (1, width):
    raise UsageError("groups and group_width are for block 'bottleneck'; leave them out")
  return groups * group_width
