"""Runs of several processes on the loopback interface: start, loss of one, errors, end."""

import concurrent.futures
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fixture_ports import free_port

SCRIPT = Path(__file__).with_name("run_on_hosts.py")
LIVENESS_TIMEOUT = 4  # seconds


class Run:
  """Processes of one run, started with the flags of each."""

  def __init__(self, folder, flags, *, numbers=None, counts=None, address=None):
    folder.mkdir()
    address = address or f"127.0.0.1:{free_port()}"
    numbers = numbers or range(len(flags))
    counts = counts or [len(flags)] * len(flags)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    # Which gRPC would take even for this machine's own services.
    environment |= {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
    self.outputs, self.errors, self.processes = [], [], []
    for k, (number, count) in enumerate(zip(numbers, counts, strict=True)):
      self.outputs.append(folder / f"stdout{k}")
      self.errors.append(folder / f"stderr{k}")
      with self.outputs[k].open("w") as out, self.errors[k].open("w") as err:
        self.processes.append(
          subprocess.Popen(
            [sys.executable, SCRIPT, address, str(number), str(count), *flags[k]],
            env=environment,
            stdout=out,
            stderr=err,
          )
        )

  def send(self, k, number):
    """Sends a signal once all processes have made some steps; the time of that."""
    deadline = time.monotonic() + 90
    while not all("step 5\n" in path.read_text() for path in self.outputs):
      assert all(p.poll() is None for p in self.processes), self.all_errors()
      assert time.monotonic() < deadline, self.all_errors()
      time.sleep(0.05)
    self.processes[k].send_signal(number)
    return time.monotonic()

  def end(self, *which):
    """Exit status and last line of stderr of each of `which` (default: all)."""
    results = []
    for k in which or range(len(self.processes)):
      status = self.processes[k].wait(timeout=90)
      results.append((status, self.errors[k].read_text().strip().rpartition("\n")[2]))
    return results

  def all_errors(self):
    return [path.read_text() for path in self.errors]

  def close(self):
    for process in self.processes:
      with contextlib.suppress(ProcessLookupError):
        process.kill()
      process.wait()


def killed(folder, victim):
  run = Run(folder, [[]] * 2)
  with contextlib.closing(run):
    begin = run.send(victim, signal.SIGKILL)
    results = run.end(1 - victim)
    return results, time.monotonic() - begin


def frozen(folder, victim, count):
  run = Run(folder, [[f"--liveness-timeout={LIVENESS_TIMEOUT}"]] * count)
  with contextlib.closing(run):
    begin = run.send(victim, signal.SIGSTOP)
    results = run.end(*(k for k in range(count) if k != victim))
    seconds = time.monotonic() - begin
    run.processes[victim].send_signal(signal.SIGCONT)
    return results, seconds, run.end(victim)[0]


def ended(folder, *flags):
  run = Run(folder, flags)
  with contextlib.closing(run):
    return run.end(), [path.read_text() for path in run.outputs], run.all_errors()


def not_all(folder):
  flags = [["--connect-timeout=12"]] * 4
  run = Run(folder, flags, numbers=[0, 1, 1, 2], counts=[3, 3, 3, 4])
  with contextlib.closing(run):
    return run.end()


def nobody(folder):
  run = Run(folder, [["--connect-timeout=1"]], numbers=[1], counts=[2])
  with contextlib.closing(run):
    return run.end()


def stranger(folder):
  """Another service listens at the address."""
  with socket.create_server(("127.0.0.1", 0)) as server:

    def answer():
      connection, _ = server.accept()
      connection.sendall(b"SSH-2.0-server\r\n")
      connection.close()

    threading.Thread(target=answer, daemon=True).start()
    port = server.getsockname()[1]
    flags = [["--connect-timeout=30"], ["--connect-timeout=1"]]
    run = Run(folder, flags, numbers=[1, 0], counts=[2, 2], address=f"127.0.0.1:{port}")
    with contextlib.closing(run):
      return run.end()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  """All runs of this file, some at a time: most of them wait most of the time."""
  folder = tmp_path_factory.mktemp("runs")
  tasks = {
    "frozen 1": (frozen, 1, 3),
    "frozen 0": (frozen, 0, 2),
    "not all": (not_all,),
    "killed 1": (killed, 1),
    "killed 0": (killed, 0),
    "error": (ended, [], ["--usage-error-at=3"]),
    "bug": (ended, ["--bug-at=3"], []),
    "end": (ended, ["--steps=4", "--slow-end=6"], ["--steps=4"]),
    "unequal": (ended, ["--devices=2"], ["--devices=1"]),
    "nobody": (nobody,),
    "stranger": (stranger,),
  }
  with concurrent.futures.ThreadPoolExecutor(5) as pool:
    return {
      name: pool.submit(task, folder / name, *arguments)
      for name, (task, *arguments) in tasks.items()
    }


def lost(process):
  return rf"error: process {process} \({re.escape(socket.gethostname())}\) was lost: "


@pytest.mark.parametrize("victim", [0, 1])
def test_loss_of_a_process_that_is_killed(results, victim):
  [(status, message)], seconds = results[f"killed {victim}"].result()
  assert status == 75, message
  assert re.match(lost(victim) + "its connection closed.*The same command", message)
  assert seconds < 10


@pytest.mark.parametrize("victim", [0, 1])
def test_loss_of_a_process_that_freezes(results, victim):
  others, seconds, (thawed_status, thawed) = results[f"frozen {victim}"].result()
  for status, message in others:
    assert status == 75, message
    assert re.match(lost(victim) + "no sign of life for .*The same command", message)
  assert seconds < 3 * LIVENESS_TIMEOUT
  assert thawed_status == 75
  assert f"error: the others gave up this process ({victim}, " in thawed


def test_an_error_of_one_process_is_told_by_all(results):
  ends, _, _ = results["error"].result()
  error = "--config.model.pool=lipp is none of: average, max"
  (status, message), own = ends
  assert own == (1, f"error: {error}")
  assert status == 1
  assert message == f"error: process 1 ({socket.gethostname()}) ended with an error: {error}"
  ends, _, errors = results["bug"].result()
  assert [status for status, _ in ends] == [1, 1]
  assert "Traceback" in errors[0]
  assert (
    ends[1][1] == f"error: process 0 ({socket.gethostname()}) ended with an error: KeyError: "
    "'a bug'"
  )


def test_processes_with_different_numbers_of_devices(results):
  ends, _, _ = results["unequal"].result()
  for status, message in ends:
    assert status == 1
    assert "different numbers of devices: process 0 has 2, process 1 has 1. Each" in message


def test_processes_that_end_at_different_times(results):
  ends, outputs, errors = results["end"].result()
  assert [status for status, _ in ends] == [0, 0], errors
  assert all(output.endswith("step 3\nended\n") for output in outputs)
  assert not any(errors)


def test_processes_that_do_not_come(results):
  (first, second, double, other) = results["not all"].result()
  assert double[0] == other[0] == 1 or second[0] == 1  # of two with one id the later is refused
  for status, message in (first, min(second, double, key=lambda end: -end[0])):
    assert status == 75, message
    assert message.startswith(
      "error: 2 of 3 processes have connected (missing: process 2); refused"
    )
    assert "after 12 s; start the same command on every host" in message
  refusals = {message for status, message in (second, double, other) if status == 1}
  assert len(refusals) == 2
  assert any("a process 1 has connected already" in message for message in refusals)
  assert any("--num_processes=4, but process 0 with --num_processes=3" in m for m in refusals)


def test_a_coordinator_that_is_not_there(results):
  [(status, message)] = results["nobody"].result()
  assert status == 75
  assert re.match(
    r"error: process 0 does not answer at .* after 1 s \(.*\); is it running", message
  )
  (member_status, member), (first_status, first) = results["stranger"].result()
  assert member_status == first_status == 1
  assert "is not process 0 of this run; check the port" in member
  assert "another program uses it" in first
