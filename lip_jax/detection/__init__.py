"""Object detection: what RetinaNet and Faster R-CNN are trained and evaluated with."""

from lip_jax.detection import torch_names  # noqa: F401, registers what load_torch_weights needs
from lip_jax.detection.registry import create_detector, list_detectors

__all__ = ["create_detector", "list_detectors"]
