"""What a network finds important: the importance maps of its LIP layers, as arrays and figures."""

import io
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from lip_jax.lan import record_logits


def importance_maps(model: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
  """Importance exp(G(x)) of every LIP layer, averaged over its channels.

  Args:
    model: a network of `create_model`, in eval mode.
    images: [N, H, W, 3], normalized.

  Returns:
    From the layer's path in the model, for example "layer2.0.spatial.residual_pool", to
    [N, H', W'] at the resolution of what the layer pools, scaled so that each map has a mean of
    one; in the order of the computation. Empty for a model without LIP.
  """
  graph, state = nnx.split(model)

  @jax.jit
  def run(state, images):
    copy = nnx.merge(graph, state, copy=True)
    paths = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(copy)}
    with record_logits() as records:
      copy(images)
    order.extend(paths[id(layer)] for layer, _ in records)
    return [_importance(logits) for _, logits in records]

  order: list[str] = []
  maps = run(state, images)
  return dict(zip(order, maps, strict=True))


def _importance(logits: jax.Array) -> jax.Array:
  """Channel mean of exp(logits), [N, H, W, C] -> [N, H, W], with a mean of one."""
  logits = logits.astype(np.float32)
  importance = jax.numpy.exp(logits - logits.max(axis=(1, 2, 3), keepdims=True)).mean(axis=3)
  return importance / importance.mean(axis=(1, 2), keepdims=True)


def draw_importance(
  model: nnx.Module,
  images: np.ndarray,
  normalize: Callable[[np.ndarray], jax.Array],
  path: str | os.PathLike[str],
) -> bool:
  """Writes a PNG with each image above the importance maps of the network's LIP layers.

  Of the two layers in a transition the one in the residual branch is shown; the other's maps look
  alike where both share a trunk.

  Args:
    model: a network in eval mode.
    images: [N, H, W, 3] uint8.
    normalize: from these to what the model takes.
    path: file to write, which may be in a bucket.

  Returns:
    False if the model has no LIP layer, and nothing was drawn.
  """
  # Drawn without pyplot, which would choose a window system and keep every figure.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  maps = {
    name: importance
    for name, importance in importance_maps(model, normalize(images)).items()
    if not name.endswith("shortcut_pool")
  }
  if not maps:
    return False
  rows = len(maps) + 1
  figure = Figure(figsize=(1.25 * len(images) + 1.6, 1.3 * rows), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots(rows, len(images), squeeze=False)
  shown: Any = None
  for column, image in enumerate(images):
    axes[0, column].imshow(image)
    for row, importance in enumerate(maps.values(), start=1):
      # Logarithmic: half as important is as far below the average as twice is above.
      shown = axes[row, column].imshow(
        np.log2(importance[column]), cmap="cividis", vmin=-2, vmax=2, interpolation="nearest"
      )
  for row, name in enumerate(["input", *map(_label, maps)]):
    size = maps[list(maps)[row - 1]].shape[1:] if row else images.shape[1:3]
    axes[row, 0].set_ylabel(
      f"{name}\n{size[0]}x{size[1]}", rotation=0, ha="right", va="center", fontsize=9
    )
  for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
  bar = figure.colorbar(shown, ax=axes[1:], ticks=[-2, -1, 0, 1, 2], shrink=0.6)
  bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
  bar.set_label("importance, relative to the image's mean")
  picture = io.BytesIO()  # matplotlib itself writes to disks only, and `path` may be in a bucket
  figure.savefig(picture, format="png", dpi=110)
  epath.Path(path).write_bytes(picture.getvalue())
  return True


def _label(path: str) -> str:
  """Short name of a LIP layer: "layer2.0.spatial.residual_pool" -> "layer2"."""
  parts = path.split(".")
  if len(parts) == 1:
    return "stem"
  return parts[0]
