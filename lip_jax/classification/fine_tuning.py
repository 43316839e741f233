"""The first state of a run that fine-tunes a network which is there already."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lip_jax.classification.config import Config
from lip_jax.export import class_names, loading
from lip_jax.models.description import CLASSIFIERS, check_weights, flat_variables
from lip_jax.training.train_state import TrainState, Tree

log = logging.getLogger("lip_jax")

_CLASSIFIERS = tuple(f"{name}." for name in CLASSIFIERS)


def start_from(
  path: str | Path, state: TrainState, config: Config, classes: Sequence[str]
) -> TrainState:
  """A first state with another network's parameters and batch statistics.

  The classifier is taken over if the network has the same classes, as far as their names are known;
  else it is left as it is.

  Args:
    path: of the network, as for `lip_jax.load`.

  Raises:
    UsageError: there is no such network, or its arrays are not those of the run's network.
  """
  model, found = loading.load(path)
  arrays = {key: np.asarray(var.get_value()) for key, var in flat_variables(model).items()}
  same_classes = found["num_classes"] == len(classes) and (
    found["class_names"] in (None, class_names.for_people(classes))
  )
  taken = {
    key: array for key, array in arrays.items() if same_classes or not key.startswith(_CLASSIFIERS)
  }
  own: dict[str, Any] = _flat(state.params) | {
    key: jax.ShapeDtypeStruct(array.shape[1:], array.dtype)  # without the batch-norm groups
    for key, array in _flat(state.batch_stats).items()
  }
  check_weights(
    {key: (array.shape, "float32") for key, array in taken.items()},
    {key: a for key, a in own.items() if same_classes or not key.startswith(_CLASSIFIERS)},
    f"the weights of {path} ({found['model']}) are not those of config.model ({config.model})",
  )
  log.info(
    "weights of %s; the classifier %s",
    path,
    "is theirs, too" if same_classes else f"is a new one, of {len(classes)} classes",
  )
  _compare_preparation(path, found["preprocess"], config)
  return dataclasses.replace(
    state, params=_filled(state.params, taken), batch_stats=_filled(state.batch_stats, taken)
  )


def _compare_preparation(path: str | Path, theirs: Mapping[str, Any] | None, config: Config):
  """Warns if images are not normalized as those that the weights were trained on."""
  for name in ("mean", "std"):
    ours = list(getattr(config.data, name))
    if theirs is not None and list(theirs[name]) != ours:
      log.warning(
        "%s was trained with data.%s %s, and this run has %s", path, name, theirs[name], ours
      )


def _flat(tree: Tree) -> dict[str, jax.Array]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {_name(keys): leaf for keys, leaf in leaves}


def _filled(tree: Tree, arrays: Mapping[str, np.ndarray]) -> Tree:
  """The tree with these arrays in it, placed as the old ones, and the same for all groups."""

  def fill(keys: Any, old: jax.Array) -> jax.Array:
    if _name(keys) not in arrays:
      return old
    new = np.broadcast_to(arrays[_name(keys)], old.shape).astype(old.dtype)
    return jax.make_array_from_callback(old.shape, old.sharding, lambda index: new[index])

  return jax.tree_util.tree_map_with_path(fill, tree)


def _name(keys: Any) -> str:
  return jax.tree_util.keystr(keys, simple=True, separator=".")
