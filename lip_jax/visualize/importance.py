"""The importance that a network's LIP layers pool with, as maps over the image."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lip_jax.models.lan import LIP, SoftPool, record_logits
from lip_jax.visualize.grids import layer_grids, to_input


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
  return with_importance(model, lambda copy, images: copy(images))(images)[1]


def with_importance(
  model: nnx.Module, function: Callable[..., Any]
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
  """`function(model, *inputs)`, compiled, and the importance of the LIP layers in it.

  Args:
    model: in eval mode.

  Returns:
    A function of `inputs`, that is compiled once for each shape of them. It gives what `function`
    gives, and maps as of `importance_maps`, by the layers' paths in the model.
  """
  return _watched(model, function, _importance)


def window_importance(model: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
  """What each LIP layer multiplies the pixels of each window by: F / sum(F), equation 2.

  The arguments are those of `importance_maps`.

  Returns:
    From the layer's path to [N, H', W', window_h * window_w, C], the window row by row: it sums to
    one over each window, and is zero outside the image (see `LocalPool.importance`).
  """

  def shares(layer: LIP, logits: jax.Array) -> jax.Array:
    # SoftPool's F is the exponential of what it pools.
    pool = SoftPool(window=layer.window, stride=layer.stride, padding=layer.padding)
    return pool.importance(logits)

  return _watched(model, lambda copy, images: copy(images), shares)(images)[1]


def pixel_importance(
  maps: Mapping[str, jax.Array], model: nnx.Module, image_size: tuple[int, int]
) -> np.ndarray | None:
  """Importance of each pixel of the image: the geometric mean over the network's LIP layers.

  A pixel that several layers pool counts by the product of its importances; the mean keeps the
  scale of a single map. Of the two layers of a transition the one in the residual branch counts.

  Args:
    maps: `importance_maps` of the images, by the model.

  Returns:
    [N, H, W] float32; None where there are no maps.
  """
  grids = layer_grids(model)
  logarithms = [
    to_input(
      np.log(np.maximum(np.asarray(values, np.float32), 1e-30)),
      grids.get(name),
      image_size,
    )
    for name, values in main_layers(maps).items()
  ]
  return np.exp(np.mean(logarithms, axis=0)) if logarithms else None


def main_layers(maps: Mapping[str, Any]) -> dict[str, Any]:
  """Without the layers of shortcuts, which in the paper's networks share a trunk with others."""
  return {name: values for name, values in maps.items() if not name.endswith("shortcut_pool")}


def _importance(layer: LIP, logits: jax.Array) -> jax.Array:
  logits = logits.astype(jnp.float32)
  values = jnp.exp(logits - logits.max(axis=(1, 2, 3), keepdims=True)).mean(axis=3)
  return values / values.mean(axis=(1, 2), keepdims=True)


def _watched(
  model: nnx.Module,
  function: Callable[..., Any],
  of_layer: Callable[[LIP, jax.Array], jax.Array],
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
  """`function`, and beside what it gives `of_layer` of each LIP layer and its logits, by path."""
  graph, state = nnx.split(model)
  order: list[str] = []  # the same for all shapes of inputs

  @jax.jit
  def run(state: Any, *inputs: Any) -> tuple[Any, list[jax.Array]]:
    copy = nnx.merge(graph, state, copy=True)
    paths = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(copy)}
    with record_logits() as records:
      result = function(copy, *inputs)
    order[:] = [paths[id(layer)] for layer, _ in records]
    return result, [of_layer(layer, logits) for layer, logits in records]

  def watched(*inputs: Any) -> tuple[Any, dict[str, jax.Array]]:
    result, values = run(state, *inputs)
    return result, dict(zip(order, values, strict=True))

  return watched
