"""Ending a loop cleanly when the process is asked to stop."""

import logging
import signal
import threading
from typing import Any, Self

log = logging.getLogger("lip_jax")


class StopOnSignal:
  """Turns the first SIGTERM or SIGINT into `requested`; a second one acts as usual."""

  def __init__(self):
    self.requested = False
    self._before: dict[int, Any] = {}

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():  # signals can be set nowhere else
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._handle)
    return self

  def _handle(self, number: int, _frame: Any) -> None:
    self.requested = True
    self._restore()
    log.warning("%s: saving a checkpoint and stopping", signal.Signals(number).name)

  def _restore(self) -> None:
    while self._before:
      signal.signal(*self._before.popitem())

  def __exit__(self, *_) -> None:
    self._restore()
