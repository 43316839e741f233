"""How a network halves its resolution: strided convolution, average, max or LIP, one interface.

A `Downsample` makes the layers for the two kinds of place where that happens in a ResNet: the
pooling of the stem, and the transition inside the first block of a stage. A transition is called
with the block's input x [N, H, W, in] and the residual branch's features h [N, H, W, mid], and
returns the next features of both: [N, H', W', mid] and, for the shortcut, [N, H', W', out], with
H' = ceil(H / 2).
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax import layers
from lip_jax.errors import UsageError
from lip_jax.logit_modules import BottleneckTrunk, Projection
from lip_jax.pooling import IntOrPair, average_pool, lip_pool, max_pool

Pool = Literal["strided", "average", "max", "lip"]
Logit = Literal["projection", "bottleneck"]

POOLS = ("strided", "average", "max", "lip")
LOGITS = ("projection", "bottleneck")

_recorded: contextvars.ContextVar[list[tuple["LIP", jax.Array]] | None] = contextvars.ContextVar(
  "recorded_logits", default=None
)


@contextlib.contextmanager
def record_logits() -> Iterator[list[tuple["LIP", jax.Array]]]:
  """Collects (layer, logits [N, H, W, C]) of every LIP layer called inside the `with` block."""
  records: list[tuple[LIP, jax.Array]] = []
  token = _recorded.set(records)
  try:
    yield records
  finally:
    _recorded.reset(token)


class LIP(nnx.Module):
  """Local importance-based pooling layer: a logit module and `lip_pool` (section 3.2).

  Args:
    logits: module from features [N, H, W, C] to logits [N, H, W, C]; its `logit_range`, if it has
      one, must bound them.
    window: height and width of the window in pixels, an int or a pair (h, w).
    stride: in pixels.
    padding: in pixels, at most window // 2.
  """

  def __init__(
    self,
    logits: Callable[[jax.Array], jax.Array],
    *,
    window: IntOrPair = 3,
    stride: IntOrPair = 2,
    padding: IntOrPair = 1,
  ):
    self.logits = logits
    self.window = window
    self.stride = stride
    self.padding = padding

  def __call__(self, x: jax.Array, source: jax.Array | None = None) -> jax.Array:
    """Pools x, [N, H, W, C]; its importance is predicted from `source` [N, H, W, S], if given."""
    logits = self.logits(x if source is None else source)
    records = _recorded.get()
    if records is not None:
      records.append((self, logits))
    return lip_pool(
      x,
      logits,
      window=self.window,
      stride=self.stride,
      padding=self.padding,
      logit_range=getattr(self.logits, "logit_range", None),
    )


class Downsample(Protocol):
  """Maker of the layers that halve a ResNet's resolution."""

  def stem(self, features: int, *, dtype: Dtype, rngs: nnx.Rngs) -> Callable[..., Any]:
    """Pooling after the first convolution: [N, H, W, features] -> [N, H', W', features]."""

  def transition(
    self, in_features: int, mid_features: int, out_features: int, *, dtype: Dtype, rngs: nnx.Rngs
  ) -> Callable[..., Any]:
    """Layer for a stage's first block: (x, h) -> (h', shortcut)."""


class Strided:
  """Strided convolutions and a max-pooled stem: the plain ResNet (He et al. 2016)."""

  def stem(self, features, *, dtype, rngs):
    del features, dtype, rngs
    return max_pool

  def transition(self, in_features, mid_features, out_features, *, dtype, rngs):
    return Convolutions(in_features, mid_features, out_features, stride=2, dtype=dtype, rngs=rngs)


class FixedPool:
  """A pooling without parameters at every place, followed by 1x1 convolutions in the transitions.

  Args:
    pool: [N, H, W, C] -> [N, H', W', C].
  """

  def __init__(self, pool: Callable[[jax.Array], jax.Array]):
    self.pool = pool

  def stem(self, features, *, dtype, rngs):
    del features, dtype, rngs
    return self.pool

  def transition(self, in_features, mid_features, out_features, *, dtype, rngs):
    return PoolTransition(
      self.pool, self.pool, in_features, mid_features, out_features, dtype=dtype, rngs=rngs
    )


class LIPProjection:
  """LIP at every place, each predicting importance from what it pools through a 1x1 projection."""

  def stem(self, features, *, dtype, rngs):
    return _stem_lip(features, dtype, rngs)

  def transition(self, in_features, mid_features, out_features, *, dtype, rngs):
    residual = LIP(Projection(mid_features, mid_features, dtype=dtype, rngs=rngs))
    shortcut = LIP(Projection(in_features, in_features, dtype=dtype, rngs=rngs))
    return PoolTransition(
      residual, shortcut, in_features, mid_features, out_features, dtype=dtype, rngs=rngs
    )


class LIPBottleneck:
  """LIP at every place; the two of a transition share a bottleneck trunk (figure 4).

  Args:
    width: x in "bottleneck-x".
  """

  def __init__(self, width: int = 128):
    self.width = width

  def stem(self, features, *, dtype, rngs):
    return _stem_lip(features, dtype, rngs)

  def transition(self, in_features, mid_features, out_features, *, dtype, rngs):
    return SharedLIPTransition(
      in_features, mid_features, out_features, width=self.width, dtype=dtype, rngs=rngs
    )


def _stem_lip(features: int, dtype: Dtype, rngs: nnx.Rngs) -> LIP:
  return LIP(Projection(features, features, kernel_size=3, dtype=dtype, rngs=rngs))


class Convolutions(nnx.Module):
  """3x3 convolution in the residual branch, 1x1 projection of the shortcut where it is needed.

  Args:
    in_features: channels of the block's input x.
    mid_features: channels of the residual branch h.
    out_features: channels of the block's output.
    stride: of both convolutions, in pixels.
    dtype: of the computation.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    in_features: int,
    mid_features: int,
    out_features: int,
    *,
    stride: int = 1,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.residual_conv = layers.conv(
      mid_features, mid_features, 3, stride=stride, dtype=dtype, rngs=rngs
    )
    self.shortcut_conv = (
      None
      if stride == 1 and in_features == out_features
      else layers.conv(in_features, out_features, 1, stride=stride, dtype=dtype, rngs=rngs)
    )

  def __call__(self, x: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    return self.residual_conv(h), x if self.shortcut_conv is None else self.shortcut_conv(x)


class PoolTransition(nnx.Module):
  """Pooling, then a 1x1 convolution, in both branches ("our baseline structure", section 4.1).

  Args:
    residual_pool: pools h.
    shortcut_pool: pools x.
    in_features: channels of the block's input x.
    mid_features: channels of the residual branch h.
    out_features: channels of the block's output.
    dtype: of the computation.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    residual_pool: Callable[..., jax.Array],
    shortcut_pool: Callable[..., jax.Array],
    in_features: int,
    mid_features: int,
    out_features: int,
    *,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.residual_pool = residual_pool
    self.residual_conv = layers.conv(mid_features, mid_features, 1, dtype=dtype, rngs=rngs)
    self.shortcut_pool = shortcut_pool
    self.shortcut_conv = layers.conv(in_features, out_features, 1, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    return self.residual_conv(self.residual_pool(h)), self.shortcut_conv(self.shortcut_pool(x))


class SharedLIPTransition(PoolTransition):
  """LIP and a 1x1 convolution in both branches; one trunk, fed by the block's input, for both.

  Args:
    in_features: channels of the block's input x.
    mid_features: channels of the residual branch h.
    out_features: channels of the block's output.
    width: of the shared trunk.
    dtype: of the computation.
    rngs: source of the initial weights.
  """

  def __init__(
    self,
    in_features: int,
    mid_features: int,
    out_features: int,
    *,
    width: int = 128,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.trunk = BottleneckTrunk(in_features, width, dtype=dtype, rngs=rngs)
    super().__init__(
      LIP(Projection(width, mid_features, dtype=dtype, rngs=rngs)),
      LIP(Projection(width, in_features, dtype=dtype, rngs=rngs)),
      in_features,
      mid_features,
      out_features,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, x: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    shared = self.trunk(x)
    return (
      self.residual_conv(self.residual_pool(h, shared)),
      self.shortcut_conv(self.shortcut_pool(x, shared)),
    )


def make_downsample(
  pool: Pool, *, logit: Logit = "bottleneck", logit_width: int = 128
) -> Downsample:
  """The `Downsample` of a name.

  Args:
    pool: "strided", "average", "max" or "lip".
    logit: for "lip", the logit module: "projection" or "bottleneck".
    logit_width: for "bottleneck", its width.

  Raises:
    UsageError: a name that does not exist, with those that do.
  """
  if pool not in POOLS:
    raise UsageError(f"unknown pool {pool!r}; choose one of {', '.join(POOLS)}")
  if logit not in LOGITS:
    raise UsageError(f"unknown logit {logit!r}; choose one of {', '.join(LOGITS)}")
  if pool == "strided":
    return Strided()
  if pool == "average":
    return FixedPool(average_pool)
  if pool == "max":
    return FixedPool(max_pool)
  return LIPProjection() if logit == "projection" else LIPBottleneck(logit_width)
