"""Keeping libraries from telling, in pages, what is then said in one line."""

import contextlib
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
  """Context in which loggers, and errors that nobody can catch, print nothing.

  Args:
    names: of the loggers.
  """
  loggers = [logging.getLogger(name) for name in names]
  levels = [logger.level for logger in loggers]
  hook = sys.unraisablehook
  for logger in loggers:
    logger.setLevel(logging.CRITICAL + 1)
  sys.unraisablehook = lambda _: None
  try:
    yield
  finally:
    sys.unraisablehook = hook
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)
