"""Model names and what they stand for."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from lip_jax.errors import UsageError
from lip_jax.models.densenet import DenseNet
from lip_jax.models.downsample import make_downsamples
from lip_jax.models.layers import make_batch_norm
from lip_jax.models.network import Network
from lip_jax.models.resnet import ResNet

_M = TypeVar("_M")

# What makes a network, and its arguments: of the constructor, and of `make_downsamples`.
_Entry = tuple[type[ResNet] | type[DenseNet], dict[str, Any]]

_PLAIN: dict[str, _Entry] = {
  "resnet18": (ResNet, {"stage_sizes": (2, 2, 2, 2), "block": "basic"}),
  "resnet34": (ResNet, {"stage_sizes": (3, 4, 6, 3), "block": "basic"}),
  "resnet50": (ResNet, {"stage_sizes": (3, 4, 6, 3)}),
  "resnet101": (ResNet, {"stage_sizes": (3, 4, 23, 3)}),
  "resnet152": (ResNet, {"stage_sizes": (3, 8, 36, 3)}),
  "resnext50_32x4d": (ResNet, {"stage_sizes": (3, 4, 6, 3), "groups": 32, "group_width": 4}),
  "resnext101_64x4d": (ResNet, {"stage_sizes": (3, 4, 23, 3), "groups": 64, "group_width": 4}),
  # The embedded job's network, for images of 32-64 px: 14 layers, a quarter of the usual width.
  "resnet_small": (ResNet, {"stage_sizes": (1, 1, 1, 1), "width": 16, "stem": "small"}),
  "densenet121": (DenseNet, {"block_sizes": (6, 12, 24, 16)}),
  "densenet169": (DenseNet, {"block_sizes": (6, 12, 32, 32)}),
  "densenet201": (DenseNet, {"block_sizes": (6, 12, 48, 32)}),
  "densenet161": (DenseNet, {"block_sizes": (6, 12, 36, 24), "growth": 48, "width": 96}),
}
_LIP: dict[str, dict[str, Any]] = {"resnet_small": {"logit_width": 16}}
_MODELS = _PLAIN | {
  f"lip_{name}": (constructor, {**options, "pool": "lip", **_LIP.get(name, {})})
  for name, (constructor, options) in _PLAIN.items()
}
# More deformable (table 6). The paper does not say which layers are: our choice is all that have
# 3x3 windows in stages c3 to c5.
_MODELS["lip_resnet101_md"] = (
  ResNet,
  {**_MODELS["lip_resnet101"][1], "deformable_stages": ("c3", "c4", "c5")},
)


def list_models() -> list[str]:
  """Names that `create_model` knows, sorted."""
  return sorted(_MODELS)


def check_options(name: str, options: Iterable[str]) -> tuple[set[str], set[str], set[str]]:
  """(pooling's, normalization's, the network's own) options of a model, if these are among them.

  Raises:
    UsageError: an unknown model or option, with the valid ones.
  """
  if name not in _MODELS:
    raise UsageError(f"unknown model {name!r}; choose one of {', '.join(list_models())}")
  constructor, _ = _MODELS[name]
  pooling, norms, own = (
    set(inspect.signature(function).parameters)
    for function in (make_downsamples, make_batch_norm, constructor.__init__)
  )
  own -= {"self", "downsample", "norm", "num_classes", "dtype", "rngs"}
  valid = pooling | norms | own
  unknown = sorted(set(options) - valid)
  if unknown:
    raise UsageError(
      f"unknown option {', '.join(unknown)} for model {name!r}; valid options: "
      + ", ".join(sorted(valid))
    )
  return pooling, norms, own


def create_model(
  name: str,
  *,
  num_classes: int = 1000,
  dtype: Dtype = jnp.float32,
  rngs: nnx.Rngs,
  **options: Any,
) -> Network:
  """Builds a network with fresh weights, in training mode.

  `model(images [N, H, W, in_channels])` gives logits [N, num_classes] in float32, and without
  classes the averaged features [N, C]; `model.features(images)` the stages' outputs by name, "c2"
  at stride 4 to "c5" at 32; `model.stages` the parameters of each; `model.eval()` and
  `model.train()` switch between running and batch statistics.

  Args:
    name: one of `list_models()`.
    num_classes: number of logits; 0: a backbone, without a classifier.
    dtype: of the computation; parameters and statistics stay in float32 (float64 for float64).
    rngs: source of the initial weights, `nnx.Rngs(seed)`.
    **options: arguments of the network's constructor, for example in_channels=1, of
      `lip_jax.models.layers.make_batch_norm`, for example bn_group_size=32 or bn_frozen=True, and
      of `lip_jax.models.downsample.make_downsamples`, for example pool="average",
      logit="projection", logit_width=64, lip_stages=("c4", "c5").

  Raises:
    UsageError: an unknown name, option, or value of an option, with the valid ones.
  """
  pooling, norms, own = check_options(name, options)
  if jnp.dtype(dtype) != jax.dtypes.canonicalize_dtype(dtype):
    raise UsageError(
      f"dtype {jnp.dtype(dtype)} needs JAX's x64 mode: call "
      "jax.config.update('jax_enable_x64', True) first"
    )
  constructor, given = _MODELS[name]
  given = given | options

  def chosen(names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in names}

  return constructor(
    num_classes=num_classes,
    downsample=make_downsamples(**chosen(pooling)),
    norm=make_batch_norm(**chosen(norms)),
    dtype=dtype,
    rngs=rngs,
    **chosen(own),
  )


def network_class(name: str) -> type[Network]:
  """The class of a model's network, whose `stages` name its parts."""
  check_options(name, ())
  return _MODELS[name][0]


def abstract_model(name: str, **options: Any) -> Any:
  """`create_model(name, **options)` with shapes in place of arrays: quick to build."""
  return abstract(lambda rngs: create_model(name, rngs=rngs, **options))


def abstract(create: Callable[[nnx.Rngs], _M]) -> _M:
  """`create(rngs)` with shapes in place of arrays."""

  def made() -> _M:
    rngs = nnx.Rngs(0)
    # Flax 0.12.8 (0.12.12 no longer) asks a traced count for its sharding at each draw; to say that
    # it has none, JAX looks through all that was traced: about half of the time.
    rngs["default"].count.set_value(np.zeros((), np.uint32))
    return create(rngs)

  return nnx.eval_shape(made)
