"""What stands in the way of using a checkpoint, and whether it is the checkpoint's fault."""

from lip_jax.errors import UsageError

# What TensorStore, which raises ValueErrors, says when something fails that may pass.
_PASSING = (
  "PERMISSION_DENIED",
  "UNAUTHENTICATED",
  "UNAVAILABLE",
  "DEADLINE_EXCEEDED",
  "ABORTED",
  "RESOURCE_EXHAUSTED",
  "Permission denied",
  "Input/output error",
)


class DamagedError(UsageError):
  """A checkpoint, or a part of it, is not what was saved."""

  def __init__(self, fault: str, message: str | None = None):
    super().__init__(message or fault)
    self.fault = fault


def reason(error: BaseException) -> str:
  """One line of what is behind an error."""
  while error.__cause__ is not None:
    error = error.__cause__
  if isinstance(error, UsageError):
    return str(error)
  lines = str(error).splitlines()
  return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def is_damage(error: Exception) -> bool:
  """Whether an error of loading is the checkpoint's fault.

  It is not where permissions, the network, the disk or memory have failed: that may pass, and a
  checkpoint that cannot be read today is not to be given up.
  """
  if isinstance(error, UsageError):
    return isinstance(error, DamagedError)
  missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
  nonsense = isinstance(
    error, ValueError | TypeError | AttributeError | LookupError | OverflowError
  )
  return missing or (nonsense and not any(text in str(error) for text in _PASSING))
