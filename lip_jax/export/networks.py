"""What differs between the tasks' networks, for who writes, reads and shares them."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx
from flax.typing import Dtype

from lip_jax.errors import UsageError, shown
from lip_jax.export import inference, validation
from lip_jax.models import description


class Networks(NamedTuple):
  """How the networks of a task are built, checked and run.

  Attributes:
    build: the network of {"name": ..., **options}, with shapes in place of arrays, of the number of
      classes; the place of the description is for errors.
    check: raises UsageError unless a folder's config has what the task's networks need.
    prepare: the function that a file holds, of images of a size or of the network's own.
    count_classes: of a description and the arrays of a PyTorch file; None: by the classifier.
    published: what is known of published weights of so many classes; None: they are classifiers.
  """

  build: Callable[[Mapping[str, Any], int, str, Dtype], nnx.Module]
  check: Callable[[Mapping[str, Any], str], None]
  prepare: Callable[[Any, Mapping[str, Any], int | None], inference.InferenceFunction]
  count_classes: Callable[[Mapping[str, Any], Mapping[str, Any], str], int] | None = None
  published: Callable[[int], dict[str, Any]] | None = None


DETECTORS = ("faster_rcnn", "retinanet")

_CLASSIFIERS = Networks(description.build, validation.check_preprocess, inference.prepare)
# "module:object", of what is built on this room, which therefore cannot import it.
_OTHERS = {"detection": "lip_jax.detection.sharing:NETWORKS"}


def task_of(name: str) -> str:
  """The task of the network of that name."""
  return "detection" if name in DETECTORS else "classification"


def of(config: Mapping[str, Any], where: str = "config") -> Networks:
  """The kind of network of a config of `lip_jax.load`, or of an exported folder.

  Raises:
    UsageError: an unknown "task", or what its networks need is not installed.
  """
  task = config.get("task", "classification")
  if task == "classification":
    return _CLASSIFIERS
  if not isinstance(task, str) or task not in _OTHERS:
    raise UsageError(f"{where}: task is {shown(task)}, expected one of {', '.join(_OTHERS)}")
  module, name = _OTHERS[task].split(":")
  try:
    found: Networks = getattr(importlib.import_module(module), name)
  except ImportError as error:
    raise UsageError(f"networks for {task} need lip-jax[train] ({error}); install it") from error
  return found
