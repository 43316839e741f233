"""LIP in a user's own model: swaps its pooling and strided convolutions for LIP layers.

A pooling becomes LIP with the same window and stride. A strided convolution becomes LIP and the
same convolution at stride 1 (in figure 4b of Gao, Wang and Wu, "LIP: Local Importance-based
Pooling", ICCV 2019, one of 1x1). Logit modules start at zero, so all of them start as average
pooling, of the positions inside the image (`nnx.avg_pool` also counts those of its padding, by
default).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import lax

from lip_jax.errors import UsageError
from lip_jax.models import layers
from lip_jax.models.downsample import LOGITS
from lip_jax.models.lan import LIP
from lip_jax.models.logit_modules import Bottleneck, Projection
from lip_jax.ops.windows import Geometry

POOLS = {nnx.avg_pool: "avg_pool", nnx.max_pool: "max_pool"}
IMAGE_CHANNELS = 4  # a convolution of at most so many channels reads the image itself

Edit = Callable[[str, Any], Any]


@dataclasses.dataclass(frozen=True)
class Replacement:
  """What became of one layer; layers are given in words."""

  path: str  # of the layer in the model, dotted
  before: str
  after: str | None  # what stands in its place; None if it was left alone
  reason: str | None = None  # why it was left alone

  def __str__(self) -> str:
    if self.after is None:
      return f"{self.path}: {self.before}, left alone: {self.reason}"
    return f"{self.path}: {self.before} -> {self.after}"


class LIPConv(nnx.Module):
  """Pooling, then a convolution of stride 1: [N, H, W, in] -> [N, H', W', out]."""

  def __init__(self, pool: LIP, conv: nnx.Conv):
    self.pool = pool
    self.conv = conv

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.conv(self.pool(x))


def replace_downsampling(
  model: nnx.Module,
  example: Any,
  *,
  logit: str = "projection",
  logit_width: int | None = None,
  skip: Callable[[str, Any], bool] | None = None,
  rngs: nnx.Rngs,
) -> list[Replacement]:
  """Swaps the pooling and strided convolutions of a model for LIP layers, in place.

  What is looked for are attributes of the model and its modules, also inside lists and dicts, that
  are `functools.partial` of `nnx.max_pool` or `nnx.avg_pool` with a stride above 1, or `nnx.Conv`
  with strides above 1. Shapes stay as they were, everywhere. The model's own parameters keep their
  values; those of a strided convolution move from `conv` to `conv.conv`, so load checkpoints before
  the swap and make the optimizer after it.

    >>> import functools
    >>> import jax
    >>> from flax import nnx
    >>> class Net(nnx.Module):
    ...   def __init__(self, rngs):
    ...     self.conv1 = nnx.Conv(3, 16, (3, 3), rngs=rngs)
    ...     self.pool = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
    ...     self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
    ...   def __call__(self, x):
    ...     return self.conv2(self.pool(nnx.relu(self.conv1(x))))
    >>> net = Net(nnx.Rngs(0))
    >>> images = jax.ShapeDtypeStruct((8, 32, 32, 3), "float32")
    >>> for change in replace_downsampling(net, images, rngs=nnx.Rngs(1)):
    ...   print(change)
    pool: max_pool 2x2, stride 2 -> LIP 2x2, stride 2
    conv2: Conv 3x3, stride 2 -> LIP 3x3, stride 2, then Conv 3x3, stride 1

  Left alone, with the reason in the result: convolutions that read the image itself (at most 4
  channels: the paper keeps the first one), layers whose output would change its shape, that are
  called with different numbers of channels, or not at all.

  Args:
    model: any NNX module; its shapes are traced, nothing is computed.
    example: what the model can be called with: an array or `jax.ShapeDtypeStruct`, or a tuple of
      them for several arguments. LIP layers compute in the dtype that their input has with it.
    logit: logit module of each LIP layer: "projection" or "bottleneck".
    logit_width: for "bottleneck", its width; 128 if left out.

  Returns:
    A `Replacement` for each layer found, in the order in which the model calls them.

  Raises:
    UsageError: a model without such attributes, an example that it cannot be called with, an
      unknown logit module, or a model that does not work with the LIP layers. The model is then
      unchanged.
  """
  _check(model, logit, logit_width)
  arguments = _arguments(example)
  found: dict[str, Any] = {}
  _edit(model, lambda path, layer: found.setdefault(path, layer))
  if not found:
    raise UsageError(
      f"{type(model).__name__} has no attribute that is functools.partial(nnx.max_pool, ...) or "
      "functools.partial(nnx.avg_pool, ...) or nnx.Conv with strides above 1. Functions called "
      "inside __call__ cannot be seen: write in __init__, for example, self.pool = "
      "functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2)), and call self.pool(x)"
    )

  calls, expected = _calls(model, arguments)
  width: dict[str, Any] = {} if logit_width is None else {"width": logit_width}
  logits = Projection if logit == "projection" else Bottleneck
  report: list[Replacement] = []
  pools: dict[str, LIP] = {}
  for path in dict.fromkeys([*(path for path, _ in calls), *found]):
    layer = found[path]
    try:
      if skip is not None and skip(path, layer):
        raise _LeftAloneError("skip said so")
      geometry, channels, dtype = _fit(layer, [call for name, call in calls if name == path])
    except _LeftAloneError as reason:
      report.append(Replacement(path, _describe(layer), None, str(reason)))
      continue
    pools[path] = LIP(
      logits(channels, channels, **width, dtype=dtype, rngs=rngs), **geometry._asdict()
    )
    after = f"LIP {_size(geometry.window)}, stride {_stride(geometry.stride)}"
    if isinstance(layer, nnx.Conv):
      after += f", then Conv {_size(layer.kernel_size)}, stride 1"
    report.append(Replacement(path, _describe(layer), after))

  def put(path, layer):
    return _swap(layer, pools[path]) if path in pools else layer

  try:
    got = _trace(model, arguments, put)
    if got != expected:
      raise ValueError(f"its output would be {_text(got)} instead of {_text(expected)}")
  except Exception as error:
    raise UsageError(
      f"the model does not work with LIP in place of {', '.join(pools)}: {error}; leave layers as "
      "they are with skip=lambda path, layer: path == ..."
    ) from error
  _edit(model, put)
  return report


class _Call(NamedTuple):
  """The array that a layer was called with, and the one it gave."""

  x: jax.ShapeDtypeStruct
  y: jax.ShapeDtypeStruct


def _calls(model: nnx.Module, arguments: tuple) -> tuple[list[tuple[str, _Call | None]], Any]:
  """(Path and call) of each layer called, in order, and the shapes of what the model returns."""
  calls: list[tuple[str, _Call | None]] = []

  def record(path: str, layer: Any) -> Any:
    return _Recorder(layer, lambda call: calls.append((path, call)))

  try:
    return calls, _trace(model, arguments, record)
  except Exception as error:
    raise UsageError(
      f"the model cannot be called with the example {_text(arguments)}: {error}"
    ) from error


class _Recorder(nnx.Module):
  """Stands in for a layer and notes its calls, as None if there was more than one argument."""

  def __init__(self, layer: Any, note: Callable[[_Call | None], None]):
    self.layer = layer
    self.note = note

  def __call__(self, *args: Any, **options: Any) -> Any:
    y = self.layer(*args, **options)
    alone = len(args) == 1 and not options and isinstance(args[0], jax.Array)
    self.note(_Call(_shape(args[0]), _shape(y)) if alone else None)
    return y

  def __getattr__(self, name: str) -> Any:
    layer = vars(self).get("layer")  # modules are looked at before they have their attributes
    if layer is None or name.startswith("_"):
      raise AttributeError(name)
    return getattr(layer, name)


class _LeftAloneError(Exception):
  """Why a layer cannot be replaced."""


def _check(model: Any, logit: str, logit_width: int | None) -> None:
  if not isinstance(model, nnx.Module):
    raise UsageError(
      f"model must be a flax.nnx.Module, got {type(model).__name__}; layers are swapped in place"
    )
  if logit not in LOGITS:
    raise UsageError(f"unknown logit {logit!r}; choose one of {', '.join(LOGITS)}")
  if logit_width is not None:
    layers.check_sizes(logit_width=logit_width)
  if logit == "projection" and logit_width is not None:
    raise UsageError(
      f"logit_width={logit_width} is for logit='bottleneck'; a projection has no width"
    )


def _arguments(example: Any) -> tuple:
  arguments = example if isinstance(example, tuple) else (example,)
  for a in jax.tree.leaves(arguments):
    if not (hasattr(a, "shape") and hasattr(a, "dtype")):
      raise UsageError(
        "example must be an array, a jax.ShapeDtypeStruct or a tuple of them, such as "
        f"jax.ShapeDtypeStruct((8, 224, 224, 3), 'float32'); got {a!r}"
      )
  return arguments


def _strides(layer: Any) -> tuple[int, ...]:
  """Of a pooling or a convolution; empty for anything else."""
  if isinstance(layer, nnx.Conv):
    strides = layer.strides or 1
    return (strides,) * len(layer.kernel_size) if isinstance(strides, int) else tuple(strides)
  if isinstance(layer, functools.partial) and layer.func in POOLS:
    return tuple(layer.keywords.get("strides") or ())
  return ()


def _edit(node: Any, edit: Edit, path: tuple[str, ...] = (), done: dict | None = None) -> Any:
  """Puts `edit(path, layer)` in the place of each layer that downsamples.

  Modules change in place. Lists and dicts of which an element changes become `nnx.List` and
  `nnx.Dict`, since those may hold modules beside functions. A module that occurs twice is edited
  once, under the first path in alphabetical order.
  """
  done = {} if done is None else done
  if id(node) in done:
    return done[id(node)]
  if path and max(_strides(node), default=1) > 1:
    new = edit(".".join(path), node)
    if isinstance(node, nnx.Module):
      done[id(node)] = new
    return new
  if isinstance(node, nnx.Module):
    done[id(node)] = node
    for name, value in sorted(vars(node).items()):
      if not name.startswith("_pytree__"):
        new = _edit(value, edit, (*path, name), done)
        if new is not value:
          setattr(node, name, nnx.data(new))
    return node
  if type(node) in (list, tuple):
    children = [_edit(value, edit, (*path, str(i)), done) for i, value in enumerate(node)]
    changed = any(new is not old for new, old in zip(children, node, strict=True))
    return nnx.List(children) if changed else node
  if type(node) is dict and all(isinstance(key, str) for key in node):
    entries = {key: _edit(value, edit, (*path, key), done) for key, value in node.items()}
    changed = any(entries[key] is not node[key] for key in node)
    return nnx.Dict(entries) if changed else node
  return node


def _swap(layer: Any, pool: LIP) -> nnx.Module:
  """What stands in the place of a layer: a pool, and the rest of a convolution after it."""
  if not isinstance(layer, nnx.Conv):
    return pool
  layer.strides = 1
  return LIPConv(pool, layer)


def _trace(model: nnx.Module, arguments: tuple, edit: Edit) -> list[jax.ShapeDtypeStruct]:
  """Shapes of the arrays that an edited copy of the model returns."""
  graphdef, state = nnx.split(model)

  def call(state, *arguments):
    copy = _edit(nnx.merge(graphdef, state), edit)
    copy = nnx.clone(copy)  # variables that come from outside a trace cannot change inside
    return [a for a in jax.tree.leaves(copy(*arguments)) if isinstance(a, jax.Array)]

  return jax.eval_shape(call, state, *arguments)


def _fit(layer: Any, calls: list[_Call | None]) -> tuple[Geometry, int, Dtype]:
  """Windows, channels and dtype of the LIP that takes the place of a layer, if there is one."""
  if not calls:
    raise _LeftAloneError("not called with this example")
  known = [call for call in calls if call is not None]
  if len(known) < len(calls):
    raise _LeftAloneError("called with more arguments than the features")
  for x, _ in known:
    if len(x.shape) != 4 or len(_strides(layer)) != 2:
      raise _LeftAloneError(f"called with {_text(x)}; LIP pools images, [N, H, W, C]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise _LeftAloneError(f"called with {x.dtype}; LIP pools floating point features")
  channels = sorted({x.shape[3] for x, _ in known})
  if len(channels) > 1:
    raise _LeftAloneError(
      f"called with {' and '.join(map(str, channels))} channels; give each call its own attribute"
    )
  geometry = _conv_geometry if isinstance(layer, nnx.Conv) else _pool_geometry
  return geometry(layer, known), channels[0], jnp.result_type(*(x.dtype for x, _ in known))


def _pool_geometry(layer: functools.partial, calls: list[_Call]) -> Geometry:
  """A pooling's own window and stride, and the padding closest to its own that fits LIP."""
  window, stride = layer.keywords["window_shape"], _strides(layer)
  pads = layer.keywords.get("padding", "VALID")
  if isinstance(pads, str):
    pads = lax.padtype_to_pads(calls[0].x.shape[1:3], window, stride, pads)
  axes = []
  for axis, (k, s, (low, _)) in enumerate(zip(window, stride, pads, strict=True), start=1):
    if k < s:  # skips pixels, which LIP need not
      k, low = _cover(s), low + (_cover(s) - k) // 2
    sizes = [(x.shape[axis], y.shape[axis]) for x, y in calls]
    fits = [p for p in range(k // 2 + 1) if all((n + 2 * p - k) // s + 1 == m for n, m in sizes)]
    if not fits:
      raise _LeftAloneError(
        f"no padding of LIP, at most {k // 2} on each side, gives the same output size"
      )
    axes.append((k, s, min((abs(p - low), p) for p in fits)[1]))
  (kh, sh, ph), (kw, sw, pw) = axes
  return Geometry((kh, kw), (sh, sw), (ph, pw))


def _conv_geometry(layer: nnx.Conv, calls: list[_Call]) -> Geometry:
  """Windows that cover the strides of a convolution."""
  if layer.in_features <= IMAGE_CHANNELS:
    raise _LeftAloneError(f"reads the image itself ({layer.in_features} channels)")
  if len(layer.kernel.shape) != len(layer.kernel_size) + 2:
    raise _LeftAloneError("its weights are those of several layers, stacked")
  stride = (_strides(layer)[0], _strides(layer)[1])
  window = (_cover(stride[0]), _cover(stride[1]))
  geometry = Geometry(window, stride, (window[0] // 2, window[1] // 2))
  graphdef, state = nnx.split(layer)

  def at_stride_1(state, x):
    conv = nnx.merge(graphdef, state)
    conv.strides = 1
    return conv(x)

  for x, y in calls:
    n, height, width, c = x.shape
    pooled = jax.ShapeDtypeStruct((n, *geometry.output_size((height, width)), c), x.dtype)
    after = jax.eval_shape(at_stride_1, state, pooled)
    if after.shape != y.shape:
      raise _LeftAloneError(
        f"after LIP its output would be {_size(after.shape[1:3])} instead of "
        f"{_size(y.shape[1:3])}; padding='SAME' would let it be replaced"
      )
  return geometry


def _cover(stride: int) -> int:
  """The smallest odd window, from 3, that leaves out no pixel; 1 where nothing is skipped."""
  return 1 if stride == 1 else max(3, stride + 1 - stride % 2)


def _describe(layer: Any) -> str:
  if isinstance(layer, nnx.Conv):
    name, window = "Conv", layer.kernel_size
  else:
    name, window = POOLS[layer.func], layer.keywords.get("window_shape", ())
  return f"{name} {_size(window)}, stride {_stride(_strides(layer))}"


def _size(sizes: Iterable[int]) -> str:
  return "x".join(map(str, sizes))


def _stride(stride: tuple[int, ...]) -> str:
  return str(stride[0]) if len(set(stride)) == 1 else _size(stride)


def _text(arrays: Any) -> str:
  return ", ".join(f"{a.dtype}{list(a.shape)}" for a in jax.tree.leaves(arrays))


def _shape(a: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(a.shape, a.dtype)
