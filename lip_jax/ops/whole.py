"""Operations that other systems have as a whole, recognizable in a program on its way there.

The program of a non-maximum suppression is a loop over tiles that nothing tells from another
loop. Inside of `kept`, such operations are calls of their own in the program, and their constants
are known.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax


class Operation(NamedTuple):
  """What a call in a program does."""

  kind: str
  constants: dict[str, Any]


_kept: contextvars.ContextVar[dict[str, Operation] | None] = contextvars.ContextVar(
  "whole_operations", default=None
)


@contextlib.contextmanager
def kept() -> Iterator[dict[str, Operation]]:
  """Gives the operations of the programs that are traced inside, by the names of their calls."""
  operations: dict[str, Operation] = {}
  token = _kept.set(operations)
  try:
    yield operations
  finally:
    _kept.reset(token)


def call(kind: str, function: Callable[..., Any], *arrays: Any, **constants: Any) -> Any:
  """`function(*arrays)`, of which `kind` and `constants` say all."""
  operations = _kept.get()
  if operations is None:
    return function(*arrays)

  def operation(*arrays: Any) -> Any:
    return function(*arrays)

  operation.__name__ = f"{kind}_{len(operations)}"
  operations[operation.__name__] = Operation(kind, constants)
  return jax.jit(operation)(*arrays)
