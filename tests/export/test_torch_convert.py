"""Conversion of weight files to exported folders and back, with the small networks."""

import collections
import json
import shutil
import sys

import numpy as np
import pytest
import safetensors.numpy
from fixture_weights import weight
from flax import nnx

import lip_jax
from lip_jax.errors import UsageError
from lip_jax.export import folders
from lip_jax.export.torch_convert import convert_weights
from lip_jax.export.torch_files import read_torch_checkpoint
from lip_jax.models import abstract_model
from lip_jax.models.torch_names import to_torch_state_dict

OPTIONS = {"resnet_small": {"width": 2}, "lip_resnet_small": {"width": 2, "logit_width": 4}}
NAMES = sorted(OPTIONS)


def state_dict_of(name):
  """Arbitrary weights under PyTorch names."""
  model = abstract_model(name, num_classes=3, **OPTIONS[name])
  for _, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
    variable.set_value(np.zeros(variable.shape, variable.dtype))
  return {key: weight(key, array.shape) for key, array in to_torch_state_dict(model).items()}


@pytest.fixture(scope="module")
def state_dicts():
  return {name: state_dict_of(name) for name in NAMES}


@pytest.fixture(scope="module")
def original(state_dicts, tmp_path_factory):
  folder = tmp_path_factory.mktemp("exported")
  source = write(folder / "w.npz", state_dicts["resnet_small"])
  convert_weights(source, folder / "out", model="resnet_small", width=2)
  return folder


@pytest.fixture
def exported(original, tmp_path):
  """The folder "out" beside the file that it was made from, "w.npz", for one test to change."""
  shutil.copytree(original, tmp_path, dirs_exist_ok=True)
  return tmp_path / "out"


def save_torch(path, state_dict, *, kind="zip", prefix="", wrap=False):
  torch = pytest.importorskip("torch")
  tensors = ((prefix + key, torch.tensor(array)) for key, array in state_dict.items())
  content = collections.OrderedDict(tensors)
  if wrap:
    content = {"epoch": 90, "state_dict": content, "best_acc1": torch.tensor(78.2)}
  torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
  return path


def write(path, state_dict):
  """A file of the kind that its suffix names."""
  if path.suffix == ".npz":
    np.savez(path, **state_dict)
  elif path.suffix == ".safetensors":
    safetensors.numpy.save_file(
      {key: np.asarray(array, order="C") for key, array in state_dict.items()}, path
    )
  else:
    save_torch(path, state_dict)
  return path


def assert_same(arrays, expected):
  assert set(arrays) == set(expected)
  for name, array in expected.items():
    assert arrays[name].dtype == array.dtype, name
    assert arrays[name].shape == array.shape, name
    assert arrays[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
  ("name", "suffix"),
  [("lip_resnet_small", ".npz"), ("resnet_small", ".safetensors"), ("lip_resnet_small", ".pth")],
)
def test_there_and_back_is_exact(name, suffix, state_dicts, tmp_path):
  source = write(tmp_path / f"weights{suffix}", state_dicts[name])
  done = convert_weights(source, tmp_path / "out", model=name, **OPTIONS[name])
  assert done.startswith(f"{source} -> {tmp_path}/out: {name}, 3 classes, ")
  assert done.endswith(" parameters")
  back = tmp_path / f"back{suffix}"
  assert str(back) in convert_weights(tmp_path / "out", back)
  assert_same(read_torch_checkpoint(back), state_dicts[name])
  assert len(list(tmp_path.iterdir())) == 3  # nothing is left beside them


def test_back_and_there_is_exact(exported, tmp_path):
  convert_weights(exported, tmp_path / "weights.npz")
  convert_weights(tmp_path / "weights.npz", tmp_path / "again", model="resnet_small", width=2)
  for file in ("model.safetensors", "config.json"):
    assert (tmp_path / "again" / file).read_bytes() == (exported / file).read_bytes()


def test_pytorch_reads_what_is_written_for_it(exported, state_dicts, tmp_path):
  torch = pytest.importorskip("torch")
  convert_weights(exported, tmp_path / "back.pt")
  loaded = torch.load(tmp_path / "back.pt", weights_only=True)
  assert isinstance(loaded, collections.OrderedDict)
  arrays = {key: tensor.numpy() for key, tensor in loaded.items()}
  assert_same(arrays, state_dicts["resnet_small"])


@pytest.mark.parametrize(
  ("kind", "prefix", "wrap"),
  [("zip", "module.", True), ("legacy", "", False), ("legacy", "module.", True)],
)
def test_prefixes_and_wrappers(kind, prefix, wrap, state_dicts, tmp_path):
  name = "lip_resnet_small"
  source = save_torch(
    tmp_path / "model_best.pth.tar", state_dicts[name], kind=kind, prefix=prefix, wrap=wrap
  )
  convert_weights(source, tmp_path / "out", model=name, **OPTIONS[name])
  model, config = folders.load(tmp_path / "out")
  assert_same(to_torch_state_dict(model), state_dicts[name])
  assert config["num_classes"] == 3
  assert config["model"] == {"name": name, **OPTIONS[name]}
  assert config["preprocess"]["image_size"] == 224
  np.testing.assert_allclose(np.divide(config["preprocess"]["mean"], 255), [0.485, 0.456, 0.406])
  np.testing.assert_allclose(np.divide(config["preprocess"]["std"], 255), [0.229, 0.224, 0.225])


@pytest.mark.parametrize(
  "prefix", ["_orig_mod.", "model.", "backbone.", "encoder.", "module._orig_mod.model.backbone."]
)
def test_what_wraps_a_network_is_taken_off_its_names_and_said(
  prefix, state_dicts, tmp_path, messages
):
  weights = {f"{prefix}{name}": array for name, array in state_dicts["resnet_small"].items()}
  weights["neck.weight"] = np.zeros(3, np.float32)
  source = write(tmp_path / "weights.safetensors", weights)
  convert_weights(source, tmp_path / "out", model="resnet_small", **OPTIONS["resnet_small"])
  assert_same(to_torch_state_dict(folders.load(tmp_path / "out")[0]), state_dicts["resnet_small"])
  (said,) = messages()
  assert prefix in said
  assert "neck.weight" in said
  # Not where it makes nothing fit.
  weights[f"{prefix}layer9.weight"] = np.zeros(3, np.float32)
  write(source, weights)
  with pytest.raises(UsageError, match=f"unexpected {prefix}layer9.weight"):
    convert_weights(source, tmp_path / "o", model="resnet_small", **OPTIONS["resnet_small"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes_become_float32(dtype, state_dicts, tmp_path):
  torch = pytest.importorskip("torch")
  name = "resnet_small"
  tensors = {
    key: torch.tensor(array).to(getattr(torch, dtype) if array.ndim else torch.int64)
    for key, array in state_dicts[name].items()
  }
  torch.save(tensors, tmp_path / "w.pth")
  done = convert_weights(tmp_path / "w.pth", tmp_path / "out", model=name, width=2)
  assert ("rounded from float64" in done) == (dtype == "float64")
  weights = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
  for ours, theirs in (("fc.kernel", "fc.weight"), ("bn1.var", "bn1.running_var")):
    np.testing.assert_array_equal(weights[ours], tensors[theirs].float().numpy().T)


def test_the_model_must_be_named(state_dicts, tmp_path):
  source = write(tmp_path / "w.npz", state_dicts["resnet_small"])
  with pytest.raises(UsageError) as caught:
    convert_weights(source, tmp_path / "out")
  assert all(name in str(caught.value) for name in lip_jax.list_models())
  with pytest.raises(UsageError, match="unknown model 'resnet49'"):
    convert_weights(source, tmp_path / "out", model="resnet49")
  with pytest.raises(UsageError, match="unknown option wide for model 'resnet_small'"):
    convert_weights(source, tmp_path / "out", model="resnet_small", wide=2)
  with pytest.raises(UsageError, match="dtype is not among the options"):
    convert_weights(source, tmp_path / "out", model="resnet_small", dtype="float32")
  assert not (tmp_path / "out").exists()


def test_weights_of_another_network_are_listed(state_dicts, tmp_path):
  source = write(tmp_path / "w.npz", state_dicts["resnet_small"])
  with pytest.raises(UsageError, match=r"missing maxpool\.logit.*unexpected layer2\.0"):
    convert_weights(
      source, tmp_path / "out", model="lip_resnet_small", **OPTIONS["lip_resnet_small"]
    )
  with pytest.raises(UsageError, match=r"shape of fc.bias is \(3,\), expected \(1000,\)"):
    convert_weights(source, tmp_path / "out", model="resnet_small", width=2, num_classes=1000)
  assert not (tmp_path / "out").exists()


def test_without_a_classifier(state_dicts, tmp_path):
  backbone = {k: v for k, v in state_dicts["resnet_small"].items() if not k.startswith("fc")}
  source = write(tmp_path / "w.npz", backbone)
  with pytest.raises(UsageError, match=r"no fc.weight or classifier.weight .* begins with bn1"):
    convert_weights(source, tmp_path / "out", model="resnet_small", width=2)
  with pytest.raises(UsageError, match=r"missing fc.bias"):
    convert_weights(source, tmp_path / "out", model="resnet_small", width=2, num_classes=3)


def test_what_is_there_is_kept(exported, tmp_path):
  source = tmp_path / "w.npz"
  with pytest.raises(UsageError, match=r"out exists; .* overwrite"):
    convert_weights(source, exported, model="resnet_small", width=2)
  convert_weights(source, exported, model="resnet_small", width=2, overwrite=True)
  before = source.read_bytes()
  with pytest.raises(UsageError, match=r"w.npz exists; .* overwrite"):
    convert_weights(exported, source)
  assert source.read_bytes() == before
  source.write_bytes(b"old")
  convert_weights(exported, source, overwrite=True)
  assert len(read_torch_checkpoint(source)) > 20
  (tmp_path / "folder.npz").mkdir()
  with pytest.raises(UsageError, match="is a folder; name a file"):
    convert_weights(exported, tmp_path / "folder.npz", overwrite=True)


def test_places_of_the_wrong_kind(exported, tmp_path):
  with pytest.raises(UsageError, match=r"must be a file that ends in \.safetensors, \.npz, \.pth"):
    convert_weights(exported, tmp_path / "new")
  with pytest.raises(UsageError, match=r"new.npz looks like a file.*name a folder"):
    convert_weights(tmp_path / "w.npz", tmp_path / "new.npz", model="resnet_small", width=2)
  with pytest.raises(UsageError, match="says itself what network it is; leave out model, width"):
    convert_weights(exported, tmp_path / "new.npz", model="resnet_small", width=2)
  with pytest.raises(UsageError, match=r"there is no file or folder .*none"):
    convert_weights(tmp_path / "none", tmp_path / "new.npz")


def test_a_folder_that_is_not_exported(exported, tmp_path):
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  with pytest.raises(UsageError, match="belongs to a training run"):
    convert_weights(tmp_path / "run", tmp_path / "new.npz")
  config = json.loads((exported / "config.json").read_text())
  (exported / "config.json").write_text(json.dumps({**config, "num_classes": 4}))
  with pytest.raises(UsageError, match=r"2 faults.*shape of fc.bias is \(3,\), expected \(4,\)"):
    convert_weights(exported, tmp_path / "new.npz")
  assert not (tmp_path / "new.npz").exists()


def test_without_pytorch_only_its_own_format_is_out_of_reach(exported, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)  # to import it fails now
  with pytest.raises(UsageError, match=r"pip install torch\) or write .*back.safetensors"):
    convert_weights(exported, tmp_path / "back.pth")
  convert_weights(exported, tmp_path / "back.safetensors")
  convert_weights(exported, tmp_path / "back.npz")
  assert_same(
    read_torch_checkpoint(tmp_path / "back.safetensors"),
    read_torch_checkpoint(tmp_path / "back.npz"),
  )
