"""Which process this is, by flags and environments. Real runs: tests/e2e/test_processes.py."""

import importlib.util

import jax
import pytest

from lip_jax.distributed import startup
from lip_jax.errors import UsageError

ADDRESS = "10.0.0.2:8476"
SLURM = {
  "SLURM_JOB_ID": "5000",
  "SLURM_STEP_NODELIST": "node[007-010]",
  "SLURM_NTASKS": "4",
  "SLURM_STEP_NUM_TASKS": "4",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "1",
}
OPEN_MPI = {
  "OMPI_COMM_WORLD_SIZE": "2",
  "OMPI_COMM_WORLD_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
INDEXED_POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "JOB_COMPLETION_INDEX": "1"}


@pytest.fixture
def environment(monkeypatch):
  def put(*environments, **more):
    for variables in (*environments, more):
      for name, value in variables.items():
        monkeypatch.setenv(name, value)

  return put


def place(**flags):
  """What is known of a process before jax itself looks at the cluster."""
  here = startup.locate(startup.Options(**flags))
  return here and (
    here.coordinator_address,
    here.num_processes,
    here.process_id,
    here.local_device_ids,
  )


def test_a_process_on_its_own_starts_without_others(environment):
  assert place() is None
  with startup.join(startup.Options(num_processes=1)) as names:
    assert len(names) == 1
  assert not jax.distributed.is_initialized()
  environment(KUBERNETES_SERVICE_HOST="10.96.0.1")  # as in any pod
  assert place() is None


def test_slurm(environment):
  environment(SLURM)
  assert place() == (None, 4, 2, [1])  # jax knows the address
  assert place(coordinator_address=ADDRESS) == (ADDRESS, 4, 2, [1])
  assert place(local_device_ids=[2, 3]) == (None, 4, 2, [2, 3])
  assert place(distributed="off") is None
  environment(SLURM_STEP_TASKS_PER_NODE="1(x4)")  # each has all GPUs of its node
  assert place() == (None, 4, 2, None)
  environment(SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0")  # a shell inside the allocation
  assert place() is None


def test_open_mpi(environment):
  environment(OPEN_MPI)
  assert place(coordinator_address=ADDRESS) == (ADDRESS, 2, 1, [0])
  environment(CUDA_VISIBLE_DEVICES="3")  # the launcher gives each its own
  assert place(coordinator_address=ADDRESS) == (ADDRESS, 2, 1, None)
  environment(OMPI_COMM_WORLD_SIZE="1", OMPI_COMM_WORLD_RANK="0")
  assert place() is None


def test_cloud_tpu(environment, monkeypatch):
  monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
  platforms = jax.config.jax_platforms
  try:
    jax.config.update("jax_platforms", "tpu,cpu")
    assert place() == (None, None, None, None)  # jax asks the machine's metadata server
    assert place(process_id=1) == (None, None, 1, None)
    assert place(distributed="off") is None
    environment(TPU_WORKER_HOSTNAMES="10.0.0.5,10.0.0.6,10.0.0.7", TPU_WORKER_ID="2")  # on GKE
    assert place() == (None, None, None, None)
    environment(TPU_WORKER_HOSTNAMES="10.0.0.5")
    assert place() is None
    jax.config.update("jax_platforms", "cpu")
    environment(TPU_WORKER_HOSTNAMES="10.0.0.5,10.0.0.6")
    assert place() is None
  finally:
    jax.config.update("jax_platforms", platforms)


@pytest.mark.skipif(
  importlib.util.find_spec("kubernetes") is not None, reason="the package is installed"
)
def test_kubernetes_without_its_package(environment):
  environment(INDEXED_POD)
  with pytest.raises(UsageError, match=r"jax\[k8s\]"):
    place()
  whole = {"coordinator_address": ADDRESS, "num_processes": 2, "process_id": 1}
  assert place(**whole) == (ADDRESS, 2, 1, None)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"process_id": 1}, "--process_id without --coordinator_address and --num_processes"),
    ({"num_processes": 2, "process_id": 1}, "without --coordinator_address:"),
    ({"coordinator_address": "10.0.0.2:http"}, "10.0.0.2:http is not HOST:PORT"),
    ({"coordinator_address": "8476"}, "is not HOST:PORT"),
    ({"coordinator_address": "10.0.0.2:70000"}, "1 to 65535"),
    ({"coordinator_address": ADDRESS, "num_processes": 2, "process_id": 2}, "ids are 0 to 1"),
    ({"num_processes": 0}, "--num_processes=0 has to be at least 1"),
    ({"process_id": -1}, "--process_id=-1 has to be at least 0"),
    ({"connect_timeout": 0}, "--connect_timeout=0"),
    ({"distributed": "on"}, "no cluster is detected"),
    ({"distributed": "off", "coordinator_address": ADDRESS}, "contradicts"),
  ],
)
def test_contradictions(given, message):
  with pytest.raises(UsageError, match=message):
    startup.locate(startup.Options(**given))
