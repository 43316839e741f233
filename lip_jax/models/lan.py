"""The poolings of `lip_jax.ops` as layers that also give the importance they pool with.

Layers without parameters hold nothing but their window, so that any of them can stand wherever a
network pools: see `lip_jax.models.downsample`.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax.errors import UsageError
from lip_jax.models import layers, padding
from lip_jax.models.logit_modules import Bottleneck, Projection
from lip_jax.ops import lip_pool, pools
from lip_jax.ops.adaptive import adaptive_lip_pool, global_lip_pool
from lip_jax.ops.windows import IntOrPair, Windows, accumulation_dtype, make_geometry, pair, taps

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


class LocalPool(nnx.Module):
  """A pooling of the LAN family (equation 1): x [N, H, W, C] -> [N, H', W', C].

  Args:
    window: height and width of the window in pixels, an int or a pair (h, w), as are stride and
      padding, the latter at most window // 2.
  """

  def __init__(self, *, window: IntOrPair = 3, stride: IntOrPair = 2, padding: IntOrPair = 1):
    self.window = window
    self.stride = stride
    self.padding = padding

  @property
  def _windows(self) -> Windows:
    return {"window": self.window, "stride": self.stride, "padding": self.padding}

  def __call__(self, x: jax.Array) -> jax.Array:
    mask = padding.inside(x)
    # A window that begins outside may yet hold pixels of the image.
    return self._pool(x) if mask is None else padding.blank(self._pool_inside(x, mask))

  def _pool(self, x: jax.Array) -> jax.Array:
    raise NotImplementedError

  def _pool_inside(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """`_pool`, as if each image ended where its mask [N, H, W, 1] does."""
    logits, _ = _exclude(self._log_importance(x), mask, None)
    return lip_pool.lip_pool(x, logits, **self._windows)

  def importance(self, x: jax.Array) -> jax.Array:
    """F(x) of each pixel of each window, divided by its sum over the window.

    [N, H, W, C] -> [N, H', W', window_h * window_w, C], the window row by row; zero outside the
    image. The layer's output is the sum of importance times pixels (for `LpPool` see there).
    Divided because F may be known up to a factor per window only, and may itself depend on the
    window.
    """
    return self._shares(self._log_importance(x))

  def _log_importance(self, x: jax.Array) -> jax.Array:
    """Logarithm of F, [N, H, W, C], where F is the same in all windows."""
    raise NotImplementedError

  def _taps(self, x: jax.Array, outside: float) -> jax.Array:
    geometry = make_geometry(x, **self._windows)
    return jnp.stack(taps(x.astype(accumulation_dtype(x)), geometry, outside), axis=3)

  def _shares(self, log_importance: jax.Array) -> jax.Array:
    return jax.nn.softmax(self._taps(log_importance, -math.inf), axis=3)


class AveragePool(LocalPool):
  """Average pooling: F = 1."""

  def _pool(self, x: jax.Array) -> jax.Array:
    return pools.average_pool(x, **self._windows)

  def _log_importance(self, x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x)


class MaxPool(LocalPool):
  """Max pooling: F is one for the largest pixel of a window, zero for the others."""

  def _pool(self, x: jax.Array) -> jax.Array:
    return pools.max_pool(x, **self._windows)

  def _pool_inside(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    lowest = jnp.asarray(jnp.finfo(x.dtype).min, x.dtype)
    return self._pool(jnp.where(mask, x, lowest))

  def importance(self, x: jax.Array) -> jax.Array:
    pixels = self._taps(x, -math.inf)
    largest = (pixels == pixels.max(axis=3, keepdims=True)).astype(pixels.dtype)
    return largest / largest.sum(axis=3, keepdims=True)  # equal pixels share


class StridedPool(LocalPool):
  """Sampling at a fixed interval (equation 3): F is one for a window's central pixel, else zero."""

  def _pool(self, x: jax.Array) -> jax.Array:
    return pools.strided_pool(x, **self._windows)

  def _pool_inside(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    return self._pool(x)  # an image's windows have their centres inside

  def importance(self, x: jax.Array) -> jax.Array:
    (kh, kw) = pair("window", self.window)
    sampled = ((kh - 1) // 2) * kw + (kw - 1) // 2
    shape = self._taps(x, 0.0).shape
    one_hot = jax.nn.one_hot(sampled, kh * kw, dtype=accumulation_dtype(x))
    return jnp.broadcast_to(one_hot[None, None, None, :, None], shape)


class SoftPool(LocalPool):
  """SoftPool (Stergiou et al. 2021): F = exp(x)."""

  def _pool(self, x: jax.Array) -> jax.Array:
    return pools.soft_pool(x, **self._windows)

  def _log_importance(self, x: jax.Array) -> jax.Array:
    return x


class ExpPool(LocalPool):
  """F = exp(beta * x) with a learned beta, a scalar: from average (0) towards max pooling.

  Beta is kept in at least float32.
  """

  def __init__(self, beta: float = 1.0, *, dtype: Dtype = jnp.float32, **windows: Unpack[Windows]):
    super().__init__(**windows)
    self.beta = nnx.Param(jnp.asarray([beta], layers.param_dtype(dtype)))

  def _pool(self, x: jax.Array) -> jax.Array:
    return pools.exp_pool(x, self.beta[...], **self._windows)

  def _log_importance(self, x: jax.Array) -> jax.Array:
    beta = self.beta[...].reshape(1, 1, 1, 1)
    return beta * x.astype(accumulation_dtype(x, beta))


class LpPool(LocalPool):
  """Power mean (mean(|x|^p))^(1 / p).

  Its `importance` is that of the sum that it is: weights w = |x|^(p - 1) / (n^(1 / p) *
  (sum |x|^p)^(1 - 1 / p)) over the n pixels of a window, with y = sum(w |x|). They sum to one at
  p = 1 and for constant |x| only (see `lip_jax.lp_pool`).
  """

  def __init__(self, p: float = 2.0, **windows: Unpack[Windows]):
    super().__init__(**windows)
    self.p = p

  def _pool(self, x: jax.Array) -> jax.Array:
    return pools.lp_pool(x, self.p, **self._windows)

  def _pool_inside(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    raise _unmaskable(self)

  def importance(self, x: jax.Array) -> jax.Array:
    inside = self._taps(jnp.ones_like(x), 0.0)
    y = self(x.astype(inside.dtype))[:, :, :, None, :]
    relative = jnp.abs(self._taps(x, 0.0)) / jnp.where(y == 0, 1, y)
    return inside * relative ** (self.p - 1) / inside.sum(axis=3, keepdims=True)


class DetailPreservingPool(LocalPool):
  """Detail-preserving pooling (Saeedan et al. 2018) with alpha and lambda learned per channel.

  Both are kept as logarithms, which holds them positive; they start at one. The kernel of the full
  form starts as the mean of the window, which is the lite form.

  Args:
    full: learn the linear down-scaling that details are measured against, a kernel per channel.
    dtype: of the computation; parameters are kept in at least float32.
  """

  def __init__(
    self,
    features: int,
    *,
    full: bool = False,
    symmetric: bool = True,
    dtype: Dtype = jnp.float32,
    **windows: Unpack[Windows],
  ):
    super().__init__(**windows)
    kept = layers.param_dtype(dtype)
    kh, kw = pair("window", self.window)
    self.log_alpha = nnx.Param(jnp.zeros((features,), kept))
    self.log_lambda = nnx.Param(jnp.zeros((features,), kept))
    self.kernel = nnx.Param(jnp.full((kh, kw, features), 1 / (kh * kw), kept)) if full else None
    self.symmetric = symmetric
    self.epsilon = 1e-3

  @property
  def _importance_options(self) -> dict[str, Any]:
    return {
      "alpha": jnp.exp(self.log_alpha[...]),
      "lam": jnp.exp(self.log_lambda[...]),
      "kernel": None if self.kernel is None else self.kernel[...],
      "symmetric": self.symmetric,
      "epsilon": self.epsilon,
    }

  def _pool(self, x: jax.Array) -> jax.Array:
    return pools.detail_preserving_pool(x, **self._importance_options, **self._windows)

  def _pool_inside(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    raise _unmaskable(self)

  def importance(self, x: jax.Array) -> jax.Array:
    geometry = make_geometry(x, **self._windows)
    importance = pools.detail_importance(x, geometry=geometry, **self._importance_options)
    total = functools.reduce(jnp.add, importance)
    return jnp.stack([f / total for f in importance], axis=3)


class LIP(LocalPool):
  """Local importance-based pooling: F = exp(G(x)) with a learned logit module G: equations 4, 5.

  Args:
    logits: module from features [N, H, W, C] to logits [N, H, W, C]; its `logit_range`, if it has
      one, must bound them.
    average_steps: pool by averages in the first so many training steps (table 2, D); the layer
      then counts its training steps among the model's batch statistics.
  """

  def __init__(
    self,
    logits: Callable[[jax.Array], jax.Array],
    *,
    average_steps: int = 0,
    **windows: Unpack[Windows],
  ):
    super().__init__(**windows)
    self.logits = logits
    self.average_steps = average_steps
    self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32)) if average_steps else None
    self.deterministic = False  # what model.eval() and model.train() set

  def __call__(self, x: jax.Array, source: jax.Array | None = None) -> jax.Array:
    """Pools x, [N, H, W, C]; its importance is predicted from `source` [N, H, W, S], if given."""
    records, mask = _recorded.get(), padding.inside(x)
    fused = self._fused(x) if records is None and mask is None else None
    if fused is not None:
      return fused.pool(x, x if source is None else source, **self._windows)
    logits = self._log_importance(x, source)
    if self.steps is not None and not self.deterministic:
      self.steps[...] = self.steps[...] + 1
    if records is not None:
      records.append((self, logits))
    logit_range = self._logit_range
    if mask is not None:
      logits, logit_range = _exclude(logits, mask, logit_range)
    return padding.blank(lip_pool.lip_pool(x, logits, logit_range=logit_range, **self._windows))

  def _fused(self, x: jax.Array) -> Projection | Bottleneck | None:
    """The logit module, if it can pool x by itself. Subclasses may do anything in their call."""
    if self.steps is not None or type(self.logits) not in (Projection, Bottleneck):
      return None
    module = cast(Projection | Bottleneck, self.logits)
    return module if module.fuses(x) else None

  @property
  def _logit_range(self) -> tuple[float, float] | None:
    return getattr(self.logits, "logit_range", None)

  def importance(self, x: jax.Array, source: jax.Array | None = None) -> jax.Array:
    """As `LocalPool.importance`, predicted from `source` [N, H, W, S], if given."""
    return self._shares(self._log_importance(x, source))

  def _log_importance(self, x: jax.Array, source: jax.Array | None = None) -> jax.Array:
    logits = self.logits(x if source is None else source)
    if self.steps is None:
      return logits
    constant = self._logit_range[0] if self._logit_range else 0.0
    # In a train state there is one count for each batch-norm group, all the same.
    averaging = self.steps[...].reshape(-1)[0] < self.average_steps
    return jnp.where(averaging, jnp.full_like(logits, constant), logits)


def _exclude(
  logits: jax.Array, mask: jax.Array, logit_range: tuple[float, float] | None
) -> tuple[jax.Array, tuple[float, float] | None]:
  """Logits [N, H, W, C] that give no weight to what is not in the mask, and their range."""
  low, high = logit_range or (-math.inf, math.inf)
  if high - low <= 20:  # exp(-60) is less than the rounding of a sum, of float64 too
    low -= 60
    logit_range = (low, high)
  else:
    low, logit_range = -1e4, None
  return jnp.where(mask, logits, jnp.asarray(low, logits.dtype)), logit_range


def _unmaskable(pool: LocalPool) -> UsageError:
  return UsageError(
    f"{type(pool).__name__} has no form for images of different sizes in one batch; take another "
    "pool, or mask_padding=False"
  )


class AdaptiveLIP(nnx.Module):
  """`lip_jax.adaptive_lip_pool` with the logits of a logit module: [N, H, W, C] -> [N, h, w, C].

  `output_size` is that of the result in pixels, an int or a pair (h, w).
  """

  def __init__(self, logits: Callable[[jax.Array], jax.Array], output_size: IntOrPair):
    self.logits = logits
    self.output_size = output_size

  def __call__(self, x: jax.Array) -> jax.Array:
    return adaptive_lip_pool(
      x, self.logits(x), self.output_size, logit_range=getattr(self.logits, "logit_range", None)
    )


class GlobalLIP(nnx.Module):
  """`lip_jax.global_lip_pool` with the logits of a logit module: [N, H, W, C] -> [N, C]."""

  def __init__(self, logits: Callable[[jax.Array], jax.Array]):
    self.logits = logits

  def __call__(self, x: jax.Array) -> jax.Array:
    return global_lip_pool(x, self.logits(x))
