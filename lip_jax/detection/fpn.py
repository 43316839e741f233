"""Feature pyramids (Lin et al., CVPR 2017) on a backbone's features."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax.models import padding
from lip_jax.models.layers import LayerFactory

_XAVIER = nnx.initializers.xavier_uniform()


class FPN(nnx.Module):
  """Features of several strides, each with what the coarser ones know: equal channels everywhere.

  Args:
    in_features: channels of each stage, from fine to coarse.
    strides: of each stage in pixels; each twice the one before.
    channels: of the result.
    dtype: of the computation.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    in_features: Sequence[int],
    strides: Sequence[int],
    channels: int,
    *,
    dtype: Dtype,
    rngs: nnx.Rngs,
  ):
    make = functools.partial(LayerFactory(dtype, rngs, _XAVIER).conv, use_bias=True)
    self.laterals = nnx.List([make(size, channels, 1) for size in in_features])
    self.outputs = nnx.List([make(channels, channels, 3) for _ in in_features])
    self.strides = tuple(strides)
    self.channels = channels

  def __call__(self, stages: Sequence[jax.Array]) -> list[jax.Array]:
    """[N, H, W, in_features] of each stage -> [N, H, W, channels] of each."""
    merged: list[jax.Array] = []
    for stage, lateral in zip(reversed(stages), reversed(self.laterals), strict=True):
      x = lateral(stage)
      merged.append(x + _upsample(merged[-1], x) if merged else x)
    return [
      padding.blank(output(padding.blank(x, stride)), stride)
      for x, output, stride in zip(reversed(merged), self.outputs, self.strides, strict=True)
    ]


class CoarserLevels(nnx.Module):
  """RetinaNet's P6 and P7: two more convolutions 3x3 of stride 2.

  Args:
    in_features: channels of what P6 is computed from.
    stride: of it, in pixels.
    channels: of the results.
    relu_between: whether P7 is computed from ReLU(P6).
    dtype: of the computation.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    in_features: int,
    stride: int,
    channels: int,
    *,
    relu_between: bool,
    dtype: Dtype,
    rngs: nnx.Rngs,
  ):
    make = functools.partial(LayerFactory(dtype, rngs, _XAVIER).conv, stride=2, use_bias=True)
    self.p6 = make(in_features, channels, 3)
    self.p7 = make(channels, channels, 3)
    self.stride = stride
    self.relu_between = relu_between

  def __call__(self, x: jax.Array) -> list[jax.Array]:
    """[N, H, W, in_features] -> P6 [N, H / 2, W / 2, channels] and P7, rounded up."""
    p6 = padding.blank(self.p6(x), 2 * self.stride)
    p7 = self.p7(nnx.relu(p6) if self.relu_between else p6)
    return [p6, padding.blank(p7, 4 * self.stride)]


def _upsample(x: jax.Array, like: jax.Array) -> jax.Array:
  """Each pixel of x [N, H, W, C] four times: [N, 2 H, 2 W, C], cut off at the size of `like`."""
  n, height, width, channels = x.shape
  twice = jnp.broadcast_to(x[:, :, None, :, None, :], (n, height, 2, width, 2, channels))
  return twice.reshape(n, 2 * height, 2 * width, channels)[:, : like.shape[1], : like.shape[2]]
