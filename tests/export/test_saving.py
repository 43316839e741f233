"""Networks as StableHLO, ONNX and folders, and on a hub that runs here."""

import base64
import contextlib
import dataclasses
import functools
import http.server
import json
import math
import shutil
import threading
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_weights import normal
from flax import nnx

from lip_jax import cli
from lip_jax.data.prepare import cluttered_digits
from lip_jax.errors import UsageError
from lip_jax.export import folders, hub, saving, stablehlo_onnx
from lip_jax.models import abstract_model, lan

NAME = "lip_resnet_small"
OPTIONS = {"width": 8, "logit_width": 4}
SIZE = 48
PREPROCESS = {"image_size": SIZE, "resize": SIZE, "mean": [90.0, 100, 110], "std": [60.0, 65, 70]}
CLASSES = [f"digit {k}" for k in range(10)]
LOAD = {"stablehlo": stablehlo_onnx.load_stablehlo, "onnx": stablehlo_onnx.load_onnx}


@functools.cache
def validation():
  """Images of the embedded data set and their labels."""
  config = cluttered_digits.ClutteredDigits.builder_configs["classify"]
  scenes = [cluttered_digits.draw_scene(config, "validation", k) for k in range(60)]
  return np.stack([scene.image for scene in scenes]), np.array([s.labels[0] for s in scenes])


def reference(model, images):
  """Logits by NumPy's normalization and the model as it is."""
  normalized = (images - np.float32(PREPROCESS["mean"])) / np.float32(PREPROCESS["std"])
  return np.asarray(jax.jit(lambda x: model(x))(jnp.asarray(normalized, jnp.float32)))


def make_model(name, options, num_classes):
  """A network with arbitrary weights, in evaluation mode."""
  model = abstract_model(name, num_classes=num_classes, **options)
  for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
    noise = normal(".".join(map(str, path)), variable.shape)
    if len(variable.shape) > 1:  # a kernel: variance 2 / fan_in
      noise *= np.float32(math.sqrt(2 / math.prod(variable.shape[:-1])))
    else:
      noise = (path[-1] in ("scale", "var")) + 0.1 * np.abs(noise)
    variable.set_value(jnp.asarray(noise))
  model.eval()
  return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A network with arbitrary weights that tells the images apart."""
  model = make_model(NAME, OPTIONS, num_classes=10)
  images, _ = validation()
  logits = reference(model, images)
  gain = 1 / logits.std(axis=0)
  model.fc.kernel.set_value(model.fc.kernel[...] * gain[None])
  model.fc.bias.set_value((model.fc.bias[...] - logits.mean(axis=0)) * gain)
  path = tmp_path_factory.mktemp("networks") / "folder"
  network = {"model": {"name": NAME, **OPTIONS}, "num_classes": 10}
  folders.save(path, model, {**network, "preprocess": PREPROCESS, "class_names": CLASSES})
  return path


@pytest.fixture(scope="module")
def expected(folder):
  model, _ = folders.load(folder)
  return reference(model, validation()[0])


def names(path):
  return sorted(entry.name for entry in path.iterdir())


def needs(form):
  if form == "onnx":
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("form", ["stablehlo", "onnx"])
def test_files_evaluate_as_the_model_does(form, folder, expected, tmp_path, capsys):
  needs(form)
  path = tmp_path / f"network.{form}"
  assert cli.main(["export", str(folder), str(path)]) == 0
  printed = capsys.readouterr().out
  assert f"{path}: " in printed
  assert "takes uint8 RGB images [N, 48, 48, 3]; read back and run by" in printed
  assert names(tmp_path) == [path.name]

  call, config = LOAD[form](path)
  images, labels = validation()
  logits = np.concatenate([call(images[:50]), call(images[50:])])
  assert logits.dtype == np.float32
  assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
  counts = [(found.argmax(axis=1) == labels).sum() for found in (logits, expected)]
  assert counts[0] == counts[1]
  assert len(set(expected.argmax(axis=1))) > 5  # so the counts could differ
  assert config["class_names"] == CLASSES
  assert config["preprocess"] == PREPROCESS
  assert config["input"] == {
    "dtype": "uint8",
    "shape": ["batch", SIZE, SIZE, 3],
    "normalized": False,
  }


def test_stablehlo_needs_nothing_but_jax_and_is_for_all_platforms(folder, expected, tmp_path):
  path = tmp_path / "network"
  saving.write(folder, path, form="stablehlo")
  with zipfile.ZipFile(path) as archive:
    network = jax.export.deserialize(bytearray(archive.read("network.bin")))
  assert network.platforms == ("cpu", "cuda", "tpu")
  assert str(network.in_avals[0]) == f"uint8[batch,{SIZE},{SIZE},3]"
  logits = network.call(validation()[0][:3])
  np.testing.assert_allclose(logits, expected[:3], atol=1e-4 * np.abs(expected).max())
  # What was written for TPUs is inside, too: sums over windows in place of slices.
  assert "reduce_window" in network.mlir_module()


def test_a_folder_of_half_the_size_with_its_evaluation(folder, expected, tmp_path):
  results = {"data": "digits", "top1": 0.5, "top5": 0.75, "loss": 1.0, "count": 60}
  record = tmp_path / "results.json"
  record.write_text(json.dumps({**results, "model": {"name": NAME, **OPTIONS}}))
  out = tmp_path / "out"
  report = saving.write(folder, out, dtype="bfloat16", image_size=64, evaluation=record)
  assert report.difference < 1e-4
  assert report.size < 0.6 * (folder / "model.safetensors").stat().st_size
  model, config = folders.load(out)
  assert config["preprocess"] == {**PREPROCESS, "image_size": 64, "resize": 64}
  assert config["evaluation"] == results
  logits = reference(model, validation()[0])
  assert 0 < np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()
  record.write_text(json.dumps({**results, "model": {"name": "resnet18"}}))
  with pytest.raises(UsageError, match=r"evaluation is of \{'name': 'resnet18'\}"):
    saving.write(folder, tmp_path / "other", evaluation=record)
  assert names(tmp_path) == ["out", "results.json"]


def test_what_does_not_agree_is_not_kept(folder, tmp_path, monkeypatch):
  needs("onnx")
  from lip_jax.export import onnx_graph

  path = tmp_path / "network.onnx"
  path.write_bytes(b"the one before")
  # A fault in the converter: the gate of the logits is another function.
  monkeypatch.setitem(onnx_graph._RULES, "tanh", onnx_graph._RULES["logistic"])
  with pytest.raises(UsageError, match=r"differs from the model by .* nothing is kept"):
    saving.write(folder, path, overwrite=True)
  monkeypatch.delitem(onnx_graph._RULES, "tanh")
  with pytest.raises(UsageError, match=r"cannot be written as ONNX: tanh of float32\[batch"):
    saving.write(folder, path, overwrite=True)
  assert names(tmp_path) == ["network.onnx"]
  assert path.read_bytes() == b"the one before"


def test_without_preprocessing_files_take_normalized_images(tmp_path):
  options = {"width": 2, "stage_sizes": (1, 1, 1, 1)}
  model = make_model("resnet_small", options, num_classes=3)
  config = {"model": {"name": "resnet_small", **options}, "num_classes": 3}
  folders.save(tmp_path / "f", model, config)
  with pytest.raises(UsageError, match=r"does not say how .* give the image size"):
    saving.write(tmp_path / "f", tmp_path / "n.stablehlo")
  saving.write(tmp_path / "f", tmp_path / "n.stablehlo", image_size=32)
  call, config = stablehlo_onnx.load_stablehlo(tmp_path / "n.stablehlo")
  assert config["input"]["dtype"] == "float32"
  images = np.random.default_rng(0).standard_normal((3, 32, 32, 3)).astype(np.float32)
  expected = jax.jit(lambda x: model(x))(images)
  np.testing.assert_allclose(call(images), expected, rtol=1e-4, atol=1e-4)


def test_errors_leave_nothing(folder, tmp_path, monkeypatch):
  (tmp_path / "taken.stablehlo").write_bytes(b"no archive")
  number = tmp_path / "number.json"
  number.write_text("5")
  for out, options, message in (
    ("taken.stablehlo", {}, "exists; choose another file, or say to overwrite it"),
    ("x.onnx", {"form": "folder"}, "looks like a file"),
    ("x.onnx", {"form": "stablehlo"}, "looks like a file of onnx, but format stablehlo was given"),
    ("x", {"form": "tflite"}, "unknown format 'tflite'; choose one of folder, stablehlo, onnx"),
    ("x", {"dtype": "int8"}, "unknown dtype 'int8'"),
    ("x.stablehlo", {"evaluation": "e.json"}, "can be kept in a folder only"),
    ("x", {"evaluation": tmp_path / "e.json"}, "cannot read the evaluation"),
    ("x", {"evaluation": number}, "cannot read the evaluation .*a int, expected an object"),
  ):
    with pytest.raises(UsageError, match=message):
      saving.write(folder, tmp_path / out, **options)
  with pytest.raises(UsageError, match=r"cannot read .*taken.stablehlo: it is damaged"):
    stablehlo_onnx.load_stablehlo(tmp_path / "taken.stablehlo")
  for content, config in ((b"", "{}"), (b"x" * 99, "{}"), (b"", "[1]")):
    with zipfile.ZipFile(tmp_path / "other.stablehlo", "w") as archive:
      archive.writestr("network.bin", content)
      archive.writestr("config.json", config)
    with pytest.raises(UsageError, match=r"other.stablehlo.* is damaged"):
      stablehlo_onnx.load_stablehlo(tmp_path / "other.stablehlo")
  (tmp_path / "other.stablehlo").unlink()
  monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
  with pytest.raises(UsageError, match=r"needs the packages of lip-jax\[onnx\]"):
    saving.write(folder, tmp_path / "x.onnx")
  assert names(tmp_path) == ["number.json", "taken.stablehlo"]


WINDOWS = {"window": 3, "stride": 2, "padding": 1}
POOLS = {
  "average": lan.AveragePool(**WINDOWS),
  "max": lan.MaxPool(**WINDOWS),
  "strided": lan.StridedPool(window=2, stride=2, padding=0),
  "exp": lan.ExpPool(2.0, **WINDOWS),
  "soft": lan.SoftPool(**WINDOWS),
  "lp": lan.LpPool(3.0, **WINDOWS),
  "full": lan.DetailPreservingPool(6, full=True, **WINDOWS),
  "lite": lan.DetailPreservingPool(6, symmetric=False, **WINDOWS),
}


@pytest.mark.parametrize("name", POOLS)
def test_every_pooling_as_onnx(name):
  needs("onnx")
  import onnxruntime

  from lip_jax.export import onnx_graph

  def network(images):
    x = jnp.concatenate([images, -images], axis=3)
    return POOLS[name](x).sum(axis=(1, 2))

  (batch,) = jax.export.symbolic_shape("batch")
  model = onnx_graph.to_onnx(network, jax.ShapeDtypeStruct((batch, 7, 8, 3), jnp.float32))
  session = onnxruntime.InferenceSession(model.SerializeToString())
  images = np.random.default_rng(0).standard_normal((3, 7, 8, 3)).astype(np.float32)
  images[1, :4] = 0
  (found,) = session.run(None, {"images": images})
  np.testing.assert_allclose(found, jax.jit(network)(images), rtol=1e-5, atol=1e-5)


@dataclasses.dataclass
class Hub:
  """What a hub was sent."""

  address: str
  created: list = dataclasses.field(default_factory=list)
  files: dict = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def running_hub(token):
  """The few endpoints that an upload of small files takes, over HTTP."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = self.rfile.read(int(self.headers.get("content-length", 0)))
      if self.headers.get("authorization") != f"Bearer {token}":
        return self._answer(401, {"error": "Invalid credentials"})
      if self.path == "/api/repos/create":
        state.created.append(json.loads(body))
        return self._answer(200, {"url": f"{state.address}/me/net"})
      if self.path == "/api/validate-yaml":
        return self._answer(200, {"errors": [], "warnings": []})
      if self.path == "/api/models/me/net/preupload/main":
        files = [
          {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
          for file in json.loads(body)["files"]
        ]
        return self._answer(200, {"files": files})
      if self.path == "/api/models/me/net/commit/main":
        for line in map(json.loads, body.splitlines()):
          if line["key"] == "file":
            state.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._answer(
          200, {"commitUrl": f"{state.address}/me/net/commit/1", "commitOid": "1" * 40}
        )
      return self._answer(404, {"error": self.path})

    def _answer(self, status, values):
      content = json.dumps(values).encode()
      self.send_response(status)
      self.send_header("content-type", "application/json")
      self.send_header("content-length", str(len(content)))
      self.end_headers()
      self.wfile.write(content)

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    state = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      yield state
    finally:
      server.shutdown()
      thread.join()


def test_a_folder_goes_to_the_hub_with_its_card(folder, tmp_path, monkeypatch, capsys):
  pytest.importorskip("huggingface_hub")
  monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
  with running_hub("good") as server:
    for token in ("bad", "good"):
      push = functools.partial(hub.push, folder, "me/net", endpoint=server.address, token=token)
      if token == "bad":
        with pytest.raises(
          UsageError, match=r"does not let this token write me/net \(status 401\)"
        ):
          push()
        assert not server.created
      else:
        assert push(private=True).startswith(server.address)
  assert server.created[0]["visibility"] == "private"
  assert sorted(server.files) == ["README.md", "config.json", "model.safetensors"]
  for file in ("config.json", "model.safetensors"):
    assert server.files[file] == (folder / file).read_bytes()
  capsys.readouterr()
  assert cli.main(["push", str(folder), "me/net", "--dry-run"]) == 0
  printed = capsys.readouterr().out
  assert printed.startswith(server.files["README.md"].decode())
  assert f"would upload README.md: {len(server.files['README.md']):,} bytes" in printed


def test_the_card_says_what_the_network_is(folder, tmp_path):
  out = tmp_path / "net"
  shutil.copytree(folder, out)
  config = json.loads((out / "config.json").read_text())
  config["evaluation"] = {"data": 'a"b: c', "top1": 0.9123, "top5": 0.99, "loss": 1, "count": 2000}
  config["class_names"][0] = "<img> # no heading | `"
  (out / "config.json").write_text(json.dumps(config))
  model, _ = folders.load(out)
  parameters = sum(math.prod(v.shape) for v in jax.tree.leaves(nnx.state(model, nnx.Param)))
  card = hub.preview(out, "me/net").card
  for part in (
    'lip_jax.load("hf://me/net")',
    f"| parameters | {parameters:,} |",
    "| multiply-adds, one image of 48 px |",
    "the central 48 x 48 are cut out, the mean (90, 100, 110) is subtracted",
    "10: \\<img\\> # no heading \\| \\`, digit 1,",
    "| top-1 | 91.23 % |",
    "## Licence\n\napache-2.0",
    "@inproceedings{gao2019lip,",
    '"name": "a\\"b: c"',
  ):
    assert part in card
  with pytest.raises(UsageError, match="'net' is not of the form ORGANISATION/NAME"):
    hub.preview(out, "net")
