"""The second stage of Faster R-CNN: from the features of regions to classes and boxes."""

import functools

import jax
from flax import nnx
from flax.typing import Dtype

from lip_jax.models import layers

BINS = 7  # rows and columns of a region's features
STDS = (0.1, 0.1, 0.2, 0.2)  # of the boxes' coder

_XAVIER = nnx.initializers.xavier_uniform()


class BoxHead(nnx.Module):
  """Two fully connected layers, then logits of classes and a box for each class.

  Args:
    channels: of the regions' features.
    hidden: outputs of the two layers.
    num_outputs: classes and the background, which is number 0.
    dtype: of the computation.
    rngs: source of the initial weights.
  """

  def __init__(self, channels: int, hidden: int, num_outputs: int, *, dtype: Dtype, rngs: nnx.Rngs):
    kept = layers.param_dtype(dtype)
    make = functools.partial(nnx.Linear, dtype=dtype, param_dtype=kept, rngs=rngs)
    normal = nnx.initializers.normal
    self.fc1 = make(BINS**2 * channels, hidden, kernel_init=_XAVIER)
    self.fc2 = make(hidden, hidden, kernel_init=_XAVIER)
    self.class_logits = make(hidden, num_outputs, kernel_init=normal(0.01))
    self.box_deltas = make(hidden, 4 * num_outputs, kernel_init=normal(0.001))
    self.dtype = kept

  def __call__(self, regions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[R, 7, 7, channels] -> logits [R, K], deltas [R, K, 4], in at least float32."""
    # In the order of PyTorch's weights.
    x = regions.transpose(0, 3, 1, 2).reshape(regions.shape[0], -1)
    x = nnx.relu(self.fc1(x))
    x = nnx.relu(self.fc2(x))
    logits, deltas = self.class_logits(x), self.box_deltas(x)
    return logits.astype(self.dtype), deltas.reshape(*logits.shape, 4).astype(self.dtype)
