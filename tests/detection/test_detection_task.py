"""Detection through the loop that trains everything: tiny detectors on an annotation file."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import fixture_boxes
import jax
import numpy as np
import pytest

from lip_jax import cli
from lip_jax.detection import coco_metric
from lip_jax.detection.config import Config, Data
from lip_jax.detection.registry import detector_class
from lip_jax.detection.task import Detection
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.training import config as config_lib
from lip_jax.training import trainer
from lip_jax.training.checkpoint.checkpoints import Checkpoints
from lip_jax.training.config import Optim
from lip_jax.training.train_step import Program

COUNT = 23  # images, which nothing divides


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  return fixture_boxes.write(tmp_path_factory.mktemp("boxes"), count=COUNT)


MODELS = {
  "retinanet": {"name": "retinanet", "head_convs": 0},
  "faster_rcnn": {"name": "faster_rcnn", "fc_features": 16, "num_proposals": 50},
}
TWO_SHAPES = ("64x64", "32x64")


def make_config(dataset, buckets=("64x64",), **changes):
  """Six steps of eight images."""
  model = {
    "backbone": "lip_resnet_small",
    "lip_stages": ("c4",),
    "logit": "projection",
    "width": 4,
    "fpn_channels": 8,
  }
  changed = changes.pop("model", {})
  values = {
    "model": {**model, **MODELS[changed.get("name", "retinanet")], **changed},
    "data": Data(
      dataset=dataset,
      train_split="all",
      validation_split="all",
      short_side=48,
      long_side=64,
      buckets=buckets,
      max_boxes=4,
      num_threads=2,
    ),
    "optim": Optim(base_lr=0.01, base_batch_size=8, clip_norm=35.0),
    "num_epochs": 2,
    "global_batch_size": 8,
    "eval_batch_size": 8,
    "log_every_steps": 1,
    "eval_every_epochs": 2,
    "figure_images": 2,
  }
  return Config(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("detection") / "run"
  return workdir, trainer.train(make_config(dataset, TWO_SHAPES), workdir)


def test_a_run_is_evaluated_and_says_what_it_knows(finished, dataset):
  workdir, result = finished
  assert result.finished
  assert result.metrics["count"] == COUNT
  assert set(coco_metric.NAMES) < set(result.metrics)
  assert 0 <= result.metrics["AP"] <= 1
  assert result.pictures["detections"].read_bytes().startswith(b"\x89PNG")
  assert config_lib.load(workdir) == make_config(dataset, TWO_SHAPES)
  assert any("AP_small -" not in line and "AP_large -" in line for line in result.summary)
  assert json.loads((workdir / "classes.json").read_text())["class_names"] == ["bird", "cat"]
  assert json.loads((workdir / "categories.json").read_text())["category_ids"] == [7, 200]
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  losses = [line["train/loss"] for line in lines if "train/loss" in line]
  assert np.isfinite(losses).all()
  assert losses[-1] < losses[0]


def weights_of(workdir):
  with Checkpoints(workdir, read_only=True) as checkpoints:
    return checkpoints.restore_weights(checkpoints.latest_step)


def test_stopped_and_resumed_it_is_the_same_run(finished, dataset, tmp_path, caplog):
  workdir, result = finished
  config = make_config(dataset, TWO_SHAPES)
  run = trainer.Trainer(Detection(config), trainer.check_access(tmp_path / "run"))
  advance = run._advance

  def stop_after_two(flags):
    advance(flags)
    run.stop.requested = run.step == 2

  run._advance = stop_after_two
  with caplog.at_level(logging.INFO, "lip_jax"), run.open():
    run.restore()
    assert not run.run().finished
  # Its data may have moved meanwhile.
  shutil.copytree(Path(dataset.partition("@")[2]).parent, tmp_path / "moved")
  moved = f"coco:{tmp_path}/moved/all.json@{tmp_path}/moved/images"
  data = dataclasses.replace(config.data, dataset=moved)
  again = trainer.train(dataclasses.replace(config, data=data), tmp_path / "run")
  assert again.metrics == result.metrics
  jax.tree.map(np.testing.assert_array_equal, weights_of(tmp_path / "run"), weights_of(workdir))
  assert 1 <= caplog.text.count("compiling the training step") <= 2  # for a shape, not for a step


@pytest.mark.parametrize(
  ("name", "parts"),
  [
    ("retinanet", [(8, {}), (2, {"accumulation_steps": 4, "fsdp": 2})]),
    ("faster_rcnn", [(8, {})]),
  ],
)
def test_it_is_the_same_on_one_device_and_in_parts(dataset, name, parts):
  """One step of eight images: those whose losses are divided together are in different parts."""

  def step(devices, **changes):
    task = Detection(make_config(dataset, model={"name": name}, **changes))
    program = Program(task, steps_per_epoch=3, devices=jax.devices()[:devices])
    with task.train_loader() as loader:
      batch = sharding.put_batch(next(loader), program.mesh)
    stop = sharding.StopFlags(program.mesh)(False)
    state, metrics = program.update(program.init(), batch, stop)
    return jax.device_get((metrics, state.params))

  expected_metrics, expected = step(1)
  for devices, changes in parts:
    metrics, params = step(devices, **changes)
    for term in ("loss", *detector_class(name).terms):
      np.testing.assert_allclose(metrics[term], expected_metrics[term], rtol=1e-4)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), params, expected
    )


def test_each_image_counts_once_on_any_mesh(finished, dataset):
  """And is found the same in a larger bucket than that of the run."""
  workdir, result = finished
  params, batch_stats = weights_of(workdir)
  batch_stats = jax.tree.map(lambda stat: stat[0], batch_stats)
  found = []
  for devices, batch_size in ((1, 5), (4, 12)):
    task = Detection(make_config(dataset, eval_batch_size=batch_size, figure_images=0))
    graph = Program(task, steps_per_epoch=3, devices=jax.devices()[:1]).graph
    mesh = sharding.make_mesh(jax.devices()[:devices])
    weights = jax.device_put((params, batch_stats), sharding.replicated(mesh))
    metrics = task.evaluator(graph, mesh)(*weights, lambda: False)
    found.append(metrics)
    np.testing.assert_allclose(metrics["AP"], result.metrics["AP"], atol=1e-3)
  assert found[0]["count"] == found[1]["count"] == COUNT


def test_what_is_frozen_stays(dataset, tmp_path):
  config = make_config(dataset, frozen_stages=("stem", "c2"), num_epochs=1, figure_images=0)
  program = Program(Detection(config), steps_per_epoch=3)
  first = jax.device_get(program.init().params)
  trainer.train(config, tmp_path / "run")
  params, batch_stats = weights_of(tmp_path / "run")
  for name in ("conv1", "layer1"):
    jax.tree.map(np.testing.assert_array_equal, params["backbone"][name], first["backbone"][name])
  kernels = [tree["backbone"]["layer2"][0]["spatial"] for tree in (params, first)]
  moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), *kernels)
  assert max(jax.tree.leaves(moved)) > 0
  assert {len(stat) for stat in jax.tree.leaves(batch_stats)} == {1}  # frozen: one for all


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model": {"preset": "mmdet9"}}, "unknown preset 'mmdet9'"),
    ({"model": {"backbone": "resnet51"}}, "unknown model 'resnet51'"),
    ({"model": {"fpn": 3}}, "unknown option fpn"),
  ],
)
def test_networks_that_are_not_there(dataset, changes, message):
  with pytest.raises(UsageError, match=message):
    Detection(make_config(dataset, **changes))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"buckets": ("64",)}, "expected different shapes HEIGHTxWIDTH"),
    ({"buckets": ("64x50",)}, "64x50 must be multiples of 32"),
    ({"long_side": 20}, "long_side=20 must be at least config.data.short_side=48"),
    ({"max_boxes": 0}, "config.data.max_boxes must be"),
  ],
)
def test_data_that_cannot_be(dataset, changes, message):
  values = json.loads(config_lib.to_json(make_config(dataset)))
  values["data"].update(changes)
  with pytest.raises(UsageError, match=message):
    config_lib.from_dict(values)


def test_another_order_of_classes_is_another_run(finished, dataset, tmp_path, files_of):
  workdir, _ = finished
  values = fixture_boxes.content(COUNT)
  values["categories"].reverse()
  other = fixture_boxes.write(tmp_path, values)
  before = files_of(workdir)
  data = dataclasses.replace(make_config(dataset).data, dataset=other)
  with pytest.raises(UsageError, match="holds a run"):
    trainer.train(make_config(dataset, data=data), workdir)
  assert files_of(workdir) == before


def evaluated(capsys, *arguments):
  assert cli.main(["evaluate", *map(str, arguments), "--json"]) == 0
  return json.loads(capsys.readouterr().out)


def test_a_run_and_what_it_found_are_evaluated_by_a_command(finished, dataset, tmp_path, capsys):
  workdir, result = finished
  annotations = dataset.removeprefix("coco:").partition("@")[0]
  found = evaluated(capsys, workdir, "--save-detections", tmp_path / "d.json", "--batch-size", 9)
  assert found["ground_truth"] == annotations
  assert found["count"] == COUNT
  np.testing.assert_allclose(found["AP"], result.metrics["AP"], atol=1e-3)
  assert found["AP"] == pytest.approx(np.mean(list(found["AP_by_class"].values())))
  picture = tmp_path / "curves.png"
  files = ("--detections", tmp_path / "d.json", "--annotations", annotations)
  again = evaluated(capsys, *files, "--curves", picture)
  assert all(again[name] == found[name] for name in coco_metric.NAMES)
  assert picture.read_bytes().startswith(b"\x89PNG")
  assert cli.main(["evaluate", *map(str, files), "--curves", "c.jpeg"]) == 1
  assert "must end in .png" in capsys.readouterr().err


def test_areas_of_sizes_are_told_or_are_in_the_annotations(finished, dataset, tmp_path, capsys):
  workdir, _ = finished
  detections, truth = tmp_path / "d.json", tmp_path / "a.json"
  saving = ("--save-detections", detections, "--save-annotations", truth, "--batch-size", 9)
  found = evaluated(capsys, workdir, "--areas", 90, 110, *saving)
  assert found["area_limits"] == [90, 110]
  assert min(found[f"AR_{size}"] for size in coco_metric.SIZES) >= 0
  annotations = dataset.removeprefix("coco:").partition("@")[0]
  by_file = evaluated(capsys, "--detections", detections, "--annotations", truth)
  told = ("--annotations", annotations, "--areas", 90, 110)
  by_option = evaluated(capsys, "--detections", detections, *told)
  for other in (by_file, by_option):
    assert {name: other[name] for name in found if name in other and name[0] == "A"} == {
      name: value for name, value in found.items() if name[0] == "A"
    }
  default = evaluated(capsys, "--detections", detections, "--annotations", annotations)
  assert default["area_limits"] == [1024, 9216]
  assert default["AR_medium"] == -1
  for areas in (("5", "5"), ("nan", "9"), ("1", "inf")):
    command = ["--detections", str(detections), "--annotations", str(truth), "--areas", *areas]
    assert cli.main(["evaluate", *command]) == 1
    assert "expected two positive numbers, the second one larger" in capsys.readouterr().err
  values = json.loads(truth.read_text())
  truth.write_text(json.dumps({**values, "info": {"area_limits": [1]}}))
  assert cli.main(["evaluate", f"--detections={detections}", f"--annotations={truth}"]) == 1
  assert "info has area_limits [1]; expected two numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "holds no detections"),
    ("{}", "a JSON dict"),
    (
      '[{"image_id": 9223372036854775808, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 1}]',
      "d.json",
    ),
    ('[{"image_id": 1}]', "'category_id'"),
    ('[{"image_id": 1.5, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 1}]', "whole numbers"),
    ('[{"image_id": 99, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 1}]', "image_id 99"),
    ('[{"image_id": 1, "category_id": 7, "bbox": [1, 2, -3, 4], "score": 1}]', "negative size"),
    ('[{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "score": NaN}]', "not finite"),
    ('[{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3], "score": 1}]', "four numbers"),
    ('[{"image_id": 1, "category_id": 7, "bbox": [[1, 2, 3, 4]], "score": 1}]', "four numbers"),
    ('[{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "score": [1]}]', "scores numbers"),
  ],
)
def test_detections_that_cannot_be(text, message, dataset, tmp_path, capsys):
  (tmp_path / "d.json").write_text(text)
  annotations = dataset.removeprefix("coco:").partition("@")[0]
  arguments = ["--detections", str(tmp_path / "d.json"), "--annotations", annotations]
  assert cli.main(["evaluate", *arguments]) == 1
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1


def test_detections_of_unknown_categories_are_left_out(dataset, tmp_path, capsys):
  annotations = dataset.removeprefix("coco:").partition("@")[0]
  values = json.loads(Path(annotations).read_text())["annotations"]
  known = [{**one, "score": 0.5} for one in values]
  file = tmp_path / "d.json"
  file.write_text(json.dumps(known))
  expected = evaluated(capsys, "--detections", file, "--annotations", annotations)
  assert expected["AP"] == 1
  file.write_text(json.dumps([{**known[0], "category_id": 91, "score": 0.9}, *known]))
  command = ["evaluate", "--detections", str(file), "--annotations", annotations, "--json"]
  assert cli.main(command) == 0
  out, err = capsys.readouterr()
  assert json.loads(out) == expected
  assert "1 detections are of categories that the annotations lack, the first of 91" in err
