"""Errors that are the user's to mend."""


class UsageError(ValueError):
  """The user's input is at fault.

  The message says what was given, what was expected and what to do. Commands print it without a
  traceback.
  """
