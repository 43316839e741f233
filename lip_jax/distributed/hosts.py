"""Start-up of a run on several hosts, or of several processes on one."""

import asyncio
import atexit
import collections
import contextlib
import dataclasses
import importlib.util
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax._src import clusters  # what jax.distributed detects with; no public name gives the numbers

from lip_jax.distributed.liveness import Member, end_thread, run_in_thread, split_address
from lip_jax.distributed.roll import EXIT_ERROR, MissingProcessError, Roll
from lip_jax.errors import UsageError

log = logging.getLogger("lip_jax")

_VERDICT_SECONDS = 5  # an error that the loss of a process causes may come before the news of it


@dataclasses.dataclass(frozen=True)
class Options:
  """How this process finds the others. What is None is taken from the cluster's environment."""

  distributed: str = "auto"  # or on, off; on: an error if there are no others
  coordinator_address: str | None = None  # HOST:PORT of process 0
  num_processes: int | None = None
  process_id: int | None = None
  local_device_ids: Sequence[int] | None = None  # devices of this host that the process uses
  connect_timeout: float = 300  # seconds until all have to be there
  liveness_timeout: float = 45  # seconds of silence after which a process counts as lost


@dataclasses.dataclass(frozen=True)
class Plan:
  """The place of this process in a run of several."""

  coordinator_address: str
  num_processes: int
  process_id: int
  local_rank: int | None  # place among those of this host, where a launcher says so
  origin: str  # where the numbers come from


@contextlib.contextmanager
def join(options: Options) -> Iterator[list[str]]:
  """Connects this process with the others of its run, if there are any, for the time of a `with`.

  To be entered before the first JAX computation. On the way out it waits for the other processes;
  an exception is told to them first, and they end with it. While it lasts, the loss of a process,
  or its error, ends this one: one line on stderr and exit status 75 (lost) or 1 (error).

  Yields:
    Host names of all processes, by process index.

  Raises:
    UsageError: options that contradict each other or the other processes', or processes with
      different numbers of devices.
    MissingProcessError: not all processes came within `connect_timeout`.
  """
  found = plan(options)
  if found is None or jax.distributed.is_initialized():
    yield [socket.gethostname()]
    return
  member = _connect(found, options)
  try:
    _start_jax(found, options, member)
    yield member.hosts
  except BaseException as error:
    if isinstance(error, SystemExit) and not error.code:
      member.finish()
    else:
      _fail(error, member)
    raise
  member.finish()


def meet(found: Plan, options: Options) -> list[str]:
  """Connects this process with the others, as a run does, and leaves them again.

  Returns:
    Host names of all processes, by process index.

  Raises:
    UsageError: options that contradict the other processes'.
    MissingProcessError: not all processes came within `connect_timeout`.
  """
  member = _connect(found, options)
  member.failing = True  # whoever is lost from here on: all have come
  member.finish()
  member.close()
  return member.hosts


def plan(options: Options) -> Plan | None:
  """Finds out which process this is.

  Returns:
    None: a process on its own, which needs no start-up.

  Raises:
    UsageError: too little is known, or the options contradict each other.
  """
  _check(options)
  if options.distributed == "off":
    return None
  address = options.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
  count, process = options.num_processes, options.process_id
  given = {
    "--coordinator_address": address,
    "--num_processes": count,
    "--process_id": process,
  }
  cluster = _detect(complete=None not in given.values() or count == 1)
  if cluster is not None:
    count = cluster.count() if count is None else count
    if count > 1:
      process = cluster.process() if process is None else process
      address = address or cluster.address(options.connect_timeout)
  elif count != 1 and any(v is not None for v in given.values()):
    missing = [name for name, value in given.items() if value is None]
    if missing:
      raise UsageError(
        f"{' and '.join(n for n in given if n not in missing)} without {' and '.join(missing)}: "
        "no cluster is detected that would say the rest; give all three, on every host"
      )
  if count is not None and process is not None and process >= count:
    raise UsageError(
      f"--process_id={process} is out of range: with --num_processes={count} the ids are 0 to "
      f"{count - 1}"
    )
  if count is None or count == 1:
    if options.distributed == "on":
      raise UsageError(
        "--distributed=on, but this is the only process "
        f"({cluster.name + ' says so' if cluster else 'no cluster is detected'}); give "
        "--coordinator_address, --num_processes and --process_id, or --distributed=off"
      )
    return None
  if address is None:
    raise UsageError(
      f"{cluster.name if cluster else 'the flags'}: {count} processes, but the address of process "
      "0 is not known; give --coordinator_address=HOST:PORT, the same on every host, or "
      "--distributed=off if each process is a run of its own"
    )
  assert process is not None
  _check_address(address)
  if cluster is None:
    return Plan(address, count, process, None, "as the flags say")
  return Plan(address, count, process, cluster.local_rank(), cluster.name)


def _check(options: Options) -> None:
  """Raises UsageError for what is wrong in itself, on any machine."""
  if options.distributed == "off" and options.coordinator_address:
    raise UsageError("--distributed=off contradicts --coordinator_address; leave one of them out")
  if options.coordinator_address is not None:
    _check_address(options.coordinator_address)
  if options.num_processes is not None and options.num_processes < 1:
    raise UsageError(f"--num_processes={options.num_processes} has to be at least 1")
  if options.process_id is not None and options.process_id < 0:
    raise UsageError(f"--process_id={options.process_id} has to be at least 0")
  for name in ("connect_timeout", "liveness_timeout"):
    if not getattr(options, name) > 0:
      raise UsageError(f"--{name}={getattr(options, name):g} has to be more than 0 seconds")


def _check_address(address: str) -> None:
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
    raise UsageError(
      f"--coordinator_address={address} is not HOST:PORT with a port from 1 to 65535, such as "
      "10.0.0.2:8476"
    )


class _Cluster:
  """JAX's knowledge of one kind of cluster, which this process is part of."""

  def __init__(self, name: str, env: Any):
    self.name = name
    self._env = env

  def count(self) -> int:
    return self._asked("get_process_count")

  def process(self) -> int:
    return self._asked("get_process_id")

  def local_rank(self) -> int | None:
    return self._asked("get_local_process_id")

  def address(self, seconds: float) -> str:
    port = os.environ.get("JAX_COORDINATOR_PORT")
    return self._asked(
      "get_coordinator_address", timeout_secs=int(seconds), override_coordinator_port=port
    )

  def _asked(self, question: str, **arguments: Any) -> Any:
    try:
      return getattr(self._env, question)(**arguments)
    except Exception as error:  # of the cluster's interface, in any form
      reason = " ".join(str(error).split())
      raise UsageError(
        f"{self.name} does not say which process this is ({reason}); give --coordinator_address, "
        "--num_processes and --process_id, or --distributed=off if this process is on its own"
      ) from None


class _Slurm(_Cluster):
  """Of this step (srun), not of the allocation, which may be larger."""

  def count(self) -> int:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or super().count())


class _NewOpenMpi(_Cluster):
  """Open MPI from version 5 on, which no longer tells where its launcher runs."""

  def __init__(self):
    super().__init__("Open MPI", None)

  def count(self) -> int:
    return int(os.environ["OMPI_COMM_WORLD_SIZE"])

  def process(self) -> int:
    return int(os.environ["OMPI_COMM_WORLD_RANK"])

  def local_rank(self) -> int | None:
    return int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"])

  def address(self, seconds: float) -> Any:
    return None


class _Kubernetes(_Cluster):
  """An indexed job."""

  def __init__(self):
    super().__init__("Kubernetes", clusters.K8sCluster)
    if importlib.util.find_spec("kubernetes") is None:
      raise UsageError(
        "this is a pod of an indexed Kubernetes job, and the package is missing that tells how "
        "many there are: pip install 'jax[k8s]', or give --coordinator_address, --num_processes "
        "and --process_id, or --distributed=off if each pod is a run of its own"
      )
    self._asked("is_env_present")  # which loads the pod's configuration


def _detect(complete: bool) -> _Cluster | None:
  """The cluster that started this process, if it is one of those that JAX knows.

  Args:
    complete: the user has said what it could tell, but for this process's place on its host:
      worth a look at the environment, but no question to a server.
  """
  if clusters.OmpiCluster.is_env_present():
    return _Cluster("Open MPI", clusters.OmpiCluster)
  if "OMPI_COMM_WORLD_SIZE" in os.environ:
    return _NewOpenMpi()
  if clusters.SlurmCluster.is_env_present():
    return _Slurm("SLURM", clusters.SlurmCluster)
  if complete:
    return None
  platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
  if not platforms or "tpu" in platforms.split(","):
    if clusters.GkeTpuCluster.is_env_present():
      return _Cluster("Cloud TPU", clusters.GkeTpuCluster)
    try:
      if clusters.GceTpuCluster.is_env_present():
        return _Cluster("Cloud TPU", clusters.GceTpuCluster)
    except Exception as error:  # no metadata server: a TPU in a notebook, for example
      log.info("no Cloud TPU metadata (%s): this process is taken to be the only one", error)
  # Every pod has KUBERNETES_SERVICE_HOST; those of an indexed job may be parts of one run.
  if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
    return _Kubernetes()
  return None


def _connect(found: Plan, options: Options) -> Member:
  """Waits for all processes; process 0 opens the roll first."""
  log.info(
    "process %d of %d (%s), process 0 at %s",
    found.process_id,
    found.num_processes,
    found.origin,
    found.coordinator_address,
  )
  loop = run_in_thread()
  try:
    return _sign_in(found, options, loop)
  except (UsageError, MissingProcessError):
    end_thread(loop)
    raise


def _sign_in(found: Plan, options: Options, loop: asyncio.AbstractEventLoop) -> Member:
  timeouts = options.liveness_timeout, options.connect_timeout
  roll = None
  if found.process_id == 0:
    host, port = split_address(found.coordinator_address)
    roll = Roll(found.num_processes, *timeouts)
    opening = roll.open(host, port, options.connect_timeout)
    asyncio.run_coroutine_threadsafe(opening, loop).result()
  member = Member(
    found.process_id,
    found.num_processes,
    found.coordinator_address,
    *timeouts,
    loop,
    roll,
  )
  try:
    member.connect(options.connect_timeout)
  except (UsageError, MissingProcessError) as error:
    if roll:
      asyncio.run_coroutine_threadsafe(roll.give_up(str(error)), loop).result()
    raise
  return member


def _start_jax(found: Plan, options: Options, member: Member) -> None:
  """Starts JAX's own service, which is reached through the roll, and its devices."""
  # gRPC would ask an HTTP proxy even for the loopback interface.
  os.environ["no_grpc_proxy"] = "127.0.0.1"  # noqa: SIM112, its name
  jax.config.update("jax_check_proxy_envs", False)
  # It would take SIGTERM for itself; the trainer's steps agree on where to stop.
  jax.config.update("jax_enable_preemption_service", False)
  address = member.open_jax_address()
  jax.distributed.initialize(
    address,
    found.num_processes,
    found.process_id,
    local_device_ids=_local_devices(found, options, member.hosts),
    cluster_detection_method="deactivate",
    coordinator_bind_address=address,
    initialization_timeout=120,  # all of them are there
    # The roll is to be the first to know.
    heartbeat_timeout_seconds=max(100, 3 * int(options.liveness_timeout)),
  )
  devices = jax.devices()
  member.ready()
  counts = collections.Counter(device.process_index for device in devices)
  if len(set(counts.values())) > 1:
    each = ", ".join(f"process {k} has {count}" for k, count in sorted(counts.items()))
    raise UsageError(
      f"the processes have different numbers of devices: {each}. Each feeds an equal part of a "
      "batch: give all the same number (--local_device_ids)"
    )


def _local_devices(found: Plan, options: Options, hosts: list[str]) -> Sequence[int] | None:
  """GPUs of this process: all of the host's, or one where a launcher started one process for each.

  None: all that are visible.
  """
  if options.local_device_ids is not None:
    return options.local_device_ids
  if os.environ.get("JAX_LOCAL_DEVICE_IDS"):
    return [int(k) for k in os.environ["JAX_LOCAL_DEVICE_IDS"].split(",")]
  alone = hosts.count(hosts[found.process_id]) == 1
  visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
  bound = visible != "" and "," not in visible  # the launcher shows each process its own
  return None if found.local_rank is None or alone or bound else [found.local_rank]


def _fail(error: BaseException, member: Member) -> None:
  """Tells the other processes; what is then printed and returned is up to the caller."""
  status = EXIT_ERROR
  if isinstance(error, KeyboardInterrupt):
    words, status = "interrupted", 130
  elif isinstance(error, UsageError):
    words = str(error)
  else:
    # A collective fails when a process at its other end goes away.
    member.wait_for_end(_VERDICT_SECONDS)
    words = f"{type(error).__name__}: {error}"
  member.fail(re.sub(r"\s+", " ", words))

  def leave() -> None:
    # JAX's own would wait for the others. This one, registered later, comes before it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

  atexit.register(leave)
