"""The doctor, on this machine as it is and as it could be."""

import concurrent.futures
import json
import re
import runpy
import socket
from importlib import metadata
from pathlib import Path

import pytest
from fixture_ports import free_port

from lip_jax import cli
from lip_jax.distributed import startup
from lip_jax.ops.kernels import nvrtc
from lip_jax.tools import doctor, machine, step_bench
from lip_jax.training import config as config_lib

CONFIGS = Path(__file__).parents[2] / "configs"


def write_config(workdir, **changes):
  """A run of the smallest network, as training leaves its configuration behind."""
  values = runpy.run_path(str(CONFIGS / "cluttered_digits.py"))["get_config"]().to_dict()
  values["model"] = {"name": "resnet_small", "pool": "strided", "width": 8, "bn_group_size": 32}
  values["model"]["stage_sizes"] = (1, 1, 1, 1)
  values["data"] |= {"dataset": "fake:64", "image_size": 32, "num_threads": 1}
  values |= changes
  workdir.mkdir(exist_ok=True)
  (workdir / "config.json").write_text(config_lib.to_json(config_lib.from_dict(values)))
  return config_lib.load(workdir)


def examine(*checks, **subject):
  """Verdicts by check; those that are not named may have none but ok."""
  findings = list(doctor.examine(doctor.Subject(**subject)))
  others = [f for f in findings if f.check not in checks]
  assert {f.status for f in others} <= {"ok"}, others
  return {check: [f for f in findings if f.check == check] for check in checks}


def test_a_machine_that_can_train(tmp_path):
  write_config(tmp_path / "run")
  verdicts = examine(
    "devices", "workdir", "data set", "speed", workdir=str(tmp_path / "run"), bench_seconds=0.5
  )
  assert "8 cpu device(s)" in verdicts["devices"][0].text
  assert verdicts["workdir"][0].status == "ok"
  assert "checkpoints take 0.0" in verdicts["workdir"][0].text
  assert "64 images to train, 64 images to validate" in verdicts["data set"][0].text
  speed = verdicts["speed"][0]
  assert speed.status in ("ok", "warning")  # which of both is faster is the machine's
  assert "images/s with 1 thread(s), training steps" in speed.text
  assert "(batch 32 on 8 device(s)" in speed.text
  assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json"]


def test_the_command_counts_problems(tmp_path, capsys):
  write_config(tmp_path / "run", seed=3)
  (tmp_path / "data").mkdir()
  arguments = [
    "doctor",
    "--no-bench",
    "--json",
    f"--config={CONFIGS / 'cluttered_digits.py'}",
    f"--workdir={tmp_path / 'run'}",
    f"--data-dir={tmp_path / 'data'}",
  ]
  assert cli.main(arguments) == 1
  out, err = capsys.readouterr()
  assert err == ""
  result = json.loads(out)
  problems = [finding for finding in result["findings"] if finding["status"] == "problem"]
  assert not result["ok"]
  assert [problem["check"] for problem in problems] == ["workdir"]
  assert "another configuration: data.dataset: " in problems[0]["text"]
  assert problems[0]["remedy"] == "take another --workdir"
  # The embedded data set is made when it is needed.
  assert any("is not there yet" in finding["text"] for finding in result["findings"])
  assert cli.main(["doctor", f"--config={tmp_path / 'none.py'}"]) == 1
  assert "cannot read --config=" in capsys.readouterr().err


def test_paths_are_escaped(tmp_path, capsys):
  assert cli.main(["doctor", "--no-bench", f"--data-dir={tmp_path}/\u202ea\xa0\x1b[2J"]) in (0, 1)
  out = capsys.readouterr().out
  assert r"/\u202ea\xa0\x1b[2J" in out
  assert all(line.isprintable() for line in out.splitlines())


def test_devices_that_fail_or_hang_are_problems(tmp_path, monkeypatch):
  hanging = examine("devices", device_timeout=0.01, data_dir=str(tmp_path))["devices"][0]
  assert hanging.status == "problem"
  assert "do not answer within 0.01 s" in hanging.text
  monkeypatch.setenv("JAX_PLATFORMS", "nonesuch")
  failing = examine("devices", data_dir=str(tmp_path))["devices"][0]
  assert failing.status == "problem"
  assert "nonesuch" in failing.text
  # The rest does not ask them again: they might hang. Those of the run may be more than are here.
  write_config(tmp_path / "run", fsdp=16)
  found = examine("devices", "speed", workdir=str(tmp_path / "run"), data_dir=str(tmp_path))
  assert found["speed"] == []


@pytest.mark.parametrize("installed", [True, False])
def test_kernels_that_cannot_be_compiled_are_a_warning(tmp_path, monkeypatch, installed):
  seen = {"count": 1, "all": 1, "platform": "gpu", "kind": "NVIDIA H100", "memory": 0}
  monkeypatch.setattr(machine, "ask", lambda *args, **options: seen)  # there is no GPU here
  monkeypatch.setattr(nvrtc, "available", lambda: installed)
  found = examine("devices", data_dir=str(tmp_path))["devices"]
  assert any("NVRTC" in verdict.text for verdict in found) != installed


def test_one_fault_leaves_the_other_checks_alone(tmp_path, monkeypatch):
  version = metadata.version
  monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "optax" else version(name))
  (tmp_path / "file").write_text("")
  verdicts = examine(
    "versions",
    "workdir",
    "data dir",
    "data set",
    workdir=str(tmp_path / "file" / "run"),
    data_dir=str(tmp_path / "none"),
    dataset="imagenet2012",
  )
  assert "optax 0.1 (supported: >=" in verdicts["versions"][0].text
  assert "Not a directory" in verdicts["workdir"][0].text
  assert "there is no directory" in verdicts["data dir"][0].text
  assert "is not prepared: looked in" in verdicts["data set"][0].text
  odd = examine("versions", "config", "workdir", workdir="\0", data_dir=str(tmp_path))
  assert odd["workdir"][0].text.startswith("the check failed: ValueError")


def test_a_host_measures_its_part_of_a_batch(tmp_path):
  config = write_config(tmp_path / "run", global_batch_size=64)
  assert step_bench.measure(config, num_hosts=4, seconds=0.1).batch_size == 16


@pytest.fixture
def address():
  return f"127.0.0.1:{free_port()}"


def hosts_of(address, count, ids, seconds):
  """What the doctor says of the hosts on each of the processes `ids`, all at the same time."""

  def one(process):
    options = startup.Options(
      coordinator_address=address,
      num_processes=count,
      process_id=process,
      connect_timeout=seconds,
    )
    subject = doctor.Subject(processes=options, bench=False)
    return [f for f in doctor.examine(subject) if f.check == "hosts"]

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return [str(finding) for [finding] in pool.map(one, ids)]


def test_hosts_that_reach_each_other(address):
  for text in hosts_of(address, 2, (1, 0), 120):
    assert text.startswith(
      f"hosts     ok       all 2 processes have connected (process 0 at {address}"
    )
    assert text.endswith(", ".join(2 * [socket.gethostname()]))


def test_hosts_that_are_missing_are_named(address):
  with concurrent.futures.ThreadPoolExecutor() as pool:  # all of them wait
    missing = pool.submit(hosts_of, address, 4, (0, 2), 20)
    refused = pool.submit(hosts_of, f"127.0.0.1:{free_port()}", 2, (1,), 1)
    nowhere = pool.submit(hosts_of, "host", 2, (1,), 0.2)
  first, other = missing.result()
  assert "problem  2 of 4 processes have connected (missing: processes 1, 3" in first
  assert ") after 20 s; start the same command on every host" in first
  assert "problem  " in other
  assert "process 0" in other
  assert first.endswith("; --distributed=off checks this host alone")
  assert re.search(
    r"process 0 does not answer at 127\.0\.0\.1:\d+ after 1 s \(Connection refused\)",
    *refused.result(),
  )
  assert "problem  --coordinator_address=host is not HOST:PORT" in nowhere.result()[0]
