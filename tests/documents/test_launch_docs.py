"""The launch recipes, as far as they can be tried without a cloud."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lip_jax import cli

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "launch.md").read_text()
FILES = sorted((ROOT / "docs" / "launch").iterdir())
FLAG = re.compile(r"--([a-z_-]+)")


def commands(start):
  """Commands that begin with `start`, in the guide and in the files, each in one line."""
  texts = [GUIDE, *(path.read_text() for path in FILES)]
  joined = "\n".join(texts).replace("\\\n", " ")
  return re.findall(rf"{start}[^\n`|>]*", joined)


def test_flags_of_train_exist(capsys):
  with pytest.raises(SystemExit):
    cli.main(["train", "--help"])
  defined = set(FLAG.findall(capsys.readouterr().out))
  found = {flag for command in commands("train.py --") for flag in FLAG.findall(command)}
  assert {"config", "workdir"} <= found <= defined


def test_commands_of_the_doctor_are_understood(capsys):
  found = commands("lip-jax doctor --")
  assert len(found) >= 3
  with pytest.raises(SystemExit):
    cli.main(["doctor", "--help"])
  options = set(FLAG.findall(capsys.readouterr().out))
  assert {flag for command in found for flag in FLAG.findall(command)} <= options


def test_scripts_and_manifests_can_be_read():
  for path in FILES:
    assert f"launch/{path.name}" in GUIDE, path
    if path.suffix == ".yaml":
      kinds = [document["kind"] for document in yaml.safe_load_all(path.read_text())]
      assert kinds[-1] in ("Job", "JobSet", "RoleBinding")
    elif path.name != "Dockerfile":
      subprocess.run(["bash", "-n", path], check=True)


@pytest.fixture
def keep_running(tmp_path):
  def run(program, **environment):
    (tmp_path / "program.py").write_text(program)
    return subprocess.run(
      ["bash", ROOT / "docs/launch/keep_running.sh", "log", sys.executable, "program.py"],
      cwd=tmp_path,
      env={"PATH": "/usr/bin:/bin", "RESTART_SECONDS": "0", **environment},
      capture_output=True,
      text=True,
      check=False,
      timeout=60,
    )

  return run


RUNS = """
import os, pathlib, signal, sys
count = len(list(pathlib.Path().glob("run*")))
pathlib.Path(f"run{count}").touch()
if count == 0:
  sys.exit(75)
if count == 1:
  os.kill(os.getpid(), signal.SIGKILL)
print("stopped at step 3; the same command goes on from there" if count == 2 else "finished")
"""


def test_a_run_is_kept_running_until_it_has_finished(keep_running, tmp_path):
  done = keep_running(RUNS)
  assert done.returncode == 0
  assert [line for line in (tmp_path / "log").read_text().splitlines() if ":" in line] == [
    "keep_running: status 75, restart 1",
    "keep_running: status 137, restart 2",
    "keep_running: status 0, restart 3",
  ]
  assert done.stdout.endswith("finished\n")
  assert keep_running("raise SystemExit(1)").returncode == 1  # for the user to mend
  assert keep_running("raise SystemExit(75)", MAX_RESTARTS="0").returncode == 75
