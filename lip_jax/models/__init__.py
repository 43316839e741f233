"""Networks built from the pooling operators, by name."""

from lip_jax.models.registry import abstract_model, create_model, list_models

__all__ = ["abstract_model", "create_model", "list_models"]
