"""Detectors as folders and files to share, and what reads them back."""

import dataclasses
import functools
import json
import re
import shutil
import zipfile

import fixture_boxes
import jax
import numpy as np
import optax
import pytest
from fixture_detection import assert_same_detections
from fixture_detector_runs import MODEL, make_detector, write

import lip_jax
from lip_jax import cli
from lip_jax.detection import sharing
from lip_jax.detection.inputs import normalize
from lip_jax.detection.task import Detection
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.export import folders, inference, stablehlo_onnx
from lip_jax.export.torch_convert import convert_weights
from lip_jax.models.description import flat_variables
from lip_jax.training import config as config_lib
from lip_jax.training import train_state

PREPROCESS = {"short_side": 48, "long_side": 64, "mean": [128.0] * 3, "std": [64.0] * 3}
SIZES = np.array([[64, 64], [40, 33], [64, 64]], np.int32)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  """A detector's run, its data set, and its exported folder, by the detector's name."""

  @functools.cache
  def make(name):
    folder = tmp_path_factory.mktemp(name)
    write(folder / "run", fixture_boxes.write(folder, count=9), name=name)
    assert cli.main(["export", str(folder / "run"), str(folder / "exported")]) == 0
    return folder

  return make


@pytest.fixture
def place(places, request):
  return places(getattr(request, "param", "retinanet"))


both = pytest.mark.parametrize("place", ["retinanet", "faster_rcnn"], indirect=True)


def run(capsys, *arguments):
  status = cli.main([str(part) for part in arguments])
  captured = capsys.readouterr()
  assert status == 0, captured.err
  return captured.out


def pictures(name):
  """Images and sizes; for two stages none of one colour, of whose regions rounding would choose."""
  images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
  images[2] = 128
  count = 2 if name == "faster_rcnn" else 3
  return images[:count], SIZES[:count]


@both
def test_a_folder_is_what_the_run_was(place):
  (ours, before), (theirs, after) = (lip_jax.load(place / name) for name in ("run", "exported"))
  keys = ("task", "model", "num_classes", "class_names", "category_ids", "preprocess", "evaluation")
  before["model"] = {**before["model"], "lip_stages": ["c4"]}
  assert {key: after[key] for key in keys} == {key: before[key] for key in keys}
  assert after["source"]["step"] == 4
  weights = flat_variables(theirs)
  for name, variable in flat_variables(ours).items():
    np.testing.assert_array_equal(variable[...], weights[name][...], err_msg=name)


@both
def test_predict_and_evaluate_read_the_folder(place, capsys):
  found = [
    run(capsys, "predict", place / name, place / "images/0.jpg", "--threshold=.2", "--json")
    for name in ("run", "exported")
  ]
  assert found[0] == found[1]
  assert json.loads(found[0])[0]["boxes"]
  dataset = f"--data={json.loads((place / 'run/config.json').read_text())['data']['dataset']}"
  options = ["--split=all", "--batch-size=8", "--json"]
  scores = [
    json.loads(run(capsys, "evaluate", place / "run", *options)),
    json.loads(run(capsys, "evaluate", place / "exported", dataset, *options)),
  ]
  assert scores[0]["AP_by_class"] == scores[1]["AP_by_class"]
  assert scores[0]["count"] == scores[1]["count"] == 9
  assert cli.main(["evaluate", str(place / "exported")]) == 1
  assert "names no data set; say which (--data)" in capsys.readouterr().err


def test_the_hub_shows_and_gives_a_detector(place, tmp_path, capsys, monkeypatch):
  """The results of `evaluate --json` are in the card; what the hub's cache holds is loaded."""
  path = place / "exported"
  scores = run(capsys, "evaluate", place / "run", "--split=all", "--batch-size=8", "--json")
  (tmp_path / "scores.json").write_text(scores)
  run(capsys, "export", path, tmp_path / "folder", f"--evaluation={tmp_path / 'scores.json'}")
  card = run(capsys, "push", tmp_path / "folder", "me/birds", "--dry-run")
  scores = json.loads(scores)
  for part in (
    'pipeline_tag: "object-detection"',
    "retinanet, an object detector for 2 classes",
    'model, config = lip_jax.load("hf://me/birds")\nfound = model.detect(images, sizes)',
    "backbone='lip_resnet_small'",
    "a shorter side of at most 48 and a longer one of at most 64 pixels",
    "2: bird, cat. `config.json` has all, in the order of the labels.",
    f"| AP50 | {100 * scores['AP50']:.1f} |",
    "| AP, large objects | no such object |",
    f'{{"type": "mAP", "name": "AP", "value": {scores["AP"]}}}',
  ):
    assert part in card
  constants = pytest.importorskip("huggingface_hub.constants")
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  repository = tmp_path / "cache" / "models--me--birds"
  (repository / "refs").mkdir(parents=True)
  (repository / "refs" / "main").write_text("abc123")
  shutil.copytree(path, repository / "snapshots" / "abc123")
  detector, config = lip_jax.load("hf://me/birds")
  assert (config["task"], config["category_ids"]) == ("detection", [7, 200])
  assert (config["source"]["kind"], config["source"]["revision"]) == ("hub", "abc123")
  weights = flat_variables(lip_jax.load(path)[0])
  for name, variable in flat_variables(detector).items():
    np.testing.assert_array_equal(variable[...], weights[name][...], err_msg=name)


def test_submission_of_images_without_annotations(place, tmp_path, capsys):
  values = fixture_boxes.content(9)
  del values["annotations"]
  fixture_boxes.write(tmp_path, values)
  (tmp_path / "all.json").rename(tmp_path / "image_info_test-dev2017.json")
  data = f"--data=coco:{tmp_path}/image_info_test-dev2017.json@{tmp_path}/images"
  path = tmp_path / "test-dev.zip"
  arguments = ["evaluate", place / "run", data, "--split=all", f"--submission={path}"]
  arguments.append(f"--save-detections={tmp_path / 'd.json'}")
  printed = run(capsys, *arguments)
  assert "there are no annotations to compare with" in printed
  assert f"{path} is for COCO's evaluation server" in printed
  with zipfile.ZipFile(path) as archive:
    assert archive.namelist() == ["detections_test-dev2017_lip_results.json"]
    rows = json.loads(archive.read(archive.namelist()[0]))
  assert rows == json.loads((tmp_path / "d.json").read_text())
  assert {row["image_id"] for row in rows} == set(range(9))
  assert {row["category_id"] for row in rows} <= {7, 200}
  before = path.read_bytes()
  for name, message in ((path, "exists; choose another file"), ("x.json", "ends with .zip")):
    arguments[4] = f"--submission={name}"
    assert cli.main(list(map(str, arguments))) == 1
    assert message in capsys.readouterr().err
  assert path.read_bytes() == before
  # With annotations it is scored, too.
  scored = ["evaluate", place / "run", "--split=all", f"--submission={path}", "--overwrite"]
  assert "AP50: " in run(capsys, *scored)


def see_nothing(detector):
  """Objects nowhere; of two stages the first finds no more than before, the second background."""
  two_stages = hasattr(detector, "box_head")
  bias = (detector.box_head if two_stages else detector.head).class_logits.bias
  bias.set_value(bias[...].at[:1].add(1000) if two_stages else bias[...] - 1000)


@both
@pytest.mark.parametrize("nothing", [False, True])
def test_files_find_what_the_model_does(nothing, place, tmp_path, capsys):
  """Images of two sizes in one batch, and a detector that sees objects nowhere."""
  source = place / "exported"
  if nothing:
    detector, config = lip_jax.load(source)
    see_nothing(detector)
    source = tmp_path / "nothing"
    folders.save(source, detector, config)
  path = tmp_path / "detector.stablehlo"
  printed = run(capsys, "export", source, path)
  assert "takes uint8 RGB images [N, 64, 64, 3] and their sizes [N, 2]" in printed
  said = "detections are chosen by (0.0001 is" if nothing else "px (0.01 is"
  assert f"{said} allowed)" in printed
  call, config = stablehlo_onnx.load_stablehlo(path)
  assert config["category_ids"] == [7, 200]
  assert config["outputs"] == ["boxes", "scores", "labels", "valid"]
  detector, _ = lip_jax.load(source)
  images, sizes = pictures(config["model"]["name"])
  pixels = normalize(images, sizes, [128.0] * 3, [64.0] * 3)
  expected = jax.device_get(jax.jit(lambda x, s: detector.detect(x, s))(pixels, sizes))
  found = call(images, sizes)
  assert found[3].any() != nothing
  assert_same_detections(found, expected)
  # Another number of images.
  assert_same_detections(call(images[1:2], sizes[1:2]), [a[1:2] for a in found])


def test_the_check_sees_what_differs(place):
  """Detections that are gone, moved, of another score or label, or that should be suppressed."""
  network = sharing.prepare(*lip_jax.load(place / "exported"))
  images, sizes = pictures("retinanet")
  expected = jax.device_get(jax.jit(network.function)(images, sizes))
  assert expected[3][0].all()
  same, tolerance, _ = network.compare(expected, expected, "float32")
  assert same == 0
  for name, place_in_image, change in (
    ("valid", slice(None), lambda valid: False),
    ("boxes", slice(None), lambda boxes: boxes + 0.1),
    ("scores", 0, lambda score: score - 0.01),
    ("labels", 0, lambda label: 1 - label),
    ("all", -1, None),
  ):
    found = [array.copy() for array in expected]
    if change is None:  # the best once more, almost
      for array in found:
        array[0, -1] = array[0, 0]
      found[0][0, -1] += 0.5
    else:
      array = found[network.config["outputs"].index(name)][0]
      array[place_in_image] = change(array[place_in_image])
    assert network.compare(tuple(found), expected, "float32")[0] > tolerance, name


def test_another_network_is_refused_where_all_scores_are_the_same(place):
  """Detections tell nothing then; what they are chosen by does."""
  networks = []
  for scale in (1, 1.01):
    detector, config = lip_jax.load(place / "exported")
    bias, kernel = detector.head.class_logits.bias, detector.fpn.outputs[0].kernel
    bias.set_value(bias[...] + 1000)
    kernel.set_value(scale * kernel[...])
    networks.append(sharing.prepare(detector, config))
  ours, theirs = networks

  def written(function):
    return jax.jit((theirs if function is ours else theirs.inside).function)

  with pytest.raises(UsageError, match=r"differs from the model .* detections are chosen by"):
    inference.check(written, ours)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"task": "yoga"}, "task is yoga, expected one of detection"),
    ({"preprocess": None}, "preprocess is None, expected an object"),
    ({"preprocess": {**PREPROCESS, "short_side": 10**9}}, "preprocess.short_side is 1000000000"),
    ({"preprocess": {**PREPROCESS, "mean": ["a"]}}, "preprocess.mean is"),
    ({"category_ids": [1, 1]}, "expected 2 different whole numbers"),
    ({"model": {**MODEL, "fpn_channels": 16}}, "does not fit retinanet"),
    ({"model": {**MODEL, "head_convs": 10**6}}, "head_convs must be at most 100"),
  ],
)
def test_hostile_folders(place, tmp_path, change, message):
  folder = tmp_path / "folder"
  folder.mkdir()
  (folder / "model.safetensors").write_bytes((place / "exported/model.safetensors").read_bytes())
  config = json.loads((place / "exported/config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**config, **change}))
  with pytest.raises(UsageError, match=message) as caught:
    lip_jax.load(folder)
  assert len(str(caught.value).splitlines()) == 1


def as_published(name):
  """A name of torchvision's released file, which is older than its code."""
  name = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d+)\.0\.", r"\1.", name)
  return re.sub(r"(_head\.conv)\.(\d+)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", name)


@pytest.mark.parametrize("preset", ["torchvision", "mmdet1"])
def test_published_weights_there_and_back(preset, tmp_path):
  """COCO's classes, by the file alone; the same bits under the names of each project."""
  detector = make_detector(80, preset=preset, head_convs=1)
  weights = lip_jax.to_torch_state_dict(detector)
  rename = as_published if preset == "torchvision" else lambda name: f"module.{name}"
  np.savez(tmp_path / "w.npz", **{rename(name): array for name, array in weights.items()})
  options = {key: value for key, value in MODEL.items() if key != "name"}
  options |= {"head_convs": 1, "preset": preset}
  flags = [f"--option={key}={value}" for key, value in options.items() if key != "lip_stages"]
  flags += ["--option=lip_stages=['c4']"]
  source, folder, back = (str(tmp_path / name) for name in ("w.npz", "folder", "back.npz"))
  assert cli.main(["convert", source, folder, "--model=retinanet", *flags]) == 0
  config = json.loads((tmp_path / "folder/config.json").read_text())
  assert (config["num_classes"], config["class_names"][0]) == (80, "person")
  assert config["category_ids"][-1] == 90
  assert cli.main(["convert", folder, back]) == 0
  with np.load(back) as arrays:
    assert set(arrays) == set(weights)
    for name, array in weights.items():
      assert arrays[name].tobytes() == array.tobytes(), name
  other = {"torchvision": "mmdet1", "mmdet1": "torchvision"}[preset]
  with pytest.raises(UsageError, match=r"num_classes|classes"):
    convert_weights(source, tmp_path / "no", model="retinanet", **options | {"preset": other})
  assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("same", [True, False])
def test_fine_tuning_from_a_detector(same, place, tmp_path, caplog):
  """The head is replaced, and said, where the classes are others; weights are frozen by name."""
  values = fixture_boxes.content(9)
  if not same:
    values["categories"][0]["name"] = "dog"
  dataset = fixture_boxes.write(tmp_path, values)
  run_config = config_lib.load(place / "run")
  config = dataclasses.replace(
    run_config,
    data=dataclasses.replace(run_config.data, dataset=dataset),
    frozen=("backbone", "fpn.laterals.0"),
  )
  task = Detection(config)
  caplog.set_level("INFO", "lip_jax")
  state = jax.jit(lambda: train_state.init(optax.identity(), 1, 1, task.create_model))()
  state = jax.device_put(state, sharding.replicated(sharding.make_mesh()))
  for source in (place / "run", place / "exported"):
    filled = task.start_from(source, state)
    theirs = flat_variables(lip_jax.load(source)[0])
    equal = {
      jax.tree_util.keystr(path, simple=True, separator="."): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(filled.params)
    }
    other = {name for name, leaf in equal.items() if not np.array_equal(leaf, theirs[name][...])}
    assert other == (set() if same else {"head.class_logits.kernel", "head.class_logits.bias"})
  said = caplog.text
  assert ("new, for 2 classes: head.class_logits.bias" in said) == (not same)
  assert not task.trainable(("backbone", "conv1", "kernel"))
  assert not task.trainable(("fpn", "laterals", 0, "kernel"))
  assert task.trainable(("fpn", "laterals", 1, "kernel"))
