"""What becomes of the other processes of a run, as jax's coordination service writes it.

The service knows who does not come, who is lost (heartbeats) and who ends with an error (its
shutdown barrier). No public function hands that on: its C++ code writes a paragraph to stderr and
aborts the process. Here a thread reads that paragraph, says it in one line and ends the process
with the status that the recipes restart by. All else that is written to stderr passes through.
"""

import contextlib
import ctypes
import faulthandler
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from typing import BinaryIO, Self

log = logging.getLogger("lip_jax")

EXIT_ERROR = 1  # an error, of this process or of another one
EXIT_LOST = 75  # EX_TEMPFAIL: other processes were lost or did not come; the same command goes on

# The service tells who has come only at this level, which has to be set before jax is loaded.
ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "coordination_service=3"}

_REMINDER_SECONDS = 10  # between two lines of the log on who is waited for
_RECORD_SECONDS = 0.2  # in which all lines of a record arrive
_PARAGRAPH_SECONDS = 1  # in which the last one arrives, on the other processes, too
_RECORD = re.compile(r"([IWEF])\d{4} [\d:.]+ +\d+ ([\w.]+):\d+\] ")
_SERVICE = re.compile(r"coordination_service|grpc_|preemption_sync|^(service\.cc|client\.h)$")
_FATAL = "distributed service detected fatal errors"
_CAME = re.compile(r"Task (\d+) invoked BarrierAsync\(\[Init\]")
_SILENT = "no sign of life for {seconds:g} s (killed, frozen, or no longer reachable)"
_LOSSES = (  # the group is the number of the process; without one it is process 0
  (r"stopped sending heartbeats\):\s+(\d+)", _SILENT),
  (r"Task (\d+) heartbeat timeout", _SILENT),
  (r"(\d+) unexpectedly tried to connect", "it, or another one of that number, came a second time"),
  (r"PollForError()|ShutdownTask()", "its connection closed (killed, or crashed)"),
  (r"Service/Heartbeat()", _SILENT),
)


class ServiceLog:
  """Reads stderr's file descriptor while the processes of a run are connected.

  Use it as a context manager, around `jax.distributed.initialize` and all that follows.

  Args:
    address: HOST:PORT of process 0, if it is known before jax has looked for it.
    liveness_timeout: seconds of silence after which a process counts as lost.

  Attributes:
    hosts: host names by process index, once they are known.
    failing: exit status of this process, if it is ending with an error of its own.
  """

  def __init__(
    self, address: str | None, count: int | None, connect_timeout: float, liveness_timeout: float
  ):
    self._address, self._count = address, count
    self._connect_timeout, self._liveness_timeout = connect_timeout, liveness_timeout
    self.hosts: list[str] = []
    self.failing: int | None = None
    self._came: set[int] = set()  # processes; known on process 0 only
    self._paragraph = ""
    self._open = contextlib.ExitStack()

  def __enter__(self) -> Self:
    self._stderr = os.dup(2)
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)
    reader = threading.Thread(target=self._read, args=(open(source, "rb"),), daemon=True)
    reader.start()
    self._open.callback(reader.join, 1)  # at most: a child of this process may still write
    self._open.callback(os.dup2, self._stderr, 2)
    # Python's own writing does not take the detour: a terminal stays one.
    direct = open(self._stderr, "w", buffering=1, errors="backslashreplace", closefd=False)
    self._open.enter_context(contextlib.redirect_stderr(direct))
    faulthandler.enable(direct)  # what crashes leaves the thread no time to read
    self._open.callback(faulthandler.disable)
    # An abort first sleeps for 6 s, the number of its signal: the thread reads, and ends sooner.
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    before = libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    self._open.callback(libc.signal, signal.SIGABRT, ctypes.c_void_p(before))
    threading.Thread(target=self._remind, daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    if self.failing is None:  # else it stays to the very end: the others have to be told
      self._open.close()

  def _remind(self) -> None:
    """Says on process 0, while others are waited for, who has not come."""
    while not self.hosts:
      time.sleep(_REMINDER_SECONDS)
      if self._came and not self.hosts:
        log.info("waiting for the other processes: %s", self._shortfall())

  def _read(self, source: BinaryIO) -> None:
    ours_until = 0.0  # lines below a record of the service are part of it
    for raw in source:
      line = raw.decode(errors="replace")
      record = _RECORD.match(line)
      if self._paragraph:
        self._paragraph += "" if record else line
        continue
      if record is None:
        told = time.monotonic() > ours_until
      else:
        ours = _SERVICE.search(record[2]) is not None
        ours_until = time.monotonic() + _RECORD_SECONDS if ours else 0
        told = not ours and record[1] != "I"
        if came := _CAME.search(line):
          self._came.add(int(came[1]))
        if ours and _FATAL in line:
          self._paragraph = line
          threading.Timer(_PARAGRAPH_SECONDS, self._end).start()
      if told:
        os.write(self._stderr, raw)

  def _end(self) -> None:
    """Ends the process, whatever its threads are at."""
    words, status = self._verdict(self._paragraph)
    with contextlib.suppress(Exception):
      sys.stdout.flush()
      if self.failing is None or status == EXIT_LOST:  # an error of its own is told already
        os.write(self._stderr, f"error: {words}\n".encode())
      else:
        status = self.failing
    os._exit(status)

  def _verdict(self, text: str) -> tuple[str, int]:
    """One line for a paragraph of the service's, and the exit status."""
    if "RegisterTask" in text:
      return self._refusal(text)
    if first := re.search(r"first task at the barrier: (\d+)", text):
      return f"{self._name(int(first[1]))} ended with an error, which it says itself", EXIT_ERROR
    for pattern, reason in _LOSSES:
      if found := re.search(pattern, text):
        name = self._name(int(found[1] or 0))
        return (
          f"{name} was lost: {reason.format(seconds=self._liveness_timeout)}. The other processes "
          "end too: no step can be made without it. The same command, on every host, goes on from "
          "the last checkpoint",
          EXIT_LOST,
        )
    return f"another process was lost, or jax's service failed: {text.strip()}", EXIT_LOST

  def _name(self, process: int) -> str:
    return f"process {process}" + (f" ({self.hosts[process]})" if self.hosts else "")

  def _refusal(self, text: str) -> tuple[str, int]:
    """Why the run has not started."""
    if "newer incarnation" in text:
      return "another process has the same --process_id; give each its own", EXIT_ERROR
    if "Unexpected task" in text:
      words = f"process 0 was started with fewer processes than --num_processes={self._count}"
      return f"{words}; give the same on every host", EXIT_ERROR
    after = f"after {self._connect_timeout:g} s"
    if self._came:
      return f"{self._shortfall()} {after}; start the same command on every host", EXIT_LOST
    host, _, port = (self._address or "").rpartition(":")
    try:
      if host:
        socket.create_connection((host.strip("[]"), int(port)), 5).close()
    except OSError as error:
      return (
        f"process 0 does not answer at {self._address} {after} ({error.strerror or error}): it "
        "says why it gave up; or is it running on that host, with the same --coordinator_address, "
        f"and is port {port} open to {socket.gethostname()}?",
        EXIT_LOST,
      )
    there = f", if it is what answers at {self._address}" if host else ""
    words = f"not all processes have come {after}: process 0 says which{there}"
    return f"{words}; start the same command on every host", EXIT_LOST

  def _shortfall(self) -> str:
    """Who has come and who has not."""
    if self._count is None:
      return f"only {_numbers(self._came)} connected"
    missing = _numbers(set(range(self._count)) - self._came)
    return f"{len(self._came)} of {self._count} processes have connected (missing: {missing})"


def _numbers(processes: set[int]) -> str:
  words = ", ".join(map(str, sorted(processes)))
  return f"process{'es' if len(processes) > 1 else ''} {words}"
