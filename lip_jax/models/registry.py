"""Model names and what they stand for."""

import functools
import inspect
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax.errors import UsageError
from lip_jax.models.resnet import ResNet

# The embedded job's network, for images of 32-64 px: 14 layers, a quarter of the usual width.
_SMALL: dict[str, Any] = {"stage_sizes": (1, 1, 1, 1), "width": 16, "stem": "small"}

_MODELS: dict[str, functools.partial[Any]] = {
  "resnet50": functools.partial(ResNet, stage_sizes=(3, 4, 6, 3)),
  "lip_resnet50": functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), pool="lip"),
  "resnet_small": functools.partial(ResNet, **_SMALL),
  "lip_resnet_small": functools.partial(ResNet, **_SMALL, pool="lip", logit_width=16),
}


def list_models() -> list[str]:
  """Names that `create_model` knows, sorted."""
  return sorted(_MODELS)


def create_model(
  name: str,
  *,
  num_classes: int = 1000,
  dtype: Dtype = jnp.float32,
  rngs: nnx.Rngs,
  **options: Any,
) -> nnx.Module:
  """Builds a network with fresh weights, in training mode.

  `model(images [N, H, W, 3])` gives logits [N, num_classes] in float32; `model.features(images)`
  the stages' outputs by name, "c2" at stride 4 to "c5" at 32; `model.eval()` and `model.train()`
  switch between running and batch statistics.

  Args:
    name: one of `list_models()`.
    num_classes: number of logits.
    dtype: of the computation; parameters and statistics stay in float32 (float64 for float64).
    rngs: source of the initial weights, `nnx.Rngs(seed)`.
    **options: arguments of the network's constructor, for example pool="average",
      logit="projection", logit_width=64, bn_group_size=32.

  Raises:
    UsageError: an unknown name, option, or value of an option, with the valid ones.
  """
  if name not in _MODELS:
    raise UsageError(f"unknown model {name!r}; choose one of {', '.join(list_models())}")
  constructor = _MODELS[name]
  arguments = inspect.signature(constructor.func.__init__).parameters
  valid = sorted(set(arguments) - {"self", "num_classes", "dtype", "rngs"})
  unknown = sorted(set(options) - set(valid))
  if unknown:
    raise UsageError(
      f"unknown option {', '.join(unknown)} for model {name!r}; valid options: {', '.join(valid)}"
    )
  return constructor(num_classes=num_classes, dtype=dtype, rngs=rngs, **options)
