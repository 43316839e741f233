"""How a network halves its resolution: strided convolution or any pooling, one interface.

A `Downsample` makes the layers for the places where that happens: the pooling of the stem; in a
ResNet the transition inside the first block of a stage, and what follows that block; in a DenseNet
the pooling between two dense blocks. A transition is called with the block's input x [N, H, W, in]
and the residual branch's features h [N, H, W, branch], and returns the next features of both:
[N, H', W', mid] and, for the shortcut, [N, H', W', out].
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax.errors import UsageError
from lip_jax.models import layers
from lip_jax.models.lan import (
  LIP,
  AveragePool,
  DetailPreservingPool,
  ExpPool,
  LocalPool,
  LpPool,
  MaxPool,
  SoftPool,
  StridedPool,
)
from lip_jax.models.logit_modules import TOPS, Bottleneck, BottleneckTrunk, Projection, Top

Pool = Literal[
  "original",
  "strided",
  "average",
  "max",
  "exp",
  "soft",
  "lp",
  "dpp_full_sym",
  "dpp_full_asym",
  "dpp_lite_sym",
  "dpp_lite_asym",
  "lip",
]
Logit = Literal["projection", "bottleneck"]
Structure = Literal["baseline", "dense"]
Place = Literal["stem", "c3", "c4", "c5"]

POOLS: tuple[str, ...] = get_args(Pool)
LOGITS: tuple[str, ...] = get_args(Logit)
STRUCTURES: tuple[str, ...] = get_args(Structure)
PLACES: tuple[str, ...] = get_args(Place)

_WINDOW_3 = {"window": 3, "stride": 2, "padding": 1}
_WINDOW_2 = {"window": 2, "stride": 2, "padding": 0}

PoolFactory = Callable[..., LocalPool]


class Downsample(Protocol):
  """Maker of the layers that halve a network's resolution."""

  def stem(self, features: int, *, dtype: Dtype, rngs: nnx.Rngs) -> Callable[..., Any]:
    """Pooling after the first convolution: [N, H, W, features] -> [N, H', W', features]."""

  def transition(
    self,
    in_features: int,
    branch_features: int,
    mid_features: int,
    out_features: int,
    *,
    dtype: Dtype,
    rngs: nnx.Rngs,
  ) -> Callable[..., Any]:
    """Layer inside the first block of a ResNet's stage: (x, h) -> (h', shortcut)."""

  def after_block(
    self, features: int, *, dtype: Dtype, rngs: nnx.Rngs
  ) -> Callable[..., Any] | None:
    """Pooling behind that block; None where the transition has halved the resolution already."""

  def between_blocks(self, features: int, *, dtype: Dtype, rngs: nnx.Rngs) -> Callable[..., Any]:
    """Pooling of a DenseNet's transition: [N, H, W, features] -> [N, H // 2, W // 2, features]."""


class Strided:
  """Strided convolutions and a max-pooled stem: the plain ResNet (He et al. 2016)."""

  def stem(self, features, *, dtype, rngs):
    del features, dtype, rngs
    return MaxPool(**_WINDOW_3)

  def transition(self, in_features, branch_features, mid_features, out_features, *, dtype, rngs):
    return Convolutions(
      in_features, branch_features, mid_features, out_features, stride=2, dtype=dtype, rngs=rngs
    )

  def after_block(self, features, *, dtype, rngs):
    del features, dtype, rngs

  def between_blocks(self, features, *, dtype, rngs):
    del features, dtype, rngs
    return StridedPool(**_WINDOW_2)


class Original(Strided):
  """What the network has without LIP: as `Strided`, but a DenseNet's transitions are averages."""

  def between_blocks(self, features, *, dtype, rngs):
    del features, dtype, rngs
    return AveragePool(**_WINDOW_2)


class Pooled:
  """One pooling at every place, followed by 1x1 convolutions in a ResNet's transitions.

  Args:
    make: (features, window=, stride=, padding=, dtype=, rngs=) -> layer that pools so many
      features.
  """

  def __init__(self, make: PoolFactory):
    self.make = make

  def stem(self, features, *, dtype, rngs):
    return self.make(features, **_WINDOW_3, dtype=dtype, rngs=rngs)

  def transition(self, in_features, branch_features, mid_features, out_features, *, dtype, rngs):
    return PoolTransition(
      self.make(branch_features, **_WINDOW_3, dtype=dtype, rngs=rngs),
      self.make(in_features, **_WINDOW_3, dtype=dtype, rngs=rngs),
      in_features,
      branch_features,
      mid_features,
      out_features,
      dtype=dtype,
      rngs=rngs,
    )

  def after_block(self, features, *, dtype, rngs):
    del features, dtype, rngs

  def between_blocks(self, features, *, dtype, rngs):
    return self.make(features, **_WINDOW_2, dtype=dtype, rngs=rngs)


class DenseThenPool(Strided):
  """Convolutions at full resolution, then one pooling of the whole block's output.

  The structure that detail-preserving pooling was published with (Saeedan et al. 2018); the stem
  stays max-pooled. It costs a ResNet-50 60 % more multiply-adds.

  Args:
    pooled: whose pooling of 2x2 windows to take.
  """

  def __init__(self, pooled: Pooled):
    self.pooled = pooled

  def transition(self, in_features, branch_features, mid_features, out_features, *, dtype, rngs):
    return Convolutions(
      in_features, branch_features, mid_features, out_features, stride=1, dtype=dtype, rngs=rngs
    )

  def after_block(self, features, *, dtype, rngs):
    return self.pooled.between_blocks(features, dtype=dtype, rngs=rngs)

  def between_blocks(self, features, *, dtype, rngs):
    return self.pooled.between_blocks(features, dtype=dtype, rngs=rngs)


class LIPProjection(Pooled):
  """LIP at every place, with logits by one 1x1 convolution (figure 4d).

  In a ResNet's transition both branches predict them from the block's input (section 3.3, figure
  4b); elsewhere what is pooled predicts its own.
  """

  stem_kernel = 1
  trunk_width: int | None = None  # of what the logit modules of a transition share

  def __init__(self, top: Top = "norm_gate", average_steps: int = 0):
    super().__init__(self._lip)
    self.top = top
    self.average_steps = average_steps

  def _lip(self, features, *, dtype, rngs, kernel_size=1, **windows):
    logits = Projection(
      features, features, kernel_size=kernel_size, top=self.top, dtype=dtype, rngs=rngs
    )
    return LIP(logits, average_steps=self.average_steps, **windows)

  def stem(self, features, *, dtype, rngs):
    return self._lip(features, kernel_size=self.stem_kernel, **_WINDOW_3, dtype=dtype, rngs=rngs)

  def transition(self, in_features, branch_features, mid_features, out_features, *, dtype, rngs):
    return SharedLIPTransition(
      in_features,
      branch_features,
      mid_features,
      out_features,
      width=self.trunk_width,
      top=self.top,
      average_steps=self.average_steps,
      dtype=dtype,
      rngs=rngs,
    )


class LIPBottleneck(LIPProjection):
  """LIP at every place, with logits by a bottleneck (figure 4e); in the stem by a 3x3 convolution.

  The two of a ResNet's transition share its first two convolutions (section 3.3).

  Args:
    width: x in "Bottleneck-x".
  """

  stem_kernel = 3

  def __init__(self, width: int = 128, top: Top = "norm_gate", average_steps: int = 0):
    super().__init__(top, average_steps)
    self.width = self.trunk_width = width

  def between_blocks(self, features, *, dtype, rngs):
    logits = Bottleneck(
      features,
      features,
      self.width,
      top=self.top,
      init=layers.kaiming_fan_in,  # as all convolutions of a DenseNet
      dtype=dtype,
      rngs=rngs,
    )
    return LIP(logits, average_steps=self.average_steps, **_WINDOW_2)


class Convolutions(nnx.Module):
  """3x3 convolution in the residual branch, 1x1 projection of the shortcut where it is needed."""

  def __init__(
    self,
    in_features: int,
    branch_features: int,
    mid_features: int,
    out_features: int,
    *,
    stride: int = 1,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.residual_conv = layers.conv(
      branch_features, mid_features, 3, stride=stride, dtype=dtype, rngs=rngs
    )
    self.shortcut_conv = (
      None
      if stride == 1 and in_features == out_features
      else layers.conv(in_features, out_features, 1, stride=stride, dtype=dtype, rngs=rngs)
    )

  def __call__(self, x: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    return self.residual_conv(h), x if self.shortcut_conv is None else self.shortcut_conv(x)


class PoolTransition(nnx.Module):
  """Pooling, then a 1x1 convolution, in both branches: figure 4c ("our baseline structure")."""

  def __init__(
    self,
    residual_pool: Callable[..., jax.Array],
    shortcut_pool: Callable[..., jax.Array],
    in_features: int,
    branch_features: int,
    mid_features: int,
    out_features: int,
    *,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.residual_pool = residual_pool
    self.residual_conv = layers.conv(branch_features, mid_features, 1, dtype=dtype, rngs=rngs)
    self.shortcut_pool = shortcut_pool
    self.shortcut_conv = layers.conv(in_features, out_features, 1, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    return self.residual_conv(self.residual_pool(h)), self.shortcut_conv(self.shortcut_pool(x))


class SharedLIPTransition(PoolTransition):
  """LIP and a 1x1 convolution in both branches, importance from the block's input: figure 4b.

  Args:
    width: of the bottleneck trunk that both logit modules share; None: they are projections.
  """

  def __init__(
    self,
    in_features: int,
    branch_features: int,
    mid_features: int,
    out_features: int,
    *,
    width: int | None = 128,
    top: Top = "norm_gate",
    average_steps: int = 0,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.trunk = (
      None if width is None else BottleneckTrunk(in_features, width, dtype=dtype, rngs=rngs)
    )

    def lip(features: int) -> LIP:
      head = Projection(width or in_features, features, top=top, dtype=dtype, rngs=rngs)
      return LIP(head, average_steps=average_steps)

    super().__init__(
      lip(branch_features),
      lip(in_features),
      in_features,
      branch_features,
      mid_features,
      out_features,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, x: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    shared = x if self.trunk is None else self.trunk(x)
    return (
      self.residual_conv(self.residual_pool(h, shared)),
      self.shortcut_conv(self.shortcut_pool(x, shared)),
    )


def make_downsamples(
  pool: Pool = "original",
  *,
  logit: Logit = "bottleneck",
  logit_width: int = 128,
  logit_top: Top = "norm_gate",
  average_steps: int = 0,
  pool_parameter: float | None = None,
  structure: Structure = "baseline",
  lip_stages: Sequence[Place] = ("stem", "c3", "c4", "c5"),
) -> dict[str, Downsample]:
  """The `Downsample` of each place of a network.

  Args:
    pool: "original" (what the network has without LIP), "strided", "average", "max", "exp",
      "soft", "lp", "dpp_full_sym", "dpp_full_asym", "dpp_lite_sym", "dpp_lite_asym" or "lip".
    logit: for "lip", the logit module: "projection" or "bottleneck".
    logit_width: for "bottleneck", its width.
    logit_top: for "lip", what follows the logit module's last convolution: "norm_gate", "norm",
      "gate" or "none" (table 2, A to D).
    average_steps: for "lip", training steps that pool by averages first (2,000 in table 2, D).
    pool_parameter: for "exp" the initial beta (1 by default), for "lp" the exponent p (2).
    structure: where a ResNet pools: "baseline" (pooling, then 1x1 convolution, in both branches)
      or "dense" (convolutions at full resolution, then one pooling behind the block; the stem stays
      max-pooled). A DenseNet pools between its blocks in either.
    lip_stages: places that get this pool, of "stem" (stride 4), "c3" (on the way to stride 8),
      "c4" and "c5"; the others keep the network's own (table 3).

  Returns:
    {"stem": ..., "c3": ..., "c4": ..., "c5": ...}.

  Raises:
    UsageError: a name that does not exist, with those that do, or a number out of range.
  """
  for name, value, valid in (
    ("pool", pool, POOLS),
    ("logit", logit, LOGITS),
    ("logit_top", logit_top, TOPS),
    ("structure", structure, STRUCTURES),
  ):
    if value not in valid:
      raise UsageError(f"unknown {name} {value!r}; choose one of {', '.join(valid)}")
  if not isinstance(lip_stages, (tuple, list)) or not set(lip_stages) <= set(PLACES):
    raise UsageError(f"lip_stages must be some of {', '.join(PLACES)}, got {lip_stages!r}")
  layers.check_sizes(logit_width=logit_width)
  layers.check_sizes(least=0, average_steps=average_steps)
  if pool_parameter is not None:
    if pool not in ("exp", "lp"):
      raise UsageError(f"pool_parameter is for pool 'exp' and 'lp'; pool {pool!r} has none")
    if not math.isfinite(pool_parameter) or (pool == "lp" and pool_parameter < 1):
      raise UsageError(
        "pool_parameter must be a finite number, and for pool 'lp', whose exponent it is, at "
        f"least 1; got {pool_parameter}"
      )
  here: Downsample
  if pool in ("original", "strided"):
    here = Original() if pool == "original" else Strided()
  else:
    pooled: Pooled
    if pool != "lip":
      pooled = Pooled(_factory(pool, pool_parameter))
    elif logit == "projection":
      pooled = LIPProjection(logit_top, average_steps)
    else:
      pooled = LIPBottleneck(logit_width, logit_top, average_steps)
    here = pooled if structure == "baseline" else DenseThenPool(pooled)
  original = Original()
  return {place: here if place in lip_stages else original for place in PLACES}


def _factory(pool: Pool, parameter: float | None) -> PoolFactory:
  """What makes the layers of a pooling that needs no logit module."""

  def make(features, *, dtype, rngs, **windows):
    del rngs  # nothing starts at random
    if pool == "exp":
      return ExpPool(1.0 if parameter is None else parameter, dtype=dtype, **windows)
    if pool == "lp":
      return LpPool(2.0 if parameter is None else parameter, **windows)
    if pool.startswith("dpp"):
      _, form, symmetry = pool.split("_")
      return DetailPreservingPool(
        features, full=form == "full", symmetric=symmetry == "sym", dtype=dtype, **windows
      )
    return {"average": AveragePool, "max": MaxPool, "soft": SoftPool}[pool](**windows)

  return make
