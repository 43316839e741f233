"""Runs of several processes on the loopback interface: start, loss of one, errors, end."""

import concurrent.futures
import contextlib
import http.server
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

from lip_jax.distributed import service_log

SCRIPT = Path(__file__).with_name("run_on_hosts.py")
QUICK = service_log.ENVIRONMENT  # without it, processes are started twice
LIVENESS_TIMEOUT = 4  # seconds
LATER = 20  # seconds, on a machine that is busy with other tests


class Run:
  """Processes of one run.

  Args:
    flags: of each process.
    numbers, counts, addresses: other flags than those of a proper run.
    cluster: function of a process's number to variables that stand for such flags.
  """

  def __init__(self, folder, flags, *, numbers=None, counts=None, addresses=None, cluster=None):
    folder.mkdir()
    addresses = addresses or [f"127.0.0.1:{free_port()}"] * len(flags)
    numbers = numbers or range(len(flags))
    counts = counts or [len(flags)] * len(flags)
    environment = {k: v for k, v in os.environ.items() if k not in QUICK}
    environment |= {"JAX_PLATFORMS": "cpu"} | ({} if cluster else QUICK)
    # Which gRPC would take even for this machine's own services.
    environment |= {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
    self.outputs, self.errors, self.processes = [], [], []
    for k, (number, count) in enumerate(zip(numbers, counts, strict=True)):
      where = [f"--coordinator_address={addresses[k]}"]
      where += [f"--num_processes={count}", f"--process_id={number}"]
      self.outputs.append(folder / f"stdout{k}")
      self.errors.append(folder / f"stderr{k}")
      with self.outputs[k].open("w") as out, self.errors[k].open("w") as err:
        self.processes.append(
          subprocess.Popen(
            [sys.executable, SCRIPT, *([] if cluster else where), *flags[k]],
            env=environment | (cluster(k) if cluster else {}),
            stdout=out,
            stderr=err,
          )
        )

  def wait_for_steps(self):
    """Returns the time, once all processes have made some steps."""
    deadline = time.monotonic() + 180
    while not all("step 5\n" in path.read_text() for path in self.outputs):
      assert all(p.poll() is None for p in self.processes), self.all_errors()
      assert time.monotonic() < deadline, self.all_errors()
      time.sleep(0.05)
    return time.monotonic()

  def end(self, *which):
    """Exit status and last line of stderr of each of `which` (default: all)."""
    results = []
    for k in which or range(len(self.processes)):
      status = self.processes[k].wait(timeout=180)
      results.append((status, self.errors[k].read_text().strip().rpartition("\n")[2]))
    return results

  def all_errors(self):
    return [path.read_text() for path in self.errors]

  def close(self):
    for process in self.processes:
      with contextlib.suppress(ProcessLookupError):
        process.kill()
      process.wait()


def slurm(port):
  return lambda k: {
    "JAX_COORDINATOR_PORT": str(port),
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_NTASKS": "4",  # of the allocation
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": str(k),
    "SLURM_LOCALID": str(k),
  }


def open_mpi(port):
  return lambda k: {
    "JAX_COORDINATOR_PORT": str(port),
    "OMPI_MCA_orte_hnp_uri": "40960.0;tcp://127.0.0.1,10.1.0.7:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": str(k),
    "OMPI_COMM_WORLD_LOCAL_RANK": str(k),
    **QUICK,
  }


class Metadata(http.server.BaseHTTPRequestHandler):
  """What the metadata servers of the two hosts of a TPU slice answer."""

  def do_GET(self):
    process, name = self.path.split("/")[1], self.path.rpartition("/")[2]
    self.send_response(200)
    self.end_headers()
    self.wfile.write(
      {
        "agent-worker-number": process.encode(),
        "worker-network-endpoints": b"a:0:127.0.0.1,b:1:127.0.0.1",
        "tpu-env": b"ACCELERATOR_TYPE: 'v5litepod-16'",
      }[name]
    )

  def log_message(self, *_):
    pass


def cloud_tpu(port, metadata_port):
  return lambda k: {
    "JAX_COORDINATOR_PORT": str(port),
    "JAX_PLATFORMS": "tpu,cpu",
    "JAX_FORCE_TPU_INIT": "1",
    "GCE_METADATA_IP": f"127.0.0.1:{metadata_port}/{k}",
    **QUICK,
  }


def killed(folder):
  run = Run(folder, [[f"--liveness-timeout={LIVENESS_TIMEOUT}"]] * 2, cluster=open_mpi(free_port()))
  with contextlib.closing(run):
    begin = run.wait_for_steps()
    run.processes[0].kill()
    return run.end(1), time.monotonic() - begin


def killed_at_the_end(folder):
  """Process 0 has made all steps, and waits for the other one."""
  flags = [f"--liveness-timeout={LIVENESS_TIMEOUT}", "--steps=6"]
  run = Run(folder, [flags, [*flags, "--slow-end=200"]], cluster=slurm(free_port()))
  with contextlib.closing(run):
    begin = run.wait_for_steps()
    run.processes[1].kill()
    return run.end(0), time.monotonic() - begin


def frozen(folder, victim, count):
  run = Run(folder, [[f"--liveness-timeout={LIVENESS_TIMEOUT}"]] * count)
  with contextlib.closing(run):
    begin = run.wait_for_steps()
    run.processes[victim].send_signal(signal.SIGSTOP)
    results = run.end(*(k for k in range(count) if k != victim))
    seconds = time.monotonic() - begin
    run.processes[victim].send_signal(signal.SIGCONT)
    return results, seconds, run.end(victim)[0]


class Relay:
  """A way to `port` of this machine that can be cut."""

  def __init__(self, port):
    self._target = ("127.0.0.1", port)
    self._server = socket.create_server(("127.0.0.1", 0))
    self.port = self._server.getsockname()[1]
    self.open = True
    threading.Thread(target=self._accept, daemon=True).start()

  def _accept(self):
    while True:
      here, _ = self._server.accept()
      try:
        there = socket.create_connection(self._target)
      except OSError:  # not yet
        here.close()
        continue
      for ways in ((here, there), (there, here)):
        threading.Thread(target=self._pass, args=ways, daemon=True).start()

  def _pass(self, source, target):
    with contextlib.suppress(OSError):
      while data := source.recv(1 << 16):
        if self.open:
          target.sendall(data)
      target.close()


def cut_off(folder):
  """What process 1 and process 0's service say to each other no longer arrives."""
  port = free_port()
  relay = Relay(port)
  addresses = [f"127.0.0.1:{port}", f"127.0.0.1:{relay.port}"]
  run = Run(folder, [[f"--liveness-timeout={LIVENESS_TIMEOUT}"]] * 2, addresses=addresses)
  with contextlib.closing(run):
    begin = run.wait_for_steps()
    relay.open = False
    results = run.end()
    return results, time.monotonic() - begin


def ended(folder, *flags, cluster=None, **others):
  short = ["--liveness-timeout=4"]  # beyond which the others are told of an error
  run = Run(folder, [short + more for more in flags], cluster=cluster, **others)
  with contextlib.closing(run):
    return run.end(), [path.read_text() for path in run.outputs], run.all_errors()


def ended_on_tpu(folder, *flags):
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
      return ended(folder, *flags, cluster=cloud_tpu(free_port(), server.server_port))
    finally:
      server.shutdown()


def not_all(folder):
  flags = [["--connect-timeout=12"]] * 4
  run = Run(folder, flags, numbers=[0, 1, 1, 3], counts=[3, 3, 3, 4])
  with contextlib.closing(run):
    return run.end()


def stranger(folder):
  """Another service listens at the address."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    run = Run(folder, [["--connect-timeout=1"]] * 2, addresses=[address] * 2)
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
    "cut off": (cut_off,),
    "killed 1": (killed_at_the_end,),
    "killed 0": (killed,),
    "bug": (ended, ["--bug-at=3"], []),
    "end": (ended_on_tpu, ["--steps=4", "--slow-end=6"], ["--steps=4"]),
    "unequal": (ended, ["--devices=2"], ["--devices=1"]),
    "counts": (lambda folder: ended(folder, [], [], counts=[2, 3]),),
    "stranger": (stranger,),
  }
  with concurrent.futures.ThreadPoolExecutor(5) as pool:
    return {
      name: pool.submit(task, folder / name, *arguments)
      for name, (task, *arguments) in tasks.items()
    }


def lost(process, reason):
  host = re.escape(socket.gethostname())
  return rf"error: process {process} \({host}\) was lost: {reason}.*The same command"


@pytest.mark.parametrize(
  ("victim", "reason"), [(0, "its connection closed"), (1, "no sign of life for 4 s")]
)
def test_loss_of_a_process_that_is_killed(results, victim, reason):
  [(status, message)], seconds = results[f"killed {victim}"].result()
  assert status == 75, message
  assert re.match(lost(victim, reason), message)
  assert seconds < LIVENESS_TIMEOUT + LATER


@pytest.mark.parametrize("victim", [0, 1])
def test_loss_of_a_process_that_freezes(results, victim):
  others, seconds, (thawed_status, thawed) = results[f"frozen {victim}"].result()
  for status, message in others:
    assert status == 75, message
    assert re.match(lost(victim, "no sign of life for 4 s"), message)
  assert seconds < LIVENESS_TIMEOUT + LATER
  assert thawed_status == 75
  assert "was lost: " in thawed


def test_loss_of_a_process_that_is_cut_off(results):
  ends, seconds = results["cut off"].result()
  for process, (status, message) in enumerate(ends):
    assert status == 75, message
    assert re.match(lost(1 - process, "(no sign of life for 4 s|its connection closed)"), message)
  assert seconds < 2 * (LIVENESS_TIMEOUT + LATER)


def test_an_error_of_one_process_ends_the_others(results):
  ends, _, errors = results["bug"].result()
  assert [status for status, _ in ends] == [1, 1]
  assert "Traceback" in errors[0]
  assert ends[0][1] == "KeyError: 'a bug'"
  assert ends[1][1].startswith(f"error: process 0 ({socket.gethostname()}) ended with an error")


def test_processes_with_different_numbers_of_devices(results):
  ends, _, _ = results["unequal"].result()
  for status, message in ends:
    assert status == 1
    assert "different numbers of devices: process 0 has 2, process 1 has 1. Each" in message


def test_processes_with_different_counts(results):
  ((status, first), own), _, _ = results["counts"].result()
  assert own[0] == status == 1
  assert "--num_processes=3, but process 0 with --num_processes=2; give the same" in own[1]
  assert first.startswith("error: process 1 ended with an error")


def test_processes_that_end_at_different_times(results):
  ends, outputs, errors = results["end"].result()
  assert [status for status, _ in ends] == [0, 0], errors
  assert all(output.endswith("step 3\nended\n") for output in outputs)
  assert not any(errors)


def test_processes_that_do_not_come(results):
  (first, *twice, other) = results["not all"].result()
  assert first[0] == 75
  assert "2 of 3 processes have connected (missing: process 2) after 12 s; start the" in first[1]
  (earlier_status, earlier), (later_status, later) = sorted(twice)
  assert (earlier_status, later_status) == (1, 75)
  assert "another process has the same --process_id" in earlier
  assert re.search("process 0 (says which|does not answer at .* after 12 s .*: it says why)", later)
  assert other[0] == 1
  assert "process 0 was started with fewer processes than --num_processes=4" in other[1]


def test_a_port_that_another_program_has(results):
  (first_status, first), (status, message) = results["stranger"].result()
  assert first_status == 1
  assert "(Address already in use): another program uses it" in first
  assert status == 75
  assert "process 0 says which, if it is what answers at 127.0.0.1:" in message
