"""What a folder from elsewhere says, checked before anything is built or allocated from it."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lip_jax.errors import UsageError, shown
from lip_jax.models.description import check_model, check_num_classes

# Far above any network's. What they keep away takes hours or all memory, not seconds.
_MAX_NUMBER = 10**7
MAX_PIXELS = 2**14
_MAX_NAME = 10_000  # characters; paths may have 4,096
# Bytes that any file may unpack to, and how often its size on top of it.
_MAX_UNPACKED = 2**26
_MAX_RATIO = 20


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
  root = os.path.realpath(folder)
  for path in folder.rglob("*"):
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
      cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/([^/]+)", root)
      hub = "hf://{}/{}@{}".format(*cached.groups()) if cached else "hf://ORGANISATION/NAME"
      raise UsageError(
        f"{path} is a link that leads out of {folder}; put the file itself there if you trust it, "
        f"or load what the Hugging Face cache holds as {hub}"
      )
    if not (path.is_file() or path.is_dir()):
      raise UsageError(f"{path} is no file; copy {folder} again")


def check_config(config: Mapping[str, Any], where: str) -> None:
  """Raises UsageError unless a folder's config.json says what `export.folders.save` writes."""
  check_model(config.get("model"), where)
  num_classes = check_num_classes(config.get("num_classes"), where)
  check_class_names(config.get("class_names"), num_classes, where)
  for key, check in (("evaluation", check_evaluation), ("source", _check_source)):
    values = config.get(key)
    if values is not None:
      expect(isinstance(values, dict), where, key, values, "an object")
      check(values, where)


def check_class_names(names: Any, num_classes: int, where: str) -> list[str] | None:
  """`names`, if they are a name for each class, or None; else raises UsageError."""
  if names is None:
    return None
  good = isinstance(names, list | tuple) and all(map(_is_name, names))
  expect(good, where, "class_names", names, "a list of names")
  if len(names) != num_classes:
    raise UsageError(f"{where} has {len(names)} class names for {num_classes} classes")
  return list(names)


def check_evaluation(values: Mapping[str, Any], where: str) -> None:
  """Raises UsageError unless these are "data", a name, "count" of images, and a task's metrics."""
  data, count = values.get("data"), values.get("count")
  expect(_is_name(data), where, "evaluation.data", data, "a name")
  expect(is_whole(count, 0, 2**63), where, "evaluation.count", count, "a number of images")
  for key in sorted(set(values) - {"data", "count"}):
    number, fraction = values[key], key.startswith("top")
    good = _is_number(number) and (not fraction or 0 <= number <= 1)
    expected = "a fraction, 0 to 1" if fraction else "a number"
    expect(good, where, f"evaluation.{shown(key)}", number, expected)


def check_preprocess(config: Mapping[str, Any], where: str) -> None:
  """Raises UsageError unless a classifier's config says how images are prepared, or nothing."""
  values = config.get("preprocess")
  if values is None:
    return
  expect(isinstance(values, dict), where, "preprocess", values, "an object")
  size, resize = values.get("image_size"), values.get("resize")
  sides = size if isinstance(size, list | tuple) and len(size) == 2 else [size]
  good = all(is_whole(side, 1, MAX_PIXELS) for side in sides)
  expect(good, where, "preprocess.image_size", size, f"1 to {MAX_PIXELS:,} pixels")
  good = resize == size or is_whole(resize, max(sides), MAX_PIXELS)
  expected = f"image_size={size} to {MAX_PIXELS:,} pixels"
  expect(good, where, "preprocess.resize", resize, expected)
  check_moments(values, where)


def check_moments(values: Mapping[str, Any], where: str) -> None:
  """Raises UsageError unless these have the "mean" and "std" of each colour."""
  for key, least, kind in (("mean", -math.inf, ""), ("std", 0, "positive ")):
    numbers = values.get(key)
    good = (
      isinstance(numbers, list | tuple)
      and len(numbers) in (1, 3)
      and all(_is_number(v) and least < v <= _MAX_NUMBER for v in numbers)
    )
    expect(good, where, f"preprocess.{key}", numbers, f"three {kind}numbers, for R, G and B")


def _check_source(values: Mapping[str, Any], where: str) -> None:
  step = values.get("step")
  good = step is None or is_whole(step, 0, 2**63)
  expect(good, where, "source.step", step, "a number of steps")


def expect(good: bool, where: str, key: str, value: Any, expected: str) -> None:
  """Raises UsageError, of what stands under `key`, unless it is good."""
  if not good:
    raise UsageError(f"{where}: {key} is {shown(value)}, expected {expected}")


def _is_name(value: Any) -> bool:
  # Any characters: who shows it to a terminal escapes them.
  return isinstance(value, str) and len(value) <= _MAX_NAME


def _is_number(value: Any) -> bool:
  # Not math.isfinite, which fails for whole numbers that no float can hold.
  return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def is_whole(value: Any, least: Any, most: int) -> bool:
  """Whether `value` is a whole number in [least, most]."""
  return type(value) is int and least <= value <= most
