"""What a folder from elsewhere says, checked before anything is built or allocated from it.

Weights are compared with the network before they are read, and sizes with the files that they are
announced in.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lip_jax.errors import UsageError, shown
from lip_jax.models.description import check_model, check_num_classes

# Far above any network's. What they keep away takes hours or all memory, not seconds.
_MAX_NUMBER = 10**7
_MAX_PIXELS = 2**14
_MAX_NAME = 1000  # characters
_MAX_FAULTS = 20  # named in an error
# Bytes that any file may unpack to, and how often its size on top of it.
_MAX_UNPACKED = 2**26
_MAX_RATIO = 20
# Parameters and statistics are in one of these, as safetensors and NumPy call them.
_FLOATS = ("f16", "bf16", "f32", "f64", "float16", "bfloat16", "float32", "float64")


def unpacks_too_far(unpacked: int, packed: int) -> bool:
  """Whether files of `packed` bytes would become far more than weights can be packed to."""
  return unpacked > _MAX_UNPACKED + _MAX_RATIO * packed


def check_announced_size(announced: int, folder: Path) -> None:
  """Raises UsageError if a folder announces arrays, in bytes, that its files can hardly hold.

  Parts of an array that have no file are zeros, so that next to nothing could fill all memory.
  """
  size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
  if unpacks_too_far(announced, size):
    raise UsageError(
      f"{folder} is refused: it announces arrays of {announced:,} bytes and holds {size:,}; copy "
      "it again"
    )


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


def weight_faults(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, Any]) -> list[str]:
  """Names whose arrays are missing, left over or of another shape than the network's variables."""
  faults = [f"missing {key}" for key in expected if key not in found]
  faults += [
    f"shape of {key} is {found[key]}, expected {variable.shape}"
    for key, variable in expected.items()
    if key in found and found[key] != variable.shape
  ]
  return faults + [f"unexpected {key}" for key in found if key not in expected]


def check_weights(
  shapes: Mapping[str, tuple[int, ...]],
  dtypes: Mapping[str, str],
  variables: Mapping[str, Any],
  what: str,
) -> None:
  """Compares what a file announces with what a network has, before any of it is read.

  Args:
    variables: of the network, from `flat_variables`, or anything else with a shape.

  Raises:
    UsageError: `what`, and which arrays are missing, left over, of another shape or no
      floating-point numbers.
  """
  faults = weight_faults(shapes, variables)
  faults += [
    f"{key} is of {dtype}, expected floating point"
    for key, dtype in dtypes.items()
    if dtype.lower() not in _FLOATS
  ]
  if faults:
    named = "; ".join(faults[:_MAX_FAULTS])
    more = f"; and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
    raise UsageError(f"{what} ({len(faults)} faults): {named}{more}")


def check_config(config: Mapping[str, Any], where: str) -> None:
  """Raises UsageError unless a folder's config.json says what `export.folders.save` writes."""
  check_model(config.get("model"), where)
  num_classes = check_num_classes(config.get("num_classes"), where)
  check_class_names(config.get("class_names"), num_classes, where)
  for key, check in (
    ("preprocess", _check_preprocess),
    ("evaluation", check_evaluation),
    ("source", _check_source),
  ):
    values = config.get(key)
    if not isinstance(values, dict | None):
      raise UsageError(f"{where}: {key} is {shown(values)}, expected an object")
    if values is not None:
      check(values, where)


def check_class_names(names: Any, num_classes: int, where: str) -> list[str] | None:
  """`names`, if they are a name for each class, or None; else raises UsageError."""
  if names is None:
    return None
  if not isinstance(names, list | tuple) or not all(map(_is_name, names)):
    raise UsageError(f"{where}: class_names is {shown(names)}, expected a list of printable names")
  if len(names) != num_classes:
    raise UsageError(f"{where} has {len(names)} class names for {num_classes} classes")
  return list(names)


def check_evaluation(values: Mapping[str, Any], where: str) -> None:
  """Raises UsageError unless these are "data", a name, "count" of images, and a task's metrics."""
  data, count = values.get("data"), values.get("count")
  if not _is_name(data):
    raise UsageError(f"{where}: evaluation.data is {shown(data)}, expected a printable name")
  if not _is_whole(count, 0, 2**63):
    raise UsageError(f"{where}: evaluation.count is {shown(count)}, expected a number of images")
  metrics = {key: value for key, value in values.items() if key not in ("data", "count")}
  for key, number in metrics.items():
    fraction = key.startswith("top")
    if not _is_number(number) or (fraction and not 0 <= number <= 1):
      expected = "a fraction, 0 to 1" if fraction else "a number"
      raise UsageError(f"{where}: evaluation.{shown(key)} is {shown(number)}, expected {expected}")


def _check_preprocess(values: Mapping[str, Any], where: str) -> None:
  size, resize = values.get("image_size"), values.get("resize")
  if not _is_whole(size, 1, _MAX_PIXELS):
    raise UsageError(
      f"{where}: preprocess.image_size is {shown(size)}, expected 1 to {_MAX_PIXELS:,} pixels"
    )
  if not _is_whole(resize, size, _MAX_PIXELS):
    raise UsageError(
      f"{where}: preprocess.resize is {shown(resize)}, expected image_size={size} to "
      f"{_MAX_PIXELS:,} pixels"
    )
  for key, least in (("mean", -math.inf), ("std", 0)):
    numbers = values.get(key)
    if (
      not isinstance(numbers, list | tuple)
      or len(numbers) != 3
      or not all(_is_number(v) and least < v <= _MAX_NUMBER for v in numbers)
    ):
      raise UsageError(
        f"{where}: preprocess.{key} is {shown(numbers)}, expected three "
        f"{'positive ' if key == 'std' else ''}numbers, for R, G and B"
      )


def _check_source(values: Mapping[str, Any], where: str) -> None:
  step = values.get("step")
  if step is not None and not _is_whole(step, 0, 2**63):
    raise UsageError(f"{where}: source.step is {shown(step)}, expected a number of steps")


def _is_name(value: Any) -> bool:
  # Not printable: what could give orders to the terminal that shows it.
  return isinstance(value, str) and len(value) <= _MAX_NAME and value.isprintable()


def _is_number(value: Any) -> bool:
  # Not math.isfinite, which fails for whole numbers that no float can hold.
  return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_whole(value: Any, least: Any, most: int) -> bool:
  return type(value) is int and least <= value <= most
