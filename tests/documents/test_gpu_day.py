"""benchmarks/gpu_day.sh, at tiny sizes on the CPU, so that it runs on the day that it is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixture_xla import QUICK

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_gpu_day(tmp_path):
  env = {**os.environ, "TINY": "1", "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
  env["XLA_FLAGS"] = QUICK
  command = ["bash", str(ROOT / "benchmarks" / "gpu_day.sh"), str(tmp_path)]
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  page = (tmp_path / "page.md").read_text()
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert {step["name"]: step["status"] for step in summary["steps"]} == dict.fromkeys(
    ("kernel_check", "pool", "train_step", "inference", "detectors"), 0
  ), page
  assert all(step["result"]["rows"] for step in summary["steps"])
  assert "| shape | implementation | forward, ms |" in page
