"""How the classes of a detector are numbered: in data sets, in networks, in COCO's files.

A data set counts its classes from 0 and knows the id that each has in annotation files
("category_id"). A network's outputs are the same, except where the preset is torchvision and the
classes are 80, as COCO's: there an output's number is the id. A run keeps both in `classes.json`
and `categories.json`.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from lip_jax.detection.presets import Preset
from lip_jax.errors import UsageError
from lip_jax.training.json_files import parse_json
from lip_jax.training.workdir import read_text

FILE = "categories.json"
_KEY = "category_ids"


def outputs(category_ids: Sequence[int], preset: Preset) -> np.ndarray:
  """The output of a network for each class of a data set, int32 [classes].

  80 classes that have ids for which a network of COCO's has no outputs have the first from 1 on.
  """
  count = len(category_ids)
  labels = preset.outputs(count)
  if labels == count:
    return np.arange(count, dtype=np.int32)
  by_id = all(0 < one < labels for one in category_ids)
  return np.asarray(category_ids if by_id else range(1, count + 1), np.int32)


def to_json(category_ids: Sequence[int]) -> str:
  """What a run's `categories.json` holds."""
  return json.dumps({_KEY: list(category_ids)}) + "\n"


def classes(category_ids: Sequence[int], preset: Preset, num_outputs: int) -> np.ndarray:
  """The class of a data set for each output of a network, int32 [num_outputs]; -1: of none."""
  found = np.full(num_outputs, -1, np.int32)
  found[outputs(category_ids, preset)] = np.arange(len(category_ids))
  return found


def read(workdir: epath.Path, num_classes: int) -> list[int] | None:
  """The ids in a run's `categories.json`, in the order of its classes; None without such a file.

  Raises:
    UsageError: the file is damaged, or is not of so many classes.
  """
  path = workdir / FILE
  text = read_text(path)
  if text is None:
    return None
  ids: Any = parse_json(text, str(path)).get(_KEY)
  whole = isinstance(ids, list) and all(type(one) is int for one in ids)
  if not whole or len(set(ids)) != num_classes or len(ids) != num_classes:
    raise UsageError(
      f"{path} is damaged: expected {num_classes} different whole numbers; copy the run again"
    )
  return ids
