"""Who takes part in a run of several processes, and how all of them end when one does.

Process 0 keeps a roll: a server at the coordinator's address, to which every process (process 0
itself too) holds one connection for as long as the run lasts. Over it they find each other, show
that they are alive, say what went wrong, and agree on the end.

  - A process that was killed is known by its connection, which closes, within milliseconds. One
    that froze, or whose machine or network went away, is known by its silence, within `timeout`.
  - All others end with a message that names it, whatever their main thread waits for.

JAX's own service has no such messages: when the start times out, or another process goes away, it
aborts the process from C++. It runs as usual behind the roll, on process 0's loopback interface,
and the others reach it through a second connection to the same port. At their end that one stays
open when process 0 goes away (`Member.open_jax_address`): the abort would be faster than any
message.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Coroutine
from typing import Any, NoReturn

from lip_jax.distributed.roll import (
  FAREWELL_SECONDS,
  GREETING,
  LOOPBACK,
  MAX_LINE,
  REMINDER_SECONDS,
  VERSION,
  End,
  MissingProcessError,
  Roll,
  Silence,
  interval_of,
  pump,
  receive,
  send,
)
from lip_jax.errors import UsageError

log = logging.getLogger("lip_jax")


def run_in_thread() -> asyncio.AbstractEventLoop:
  """An event loop in a thread of its own, which does not keep the process from ending."""
  loop = asyncio.new_event_loop()

  def run() -> None:
    loop.run_forever()
    loop.close()

  threading.Thread(target=run, name="lip-liveness", daemon=True).start()
  return loop


def end_thread(loop: asyncio.AbstractEventLoop) -> None:
  """Ends what `run_in_thread` has started, with all that runs in it."""

  async def cancel() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

  asyncio.run_coroutine_threadsafe(cancel(), loop).result()
  loop.call_soon_threadsafe(loop.stop)


class Member:
  """This process's place on the roll.

  Args:
    process: index of this process.
    count: of all of them.
    address: HOST:PORT of the roll.
    timeout: seconds of silence after which process 0 counts as lost.
    start_timeout: the same, until this process is `ready`.
    roll: on process 0, the roll itself.
  """

  def __init__(
    self,
    process: int,
    count: int,
    address: str,
    timeout: float,
    start_timeout: float,
    loop: asyncio.AbstractEventLoop,
    roll: Roll | None = None,
  ):
    self._process = process
    self._count = count
    self._address = address
    self._timeout = timeout
    self._limit = max(timeout, start_timeout)
    self._loop = loop
    self._roll = roll
    self._interval = interval_of(timeout)
    self._over = threading.Event()
    self._undecided = threading.Event()  # the main thread waits to learn what became of the others
    self.failing = False  # this process ends by itself, whatever becomes of the others

  def _call(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
    return asyncio.run_coroutine_threadsafe(work, self._loop)

  def connect(self, seconds: float) -> list[str]:
    """Waits until all processes have come.

    Returns:
      Their host names, by process index.

    Raises:
      UsageError: process 0 refuses this one, or something else answers.
      MissingProcessError: not all came in time.
    """
    self.hosts: list[str] = self._call(self._connect(seconds)).result()
    self._listening = self._call(self._listen())
    self._beating = self._call(self._beat())
    return self.hosts

  async def _connect(self, seconds: float) -> list[str]:
    host, port = split_address(self._address)
    deadline = time.monotonic() + seconds
    reminder = time.monotonic() + REMINDER_SECONDS
    reason = ""
    while (left := deadline - time.monotonic()) > 0:
      if time.monotonic() > reminder:
        log.info("waiting for process 0 at %s: %s", self._address, reason)
        reminder += REMINDER_SECONDS
      try:
        connection = await asyncio.wait_for(
          asyncio.open_connection(host, port, limit=MAX_LINE), left
        )
      except TimeoutError:
        reason = reason or "no answer at all"
        continue
      except OSError as error:
        reason = error.strerror or str(error)
        # Asyncio's own words repeat the address; the numbers of gaierror are not the system's.
        if error.errno and not isinstance(error, socket.gaierror):
          reason = os.strerror(error.errno)
      else:
        hosts: list[str] = []
        try:
          hosts, reason = await self._sign_in(*connection, deadline, seconds)
        finally:
          if not hosts:
            connection[1].close()
        if hosts:
          return hosts
      await asyncio.sleep(min(0.5, left))
    raise MissingProcessError(
      f"process 0 does not answer at {self._address} after {seconds:g} s ({reason}); is it "
      f"running on that host, with the same --coordinator_address, and is port {port} open to "
      f"{socket.gethostname()}?"
    )

  async def _sign_in(
    self,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    deadline: float,
    seconds: float,
  ) -> tuple[list[str], str]:
    """Host names of all processes; or none, and why another attempt makes sense."""
    hello = {GREETING: VERSION, "process": self._process, "count": self._count}
    send(writer, **hello, host=socket.gethostname())
    answered = False
    waiting = "it accepts the connection and says nothing"
    while True:
      try:
        message = await asyncio.wait_for(receive(reader), max(0.01, deadline - time.monotonic()))
      except TimeoutError:
        if not answered:
          return [], waiting
        raise MissingProcessError(
          f"{waiting} after {seconds:g} s; start the same command on every host"
        ) from None
      if message is None:
        return [], "it closed the connection"
      known = ("go", "waiting", "busy", "refused")
      if not any(key in message for key in known):
        raise UsageError(
          f"what answers at {self._address} is not process 0 of this run; check the port in "
          "--coordinator_address"
        )
      answered = True
      if "go" in message:
        self._reader, self._writer = reader, writer
        return message["go"], ""
      if "busy" in message:
        return [], message["busy"]
      if "refused" in message:
        if message.get("missing"):
          raise MissingProcessError(message["refused"])
        raise UsageError(
          f"process 0 at {self._address} refuses process {self._process}: {message['refused']}"
        )
      waiting = message["waiting"]

  def open_jax_address(self) -> str:
    """Opens a port on the loopback interface that leads to JAX's service; its HOST:PORT."""
    if self._roll:
      return f"{LOOPBACK}:{self._roll.jax_port}"  # which the service itself opens
    return self._call(self._open_tunnel()).result()

  async def _open_tunnel(self) -> str:
    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
      with contextlib.suppress(OSError):
        outside = await asyncio.open_connection(*split_address(self._address))
        send(outside[1], **{GREETING: VERSION, "tunnel": True})
        back = asyncio.create_task(pump(outside[0], writer))
        await pump(reader, outside[1])
        while await reader.read(1 << 16):  # process 0 has gone; see the head of this file
          pass
        back.cancel()
        outside[1].close()
      writer.close()

    self._forwarding = await asyncio.start_server(forward, LOOPBACK, 0)
    return f"{LOOPBACK}:{self._forwarding.sockets[0].getsockname()[1]}"

  def ready(self) -> None:
    """From now on `timeout` holds."""
    self._limit = self._timeout
    self._say(ready=True)

  def _say(self, **message: Any) -> None:
    self._loop.call_soon_threadsafe(lambda: send(self._writer, **message))

  async def _listen(self) -> None:
    self._silence = Silence(self._interval)
    while (message := await receive(self._reader)) is not None:
      self._silence.heard()
      if "over" in message:
        self._writer.close()
        self._over.set()
        return
      if "end" in message:
        await self._end(End(**message["end"]))
    reason = "its connection closed (killed, or crashed)"
    await self._end(End(0, self.hosts[0], True, reason))

  async def _beat(self) -> None:
    while not self._over.is_set():
      await asyncio.sleep(self._interval)
      send(self._writer, alive=True)
      silent = self._silence.seconds()
      if silent > self._limit and not self._over.is_set():
        reason = f"no sign of life for {silent:.0f} s (frozen, or no longer reachable)"
        send(self._writer, gave_up=reason)  # should it be thawed
        await self._end(End(0, self.hosts[0], True, reason))

  async def _end(self, end: End) -> NoReturn:
    """Ends this process, whatever its threads are at."""
    mine = end.process == self._process
    if not mine and not end.lost:
      # The same error may be on its way here, from the mouth of the main thread.
      for _ in range(20):
        if self._undecided.is_set() or self.failing:
          break
        await asyncio.sleep(0.1)
    if self._roll:
      await self._roll.farewell()
    if self.failing:
      self._over.set()  # the main thread ends the process, with its own error
      await asyncio.Event().wait()
    words = str(end)
    if mine:
      words = f"the others gave up this process ({end.process}, {end.host}): {end.reason}"
    with contextlib.suppress(Exception):
      sys.stdout.flush()
      print(f"error: {words}", file=sys.stderr, flush=True)
    os._exit(end.status)

  def finish(self) -> None:
    """Waits until all processes have come this far."""
    self._say(finished=True)
    if not self._over.wait(REMINDER_SECONDS):
      log.info("process %d has finished, and waits for the others", self._process)
      self._over.wait()
    if self._roll:
      self._call(self._roll.see_off()).result()

  def close(self) -> None:
    """Leaves for good: gives the coordinator's port back, and ends the thread."""
    if self._roll:
      self._loop.call_soon_threadsafe(self._roll.close)
    end_thread(self._loop)

  def fail(self, reason: str) -> None:
    """Tells the others that this process ends with an error of its own."""
    self.failing = True
    self._say(failed=reason[: MAX_LINE // 16])
    self._over.wait(2 * FAREWELL_SECONDS)  # until it has reached them

  def wait_for_end(self, seconds: float) -> None:
    """Waits for news of the others: an error here may come from the loss of one of them."""
    self._undecided.set()
    self._over.wait(seconds)
    self._undecided.clear()


def split_address(address: str) -> tuple[str, int]:
  """Host and port; the host of an IPv6 address may stand in brackets."""
  host, _, port = address.rpartition(":")
  return host.strip("[]"), int(port)
