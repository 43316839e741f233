"""Region proposal networks (Ren et al., "Faster R-CNN", NeurIPS 2015)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import lax

from lip_jax.detection.postprocess import Level
from lip_jax.detection.presets import Preset
from lip_jax.models import layers, padding
from lip_jax.ops import boxes as box_ops
from lip_jax.ops.nms import nms

STDS = (1, 1, 1, 1)  # of the boxes' coder

_NMS_THRESHOLD = 0.7
_NORMAL = nnx.initializers.normal(0.01)


class Proposals(NamedTuple):
  """Where objects may be in each of N images, by decreasing score; zeros where not valid."""

  boxes: jax.Array  # [N, limit, 4], inclusive where the preset is
  scores: jax.Array  # [N, limit], probabilities of an object
  valid: jax.Array  # [N, limit] bool


class ProposalHead(nnx.Module):
  """Is there an object at each anchor, and where: one 3x3 convolution, the same for all levels.

  Args:
    channels: of the pyramid, and inside.
    per_cell: anchors of a cell.
    dtype: of the computation.
    rngs: source of the initial weights.
  """

  def __init__(self, channels: int, per_cell: int, *, dtype: Dtype, rngs: nnx.Rngs):
    factory = layers.LayerFactory(dtype, rngs, _NORMAL)
    self.conv = factory.conv(channels, channels, 3, use_bias=True)
    self.logits = factory.conv(channels, per_cell, 1, use_bias=True)
    self.box_deltas = factory.conv(channels, 4 * per_cell, 1, use_bias=True)
    self.dtype = layers.param_dtype(dtype)

  def __call__(self, x: jax.Array, stride: int) -> tuple[jax.Array, jax.Array]:
    """[N, H, W, channels] of one level -> logits [N, A, 1], deltas [N, A, 4]."""
    x = padding.blank(nnx.relu(self.conv(x)), stride)
    logits, deltas = self.logits(x), self.box_deltas(x)
    # Not len(x): the number of images is a symbol where the network is exported.
    return (
      logits.reshape(x.shape[0], -1, 1).astype(self.dtype),
      deltas.reshape(x.shape[0], -1, 4).astype(self.dtype),
    )


def propose(levels: Sequence[Level], size: jax.Array, preset: Preset, limit: int) -> Proposals:
  """The best anchors of each level, moved, then NMS within levels; no gradient flows through.

  Args:
    levels: of one image, of one class.
    size: [2], its height and width, that boxes are clipped to.
    preset: the conventions.
    limit: so many of each level, and so many in all.

  Returns:
    As `Proposals`, without the axis N.
  """
  logits, boxes, numbers = [], [], []
  for number, level in enumerate(lax.stop_gradient(tuple(levels))):
    scores = jnp.where(level.usable, level.logits[:, 0], -jnp.inf)
    best, index = lax.top_k(scores, min(limit, len(scores)))
    logits.append(best)
    boxes.append(
      box_ops.decode(
        level.anchors[index],
        level.deltas[index],
        stds=STDS,
        inclusive=preset.inclusive,
        size=size,
      )
    )
    numbers.append(jnp.full(len(best), number, jnp.int32))
  scores, candidates = jnp.concatenate(logits), jnp.concatenate(boxes)
  width, height = box_ops.sizes(candidates, inclusive=preset.inclusive)
  least = preset.faster_rcnn.least_proposal
  index, valid = nms(
    candidates,
    scores,
    jnp.concatenate(numbers),
    threshold=_NMS_THRESHOLD,
    limit=limit,
    valid=(scores > -jnp.inf) & (width >= least) & (height >= least),
    inclusive=preset.inclusive,
  )
  return Proposals(
    jnp.where(valid[:, None], candidates[index], 0),
    jnp.where(valid, jax.nn.sigmoid(scores[index]), 0),
    valid,
  )
