"""Folders from elsewhere: what is checked before anything is built or allocated from them.

JSON is only data, but its numbers become sizes and loops. What it says of a network is bounded here
before the network is built, and weights are compared with the network before they are read.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from flax.typing import Dtype

from lip_jax import models
from lip_jax.errors import UsageError

# Far above any network's. What they keep away takes hours or all memory, not seconds.
_MAX_BYTES = 2**24  # of a JSON file
_MAX_NUMBER = 10**7
_MAX_BLOCKS = 150  # densenet201 has 98; building takes a quarter of a second for each
_MAX_CLASSES = 2**20
_MAX_PIXELS = 2**14
_MAX_NAME = 1000  # characters
# Bytes that arrays in any files may announce, and how often their files' size on top of it.
_MAX_UNPACKED = 2**26
_MAX_RATIO = 20


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    UsageError: there is no such file, or it holds something else: no JSON, no object, numbers that
      are not finite, nesting that is too deep, or megabytes.
  """
  if not path.is_file():
    raise UsageError(f"there is no file {path}; copy the folder again")
  try:
    size = path.stat().st_size
    if size > _MAX_BYTES:
      raise ValueError(f"{size:,} bytes, expected at most {_MAX_BYTES:,}")
    text = path.read_text(encoding="utf-8")
  except (OSError, ValueError) as error:
    raise UsageError(f"{path} is damaged ({error}); copy the folder again") from None
  return parse_json(text, str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
  """The object in the text of a JSON file `where`, checked as by `read_json`."""
  try:
    values = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    if not isinstance(values, dict):
      raise ValueError(f"a {type(values).__name__}, expected an object")
  except (ValueError, RecursionError) as error:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    raise UsageError(f"{where} is damaged ({reason}); copy the folder again") from None
  return values


def check_links(folder: Path) -> None:
  """Raises UsageError if a link anywhere in a folder leads out of it, or something is no file."""
  root = folder.resolve()
  for path in folder.rglob("*"):
    if path.is_symlink() and not path.resolve().is_relative_to(root):
      raise UsageError(
        f"{path} is a link that leads out of {folder}; put the file itself there if you trust it"
      )
    if not (path.is_file() or path.is_dir()):
      raise UsageError(f"{path} is no file; copy {folder} again")


def check_announced_size(announced: int, folder: Path) -> None:
  """Raises UsageError if a folder announces arrays that its files can hardly hold.

  Parts of an array that have no file are zeros, so that next to nothing could fill all memory.

  Args:
    announced: bytes of the arrays.
    folder: local.
  """
  size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
  if announced > _MAX_UNPACKED + _MAX_RATIO * size:
    raise UsageError(
      f"{folder} is refused: it announces arrays of {announced:,} bytes and holds {size:,}; copy "
      "it again"
    )


def check_model(model: Any, where: str) -> None:
  """Checks what a file says of a network.

  Args:
    model: should be {"name": ..., **options}, as in a training configuration.
    where: the file, for the error.

  Raises:
    UsageError: it is something else, or has numbers that no network has.
  """
  if not isinstance(model, Mapping) or not isinstance(model.get("name"), str):
    raise UsageError(f"{where} lacks the model's name; copy or export the folder again")
  for key, value in model.items():
    values = value if isinstance(value, list | tuple) else [value]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    plain = all(isinstance(v, str | int | float | bool | None) for v in values)
    if not plain or len(values) > _MAX_BLOCKS or any(abs(v) > _MAX_NUMBER for v in numbers):
      raise UsageError(
        f"{where}: the model's option {_shown(key)} is {_shown(value)}, expected a name, a number "
        f"up to {_MAX_NUMBER:,}, or a few of them"
      )
    if len(values) > 1 and sum(map(abs, numbers)) > _MAX_BLOCKS:
      raise UsageError(
        f"{where}: the model's option {_shown(key)} is {_shown(value)}, expected at most "
        f"{_MAX_BLOCKS} blocks in all"
      )


def build(model: Mapping[str, Any], num_classes: int, dtype: Dtype, where: str) -> nnx.Module:
  """The network that a file describes, with shapes in place of arrays.

  Args:
    model: what `check_model` has checked.
    num_classes: number of logits.
    dtype: of the computation.
    where: the file, for the error.

  Raises:
    UsageError: there is no such network.
  """
  options = dict(model)
  name = options.pop("name")
  reserved = sorted({"num_classes", "dtype", "rngs"} & set(options))
  if reserved:
    raise UsageError(
      f"{where}: {', '.join(reserved)} is not among the options of a model; leave it out"
    )
  try:
    return models.abstract_model(name, num_classes=num_classes, dtype=dtype, **options)
  except UsageError:
    raise
  except Exception as error:  # options of a wrong type can raise anything
    reason = _shown(" ".join(str(error).split()))
    raise UsageError(
      f"{where}: no network {name} can be built with the options {_shown(options)} "
      f"({type(error).__name__}: {reason})"
    ) from error


def check_num_classes(number: Any, where: str) -> int:
  """`number`, if a network can have so many classes; else raises UsageError."""
  if not _is_whole(number, 1, _MAX_CLASSES):
    raise UsageError(
      f"{where} lacks num_classes, or it is out of range: {_shown(number)}, expected 1 to "
      f"{_MAX_CLASSES:,}; copy or export the folder again"
    )
  return number


def check_class_names(names: Any, num_classes: int, where: str) -> list[str] | None:
  """`names`, if they are a name for each class, or None; else raises UsageError."""
  if names is None:
    return None
  if not isinstance(names, list | tuple) or not all(
    isinstance(name, str) and len(name) <= _MAX_NAME and name.isprintable() for name in names
  ):
    # Not printable: what could give orders to the terminal that shows it.
    raise UsageError(f"{where}: class_names is {_shown(names)}, expected a list of printable names")
  if len(names) != num_classes:
    raise UsageError(f"{where} has {len(names)} class names for {num_classes} classes")
  return list(names)


def check_preprocess(values: Any, where: str) -> dict[str, Any] | None:
  """`values`, if they say how images are prepared (see `export.save`), or None.

  Raises:
    UsageError: they are something else.
  """
  if values is None:
    return None
  _check_object("preprocess", values, where)
  size, resize = values.get("image_size"), values.get("resize")
  if not _is_whole(size, 1, _MAX_PIXELS):
    raise UsageError(
      f"{where}: preprocess.image_size is {_shown(size)}, expected 1 to {_MAX_PIXELS:,} pixels"
    )
  assert isinstance(size, int)  # said again for mypy
  if not _is_whole(resize, size, _MAX_PIXELS):
    raise UsageError(
      f"{where}: preprocess.resize is {_shown(resize)}, expected image_size={size} to "
      f"{_MAX_PIXELS:,} pixels"
    )
  for key, least in (("mean", -math.inf), ("std", 0)):
    numbers = values.get(key)
    if (
      not isinstance(numbers, list | tuple)
      or len(numbers) != 3
      or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers)
      or not all(least < v <= _MAX_NUMBER for v in numbers)
    ):
      raise UsageError(
        f"{where}: preprocess.{key} is {_shown(numbers)}, expected three "
        f"{'positive ' if key == 'std' else ''}numbers, for R, G and B"
      )
  return values


def check_evaluation(values: Any, where: str) -> dict[str, Any] | None:
  """`values`, if they are results of an evaluation (see `lip_jax.load`), or None.

  Raises:
    UsageError: they are something else.
  """
  if values is None:
    return None
  _check_object("evaluation", values, where)
  data, count = values.get("data"), values.get("count")
  if not isinstance(data, str) or len(data) > _MAX_NAME or not data.isprintable():
    raise UsageError(f"{where}: evaluation.data is {_shown(data)}, expected a printable name")
  if not _is_whole(count, 0, 2**63):
    raise UsageError(f"{where}: evaluation.count is {_shown(count)}, expected a number of images")
  for key, most in (("top1", 1), ("top5", 1), ("loss", math.inf)):
    number = values.get(key)
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= most:
      expected = "a number" if most == math.inf else "a fraction, 0 to 1"
      raise UsageError(f"{where}: evaluation.{key} is {_shown(number)}, expected {expected}")
  return values


def check_source(values: Any, where: str) -> dict[str, Any] | None:
  """`values`, if they say where a network is from (see `lip_jax.load`), or None.

  Raises:
    UsageError: they are something else.
  """
  if values is None:
    return None
  _check_object("source", values, where)
  step = values.get("step")
  if step is not None and not _is_whole(step, 0, 2**63):
    raise UsageError(f"{where}: source.step is {_shown(step)}, expected a number of steps")
  return values


def _check_object(name: str, values: Any, where: str) -> None:
  if not isinstance(values, dict):
    raise UsageError(f"{where}: {name} is {_shown(values)}, expected an object")


def _is_whole(value: Any, least: int, most: int) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _shown(value: Any) -> str:
  """A value as part of a line, cut where it is long."""
  text = value if isinstance(value, str) else repr(value)
  text = text if text.isprintable() else repr(text)
  return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse_constant(name: str) -> None:
  raise ValueError(f"it holds {name}, which is no number of JSON")


def _finite(text: str) -> float:
  number = float(text)
  if not math.isfinite(number):
    raise ValueError(f"it holds {text[:20]}, which is too large")
  return number
