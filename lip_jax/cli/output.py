"""What the subcommands print: aligned tables, progress."""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence

from lip_jax.errors import printable


def say(text: object) -> None:
  """Prints lines to stdout; what could steer a terminal is escaped."""
  print(printable(str(text), keep="\n"))


def progress(text: str) -> None:
  """Replaces the progress line of a terminal; an empty text removes it."""
  if sys.stderr.isatty():
    print(f"\r\033[K{printable(text)}", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def working(text: str = "") -> Iterator[None]:
  """Context with a progress line, which is removed behind it."""
  progress(text)
  try:
    yield
  finally:
    progress("")


def table(rows: Iterable[tuple[str, ...]], right: Sequence[int] = (1, 2, 3, 4, 5, 6)) -> str:
  """Aligned columns, those in `right` to the right."""
  rows = [tuple(map(printable, row)) for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = [
      cell.rjust(width) if index in right else cell.ljust(width)
      for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)
