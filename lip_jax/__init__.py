"""LIP, local importance-based pooling (Gao et al., ICCV 2019), for JAX on TPU and GPU."""

import importlib
from typing import Any

from lip_jax.models import create_model, lan, list_models
from lip_jax.models.folding import fold_batch_norm
from lip_jax.models.lan import LIP, AdaptiveLIP, GlobalLIP
from lip_jax.models.logit_modules import Bottleneck, Projection
from lip_jax.models.replace import replace_downsampling
from lip_jax.models.torch_names import load_torch_weights, to_torch_state_dict
from lip_jax.ops.adaptive import adaptive_lip_pool, global_lip_pool
from lip_jax.ops.lip_pool import gated_lip_pool, lip_pool, projected_lip_pool
from lip_jax.ops.pools import (
  average_pool,
  detail_preserving_pool,
  exp_pool,
  lp_pool,
  max_pool,
  soft_pool,
  strided_pool,
)

__version__ = "0.1.0"

__all__ = [
  "LIP",
  "AdaptiveLIP",
  "Bottleneck",
  "GlobalLIP",
  "Projection",
  "adaptive_lip_pool",
  "average_pool",
  "create_detector",
  "create_model",
  "detail_preserving_pool",
  "exp_pool",
  "fold_batch_norm",
  "gated_lip_pool",
  "global_lip_pool",
  "lan",
  "lip_pool",
  "list_models",
  "load",
  "load_torch_weights",
  "lp_pool",
  "max_pool",
  "projected_lip_pool",
  "replace_downsampling",
  "soft_pool",
  "strided_pool",
  "to_torch_state_dict",
]


# On first use: what few need, or what needs more than jax, flax and numpy.
_LATER = {"create_detector": "lip_jax.detection", "load": "lip_jax.export.loading"}


def __getattr__(name: str) -> Any:
  if name in _LATER:
    return getattr(importlib.import_module(_LATER[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
