"""Says where a run hangs."""

import collections
import logging
import re
import statistics
import sys
import threading
import time
import traceback
from typing import Self

log = logging.getLogger("lip_jax")

_NUMBER = re.compile(r"\d+")
_FRAMES = 20  # of each thread, innermost


class Watchdog:
  """Reports, with the stacks of all threads, a phase of the work that takes far too long.

  "Far too long" is `seconds`, or `factor` times the median of that kind of phase if that is more;
  for the first of its kind, which may compile, `first_seconds`. It reports once, again whenever the
  time has doubled, and at the end of the phase. It never ends anything.

  Phases that differ in their numbers only ("step 120", "step 121") are of one kind. Use it as a
  context manager.

  Args:
    seconds: what every phase may take.
    first_seconds: what the first of a kind may take.
    factor: how much more than usual a phase may take.
  """

  def __init__(self, *, seconds: float = 300, first_seconds: float = 1800, factor: float = 20):
    self._seconds = seconds
    self._first_seconds = max(seconds, first_seconds)
    self._factor = factor
    self._taken: dict[str, collections.deque[float]] = collections.defaultdict(
      lambda: collections.deque(maxlen=101)
    )
    self._current: tuple[str, str, float] | None = None  # phase, kind, since
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="lip-watchdog", daemon=True)
    self._thread.start()

  def doing(self, phase: str | None) -> None:
    """What the calling thread does from now on; None: nothing that could hang."""
    now = time.monotonic()
    before = self._current
    self._current = (phase, _NUMBER.sub("#", phase), now) if phase else None
    if before:
      self._taken[before[1]].append(now - before[2])

  def close(self) -> None:
    self._closed.set()
    self._thread.join()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _watch(self) -> None:
    reported, again = None, 0.0  # the phase, and the seconds at which it is reported next
    while not self._closed.wait(min(5.0, self._seconds / 10)):
      current = self._current
      if reported and current is not reported:
        ended = current[2] if current else time.monotonic()
        log.info("%s has ended, after about %.1f s", reported[0], ended - reported[2])
        reported = None
      if current is None:
        continue
      phase, kind, since = current
      seconds = time.monotonic() - since
      limit, usual = self._limit(kind)
      if seconds > (again if reported else limit):
        log.warning("%s takes %.1f s so far (%s); it is at\n%s", phase, seconds, usual, _stacks())
        reported, again = current, 2 * seconds

  def _limit(self, kind: str) -> tuple[float, str]:
    taken = list(self._taken[kind]) if kind in self._taken else []
    if not taken:
      return self._first_seconds, "the first of its kind"
    usual = statistics.median(taken)
    return max(self._seconds, self._factor * usual), f"usually {usual:.2g} s"


def _stacks() -> str:
  """Python stacks of all threads but the calling one, the main thread first; equal ones once."""
  names = {thread.ident: thread.name for thread in threading.enumerate()}
  main = threading.main_thread().ident
  threads: dict[str, list[str]] = {}
  frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
  for ident, frame in frames:
    if ident != threading.get_ident():
      stack = "".join(traceback.format_stack(frame)[-_FRAMES:])
      threads.setdefault(stack, []).append(names.get(ident, f"thread {ident}"))
  return "\n".join(f"{', '.join(names)}:\n{stack}" for stack, names in threads.items())
