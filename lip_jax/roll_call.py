"""Whether the hosts of a run reach process 0, by plain TCP, before anything is built on it."""

import contextlib
import json
import os
import socket
import time

from lip_jax.errors import UsageError


def environment() -> str | None:
  """What a launcher says of this process in environment variables; None if there is no launcher."""
  for launcher, count, index in (
    ("SLURM", "SLURM_NTASKS", "SLURM_PROCID"),
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
  ):
    if count in os.environ and index in os.environ:
      return f"{launcher}: process {os.environ[index]} of {os.environ[count]}"
  if "TPU_WORKER_HOSTNAMES" in os.environ and "TPU_WORKER_ID" in os.environ:
    hosts = os.environ["TPU_WORKER_HOSTNAMES"].split(",")
    return f"Cloud TPU on Kubernetes: process {os.environ['TPU_WORKER_ID']} of {len(hosts)}"
  if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
    return f"Kubernetes: process {os.environ['JOB_COMPLETION_INDEX']} of an indexed job"
  return None


def call(address: str, num_processes: int, process_id: int, *, seconds: float) -> str:
  """Process 0 listens until all others have called; the others call until it has answered.

  Args:
    address: HOST:PORT of process 0, as the others reach it.
    num_processes: in all.
    process_id: which one this is.
    seconds: to wait for.

  Returns:
    Who has connected.

  Raises:
    UsageError: an impossible argument, or not all have connected in time; names who is missing.
  """
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise UsageError(f"--coordinator_address={address} is not of the form HOST:PORT")
  if not 0 <= process_id < num_processes:
    raise UsageError(
      f"--process_id={process_id} is not one of 0 to {num_processes - 1} (--num_processes="
      f"{num_processes})"
    )
  deadline = time.monotonic() + seconds
  host = host.strip("[]")
  if process_id:
    return _answer(host, int(port), process_id, deadline)
  return _listen(host, int(port), num_processes, deadline)


def _listen(host: str, port: int, num_processes: int, deadline: float) -> str:
  names = {0: socket.gethostname()}
  try:
    server = socket.create_server(("", port))
  except OSError as error:
    raise UsageError(
      f"process 0 cannot listen on port {port}: {error.strerror}; end what uses it, or take another"
    ) from None
  with contextlib.ExitStack() as calls:
    calls.enter_context(server)
    waiting = []
    while len(names) < num_processes:
      server.settimeout(max(deadline - time.monotonic(), 1e-3))
      try:
        connection, _ = server.accept()
        calls.enter_context(connection)
        connection.settimeout(5)
        with connection.makefile() as message:
          caller = json.loads(message.readline())
        names[int(caller["process_id"])] = str(caller["host"])
        waiting.append(connection)
      except (ValueError, KeyError, TypeError):  # someone else's port scan
        continue
      except TimeoutError:
        if time.monotonic() < deadline:
          continue
        missing = ", ".join(str(k) for k in range(num_processes) if k not in names)
        raise UsageError(
          f"{len(names)} of {num_processes} processes have connected to {host}:{port}, missing: "
          f"{missing}; start the same command on every host, with its --process_id, and open the "
          "port in the firewall"
        ) from None
    for connection in waiting:
      with contextlib.suppress(OSError):  # one that has gone since
        connection.sendall(b"all there\n")
  hosts = ", ".join(names[k] for k in sorted(names))
  return f"all {num_processes} processes have connected to {host}:{port}: {hosts}"


def _answer(host: str, port: int, process_id: int, deadline: float) -> str:
  reason = "no answer"
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, port), timeout=min(left, 5)) as connection:
        message = {"process_id": process_id, "host": socket.gethostname()}
        connection.sendall(json.dumps(message).encode() + b"\n")
        connection.settimeout(max(deadline - time.monotonic(), 1e-3))
        if connection.recv(1):
          return f"process 0 at {host}:{port} is reached, and all others have reached it"
        reason = "process 0 went away while it waited for others"
    except socket.gaierror as error:
      reason = f"the name {host} is not known ({error.strerror})"
    except OSError as error:
      reason = error.strerror or str(error)
    time.sleep(min(0.5, max(deadline - time.monotonic(), 0)))
  raise UsageError(
    f"process {process_id} cannot reach process 0 at {host}:{port}: {reason}; start the same "
    "command there with --process_id=0, check the address, and open the port in the firewall"
  )
