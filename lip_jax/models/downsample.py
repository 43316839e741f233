"""How a network halves its resolution: strided convolution or any pooling, one interface.

A `Downsample` makes the layers for the places where that happens: the pooling of the stem; in a
ResNet the transition inside the first block of a stage, and what follows that block; in a DenseNet
the pooling between two dense blocks. A transition is called with the block's input x [N, H, W, in]
and the residual branch's features h [N, H, W, branch], and returns the next features of both:
[N, H', W', mid] and, for the shortcut, [N, H', W', out].
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from lip_jax.errors import UsageError
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
  each_image_alone,
)
from lip_jax.models.layers import (
  LayerFactory,
  call_by_image,
  check_choice,
  check_sizes,
  kaiming_fan_in,
)
from lip_jax.models.logit_modules import TOPS, Bottleneck, BottleneckTrunk, Projection

_DETAIL_PRESERVING = tuple(
  f"dpp_{form}_{symmetry}" for form in ("full", "lite") for symmetry in ("sym", "asym")
)
POOLS = ("original", "strided", "average", "max", "exp", "soft", "lp", *_DETAIL_PRESERVING, "lip")
LOGITS = ("projection", "bottleneck")
STRUCTURES = ("baseline", "dense")
PLACES = ("stem", "c3", "c4", "c5")

_WINDOW_3 = {"window": 3, "stride": 2, "padding": 1}
_WINDOW_2 = {"window": 2, "stride": 2, "padding": 0}


class Downsample:
  """Maker of the layers that halve a network's resolution; here those of the networks without LIP.

  These are strided convolutions and a max-pooled stem (He et al. 2016), in a DenseNet averages.
  """

  def stem(self, features: int, make: LayerFactory) -> Callable[..., Any]:
    """Pooling after the first convolution: [N, H, W, features] -> [N, H', W', features]."""
    return MaxPool(**_WINDOW_3)

  def transition(
    self,
    in_features: int,
    branch_features: int,
    mid_features: int,
    out_features: int,
    make: LayerFactory,
  ) -> Callable[..., Any]:
    """Layer inside the first block of a ResNet's stage: (x, h) -> (h', shortcut)."""
    return Convolutions(in_features, branch_features, mid_features, out_features, make, stride=2)

  def after_block(self, features: int, make: LayerFactory) -> Callable[..., Any] | None:
    """Pooling behind that block; None where the transition has halved the resolution already."""
    return None

  def between_blocks(self, features: int, make: LayerFactory) -> Callable[..., Any]:
    """Pooling of a DenseNet's transition: [N, H, W, features] -> [N, H // 2, W // 2, features]."""
    return AveragePool(**_WINDOW_2)


class Strided(Downsample):
  """Strided convolutions, and in a DenseNet the sampling that they do."""

  def between_blocks(self, features, make):
    return StridedPool(**_WINDOW_2)


class Pooled(Downsample):
  """One pooling at every place, followed by 1x1 convolutions in a ResNet's transitions.

  Args:
    make_pool: (features, window=, stride=, padding=, dtype=, rngs=) -> layer that pools so many
      features.
  """

  def __init__(self, make_pool: Callable[..., LocalPool]):
    self.make_pool = make_pool

  def stem(self, features, make):
    return self.make_pool(features, **_WINDOW_3, **make.options)

  def transition(self, in_features, branch_features, mid_features, out_features, make):
    return PoolTransition(
      self.make_pool(branch_features, **_WINDOW_3, **make.options),
      self.make_pool(in_features, **_WINDOW_3, **make.options),
      make.conv(branch_features, mid_features, 1),
      make.conv(in_features, out_features, 1),
    )

  def between_blocks(self, features, make):
    return self.make_pool(features, **_WINDOW_2, **make.options)


class PooledByLIP(Downsample):
  """LIP at every place.

  In a ResNet's transition both branches predict their logits from the block's input (section 3.3,
  figure 4b), by bottlenecks of which they share the first two convolutions; elsewhere what is
  pooled predicts its own.

  Args:
    width: x in "Bottleneck-x" (figure 4e), whose place in the stem a 3x3 convolution takes; None:
      logits by one 1x1 convolution (figure 4d).
  """

  def __init__(self, width: int | None, top: str, average_steps: int):
    self.width = width
    self.top = top
    self.average_steps = average_steps

  def stem(self, features, make):
    return self._lip(features, features, make, kernel_size=1 if self.width is None else 3)

  def transition(self, in_features, branch_features, mid_features, out_features, make):
    trunk = None if self.width is None else BottleneckTrunk(in_features, self.width, make)
    shared = self.width or in_features
    return SharedLIPTransition(
      trunk,
      self._lip(shared, branch_features, make),
      self._lip(shared, in_features, make),
      make.conv(branch_features, mid_features, 1),
      make.conv(in_features, out_features, 1),
    )

  def between_blocks(self, features, make):
    if self.width is None:
      return self._lip(features, features, make, **_WINDOW_2)
    # Initialised as all convolutions of a DenseNet.
    logits = Bottleneck(
      features, features, self.width, top=self.top, init=kaiming_fan_in, **make.options
    )
    return LIP(logits, average_steps=self.average_steps, **_WINDOW_2)

  def _lip(self, in_features, out_features, make, kernel_size=1, **windows) -> LIP:
    logits = Projection(
      in_features, out_features, kernel_size=kernel_size, top=self.top, **make.options
    )
    return LIP(logits, average_steps=self.average_steps, **windows)


class DenseThenPool(Downsample):
  """Convolutions at full resolution, then one pooling of the whole block's output.

  The structure that detail-preserving pooling was published with (Saeedan et al. 2018); the stem
  stays max-pooled. It costs a ResNet-50 60 % more multiply-adds.

  Args:
    pooled: whose pooling of 2x2 windows to take.
  """

  def __init__(self, pooled: Downsample):
    self.pooled = pooled

  def transition(self, in_features, branch_features, mid_features, out_features, make):
    return Convolutions(in_features, branch_features, mid_features, out_features, make)

  def between_blocks(self, features, make):
    return self.pooled.between_blocks(features, make)

  after_block = between_blocks


class Convolutions(nnx.Module):
  """3x3 convolution in the residual branch, 1x1 projection of the shortcut where it is needed."""

  def __init__(
    self,
    in_features: int,
    branch_features: int,
    mid_features: int,
    out_features: int,
    make: LayerFactory,
    stride: int = 1,
  ):
    self.residual_conv = make.conv3x3(branch_features, mid_features, stride)
    identity = stride == 1 and in_features == out_features
    self.shortcut_conv = None if identity else make.conv(in_features, out_features, 1, stride)

  def __call__(self, x: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    return self.residual_conv(h), x if self.shortcut_conv is None else self.shortcut_conv(x)


class PoolTransition(nnx.Module):
  """Pooling, then a 1x1 convolution, in both branches: figure 4c ("our baseline structure")."""

  def __init__(
    self,
    residual_pool: Callable[..., jax.Array],
    shortcut_pool: Callable[..., jax.Array],
    residual_conv: nnx.Conv,
    shortcut_conv: nnx.Conv,
  ):
    self.residual_pool = residual_pool
    self.shortcut_pool = shortcut_pool
    self.residual_conv = residual_conv
    self.shortcut_conv = shortcut_conv

  def __call__(self, x: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    return self.residual_conv(self.residual_pool(h)), self.shortcut_conv(self.shortcut_pool(x))


class SharedLIPTransition(PoolTransition):
  """LIP and a 1x1 convolution in both branches, importance from the block's input: figure 4b.

  Args:
    trunk: what the logit modules of both poolings share.
  """

  by_image = False  # as `LIP.by_image`

  def __init__(self, trunk: BottleneckTrunk | None, *layers: Any):
    super().__init__(*layers)
    self.trunk = trunk

  def __call__(self, x: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    if self.by_image and each_image_alone(x):
      return call_by_image(self, type(self)._pool, x, h)
    return self._pool(x, h)

  def _pool(self, x: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    shared = x if self.trunk is None else self.trunk(x)
    return (
      self.residual_conv(self.residual_pool(h, shared)),
      self.shortcut_conv(self.shortcut_pool(x, shared)),
    )


def make_downsamples(
  pool: str = "original",
  *,
  logit: str = "bottleneck",
  logit_width: int = 128,
  logit_top: str = "norm_gate",
  average_steps: int = 0,
  pool_parameter: float | None = None,
  structure: str = "baseline",
  lip_stages: Sequence[str] = PLACES,
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

  Raises:
    UsageError: a name that does not exist, with those that do, or a number out of range.
  """
  check_choice(POOLS, pool=pool)
  check_choice(LOGITS, logit=logit)
  check_choice(TOPS, logit_top=logit_top)
  check_choice(STRUCTURES, structure=structure)
  if not isinstance(lip_stages, (tuple, list)) or not set(lip_stages) <= set(PLACES):
    raise UsageError(f"lip_stages must be some of {', '.join(PLACES)}, got {lip_stages!r}")
  check_sizes(logit_width=logit_width)
  check_sizes(least=0, average_steps=average_steps)
  if pool_parameter is not None:
    if pool not in ("exp", "lp"):
      raise UsageError(f"pool_parameter is for pool 'exp' and 'lp'; pool {pool!r} has none")
    if not math.isfinite(pool_parameter) or (pool == "lp" and pool_parameter < 1):
      raise UsageError(
        "pool_parameter must be a finite number, and for pool 'lp', whose exponent it is, at "
        f"least 1; got {pool_parameter}"
      )
  here: Downsample
  if pool == "original":
    here = Downsample()
  elif pool == "strided":
    here = Strided()
  else:
    if pool == "lip":
      width = None if logit == "projection" else logit_width
      here = PooledByLIP(width, logit_top, average_steps)
    else:
      here = Pooled(functools.partial(_make_pool, pool, pool_parameter))
    if structure == "dense":
      here = DenseThenPool(here)
  return {place: here if place in lip_stages else Downsample() for place in PLACES}


def _make_pool(pool, parameter, features, *, dtype, rngs, **windows) -> LocalPool:
  """A pooling that needs no logit module."""
  del rngs  # nothing starts at random
  if pool == "exp":
    return ExpPool(1.0 if parameter is None else parameter, dtype=dtype, **windows)
  if pool == "lp":
    return LpPool(2.0 if parameter is None else parameter, **windows)
  if pool in _DETAIL_PRESERVING:
    _, form, symmetry = pool.split("_")
    return DetailPreservingPool(
      features, full=form == "full", symmetric=symmetry == "sym", dtype=dtype, **windows
    )
  return {"average": AveragePool, "max": MaxPool, "soft": SoftPool}[pool](**windows)
