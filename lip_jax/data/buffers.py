"""Memory for batches that is used again, and never while somebody has it."""

from collections.abc import Callable
from typing import Any

import numpy as np


class Buffers:
  """Arrays of one shape, used again when nobody has any view of them any more.

  New memory costs a page fault for every 4096 bytes, which on some machines is a tenth of all time.
  """

  def __init__(self, shape: tuple[int, ...], dtype: Any, most: int):
    """`most`: unused ones that are kept."""
    self._shape = shape
    self._dtype = dtype
    self._most = most
    self._free: list[np.ndarray] = []

  def take(self) -> np.ndarray:
    """An array of any content. It is given back when the last view of it is gone."""
    try:
      memory = self._free.pop()
    except IndexError:
      memory = np.empty(self._shape, self._dtype)
    return np.asarray(_Lent(memory, self._give_back))

  def _give_back(self, memory: np.ndarray) -> None:
    if len(self._free) < self._most:
      self._free.append(memory)


class _Lent:
  """What NumPy's views of a buffer keep alive."""

  def __init__(self, memory: np.ndarray, give_back: Callable[[np.ndarray], None]):
    self.__array_interface__ = memory.__array_interface__
    self._memory = memory
    self._give_back = give_back

  def __del__(self) -> None:
    self._give_back(self._memory)
