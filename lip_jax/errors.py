"""Errors that are the user's to mend."""

import logging
from typing import TextIO


class UsageError(ValueError):
  """The user's input is at fault, or what became of it.

  The message says what was given, what was expected and what to do. Commands print it without a
  traceback, and end with `status`.
  """

  status = 1


def one_line(error: BaseException, length: int = 300) -> str:
  """What another library's error says, in one line of this length at most."""
  return " ".join(str(error).split())[:length]


def printable(text: str, keep: str = "") -> str:
  """Text for a terminal: what could steer it, or has no glyph of its own, as an escape.

  Args:
    keep: characters that stay, such as a newline.
  """
  return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def log_to(stream: TextIO, layout: str, time: str | None = None) -> None:
  """Prints what lip_jax logs to a stream, once, whatever other libraries have set up.

  Args:
    layout, time: formats of a message and of its time, as `logging.Formatter` takes them.
  """
  log = logging.getLogger("lip_jax")
  log.propagate = False
  handler = logging.StreamHandler(stream)
  handler.setFormatter(_PrintableFormatter(layout, time))
  log.handlers = [handler]


class _PrintableFormatter(logging.Formatter):
  """Names in messages may hold what steers a terminal."""

  def format(self, record: logging.LogRecord) -> str:
    return printable(super().format(record), keep="\n")


def shown(value: object) -> str:
  """A value as part of an error's line, cut where it is long."""
  text = printable(value if isinstance(value, str) else repr(value))
  return text if len(text) <= 80 else f"{text[:77]}..."
