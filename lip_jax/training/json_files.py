"""JSON files from elsewhere: data only, but its numbers become sizes and loops."""

import json
import math
from pathlib import Path
from typing import Any

from lip_jax.errors import UsageError

_MAX_BYTES = 2**24
_ADVICE = "copy the folder again"


def read_json(path: Path, advice: str = _ADVICE) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    UsageError: there is no such file, or it holds something else: no JSON, no object, numbers that
      are not finite, nesting that is too deep, or megabytes. Its last words are the advice.
  """
  try:
    if not path.is_file():
      raise UsageError(f"there is no file {path}; {advice}")
    size = path.stat().st_size
    if size > _MAX_BYTES:
      raise ValueError(f"{size:,} bytes, expected at most {_MAX_BYTES:,}")
    text = path.read_text(encoding="utf-8")
  except UsageError:
    raise
  except PermissionError as error:
    raise UsageError(f"cannot read {path}: {error.strerror}; let this user read it") from None
  except (OSError, ValueError) as error:
    raise UsageError(f"{path} is damaged ({error}); {advice}") from None
  return parse_json(text, str(path), advice)


def parse_json(text: str, where: str, advice: str = _ADVICE) -> dict[str, Any]:
  """The object in the text of a JSON file `where`, checked as by `read_json`."""
  try:
    values = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    if not isinstance(values, dict):
      raise ValueError(f"a {type(values).__name__}, expected an object")
  except (ValueError, RecursionError) as error:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    raise UsageError(f"{where} is damaged ({reason}); {advice}") from None
  return values


def _refuse_constant(name: str) -> None:
  raise ValueError(f"it holds {name}, which is no number of JSON")


def _finite(text: str) -> float:
  number = float(text)
  if not math.isfinite(number):
    raise ValueError(f"it holds {text[:20]}, which is too large")
  return number
