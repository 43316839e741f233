"""Errors that are the user's to mend."""


class UsageError(ValueError):
  """The user's input is at fault, or what became of it.

  The message says what was given, what was expected and what to do. Commands print it without a
  traceback, and end with `status`.
  """

  status = 1
