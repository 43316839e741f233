"""Weight files: written by PyTorch where it is installed, by hand where it is not.

tests/data/torch_*.pth were written by PyTorch 2.13 with `save_as(path, kind, EXAMPLE)`.
"""

import collections
import gzip
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lip_jax.errors import UsageError
from lip_jax.export.torch_files import read_torch_checkpoint

DATA = Path(__file__).parents[1] / "data"
KINDS = ["zip", "legacy"]
BFLOAT16 = ml_dtypes.bfloat16

EXAMPLE = {
  "module.fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
  "module.fc.bias": np.array([1.5, -2.5], BFLOAT16),
  "module.bn.num_batches_tracked": np.array(7, np.int64),
}


def assert_same(arrays, expected):
  assert list(arrays) == list(expected)
  for name, array in expected.items():
    assert arrays[name].dtype == array.dtype, name
    assert arrays[name].shape == array.shape, name
    assert arrays[name].tobytes() == array.tobytes(), name


# --- files made by hand ---------------------------------------------------------------------------


def opcodes(value):
  """What puts a plain value on the unpickler's stack."""
  return pickle.dumps(value, 2)[2:-1]


def tensor_opcodes(key, numel, offset, shape, strides, *, kind="zip", dtype="Float", view=None):
  extra = b"" if kind == "zip" else opcodes(view)
  return (
    b"ctorch._utils\n_rebuild_tensor_v2\n(("
    + opcodes("storage")
    + f"ctorch\n{dtype}Storage\n".encode()
    + opcodes(key)
    + opcodes("cpu")
    + opcodes(numel)
    + extra
    + b"tQ"
    + b"".join(opcodes(v) for v in (offset, shape, strides, False))
    + b"ccollections\nOrderedDict\n)RtR"
  )


def dict_opcodes(entries):
  return b"\x80\x02}" + b"".join(opcodes(k) + v + b"s" for k, v in entries.items()) + b"."


def write(path, kind, content, storages=(), byteorder=None, root="weights/"):
  """A file of torch.save around the pickle `content`; storages: (key, element count, bytes)."""
  if kind == "zip":
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr(f"{root}data.pkl", content)
      if byteorder:
        archive.writestr(f"{root}byteorder", byteorder)
      for key, _, data in storages:
        archive.writestr(f"{root}data/{key}", data)
    return path
  system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
  head = [0x1950A86A20F9469CFC6C, 1001, system]
  parts = [pickle.dumps(value, 2) for value in head] + [content]
  parts.append(pickle.dumps([key for key, _, _ in storages], 2))
  parts += [struct.pack("<q", count) + data for _, count, data in storages]
  path.write_bytes(b"".join(parts))
  return path


@pytest.mark.parametrize("kind", KINDS)
def test_views_of_one_storage(kind, tmp_path):
  numbers = np.arange(12, dtype="<f4")
  content = dict_opcodes(
    {
      "whole": tensor_opcodes("0", 12, 0, (3, 4), (4, 1), kind=kind),
      "transposed": tensor_opcodes("0", 12, 0, (4, 3), (1, 4), kind=kind),
      "column": tensor_opcodes("0", 12, 2, (3,), (4,), kind=kind),
      "scalar": tensor_opcodes("0", 12, 11, (), (), kind=kind),
      "expanded": tensor_opcodes("0", 12, 5, (2, 2), (0, 0), kind=kind),
      "empty": tensor_opcodes("0", 12, 0, (0, 4), (4, 1), kind=kind),
      "epoch": opcodes(3),
      "note": opcodes("text"),
    }
  )
  path = write(tmp_path / "w.pth", kind, content, [("0", 12, numbers.tobytes())])
  arrays = read_torch_checkpoint(path)
  whole = numbers.reshape(3, 4)
  assert_same(
    arrays,
    {
      "whole": whole,
      "transposed": whole.T,
      "column": whole[:, 2],
      "scalar": np.array(11, np.float32),
      "expanded": np.full((2, 2), 5, np.float32),
      "empty": np.zeros((0, 4), np.float32),
    },
  )
  assert np.shares_memory(arrays["whole"], arrays["transposed"])  # no copy for each


@pytest.mark.parametrize("byteorder", [b"little", b"big"])
@pytest.mark.parametrize(
  ("storage", "dtype"),
  [
    ("Double", np.float64),
    ("Float", np.float32),
    ("Half", np.float16),
    ("BFloat16", BFLOAT16),
    ("Long", np.int64),
    ("Int", np.int32),
    ("Short", np.int16),
    ("Char", np.int8),
    ("Byte", np.uint8),
    ("Bool", np.bool_),
  ],
)
def test_dtypes_and_byte_orders(storage, dtype, byteorder, tmp_path):
  values = np.array([1, 0, 1], dtype)
  data = values.view(f"u{values.itemsize}")
  data = data.astype(data.dtype.newbyteorder(">" if byteorder == b"big" else "<"))
  content = dict_opcodes({"x": tensor_opcodes("k", 3, 0, (3,), (1,), dtype=storage)})
  path = write(tmp_path / "w.pth", "zip", content, [("k", 3, data.tobytes())], byteorder)
  assert_same(read_torch_checkpoint(path), {"x": values})


def test_legacy_views_of_storages(tmp_path):
  """Before PyTorch 0.4 a storage could itself be a part of another one."""
  content = dict_opcodes(
    {"x": tensor_opcodes("0", 6, 1, (2,), (1,), kind="legacy", view=("1", 3, 3))}
  )
  numbers = np.arange(6, dtype="<f4")
  path = write(tmp_path / "w.pth", "legacy", content, [("0", 6, numbers.tobytes())])
  np.testing.assert_array_equal(read_torch_checkpoint(path)["x"], [4, 5])


@pytest.mark.parametrize("root", ["", "archive/", "a name with spaces/"])
def test_any_folder_in_the_zip(root, tmp_path):
  content = dict_opcodes({"x": tensor_opcodes("0", 2, 0, (2,), (1,))})
  storage = ("0", 2, np.ones(2, "<f4").tobytes())
  path = write(tmp_path / "w.pth", "zip", content, [storage], root=root)
  np.testing.assert_array_equal(read_torch_checkpoint(path)["x"], [1, 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  ("offset", "shape", "strides"),
  [
    (0, (5,), (1,)),
    (3, (2,), (1,)),
    (-1, (2,), (1,)),
    (3, (2,), (-1,)),
    (0, (2, 2), (1,)),
    (0, (-1,), (1,)),
    (0, (17,), (2**60,)),  # 16 * 2**60 is 0 in 64 bits
    (0, (2**33, 2**33), (2**31, 2**31)),
    (0, (2**31, 512), (0, 0)),  # inside, but a terabyte as an array of its own
    ("0", (1,), (1,)),
    (0, None, (1,)),
  ],
)
def test_nothing_outside_a_storage_is_read(kind, offset, shape, strides, tmp_path):
  content = dict_opcodes({"x": tensor_opcodes("0", 4, offset, shape, strides, kind=kind)})
  path = write(tmp_path / "w.pth", kind, content, [("0", 4, bytes(16))])
  with pytest.raises(UsageError, match="damaged or incomplete"):
    read_torch_checkpoint(path)


class Evil:
  def __init__(self, marker):
    self.marker = str(marker)

  def __reduce__(self):
    return os.mkdir, (self.marker,)


def evil_in_protocols(marker):
  for protocol in (0, 2, 4):
    yield pickle.dumps({"x": Evil(marker)}, protocol)
  yield b"\x80\x02" + f"cos\nmkdir\n(V{marker}\ntR.".encode()
  yield b"\x80\x02" + f"(V{marker}\nios\nmkdir\n.".encode()
  yield b"\x80\x02" + b'cbuiltins\neval\n(V__import__("os").mkdir("%b")\ntR.' % str(marker).encode()


@pytest.mark.parametrize("kind", [*KINDS, "bare"])
def test_code_in_a_pickle_is_refused_and_not_run(kind, tmp_path):
  marker = tmp_path / "ran"
  for payload in evil_in_protocols(marker):
    pickle.loads(payload)  # proof that the payload works
    marker.rmdir()
    path = tmp_path / "evil.pth"
    if kind == "bare":
      path.write_bytes(payload)
    else:
      write(path, kind, payload)
    message = r"(mkdir|eval)'.*could run code when loaded"
    if kind == "bare" and not payload.startswith(b"\x80"):  # protocol 0 is not even recognised
      message = "begins with"
    with pytest.raises(UsageError, match=message) as caught:
      read_torch_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize(
  "name",
  [
    ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ("torch", "load"),
    ("torch.nn.modules.linear", "Linear"),
    ("collections", "defaultdict"),
    ("lip_jax.export.torch_files", "read_torch_checkpoint"),
  ],
)
def test_names_that_are_not_listed_are_refused(name, tmp_path):
  content = b"\x80\x04" + opcodes(name[0]) + opcodes(name[1]) + b"\x93."
  path = write(tmp_path / "w.pth", "zip", content)
  with pytest.raises(UsageError, match=f"refers to '{'.'.join(name)}'.*model.state_dict"):
    read_torch_checkpoint(path)


def test_a_pickle_cannot_change_what_it_is_given(tmp_path):
  state = opcodes((None, {"__call__": 1, "__new__": 1, "__slots__": 1, "x": 1}))
  for name in (
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch\nFloatStorage\n",
  ):
    path = write(tmp_path / "w.pth", "zip", b"\x80\x02" + name + state + b"b.")
    with pytest.raises(UsageError, match="damaged or incomplete"):
      read_torch_checkpoint(path)
  assert not hasattr(collections.OrderedDict, "x")


def test_a_pickle_that_contains_itself_ends(tmp_path):
  content = b"\x80\x02}q\x00" + opcodes("model") + b"h\x00s."
  with pytest.raises(UsageError, match=r"holds no tensors \(its entries: 'model'\)"):
    read_torch_checkpoint(write(tmp_path / "w.pth", "zip", content))


# --- files that are no weights --------------------------------------------------------------------


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "is empty; download"),
    (b"\n <!DOCTYPE html><html>login</html>", "is a web page"),
    (b"<html>404</html>", "is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer.*lfs pull"),
    (gzip.compress(b"x", mtime=0), "is a gzip or tar archive; unpack it"),
    (b"hello", "begins with b'hello', which is neither"),
    (b"\x80", "damaged or incomplete"),
    (pickle.dumps({"x": 1}, 4), "is a pickle, but not one of torch.save"),
    (b"PK\x03\x04" + bytes(100), "damaged or incomplete"),
  ],
)
def test_files_that_are_something_else(content, message, tmp_path):
  path = tmp_path / "weights.pth"
  path.write_bytes(content)
  with pytest.raises(UsageError, match=message) as caught:
    read_torch_checkpoint(path)
  assert str(path) in str(caught.value)
  assert "\n" not in str(caught.value)


def test_paths_that_are_no_files(tmp_path):
  with pytest.raises(UsageError, match=f"there is no file {tmp_path}/none.pth"):
    read_torch_checkpoint(tmp_path / "none.pth")
  with pytest.raises(UsageError, match=f"{tmp_path} is a directory"):
    read_torch_checkpoint(tmp_path)


def test_another_zip_archive(tmp_path):
  with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
    archive.writestr("readme.txt", "hello")
  with pytest.raises(UsageError, match=r"but not one of torch.save \(it holds readme.txt\)"):
    read_torch_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (dict_opcodes({"epoch": opcodes(1)}), "holds no tensors.*'epoch'.*expected a state_dict"),
    (b"\x80\x02].", "holds a list, not the weights"),
    (b"\x80\x02" + tensor_opcodes("0", 1, 0, (), ()) + b".", "holds a single tensor"),
  ],
)
def test_without_a_state_dict(content, message, tmp_path):
  with pytest.raises(UsageError, match=message):
    read_torch_checkpoint(write(tmp_path / "w.pth", "zip", content, [("0", 1, bytes(4))]))


# --- files that PyTorch wrote ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_committed_files_are_read_without_pytorch(kind, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)  # to import it fails now
  assert_same(read_torch_checkpoint(DATA / f"torch_{kind}.pth"), EXAMPLE)


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_and_many_damages_are_usage_errors(kind, tmp_path):
  whole = (DATA / f"torch_{kind}.pth").read_bytes()
  path = tmp_path / "w.pth"
  for length in range(0, len(whole), 23):
    path.write_bytes(whole[:length])
    with pytest.raises(UsageError):
      read_torch_checkpoint(path)
  rng = np.random.default_rng(0)
  for _ in range(100):
    damaged = bytearray(whole)
    damaged[rng.integers(len(whole))] = rng.integers(256)
    path.write_bytes(damaged)
    try:
      read_torch_checkpoint(path)  # damage to a name or, in the legacy format, a number goes unseen
    except UsageError as error:
      assert "\n" not in str(error)  # noqa: PT017 - not every damage is found


def as_torch(array):
  torch = pytest.importorskip("torch")
  if array.dtype == BFLOAT16:
    return torch.tensor(array.astype(np.float32)).to(torch.bfloat16)
  return torch.tensor(array)


def save_as(path, kind, arrays, wrap=lambda state_dict: state_dict):
  torch = pytest.importorskip("torch")
  state_dict = collections.OrderedDict((name, as_torch(a)) for name, a in arrays.items())
  torch.save(wrap(state_dict), path, _use_new_zipfile_serialization=kind == "zip")
  return path


def with_optimizer(state_dict):
  """What the usual training script saves, with the states of SGD and of a step schedule."""
  torch = pytest.importorskip("torch")
  optimizer = {
    "state": {0: {"momentum_buffer": torch.ones(50, 50)}},
    "param_groups": [{"lr": 0.1, "momentum": 0.9, "nesterov": False, "params": [0]}],
  }
  schedule = {"milestones": collections.Counter([30, 60]), "gamma": 0.1, "last_epoch": 3}
  return {
    "epoch": 3,
    "arch": "lip_resnet50",
    "state_dict": state_dict,
    "best_acc1": torch.tensor(70.0),
    "best_acc5": np.float64(90.0),
    "device": torch.device("cuda", 0),
    "shape": torch.Size([2, 3]),
    "optimizer": optimizer,
    "schedule": schedule,
  }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  "wrap",
  [
    lambda s: s,
    dict,
    lambda s: {"state_dict": s},
    lambda s: {"model": s, "epoch": 1},
    lambda s: {"model": {"state_dict": s}},
    with_optimizer,
  ],
)
def test_state_dicts_and_their_wrappers(kind, wrap, tmp_path):
  assert_same(read_torch_checkpoint(save_as(tmp_path / "w.pth", kind, EXAMPLE, wrap)), EXAMPLE)


@pytest.mark.parametrize("kind", KINDS)
def test_what_pytorch_writes(kind, tmp_path):
  torch = pytest.importorskip("torch")
  base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
  entries = {
    "transposed": base.permute(2, 0, 1),
    "slice": base[1, :, 1:3],
    "whole": base,
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "parameter": torch.nn.Parameter(base[0]),
    "half": base.half(),
    "bfloat16": base.bfloat16() / 3,
    "double": base.double() / 3,
    "int64": base.long() * 2**40,
    "int32": -base.int(),
    "int16": -base.short(),
    "int8": -base.char(),
    "uint8": base.byte(),
    "bool": base > 5,
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 3),
  }
  torch.save(entries, tmp_path / "w.pth", _use_new_zipfile_serialization=kind == "zip")
  arrays = read_torch_checkpoint(tmp_path / "w.pth")
  assert list(arrays) == list(entries)
  for name, tensor in entries.items():
    array = arrays[name]
    assert f"torch.{array.dtype}" == str(tensor.dtype)
    assert array.shape == tuple(tensor.shape)
    array = array.astype(np.float64) if name == "bfloat16" else array
    np.testing.assert_array_equal(array, tensor.detach().double().numpy())
  assert np.shares_memory(arrays["whole"], arrays["transposed"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_module_is_refused(kind, tmp_path):
  torch = pytest.importorskip("torch")
  torch.save(
    torch.nn.Linear(2, 2), tmp_path / "w.pth", _use_new_zipfile_serialization=kind == "zip"
  )
  with pytest.raises(UsageError, match=r"'torch.nn.modules.linear.Linear'.*model.state_dict\(\)"):
    read_torch_checkpoint(tmp_path / "w.pth")


# --- other formats --------------------------------------------------------------------------------


def test_safetensors_and_npz(tmp_path):
  safetensors.numpy.save_file(EXAMPLE, tmp_path / "w.safetensors")
  arrays = read_torch_checkpoint(tmp_path / "w.safetensors")
  assert_same({name: arrays[name] for name in EXAMPLE}, EXAMPLE)
  numbers = {name: a for name, a in EXAMPLE.items() if a.dtype != BFLOAT16}
  np.savez(tmp_path / "w.npz", **numbers)
  assert_same(read_torch_checkpoint(tmp_path / "w.npz"), numbers)
  (tmp_path / "w.npz").rename(tmp_path / "w.pth")  # the content counts
  assert_same(read_torch_checkpoint(tmp_path / "w.pth"), numbers)


def test_safetensors_and_npz_that_do_not_fit(tmp_path):
  np.savez(tmp_path / "w.npz", x=EXAMPLE["module.fc.bias"])  # NumPy forgets what bfloat16 is
  with pytest.raises(UsageError, match=r"x in .* has dtype \|V2; save numbers"):
    read_torch_checkpoint(tmp_path / "w.npz")
  np.savez(tmp_path / "w.npz", x=np.array([{}], object))
  with pytest.raises(UsageError, match=r"cannot read .*w\.npz"):
    read_torch_checkpoint(tmp_path / "w.npz")
  safetensors.numpy.save_file({}, tmp_path / "w.safetensors")
  with pytest.raises(UsageError, match="holds no tensors"):
    read_torch_checkpoint(tmp_path / "w.safetensors")
  safetensors.numpy.save_file(EXAMPLE, tmp_path / "w.safetensors")
  whole = (tmp_path / "w.safetensors").read_bytes()
  (tmp_path / "w.safetensors").write_bytes(whole[:-4])
  with pytest.raises(UsageError, match="damaged or incomplete"):
    read_torch_checkpoint(tmp_path / "w.safetensors")
