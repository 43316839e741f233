"""Detectors of training runs, loaded by `lip_jax.load`, and what they find in images."""

import json
import shutil

import fixture_boxes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_detector_runs import make_detector, write
from flax import nnx
from PIL import Image

import lip_jax
from lip_jax import cli, visualize
from lip_jax.detection import categories, prediction
from lip_jax.detection.inputs import normalize
from lip_jax.detection.task import Detection
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.export import folders
from lip_jax.models.description import flat_variables
from lip_jax.models.layers import BATCH_NORM
from lip_jax.training import config as config_lib
from lip_jax.training import train_state


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Images with boxes, and a run whose detector has arbitrary weights."""
  folder = tmp_path_factory.mktemp("place")
  write(folder / "run", fixture_boxes.write(folder, count=9))
  return folder


@pytest.fixture(scope="module")
def loaded(place):
  return lip_jax.load(place / "run")


def test_a_run_is_loaded_with_what_it_says(place, loaded):
  detector, config = loaded
  assert config["task"] == "detection"
  assert (config["num_classes"], config["class_names"]) == (2, ["bird", "cat"])
  assert config["category_ids"] == [7, 200]
  assert config["preprocess"] == {
    "short_side": 48, "long_side": 64, "mean": [128.0] * 3, "std": [64.0] * 3
  }  # fmt: skip
  assert config["evaluation"]["AP"] == 0.25
  assert config["source"]["step"] == 4
  ours, theirs = flat_variables(make_detector()), flat_variables(detector)
  assert list(ours) == list(theirs)
  for name, variable in theirs.items():
    np.testing.assert_array_equal(variable[...], ours[name][...], err_msg=name)
  norms = [part for _, part in nnx.iter_modules(detector) if hasattr(part, "use_running_average")]
  assert norms
  assert all(norm.use_running_average for norm in norms)
  assert detector.mask_detection
  half, _ = lip_jax.load(place / "run" / "checkpoints" / "4", dtype=jnp.bfloat16)
  assert half.fpn.laterals[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ("file", "change", "message"),
  [
    ("config.json", {"head_convs": 10**6}, "head_convs must be at most 100, got 1000000"),
    ("config.json", {"fpn_channels": 10**6}, "does not fit retinanet"),
    ("config.json", {"fpn_channels": 10**9}, "option fpn_channels is 1000000000"),
    ("config.json", {"name": "yolo"}, "unknown detector 'yolo'"),
    ("config.json", {"preset": "x"}, "unknown preset 'x'"),
    ("config.json", {"preset": [1]}, "unknown preset"),
    ("config.json", {"backbone": None}, "config.model lacks backbone"),
    ("config.json", {"dtype": "float64"}, "dtype is not among the options"),
    ("config.json", {"strides": 3}, "unknown option strides"),
    ("classes.json", {"class_names": ["a"] * 3}, "has 3 class names for 2 classes"),
    ("categories.json", {"category_ids": [1, 1]}, "expected 2 different whole numbers"),
    ("categories.json", {"category_ids": [1, 2, 3]}, "expected 2 different whole numbers"),
    ("categories.json", {"category_ids": {"a": 1}}, "expected 2 different whole numbers"),
  ],
)
def test_hostile_runs(place, tmp_path, file, change, message):
  run = shutil.copytree(place / "run", tmp_path / "run")
  values = json.loads((run / file).read_text())
  (values["model"] if file == "config.json" else values).update(change)
  (run / file).write_text(json.dumps(values))
  with pytest.raises(UsageError, match=message) as caught:
    lip_jax.load(run)
  assert len(str(caught.value).splitlines()) == 1


def test_a_run_that_lost_its_names_is_loaded(place, tmp_path):
  run = shutil.copytree(place / "run", tmp_path / "run")
  (run / "classes.json").unlink()
  (run / "categories.json").unlink()
  _, config = lip_jax.load(run)
  assert (config["class_names"], config["category_ids"]) == (None, None)


@pytest.mark.parametrize(
  ("name", "count"),
  [("retinanet", 80), ("retinanet", 91), ("faster_rcnn", 80), ("faster_rcnn", 90)],
)
def test_own_classes_as_many_as_coco_has_or_its_outputs(place, tmp_path, name, count):
  """Of a run, and of the folder that it is exported to: their classes, not COCO's."""
  names = [f"class {k}" for k in range(count)]
  ids = [100 + k for k in range(count)]
  dataset = f"coco:{place}/all.json@{place}/images"
  write(tmp_path / "run", dataset, names, ids, name=name, preset="torchvision")
  of_run = lip_jax.load(tmp_path / "run")
  folders.save(tmp_path / "folder", *of_run)
  for detector, config in (of_run, lip_jax.load(tmp_path / "folder")):
    assert config["num_classes"] == count
    assert (config["class_names"], config["category_ids"]) == (names, ids)
    head = detector.head if name == "retinanet" else detector.box_head
    assert head.class_logits.bias.shape[0] % 91 == 0
    classes = categories.classes(ids, detector.preset, detector.num_labels)
    assert [one for one in classes if one >= 0] == list(range(count))


def test_what_takes_classifiers_refuses_detectors(place, tmp_path, capsys):
  command = ["visualize", place / "run", place / "images/0.jpg", f"--out={tmp_path}/x.png"]
  assert cli.main([str(part) for part in command]) == 1
  assert "this takes classifiers only" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def predicted(capsys, *arguments):
  status = cli.main(["predict", *map(str, arguments)])
  return status, *capsys.readouterr()


def test_boxes_are_those_of_the_image_alone(place, loaded):
  """By hand: resized, normalized, detected, and back; the detector's own size is a bucket's."""
  detector, config = loaded
  with Image.open(place / "images/0.jpg") as image:
    pixels = image.convert("RGB")
  width, height = pixels.size
  scale = min(64 / max(height, width), 48 / min(height, width))
  assert scale != 1
  batch = np.zeros((1, 64, 64, 3), np.uint8)
  size = np.array([[int(height * scale + 0.5), int(width * scale + 0.5)]])
  batch[0, : size[0, 0], : size[0, 1]] = pixels.resize(tuple(size[0, ::-1].tolist()), 2)
  images = normalize(jnp.asarray(batch), jnp.asarray(size), (128.0,) * 3, (64.0,) * 3)
  direct = jax.device_get(jax.jit(lambda x, s: detector.detect(x, s))(images, size))
  # Where rounding decides nothing.
  gap = np.diff(direct.scores[0]).argmin()
  threshold = direct.scores[0][gap : gap + 2].mean()
  keep = direct.valid[0] & (direct.scores[0] >= threshold)
  assert 0 < keep.sum() < 100
  paths = [place / f"images/{k}.jpg" for k in (0, 1, 0)]
  found = list(prediction.predict(detector, config, paths, threshold=threshold))
  np.testing.assert_array_equal(found[0].boxes.boxes, found[2].boxes.boxes)
  assert found[0].pixels.shape == (height, width, 3)
  np.testing.assert_allclose(found[0].boxes.scores, direct.scores[0][keep], rtol=1e-3)
  assert_same_boxes(
    (found[0].boxes.boxes, found[0].boxes.labels),
    (direct.boxes[0][keep] / scale, direct.labels[0][keep]),
    atol=0.5,  # sizes are rounded
  )


def assert_same_boxes(found, expected, atol):
  """In any order: of scores that are equal but for rounding, that decides."""
  ours, theirs = (
    np.concatenate([boxes, 1000 * labels[:, None]], axis=1) for boxes, labels in (found, expected)
  )
  apart = np.abs(ours[:, None] - theirs[None]).max(axis=2)
  assert len(ours) == len(theirs)
  assert max(apart.min(axis=0).max(), apart.min(axis=1).max()) <= atol


def test_importance_is_that_of_the_backbone(loaded):
  detector, _ = loaded
  images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 64, 3)), jnp.float32)
  _, parts = prediction.looker(detector)(images, np.array([[64, 64], [64, 64]]))
  maps = visualize.importance_maps(detector.backbone, images)
  whole = visualize.pixel_importance(maps, detector.backbone, (64, 64))
  assert len(maps) == 2
  for part, one in zip(parts, whole, strict=True):
    np.testing.assert_allclose(part, one / one.mean(), rtol=1e-4)
  # Of an image that ends before its batch: nothing of the padding.
  _, parts = prediction.looker(detector)(images, np.array([[33, 50], [64, 64]]))
  assert parts[0].shape == (33, 50)
  assert parts[0].mean() == pytest.approx(1, rel=1e-5)


def test_nothing_else_is_found_with_folded_norms(place, loaded):
  detector, _ = loaded
  images = jnp.asarray(np.random.default_rng(1).standard_normal((2, 64, 64, 3)), jnp.float32)
  sizes = np.array([[64, 64], [33, 50]])
  found, _ = prediction.looker(detector)(images, sizes)
  expected = jax.device_get(jax.jit(lambda x, s: detector.detect(x, s))(images, sizes))
  np.testing.assert_array_equal(found.valid, expected.valid)
  assert expected.valid.sum() > 100
  np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-5)
  for one, other in zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True):
    assert_same_boxes((one[0], one[2]), (other[0], other[2]), atol=1e-3)
  task = Detection(config_lib.load(place / "run"), num_classes=2)
  mesh = sharding.make_mesh(jax.devices()[:1])
  weights = jax.eval_shape(lambda: train_state.split(detector))
  lowered = task.lower_evaluation(nnx.graphdef(detector), mesh, *weights, "64x64")
  assert f"/{BATCH_NORM}/" not in lowered.as_text(debug_info=True)


def test_the_command(place, tmp_path, capsys):
  image, damaged = place / "images/0.jpg", tmp_path / "damaged.jpg"
  damaged.write_bytes(b"no picture")
  picture, values = tmp_path / "x.png", tmp_path / "d.json"
  options = ("--threshold=.9", f"--output={picture}", "--json", values, "--importance")
  status, out, err = predicted(capsys, place / "run", image, damaged, *options)
  assert (status, out) == (1, "")
  assert err.splitlines()[0].startswith(f"error: cannot read {damaged}: no whole JPEG")
  first, second = json.loads(values.read_text())
  assert first["image"] == str(image)
  assert "no whole JPEG" in second["error"]
  height, width = fixture_boxes.SIZES[0]
  scores = [one["score"] for one in first["boxes"]]
  assert scores == sorted(scores, reverse=True)
  assert min(scores) >= 0.9
  for one in first["boxes"]:
    x1, y1, x2, y2 = one["box"]
    assert 0 <= x1 < x2 <= width
    assert 0 <= y1 < y2 <= height
    assert (one["name"], one["category_id"]) == [("bird", 7), ("cat", 200)][one["label"]]
  with Image.open(picture) as drawn:
    wide = drawn.size[0]
  # The same without the option, in words and without importance.
  options = ("--threshold=.9", f"--output={picture}")
  status, out, err = predicted(capsys, place / "run", image, *options)
  assert status == 0
  lines = out.splitlines()
  assert lines[0] == str(image)
  assert len(lines) == 1 + len(scores)
  assert lines[1].split()[:2] == [f"{100 * scores[0]:.0f}%", first["boxes"][0]["name"]]
  with Image.open(picture) as drawn:
    assert drawn.size[0] < wide
  status, out, _ = predicted(capsys, place / "run", "--json", image, "--threshold=1")
  assert (status, json.loads(out)) == (0, [{"image": str(image), "boxes": []}])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (("--threshold=2",), "--threshold must be from 0 to 1, got 2.0"),
    (("--top=3",), "is a detector, which gives boxes; leave out --top"),
    (("--importance",), "--importance needs a file to draw into; give --output, too"),
    (("--importance=x.png",), "write --output=x.png --importance"),
    (("--output=x.gif",), "x.gif: its name must end in .png"),
    (("--output=x.png", "--importance=y.png"), "name a file each; name one of them"),
    (("--output={image}.png",), "is one of the images, and would be overwritten"),
  ],
)
def test_options_that_do_not_fit(place, tmp_path, capsys, options, message):
  image = shutil.copyfile(place / "images/0.jpg", tmp_path / "a.png")
  options = [option.format(image=tmp_path / "a") for option in options]
  status, out, err = predicted(capsys, place / "run", image, *options)
  assert (status, out) == (1, "")
  assert message in err
  assert len(err.splitlines()) == 1
  assert image.read_bytes() == (place / "images/0.jpg").read_bytes()
