"""Types of arguments, shared by the subcommands."""

import argparse
import ast
from typing import Any


def positive(text: str) -> int:
  """A whole number above zero."""
  number = int(text)
  if number < 1:
    raise argparse.ArgumentTypeError(f"{text} is not positive")
  return number


def option(text: str) -> tuple[str, Any]:
  """Key and value: a Python literal, or else a string."""
  key, equals, value = text.partition("=")
  if not (key.isidentifier() and equals):
    raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
  try:
    return key, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return key, value
