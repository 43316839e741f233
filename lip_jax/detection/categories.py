"""How the classes of a detector are numbered: in data sets, in networks, in COCO's files.

A data set counts its classes from 0 and knows the id that each has in annotation files
("category_id"). A network's outputs are the same, except where the preset is torchvision and the
classes are COCO's: there an output's number is the id. A run keeps both in `classes.json` and
`categories.json`.
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
  """The output of a network for each class of a data set, int32 [classes]."""
  by_id = preset.outputs(len(category_ids)) != len(category_ids)
  return np.asarray(category_ids if by_id else range(len(category_ids)), np.int32)


def to_json(category_ids: Sequence[int]) -> str:
  """What a run's `categories.json` holds."""
  return json.dumps({_KEY: list(category_ids)}) + "\n"


def read(workdir: epath.Path) -> list[int] | None:
  """The ids in a run's `categories.json`, in the order of its classes; None without such a file.

  Raises:
    UsageError: the file is damaged.
  """
  path = workdir / FILE
  text = read_text(path)
  if text is None:
    return None
  ids: Any = parse_json(text, str(path)).get(_KEY)
  whole = isinstance(ids, list) and all(type(one) is int for one in ids)
  if not whole or len(set(ids)) != len(ids):
    raise UsageError(f"{path} is damaged: expected different whole numbers; copy the run again")
  return ids
