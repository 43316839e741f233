"""The experiment with poolings in a detector: what it trains, keeps and draws."""

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from lip_jax.data.prepare.cluttered_digits import ClutteredDigits

DETECT_SMALL = ClutteredDigits.builder_configs["detect_small"]


@pytest.fixture
def detect_pools(monkeypatch, compilation_cache_after):
  monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
  return importlib.import_module("detect_pools")


def test_networks_differ_in_their_pooling_only(detect_pools):
  args = detect_pools._parse([])
  assert args.seeds == [0, 1, 2, 3, 4]
  configs = [detect_pools.make_config(name, 0, args) for name in detect_pools.NETWORKS]
  for config in configs:
    assert dataclasses.replace(config, model={}) == dataclasses.replace(configs[0], model={})
  different = ("backbone", "pool", "logit_width")
  models = [{k: v for k, v in c.model.items() if k not in different} for c in configs]
  assert all(model == models[0] for model in models)


@pytest.mark.slow
def test_what_others_have_trained_is_taken_and_the_rest_is_trained(
  detect_pools, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(DETECT_SMALL, "num_train", 32)
  monkeypatch.setattr(DETECT_SMALL, "num_validation", 8)
  monkeypatch.setattr(detect_pools, "QUICK_EPOCHS", 1.0)
  monkeypatch.setattr(detect_pools, "QUICK_IMAGES", 8)
  command = ["--quick", "--seeds", "0", "3", f"--data-dir={tmp_path / 'data'}"]
  command += [f"--workdir={tmp_path / 'runs'}"]
  args = detect_pools._parse(command)
  own = ("average", 3)  # compiles in less time than LIP
  ap = iter(np.linspace(0.1, 0.5, 10))  # of each network with seed 0, then with seed 3
  (tmp_path / "runs").mkdir()
  for seed in args.seeds:
    for name in detect_pools.NETWORKS:
      recipe = detect_pools.recipe(detect_pools.make_config(name, seed, args))
      metrics = dict.fromkeys(detect_pools.METRICS, next(ap))
      result = {"recipe": recipe, "parameters": 7, "images": 32, "seconds": 1, "metrics": metrics}
      if (name, seed) != own:
        (tmp_path / "runs" / f"{name}-{seed}.json").write_text(json.dumps(result))
  detect_pools.main(command)
  out = capsys.readouterr().out
  assert "== 7/10: average, seed 3" in out
  assert out.count("==") == 1
  # (10 + 32.2) / 2, and 11.1 of standard error times Student's t of one degree of freedom, 12.7.
  assert "| strided | 7 | 21.1 [-120.1, 162.3] |" in out
  assert "| LIP | 27.8 / 27.8 | 50.0 / 50.0 |" in out
  result = json.loads((tmp_path / "runs" / "average-3.json").read_text())
  assert result["images"] == 32
  assert set(detect_pools.METRICS) < set(result["metrics"])
  assert (tmp_path / "runs" / "detect_pools.png").stat().st_size > 10_000
  detect_pools.main(command)
  assert "==" not in capsys.readouterr().out


def test_the_interval_is_students(detect_pools):
  mean, low, high = detect_pools.interval([1.0, 2.0, 3.0, 4.0, 5.0])
  # t of 4 degrees of freedom at 97.5 % is 2.776, the standard error 0.7071.
  assert (mean, round(low, 3), round(high, 3)) == (3.0, 1.037, 4.963)
  assert np.isnan(detect_pools.interval([1.0])[1])
  assert detect_pools.interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
