"""What the subcommands take: their arguments, and how these are written."""

import argparse
import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

DATA_DIR = {
  "--data-dir DIR": "directory of the data sets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)"
}

AS_STORED = {
  "--as-stored": "do not turn photographs as their EXIF orientation says; so ImageNet's published "
  "numbers were measured"
}


def positive(text: str) -> int:
  """A whole number above zero."""
  number = int(text)
  if number < 1:
    raise argparse.ArgumentTypeError(f"{text} is not positive")
  return number


def directory(text: str) -> str:
  """A directory, which is not what scripts make of one that they do not have."""
  if text == "None":
    raise argparse.ArgumentTypeError("None names no directory; name one, or leave this out")
  return text


def option(text: str) -> tuple[str, Any]:
  """Key and value."""
  key, equals, value = text.partition("=")
  if not (key.isidentifier() and equals):
    raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
  return key, literal(value)


def literal(text: str) -> Any:
  """Value of a Python literal; the text itself, if it is none."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


# By metavar; of others, text.
_TYPES: dict[str, Callable[[str], Any]] = {
  "N": positive,
  "S": positive,
  "PIXELS": positive,
  "K": int,
  "Q": int,
  "DIR": directory,
  "RATE": float,
  "SCORE": float,
  "SECONDS": float,
}


def add_command(
  commands: Any,
  name: str,
  run: Callable[[argparse.Namespace], int | None],
  text: str,
  more: str = "",
  epilog: str | None = None,
  parents: Sequence[argparse.ArgumentParser] = (),
) -> argparse.ArgumentParser:
  """Adds a subcommand to the subparsers `commands`.

  Args:
    run: is called with what has been parsed; what it returns is the exit status, None: 0.
    text: says in a line what the command does.
    more: behind `text` where the command itself is described.
    epilog: printed as it is, below the arguments.
  """
  parser = commands.add_parser(
    name,
    help=text,
    description=text + more,
    epilog=epilog,
    parents=parents,
    formatter_class=argparse.RawDescriptionHelpFormatter if epilog else argparse.HelpFormatter,
  )
  parser.set_defaults(run=run)
  return parser


def add(parser: Any, arguments: Mapping[str, str], **settings: Any) -> None:
  """Adds arguments to a parser, or to a group of one.

  Args:
    arguments: for each what it is, by how it is written: "--top N" takes a positive number,
      "--dtype {float32,bfloat16}" one of these, "--json" nothing, "images IMAGE..." one or more.
      The metavar decides about the type.
    settings: of `ArgumentParser.add_argument`, for all of them.
  """
  for form, text in arguments.items():
    name, _, metavar = form.partition(" ")
    found: dict[str, Any] = {"help": text}
    if not metavar:
      found["action"] = "store_true"
    elif metavar.startswith("{"):
      found["choices"] = metavar.strip("{}").split(",")
    else:
      found["metavar"] = metavar.removesuffix("...")
      found["type"] = _TYPES.get(found["metavar"])
      found["nargs"] = "+" if metavar.endswith("...") else None
    parser.add_argument(name, **found | settings)


def select(args: argparse.Namespace, *names: str) -> dict[str, Any]:
  """Some of what has been parsed, by name."""
  return {name: getattr(args, name) for name in names}
