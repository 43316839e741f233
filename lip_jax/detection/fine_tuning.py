"""The first state of a run that starts from a detector, or from a classifier as its backbone."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import nnx

from lip_jax.data.boxes import BoxSource
from lip_jax.detection import registry
from lip_jax.detection.config import Config
from lip_jax.export import class_names, initial_weights, loading, torch_convert
from lip_jax.training.train_state import TrainState

log = logging.getLogger("lip_jax")


def start_from(
  path: str | Path,
  state: TrainState,
  config: Config,
  source: Callable[[], BoxSource],
) -> TrainState:
  """A first state with another network's parameters and batch statistics.

  Of a detector all is taken over, but what predicts classes if these are others, as far as their
  names are known; of a classifier the backbone.

  Args:
    path: of the network, as for `lip_jax.load`, or a file of PyTorch weights.
    source: gives the training images, whose classes matter where a detector is the start.

  Raises:
    UsageError: there is no such network, or its arrays are not those of the run's network.
  """
  model, found = _load(path, config)
  if found["task"] == "detection":
    images = source()
    classes = images.class_names
    same = found["num_classes"] == len(classes) and (
      found["class_names"] in (None, class_names.for_people(classes))
      and found["category_ids"] in (None, list(images.category_ids))
    )
    replaced = () if same else tuple(sorted(registry.class_arrays(config.model)))
    state = initial_weights.fill(
      state,
      model,
      f"the weights of {path} ({found['model']}) are not those of config.model ({config.model})",
      without=replaced,
    )
    said = f"new, for {len(classes)} classes: {', '.join(replaced)}" if replaced else "all of them"
    log.info("weights of the detector %s; %s", path, said)
  else:
    backbone = config.model["backbone"]
    state = initial_weights.fill(
      state,
      model,
      f"the weights of {path} ({found['model']}) are not those of config.model's backbone "
      f"({backbone})",
      prefix="backbone.",
      without=initial_weights.CLASSIFIERS,
    )
    log.info("backbone of %s; pyramid and head are new", path)
  initial_weights.compare_preparation(path, found["preprocess"], config.data)
  return state


def _load(path: str | Path, config: Config) -> tuple[nnx.Module, dict[str, Any]]:
  if not str(path).endswith(torch_convert.SUFFIXES):
    return loading.load(path)
  options = dict(config.model)
  name = options.pop("name")
  if torch_convert.is_detector(path):
    return loading.load_file(path, name, options)
  backbone = options.pop("backbone")
  options.pop("preset", None)
  return loading.load_file(path, backbone, registry.backbone_options(name, options))
