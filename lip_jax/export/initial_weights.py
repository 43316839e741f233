"""The first state of a run whose network, or a part of it, is there already."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from lip_jax.models import description
from lip_jax.training.train_state import TrainState, Tree

log = logging.getLogger("lip_jax")

CLASSIFIERS = tuple(f"{name}." for name in description.CLASSIFIERS)  # beginnings of paths


def fill(
  state: TrainState, model: nnx.Module, what: str, *, prefix: str = "", without: Sequence[str] = ()
) -> TrainState:
  """A first state with the parameters and statistics of another network.

  Args:
    model: the other network.
    what: begins the error's sentence.
    prefix: of the paths of the arrays that are those of the other network; the others stay.
    without: beginnings of paths, of either network, that are left as they are.

  Raises:
    UsageError: the arrays are not the same, or have other shapes.
  """
  left_out = tuple(without)
  own: dict[str, Any] = _flat(state.params) | {
    key: jax.ShapeDtypeStruct(array.shape[1:], array.dtype)  # without the batch-norm groups
    for key, array in _flat(state.batch_stats).items()
  }
  taken = {
    prefix + key: np.asarray(variable.get_value())
    for key, variable in description.flat_variables(model).items()
    if not key.startswith(left_out)
  }
  description.check_weights(
    {key: (array.shape, "float32") for key, array in taken.items()},
    {k: a for k, a in own.items() if k.startswith(prefix) and not k.startswith(left_out)},
    what,
  )
  return dataclasses.replace(
    state, params=_filled(state.params, taken), batch_stats=_filled(state.batch_stats, taken)
  )


def compare_preparation(path: str | Path, theirs: Mapping[str, Any] | None, data: Any) -> None:
  """Warns if images are not normalized as those that the weights were trained on."""
  for name in ("mean", "std"):
    ours = list(getattr(data, name))
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
