"""LIP, local importance-based pooling (Gao et al., ICCV 2019), for JAX on TPU and GPU."""

from lip_jax.downsample import LIP
from lip_jax.logit_modules import Bottleneck, Projection
from lip_jax.models import create_model, list_models
from lip_jax.pooling import average_pool, lip_pool, max_pool
from lip_jax.torch_weights import load_torch_weights

__version__ = "0.1.0"

__all__ = [
  "LIP",
  "Bottleneck",
  "Projection",
  "average_pool",
  "create_model",
  "lip_pool",
  "list_models",
  "load_torch_weights",
  "max_pool",
]
