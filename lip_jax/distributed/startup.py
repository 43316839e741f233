"""Start-up and end of a run on several hosts, or of several processes on one."""

import atexit
import collections
import contextlib
import dataclasses
import importlib.util
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence

import jax
from jax.experimental import multihost_utils

from lip_jax.distributed import sharding
from lip_jax.distributed.service_log import ENVIRONMENT, EXIT_ERROR, ServiceLog
from lip_jax.errors import UsageError

# Variables of launchers: processes, index, index on the host, processes on each host. jax reads
# most of them, but takes a SLURM allocation for the step, gives one GPU to a process that is alone
# on its host, and needs mpi4py for Open MPI from version 5 on.
_LAUNCHERS = {
  "SLURM": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
  "Open MPI": tuple(f"OMPI_COMM_WORLD_{k}" for k in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")),
}
_PROXIES = ("http_proxy", "https_proxy", "grpc_proxy")
_ALL = "--coordinator_address, --num_processes and --process_id"
# An error is told by jax's shutdown barrier, which fails after this much more than a lost process
# takes: the error may have come from that.
_BARRIER_SECONDS = 8


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


@contextlib.contextmanager
def join(options: Options) -> Iterator[list[str]]:
  """Connects this process with the others of its run, if there are any, for the time of a `with`.

  To be entered at the start of a program, which is started once more from its beginning where jax's
  log is not set up for this. On the way out it waits for the other processes. If another one is
  lost, ends with an error or does not come, this process ends: one line on stderr, exit status
  75 (lost, not come) or 1 (error).

  Yields:
    Host names of all processes, by process index.

  Raises:
    UsageError: options that contradict each other or the other processes', or processes with
      different numbers of devices.
  """
  here = locate(options)
  if here is None or jax.distributed.is_initialized():
    yield [socket.gethostname()]
    return
  if not ENVIRONMENT.keys() <= os.environ.keys():
    sys.stdout.flush()
    os.environ.update(ENVIRONMENT)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
  timeouts = here.connect_timeout, here.liveness_timeout
  with ServiceLog(here.coordinator_address, here.num_processes, *timeouts) as service:
    if not _initialize(here):
      yield [socket.gethostname()]
      return
    try:
      service.hosts = _meet(here)
      yield service.hosts
      # However long the others take. The shutdown itself has a limit.
      multihost_utils.sync_global_devices("lip_jax: the end of the run")
      jax.distributed.shutdown()
    except BaseException as error:
      service.failing = 130 if isinstance(error, KeyboardInterrupt) else EXIT_ERROR
      atexit.register(_leave, service.failing)  # once the error has been told here
      raise


def locate(options: Options) -> Options | None:
  """Fills in what has to be known of this process before jax is asked for the rest.

  Returns:
    None: a process on its own, which needs no start-up.

  Raises:
    UsageError: too little is known, or the options contradict each other.
  """
  _check(options)
  if options.distributed == "off":
    return None
  address = options.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
  count, process, devices = options.num_processes, options.process_id, options.local_device_ids
  values = {"--coordinator_address": address, "--num_processes": count, "--process_id": process}
  missing = [name for name, value in values.items() if value is None]
  cluster = next((k for k, v in _LAUNCHERS.items() if set(v[:3]) <= os.environ.keys()), None)
  if cluster:
    total, index, local, each = (os.environ.get(name, "") for name in _LAUNCHERS[cluster])
    count = int(total) if count is None else count
    process = int(index) if process is None else process
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    bound = visible != "" and "," not in visible  # each process is shown its own
    alone = each.partition("(")[0] == "1"
    if devices is None and not (alone or bound or "JAX_LOCAL_DEVICE_IDS" in os.environ):
      devices = [int(local)]
  elif missing and count != 1:
    cluster = _managed()
    if cluster is None and len(missing) < len(values):
      raise UsageError(
        f"{' and '.join(name for name in values if name not in missing)} without "
        f"{' and '.join(missing)}: no cluster is detected that would say the rest; give all three, "
        "on every host"
      )
  if count is not None and process is not None and process >= count:
    raise UsageError(
      f"--process_id={process} is out of range: with --num_processes={count} the ids are 0 to "
      f"{count - 1}"
    )
  if count == 1 or (missing and cluster is None):
    if options.distributed == "on":
      says = f"{cluster} says so" if cluster else "no cluster is detected"
      raise UsageError(
        f"--distributed=on, but this is the only process ({says}); give {_ALL}, or "
        "--distributed=off"
      )
    return None
  return dataclasses.replace(
    options,
    coordinator_address=address,
    num_processes=count,
    process_id=process,
    local_device_ids=devices,
  )


def _check(options: Options) -> None:
  """Raises UsageError for what is wrong in itself, on any machine."""
  address = options.coordinator_address
  if options.distributed == "off" and address:
    raise UsageError("--distributed=off contradicts --coordinator_address; leave one of them out")
  host, _, port = (address or "host:1").rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
    raise UsageError(
      f"--coordinator_address={address} is not HOST:PORT with a port from 1 to 65535, such as "
      "10.0.0.2:8476"
    )
  for name, least in (("num_processes", 1), ("process_id", 0)):
    value = getattr(options, name)
    if value is not None and value < least:
      raise UsageError(f"--{name}={value} has to be at least {least}")
  for name in ("connect_timeout", "liveness_timeout"):
    if not getattr(options, name) > 0:
      raise UsageError(f"--{name}={getattr(options, name):g} has to be more than 0 seconds")


def _managed() -> str | None:
  """The cluster, if there may be one, of which jax itself finds out all the rest."""
  platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
  if "tpu" in (platforms or "").split(","):  # jax sets it on a machine that has some
    workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if workers is None:  # jax asks the machine's metadata server
      return None if "TPU_SKIP_MDS_QUERY" in os.environ else "Cloud TPU"
    return "Cloud TPU" if "," in workers or "MEGASCALE_NUM_SLICES" in os.environ else None
  # Every pod has the first variable; those of an indexed job may be parts of one run.
  if not {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys():
    return None
  if importlib.util.find_spec("kubernetes") is None:
    raise UsageError(
      "this is a pod of an indexed Kubernetes job, and the package is missing that tells how "
      f"many there are: pip install 'jax[k8s]', or give {_ALL}, or --distributed=off if each "
      "pod is a run of its own"
    )
  return "Kubernetes"


def _initialize(here: Options) -> bool:
  """Starts jax's service and connects with it; False: jax finds that there are no others."""
  address = here.coordinator_address
  host, _, port = (address or "").rpartition(":")
  if address and here.process_id == 0:
    _wait_for_port(int(port), here.connect_timeout)
  # The trainer has a handler of SIGTERM, which also takes SIGINT and notices of the cloud.
  jax.config.update("jax_enable_preemption_service", False)
  jax.config.update("jax_check_proxy_envs", False)
  proxies = {name: os.environ.pop(name) for name in _PROXIES if name in os.environ}
  complete = None not in (address, here.num_processes, here.process_id)
  try:
    jax.distributed.initialize(
      address,
      here.num_processes,
      here.process_id,
      here.local_device_ids,
      cluster_detection_method="deactivate" if complete else None,
      coordinator_bind_address=address if host == "localhost" or host[:4] == "127." else None,
      initialization_timeout=math.ceil(here.connect_timeout),
      heartbeat_timeout_seconds=math.ceil(here.liveness_timeout),
      shutdown_timeout_seconds=math.ceil(here.liveness_timeout) + _BARRIER_SECONDS,
    )
  except Exception as error:  # of the cluster's interface, in any form
    if here.distributed == "auto" and not complete and _managed() == "Cloud TPU":
      return False  # no metadata server: in a notebook, for example
    reason = " ".join(str(error).split())
    raise UsageError(
      f"jax does not learn from the cluster which process this is ({reason}); give {_ALL}, or "
      "--distributed=off if this process is on its own"
    ) from None
  finally:
    os.environ.update(proxies)  # gRPC would ask one even for this machine's own services
  if here.local_device_ids is None:  # under a launcher jax would show one to each process
    for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
      jax.config.update(name, os.environ.get("JAX_LOCAL_DEVICE_IDS", "all"))
  return True


def _wait_for_port(port: int, seconds: float) -> None:
  """Waits while another program has the port: gRPC shares it silently, even with a process 0."""
  deadline = time.monotonic() + seconds
  while True:
    try:
      socket.create_server(("", port)).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise UsageError(
          f"process 0 cannot listen on port {port} ({os.strerror(error.errno or 0)}): another "
          "program uses it, perhaps an earlier run or a second process 0; end that, or give "
          "another port in --coordinator_address"
        ) from None
    time.sleep(0.5)


def _meet(here: Options) -> list[str]:
  """Host names of all processes; raises UsageError if they do not fit together."""
  devices = collections.Counter(device.process_index for device in jax.devices())
  if here.num_processes not in (None, len(devices)):
    raise UsageError(
      f"this process was started with --num_processes={here.num_processes}, but process 0 with "
      f"--num_processes={len(devices)}; give the same on every host"
    )
  if here.distributed == "on" and len(devices) == 1:
    raise UsageError("--distributed=on, but the cluster has no other process")
  if len(set(devices.values())) > 1:
    each = ", ".join(f"process {k} has {number}" for k, number in sorted(devices.items()))
    raise UsageError(
      f"the processes have different numbers of devices: {each}. Each feeds an equal part of a "
      "batch: give all the same number (--local_device_ids)"
    )
  return sharding.gather(socket.gethostname())


def _leave(status: int) -> None:
  """Ends the process after an error of its own, which the shutdown barrier tells the others."""
  sys.stdout.flush()
  sys.stderr.flush()
  with contextlib.suppress(Exception):
    jax.distributed.shutdown()
  os._exit(status)
