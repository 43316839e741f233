"""Which process this is, by flags and environments. Real runs: tests/e2e/test_processes.py."""

import http.server
import sys
import threading

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster

from lip_jax.distributed import hosts
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


def place(plan):
  return plan.coordinator_address, plan.num_processes, plan.process_id, plan.local_rank


def test_a_process_on_its_own_starts_without_others(environment):
  assert hosts.plan(hosts.Options()) is None
  with hosts.join(hosts.Options(num_processes=1)) as names:
    assert len(names) == 1
  assert not jax.distributed.is_initialized()
  environment(KUBERNETES_SERVICE_HOST="10.96.0.1")  # as in any pod
  assert hosts.plan(hosts.Options()) is None


def test_slurm(environment):
  environment(SLURM)
  address = f"node007:{65535 - 2**12 + 1 + 5000 % 2**12}"
  assert place(hosts.plan(hosts.Options())) == (address, 4, 2, 1)
  assert place(hosts.plan(hosts.Options(coordinator_address=ADDRESS))) == (ADDRESS, 4, 2, 1)
  assert hosts.plan(hosts.Options(distributed="off")) is None
  environment(SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0")  # a shell inside the allocation
  assert hosts.plan(hosts.Options()) is None


def test_open_mpi(environment):
  environment(OPEN_MPI)
  # From version 5 on the launcher's address is not known.
  with pytest.raises(UsageError, match=r"Open MPI: 2 processes.*--coordinator_address=HOST:PORT"):
    hosts.plan(hosts.Options())
  assert place(hosts.plan(hosts.Options(coordinator_address=ADDRESS))) == (ADDRESS, 2, 1, 0)
  environment(OMPI_MCA_orte_hnp_uri="40960.0;tcp://10.0.0.7,10.1.0.7:34911")
  assert place(hosts.plan(hosts.Options())) == (f"10.0.0.7:{65535 - 2**12 + 1 + 10}", 2, 1, 0)
  environment(OMPI_COMM_WORLD_SIZE="1", OMPI_COMM_WORLD_RANK="0")
  assert hosts.plan(hosts.Options()) is None


class Metadata(http.server.BaseHTTPRequestHandler):
  """What a Cloud TPU VM's metadata server answers."""

  def do_GET(self):
    name = self.path.rpartition("/")[2]
    self.send_response(200)
    self.end_headers()
    self.wfile.write(
      {
        "agent-worker-number": b"1",
        "worker-network-endpoints": b"a:0:10.0.0.7,b:1:10.0.0.8",
        "tpu-env": b"ACCELERATOR_TYPE: 'v5litepod-16'",
      }[name]
    )

  def log_message(self, *_):
    pass


def test_cloud_tpu(environment, monkeypatch):
  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
  platforms = jax.config.jax_platforms
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment(GCE_METADATA_IP=f"127.0.0.1:{server.server_port}")
    try:
      jax.config.update("jax_platforms", "tpu,cpu")
      assert place(hosts.plan(hosts.Options())) == ("10.0.0.7:8482", 2, 1, None)
      assert hosts.plan(hosts.Options(distributed="off")) is None
      environment(TPU_WORKER_HOSTNAMES="10.0.0.5,10.0.0.6,10.0.0.7", TPU_WORKER_ID="2")  # on GKE
      assert place(hosts.plan(hosts.Options())) == ("10.0.0.5:8482", 3, 2, None)
      jax.config.update("jax_platforms", "cpu")
      assert hosts.plan(hosts.Options()) is None
    finally:
      jax.config.update("jax_platforms", platforms)
      server.shutdown()


def test_kubernetes_without_its_package(environment, monkeypatch):
  environment(INDEXED_POD)
  monkeypatch.setitem(sys.modules, "kubernetes", None)
  with pytest.raises(UsageError, match=r"jax\[k8s\]"):
    hosts.plan(hosts.Options())
  whole = hosts.Options(coordinator_address=ADDRESS, num_processes=2, process_id=1)
  assert place(hosts.plan(whole)) == (ADDRESS, 2, 1, None)


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
    hosts.plan(hosts.Options(**given))
