"""The roll of a run of several processes: who takes part, who is alive, and why all of them end.

Process 0 keeps it: a server, to which every process (process 0 itself too, see `liveness.Member`)
holds one connection for as long as the run lasts. Messages are lines of JSON.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import socket
import time
from collections.abc import Coroutine
from typing import Any

from lip_jax.errors import UsageError

log = logging.getLogger("lip_jax")

EXIT_ERROR = 1  # an error, of this process or of another one
EXIT_LOST = 75  # EX_TEMPFAIL: other processes were lost or did not come; the same command goes on

GREETING = "lip_jax_roll"
VERSION = 1
_ANSWER_SECONDS = 10  # for the first line of either side
FAREWELL_SECONDS = 3  # for the last one
REMINDER_SECONDS = 10  # between two lines of the log on who is waited for
MAX_LINE = 1 << 20  # bytes that a message can have
LOOPBACK = "127.0.0.1"


class MissingProcessError(UsageError):
  """Not all processes of the run came; says which, and what to do."""

  status = 75


@dataclasses.dataclass(frozen=True)
class End:
  """Why a run of several processes ends early."""

  process: int  # whose fault it is
  host: str
  lost: bool  # False: it ended with an error of its own
  reason: str

  def __str__(self) -> str:
    name = f"process {self.process} ({self.host})"
    if not self.lost:
      return f"{name} ended with an error: {self.reason}"
    return (
      f"{name} was lost: {self.reason}. The other processes end too: no step can be made without "
      "it. The same command, on every host, goes on from the last checkpoint"
    )

  @property
  def status(self) -> int:
    return EXIT_LOST if self.lost else EXIT_ERROR


class Silence:
  """Measures how long another process was silent, while this one could have heard it."""

  def __init__(self, interval: float):
    self._interval = interval
    self._last = self._tick = time.monotonic()

  def heard(self) -> None:
    self._last = time.monotonic()

  def seconds(self) -> float:
    """To be called every `interval`: what goes beyond that, this process itself was frozen for."""
    now = time.monotonic()
    late = now - self._tick - 2 * self._interval
    if late > 0:
      self._last = min(now, self._last + late)
    self._tick = now
    return now - self._last


def interval_of(timeout: float) -> float:
  """Seconds between two signs of life."""
  return min(5.0, timeout / 5)


def send(writer: asyncio.StreamWriter, **message: Any) -> None:
  """Sends a message, if there is still somebody to read it."""
  if not writer.is_closing():
    writer.write(json.dumps(message).encode() + b"\n")


async def receive(reader: asyncio.StreamReader) -> dict[str, Any] | None:
  """The next message; None: the connection is closed."""
  try:
    line = await reader.readline()
  except (OSError, ValueError):  # reset, or a line beyond all limits
    return None
  try:
    message = json.loads(line)
  except ValueError:
    return {} if line else None
  return message if isinstance(message, dict) else {}


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
  """Copies bytes until one side closes."""
  with contextlib.suppress(OSError):
    while data := await reader.read(1 << 16):
      writer.write(data)
      await writer.drain()


def describe(processes: list[int]) -> str:
  """The numbers in words: "process 2", "processes 2, 5-7"."""
  runs: list[list[int]] = []
  for process in sorted(processes):
    if runs and process == runs[-1][1] + 1:
      runs[-1][1] = process
    else:
      runs.append([process, process])
  words = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
  return f"process{'es' if len(processes) > 1 else ''} {words}"


class Roll:
  """The server of process 0.

  Args:
    count: processes of the run.
    timeout: seconds of silence after which a process counts as lost.
    start_timeout: the same, until the process says that it is `ready`. What loads the devices'
      runtime may hold up all of a process for longer.

  Attributes:
    jax_port: where JAX's service is to listen, on the loopback interface.
  """

  def __init__(self, count: int, timeout: float, start_timeout: float):
    self._count = count
    self._timeout = timeout
    self._start_timeout = start_timeout
    with socket.socket() as probe:
      probe.bind((LOOPBACK, 0))
      self.jax_port: int = probe.getsockname()[1]
    self._seats: dict[int, _Seat] = {}
    self._left: set[int] = set()  # who came, and did not wait for the others
    self._refused: list[str] = []
    self._complete = False  # all have come
    self._over = False  # nobody who leaves now is missed
    self._tasks: set[asyncio.Task[None]] = set()

  async def open(self, host: str, port: int, seconds: float) -> None:
    """Listens; waits while another program, perhaps the end of the run before, has the port."""
    local = host in ("localhost", "::1") or host.startswith("127.")
    deadline = time.monotonic() + seconds
    told = False
    while True:
      try:
        self._server = await asyncio.start_server(
          self._welcome, LOOPBACK if local else None, port, backlog=1024
        )
        break
      except OSError as error:
        if time.monotonic() > deadline:
          raise UsageError(
            f"process 0 cannot listen on port {port} ({error.strerror or error}): another program "
            "uses it, perhaps an earlier run or a second process 0; end that, or give another "
            "port in --coordinator_address"
          ) from None
        if not told:
          log.info("port %d is in use; waiting up to %g s for it", port, seconds)
          told = True
        await asyncio.sleep(0.5)
    self._keep(self._watch())

  def _keep(self, work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.get_running_loop().create_task(work)
    self._tasks.add(task)  # the loop itself would let go of it
    task.add_done_callback(self._tasks.discard)

  def shortfall(self) -> str:
    """Who has come and who has not."""
    missing = [k for k in range(self._count) if k not in self._seats and k not in self._left]
    which = {"missing": missing, "gone again": sorted(self._left)}
    details = "; ".join(f"{what}: {describe(them)}" for what, them in which.items() if them)
    refused = "".join(f"; refused: {r}" for r in self._refused)
    return (
      f"{self._count - len(missing)} of {self._count} processes have connected ({details}){refused}"
    )

  async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
      hello = await asyncio.wait_for(receive(reader), _ANSWER_SECONDS)
      if hello and hello.get(GREETING) == VERSION:
        await (self._tunnel if hello.get("tunnel") else self._seat)(reader, writer, hello)
      elif hello and GREETING in hello:
        send(writer, refused="it runs another version of lip_jax; install the same on every host")
        await writer.drain()
    except (OSError, TimeoutError):
      pass
    finally:
      writer.close()

  async def _tunnel(
    self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: dict[str, Any]
  ) -> None:
    """Connects the other side with JAX's service, as soon as that is there."""
    for _attempt in range(200):
      try:
        to_jax = await asyncio.open_connection(LOOPBACK, self.jax_port)
        break
      except OSError:
        await asyncio.sleep(0.05)
    else:
      return
    both = [asyncio.create_task(pump(reader, to_jax[1]))]
    both.append(asyncio.create_task(pump(to_jax[0], writer)))
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    for task in both:
      task.cancel()
    to_jax[1].close()

  async def _seat(
    self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hello: dict[str, Any]
  ) -> None:
    process, host = hello["process"], hello["host"]
    if self._complete:
      send(writer, busy=f"a run of {self._count} processes is going on there already")
      await writer.drain()
      return
    refusal = self._refusal(process, hello["count"])
    if refusal:
      log.warning("process %d on %s was refused: %s", process, host, refusal)
      self._refused.append(f"process {process} on {host}, as {refusal}")
      send(writer, refused=refusal)
      await writer.drain()
      return
    seat = _Seat(host, writer, Silence(interval_of(self._timeout)))
    self._seats[process] = seat
    self._left.discard(process)
    if len(self._seats) == self._count:
      self._complete = True
      for each in self._seats.values():
        each.silence.heard()  # until now nothing was expected
      self._broadcast(go=[self._seats[k].host for k in range(self._count)])
    else:
      send(writer, waiting=self.shortfall())
    while (message := await receive(reader)) is not None:
      seat.silence.heard()
      if "failed" in message:
        self._end(process, lost=False, reason=str(message["failed"]))
      if "gave_up" in message:
        self._end(0, lost=True, reason=str(message["gave_up"]))
      if "ready" in message:
        seat.ready = True
      if "finished" in message:
        seat.finished = True
        if all(s.finished for s in self._seats.values()):
          self._over = True
          self._broadcast(over=True)
    if not self._complete and process:  # process 0 is about to give up for all
      del self._seats[process]
      self._left.add(process)
      log.warning("process %d on %s has gone again", process, host)
    seat.gone.set()
    if self._complete:
      self._end(process, lost=True, reason="its connection closed (killed, or crashed)")

  def _refusal(self, process: int, count: int) -> str | None:
    """Why a process cannot take part, None if it can."""
    if count != self._count:
      return (
        f"it was started with --num_processes={count}, but process 0 with "
        f"--num_processes={self._count}; give the same on every host"
      )
    if process in self._seats:
      return (
        f"a process {process} has connected already, from {self._seats[process].host}; give each "
        "process its own --process_id"
      )
    return None

  def _broadcast(self, **message: Any) -> None:
    for seat in self._seats.values():
      send(seat.writer, **message)

  async def _watch(self) -> None:
    interval = interval_of(self._timeout)
    reminded = time.monotonic()
    while True:
      await asyncio.sleep(interval if self._complete else min(1, interval))
      if self._complete:
        self._broadcast(alive=True)
        self._check()
        continue
      self._broadcast(waiting=self.shortfall())
      if time.monotonic() - reminded > REMINDER_SECONDS:
        log.info("waiting for the other processes: %s", self.shortfall())
        reminded = time.monotonic()

  def _check(self) -> None:
    for process, seat in self._seats.items():
      silent = seat.silence.seconds()
      if silent > (self._timeout if seat.ready else max(self._timeout, self._start_timeout)):
        reason = f"no sign of life for {silent:.0f} s (frozen, or no longer reachable)"
        self._end(process, lost=True, reason=reason)

  def _end(self, process: int, *, lost: bool, reason: str) -> None:
    if not self._over:
      self._over = True
      seat = self._seats[process]
      if lost:
        seat.gone.set()  # no use to wait for it
      end = End(process, seat.host, lost, reason)
      self._broadcast(end=dataclasses.asdict(end))

  async def give_up(self, reason: str) -> None:
    """Tells those who have come that the others did not, and closes."""
    self._complete = self._over = True
    self._broadcast(refused=reason, missing=True)
    await self.farewell()

  async def farewell(self) -> None:
    """Listens no longer, and sees the other processes off."""
    self.close()
    await self.see_off()

  def close(self) -> None:
    """Listens no longer."""
    self._server.close()

  async def see_off(self) -> None:
    """Gives the other processes time to read the last message: a reset connection loses it."""
    waiting = [s.gone.wait() for k, s in self._seats.items() if k != 0]
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(asyncio.gather(*waiting), FAREWELL_SECONDS)


@dataclasses.dataclass
class _Seat:
  host: str
  writer: asyncio.StreamWriter
  silence: Silence
  ready: bool = False
  finished: bool = False
  gone: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
