"""Where a network finds its evidence: class activation maps and effective receptive fields.

Sources: Zhou et al., "Learning deep features for discriminative localization" (CVPR 2016); Luo et
al., "Understanding the effective receptive field in deep convolutional neural networks" (NeurIPS
2016); figure 5 of the LIP paper, which back-propagates chosen locations of the one to the other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lip_jax.errors import UsageError
from lip_jax.models.description import CLASSIFIERS


class ClassActivation(NamedTuple):
  """Class activation maps [N, H', W'], the classes [N] that they are of, and logits [N, K]."""

  maps: jax.Array
  classes: jax.Array
  logits: jax.Array


class Regions(NamedTuple):
  """What `attend` finds in images [N, H, W, 3]."""

  activation: ClassActivation
  locations: np.ndarray  # [N, L, 2]: (row, column) in the class activation map
  fields: jax.Array  # [N, L, H, W]: the effective receptive field of each


def class_activation_maps(
  model: nnx.Module, images: jax.Array, classes: jax.Array | int | None = None
) -> ClassActivation:
  """The class's weights times the last features: how much each place speaks for the class.

  The mean of a map and the class's bias add up to the class's logit.

  Args:
    model: with `features(images)["c5"]`, [N, H', W', C], whose average over the image goes through
      a linear layer `fc` or `classifier`: any network of `create_model`, in eval mode.
    images: [N, H, W, 3], normalized.
    classes: label of each image [N], or one for all; None: what the network predicts.

  Raises:
    UsageError: a label that the network does not have, or a network of another kind.
  """
  function, state = _functional(model)
  if classes is not None:
    count, labels = _classifier(model).kernel.shape[1], np.asarray(classes)
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= count:
      raise UsageError(f"class {classes} is not one of the network's: expected 0 to {count - 1}")
    classes = jnp.broadcast_to(jnp.asarray(labels, jnp.int32), (len(images),))
  return jax.jit(function)(state, images, classes)


def effective_receptive_fields(
  function: Callable[[jax.Array], jax.Array],
  images: jax.Array,
  locations: np.ndarray | jax.Array,
) -> jax.Array:
  """How much each pixel of the image moves the map at a location.

  The absolute gradient of the map at the location, summed over the image's channels, and divided
  by its sum over the image. All zero where nothing moves the map.

  Args:
    function: from images to maps [N, H', W'] or features [N, H', W', C], of which the sum over
      channels is taken; each image's map must not depend on other images.
    images: [N, H, W, C].
    locations: whole numbers, (row, column) in the map: [L, 2] for all images, or [N, L, 2].

  Returns:
    [N, L, H, W].

  Raises:
    ValueError: locations of another shape.
    UsageError: locations outside the map.
  """
  maps, pull_back = jax.vjp(function, images)
  places = np.asarray(locations)
  if places.ndim == 2:
    places = np.broadcast_to(places, (len(images), *places.shape))
  if places.ndim != 3 or places.shape[0] != len(images) or places.shape[2] != 2:
    raise ValueError(
      f"locations must be [L, 2], or [N, L, 2] with N = {len(images)}; got {np.shape(locations)}"
    )
  size = maps.shape[1:3]
  if places.size and (places.min() < 0 or (places.max(axis=(0, 1)) >= size).any()):
    raise UsageError(
      f"location {places.max(axis=(0, 1)).tolist()} is outside the map; rows are 0 to "
      f"{size[0] - 1}, columns 0 to {size[1] - 1}"
    )

  def field(place: jax.Array) -> jax.Array:
    chosen = jnp.zeros_like(maps).at[jnp.arange(len(images)), place[:, 0], place[:, 1]].set(1)
    (gradient,) = pull_back(chosen)
    strength = jnp.abs(gradient).sum(axis=3)
    total = strength.sum(axis=(1, 2), keepdims=True)
    return strength / jnp.where(total > 0, total, 1)

  # One after the other: memory for one gradient, however many locations there are.
  fields = jax.lax.map(field, jnp.asarray(places.swapaxes(0, 1)))
  return fields.swapaxes(0, 1)


def attend(
  model: nnx.Module,
  images: jax.Array,
  classes: jax.Array | int | None = None,
  locations: np.ndarray | None = None,
) -> Regions:
  """`class_activation_maps`, and the effective receptive fields of places in them (figure 5).

  Args:
    locations: [L, 2] or [N, L, 2], (row, column) in the map; None: where each map is largest.

  Raises:
    UsageError: as `class_activation_maps`; locations outside the map.
  """
  activation = class_activation_maps(model, images, classes)
  if locations is None:
    largest = np.asarray(activation.maps).reshape(len(images), -1).argmax(axis=1)
    rows_columns = np.unravel_index(largest, activation.maps.shape[1:])
    locations = np.stack(rows_columns, axis=-1)[:, None, :]
  places = np.broadcast_to(locations, (len(images), *np.shape(locations)[-2:]))
  function, state = _functional(model)

  @jax.jit
  def fields(state: Any, images: jax.Array, classes: jax.Array) -> jax.Array:
    return effective_receptive_fields(lambda x: function(state, x, classes).maps, images, places)

  return Regions(activation, places, fields(state, images, activation.classes))


def _functional(model: nnx.Module) -> tuple[Callable[..., ClassActivation], Any]:
  """The class activation maps as a function of (state, images, classes), and the state."""
  _classifier(model)  # raises
  graph, state = nnx.split(model)

  def function(state: Any, images: jax.Array, classes: jax.Array | None) -> ClassActivation:
    network: Any = nnx.merge(graph, state, copy=True)
    linear = _classifier(network)
    kernel = linear.kernel[...]
    c5 = network.features(images)["c5"].astype(kernel.dtype)
    logits = linear(c5.mean(axis=(1, 2)))
    labels = logits.argmax(axis=1).astype(jnp.int32) if classes is None else classes
    # Of the largest precision: on TPU and GPU it would be that of bfloat16 or TF32.
    maps = jnp.einsum("nhwc,cn->nhw", c5, kernel[:, labels], precision=jax.lax.Precision.HIGHEST)
    return ClassActivation(maps, labels, logits)

  return function, state


def _classifier(model: Any) -> nnx.Linear:
  for name in CLASSIFIERS:
    layer = getattr(model, name, None)
    if isinstance(layer, nnx.Linear) and hasattr(model, "features"):
      return layer
  raise UsageError(
    f"{type(model).__name__} has no class activation maps: expected features(images)['c5'], "
    "averaged over the image, and a linear layer 'fc' or 'classifier'"
  )
