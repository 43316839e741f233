"""Networks built from the pooling operators, by name."""

from lip_jax.models.registry import create_model, list_models

__all__ = ["create_model", "list_models"]
