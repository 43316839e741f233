"""What all networks share: images in, features by stage, a classifier or none at the end."""

from collections.abc import Mapping
from typing import ClassVar

import jax
from flax import nnx
from flax.typing import Dtype

from lip_jax.models import layers


class Network(nnx.Module):
  """Base of the networks of `create_model`.

  Attributes:
    stages: for "stem", "c2", "c3", "c4", "c5" and "classifier" the attributes that compute them:
      the first parts of their parameters' paths, by which an optimizer can leave them alone.
    norm_inputs: by the attribute of a batch norm that of the convolution whose output it alone
      takes: what `fold_batch_norm` folds. The blocks of a network have their own.

  Args:
    num_classes: number of logits; 0: a backbone, without a classifier.
    remat: in training, keep the activations between blocks (of a DenseNet: layers) only, and
      compute the others again in the backward pass.
    dtype: of the computation: float32, bfloat16, float16, or float64 where JAX has x64 enabled.
  """

  stages: ClassVar[Mapping[str, tuple[str, ...]]]
  norm_inputs: ClassVar[Mapping[str, str]]

  def __init__(self, num_classes: int, *, in_channels: int, remat: bool, dtype: Dtype):
    layers.check_sizes(in_channels=in_channels)
    layers.check_sizes(least=0, num_classes=num_classes)
    self.in_channels = in_channels
    self.remat = remat
    self.dtype = dtype

  @property
  def classifier_name(self) -> str:
    """Of the attribute that is the classifier, or None."""
    (name,) = self.stages["classifier"]
    return name

  def features(self, images: jax.Array) -> dict[str, jax.Array]:
    """Outputs of the stem and of the four stages.

    Args:
      images: [N, H, W, in_channels], normalized.

    Returns:
      "stem" and "c2" at stride 4, "c3" at 8, "c4" at 16, "c5" (of a DenseNet behind the last norm
      and ReLU) at 32, each [N, H', W', C] in the compute dtype.
    """
    raise NotImplementedError

  def __call__(self, images: jax.Array) -> jax.Array:
    """Class logits [N, num_classes] of images [N, H, W, in_channels], normalized.

    Of a backbone the features "c5", averaged over the image, [N, C]. float32 (float64 in a float64
    model).
    """
    c5 = self.features(images)["c5"]
    pooled = c5.mean(axis=(1, 2), dtype=layers.param_dtype(self.dtype))
    classifier = getattr(self, self.classifier_name)
    return pooled if classifier is None else classifier(pooled)

  def _input(self, images: jax.Array) -> jax.Array:
    if images.ndim != 4 or images.shape[3] != self.in_channels:
      raise ValueError(
        f"images must be [N, H, W, {self.in_channels}], got shape {tuple(images.shape)}"
      )
    return images.astype(self.dtype)
