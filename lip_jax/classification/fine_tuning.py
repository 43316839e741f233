"""The first state of a run that fine-tunes a classifier which is there already."""

import logging
from collections.abc import Sequence
from pathlib import Path

from lip_jax.classification.config import Config
from lip_jax.export import class_names, initial_weights, loading
from lip_jax.training.train_state import TrainState

log = logging.getLogger("lip_jax")


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
  same_classes = found["num_classes"] == len(classes) and (
    found["class_names"] in (None, class_names.for_people(classes))
  )
  state = initial_weights.fill(
    state,
    model,
    f"the weights of {path} ({found['model']}) are not those of config.model ({config.model})",
    without=() if same_classes else initial_weights.CLASSIFIERS,
  )
  log.info(
    "weights of %s; the classifier %s",
    path,
    "is theirs, too" if same_classes else f"is a new one, of {len(classes)} classes",
  )
  initial_weights.compare_preparation(path, found["preprocess"], config.data)
  return state
