"""The experiment with small objects: what it trains, counts, keeps and draws."""

import dataclasses
import importlib.util
import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from lip_jax.data.prepare.cluttered_digits import ClutteredDigits
from lip_jax.data.prepare.cluttered_scene import SOURCES, draw_scene
from lip_jax.data.preprocess import decode_jpeg
from lip_jax.data.source import open_split

PATH = Path(__file__).parents[2] / "benchmarks" / "small_objects.py"
SIZES = ClutteredDigits.builder_configs["sizes"]


@pytest.fixture(scope="module")
def small_objects(compilation_cache_after):
  spec = importlib.util.spec_from_file_location("small_objects", PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """Where `cluttered_digits/sizes` is made on first use, here with few images."""
  with pytest.MonkeyPatch.context() as patch:
    for name, count in [("num_train", 64), ("num_validation", 8), ("num_condition", 8)]:
      patch.setattr(SIZES, name, count)
    yield str(tmp_path_factory.mktemp("tfds"))


def test_each_condition_is_a_split_of_its_size_and_clutter(data_dir):
  assert len(SIZES.conditions) == 16
  for condition in SIZES.conditions:
    source = open_split("cluttered_digits/sizes", condition.split, data_dir)
    assert len(source) == 8
    record = source[3]
    assert record["id"] == f"{condition.split}/000003"
    scene = draw_scene(SIZES.at(condition), "validation", 3)
    assert [box.height for box in scene.boxes] == [condition.digit_height]
    assert len(scene.sources) - 1 <= condition.fragments
    assert np.abs(decode_jpeg(record["image"]).astype(int) - scene.image).mean() < 8


def test_conditions_show_digits_of_the_validation_writers_only():
  for condition in SIZES.conditions[-2:]:
    used = {i for k in range(40) for i in draw_scene(SIZES.at(condition), "validation", k).sources}
    assert used <= set(SOURCES["validation"])


def test_quick_trial_trains_evaluates_and_is_not_done_again(
  small_objects, data_dir, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(small_objects, "QUICK_STEPS", 2)
  monkeypatch.setattr(small_objects, "QUICK_IMAGES", 8)
  command = ["--quick", "--networks", "average", "--data-dir", data_dir]
  command += ["--workdir", str(tmp_path)]
  small_objects.main(command)
  lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
  (result,) = map(json.loads, lines)
  assert set(result["conditions"]) == {condition.split for condition in SIZES.conditions}
  assert all(found["count"] == 8 for found in result["conditions"].values())
  assert (tmp_path / "small_objects.png").stat().st_size > 10_000
  assert "| average | 86,994 |" in capsys.readouterr().out
  written = (tmp_path / "results.jsonl").stat().st_mtime_ns
  small_objects.main(command)
  assert "== 1/1" not in capsys.readouterr().out
  assert (tmp_path / "results.jsonl").stat().st_mtime_ns == written


def test_networks_differ_in_their_pooling_only(small_objects):
  args = small_objects._parse([])
  recipes = [small_objects.make_config(name, 0, args) for name in small_objects.NETWORKS]
  assert all(
    dataclasses.replace(c, model={}) == dataclasses.replace(recipes[0], model={}) for c in recipes
  )
  model = [{k: v for k, v in c.model.items() if k not in ("pool", "logit")} for c in recipes]
  assert all(options == model[0] for options in model)


def test_mean_and_spread_are_over_seeds(small_objects):
  conditions = SIZES.conditions[:2]
  results = [
    {
      "network": "max",
      "seed": seed,
      "conditions": {c.split: {"top1": top1} for c, top1 in zip(conditions, pair, strict=True)},
    }
    for seed, pair in enumerate([(0.5, 0.7), (0.2, 0.3)])
  ]
  mean, spread = small_objects.accuracy(results, "max", conditions)
  assert mean == pytest.approx(42.5)
  assert spread == pytest.approx(statistics.stdev([60, 25]))
