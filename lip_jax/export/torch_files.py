"""Weight files under PyTorch names, read without PyTorch and without running what they hold.

A `.pth` file is a pickle that refers to raw bytes beside it, in one of two containers: a zip
archive (PyTorch 1.6 and later) or a row of pickles with the bytes behind them (before). Unpickling
can call any function of any installed package, so here it knows the few names that tensors need and
refuses the rest, as `torch.load(weights_only=True)` does. What those names stand for is inert: the
unpickler makes descriptions of tensors, and arrays come of them only when it is done.
"""

import collections
import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from lip_jax.errors import UsageError, one_line
from lip_jax.export.validation import unpacks_too_far

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# What training scripts put around the state_dict.
_WRAPPERS = ("state_dict", "model_state_dict", "model")

# Numbers in a tensor that has fewer of its own.
_MAX_REPEATED = 2**16

_DTYPES = {
  "torch.DoubleStorage": np.dtype(np.float64),
  "torch.FloatStorage": np.dtype(np.float32),
  "torch.HalfStorage": np.dtype(np.float16),
  "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "torch.LongStorage": np.dtype(np.int64),
  "torch.IntStorage": np.dtype(np.int32),
  "torch.ShortStorage": np.dtype(np.int16),
  "torch.CharStorage": np.dtype(np.int8),
  "torch.ByteStorage": np.dtype(np.uint8),
  "torch.BoolStorage": np.dtype(np.bool_),
}


def read_torch_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
  """Tensors of a weight file under the names that they have there.

  Reads what `torch.save` writes (`.pth`, `.pt`: both the zip format and the one before PyTorch
  1.6), `.safetensors` and `.npz`; the content decides, not the suffix. A state_dict may lie bare or
  under "state_dict", "model_state_dict" or "model"; entries that are no tensors are left out, and
  only the bytes of the state_dict are read, not an optimizer's.

  Returns:
    Arrays in PyTorch's layouts and in the file's dtypes (bfloat16 is that of ml_dtypes). They may
    be read-only, and views of one another where the tensors shared memory.

  Raises:
    UsageError: there is no such file; it is damaged, something else, without tensors, or names
      anything but tensors and plain values (it could run code when loaded).
  """
  path = Path(path)
  try:
    with path.open("rb") as file:
      start = file.read(512)
      read = _reader(start, path)
      file.seek(0)
      arrays = read(file, path)
  except UsageError:
    raise
  except FileNotFoundError:
    raise UsageError(f"there is no file {path}; give a .pth, .pt, .safetensors or .npz") from None
  except IsADirectoryError:
    raise UsageError(
      f"{path} is a directory; give the weight file in it (.pth, .pt, .safetensors or .npz)"
    ) from None
  except PermissionError:
    raise UsageError(f"no permission to read {path}; change it (chmod) or copy the file") from None
  except Exception as error:  # damaged bytes can raise anything in pickle, zipfile and NumPy
    reason = f"{type(error).__name__}: {one_line(error, 200)}"
    raise UsageError(
      f"cannot read {path}: it is damaged or incomplete ({reason}); download or copy it again"
    ) from error
  if not arrays:
    raise UsageError(f"{path} holds no tensors; give a file with the weights of a network")
  return arrays


def _reader(start: bytes, path: Path) -> Callable[[BinaryIO, Path], dict[str, np.ndarray]]:
  """What reads a file that begins with these bytes."""
  if not start:
    raise UsageError(f"{path} is empty; download or copy it again")
  # First, because the length that .safetensors begins with can look like the start of the others.
  if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
    return _read_safetensors
  if start.startswith(b"PK\x03\x04"):
    return _read_zip
  if start.startswith(b"\x80"):
    return _read_legacy
  if start.startswith(b"version https://git-lfs"):
    raise UsageError(f"{path} is a git-lfs pointer, not the file itself; run: git lfs pull")
  if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
    raise UsageError(
      f"{path} is a web page: the link that it was downloaded from does not lead to the file "
      "itself; open that link in a browser and save the file from there"
    )
  if start.startswith(b"\x1f\x8b") or start[257:262] == b"ustar":
    raise UsageError(f"{path} is a gzip or tar archive; unpack it and give the file in it")
  raise UsageError(
    f"{path} begins with {start[:8]!r}, which is neither a PyTorch file (.pth, .pt) nor "
    ".safetensors nor .npz; give one of these"
  )


def _read_safetensors(file: BinaryIO, path: Path) -> dict[str, np.ndarray]:
  with safetensors.safe_open(path, framework="numpy") as tensors:
    return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping


def _read_npz(file: BinaryIO, path: Path) -> dict[str, np.ndarray]:
  file.seek(0)
  with np.load(file, allow_pickle=False) as archive:
    arrays = dict(archive)
  for name, array in arrays.items():
    if array.dtype.kind not in "fiub":
      raise UsageError(f"{name} in {path} has dtype {array.dtype}; save numbers, as float32")
  return arrays


def _read_zip(file: BinaryIO, path: Path) -> dict[str, np.ndarray]:
  with zipfile.ZipFile(file) as archive:
    names = archive.namelist()
    _check_sizes(archive, path)
    if names and all(name.endswith(".npy") for name in names):
      return _read_npz(file, path)
    # One folder around everything, named after the file that was first written.
    roots = [n.removesuffix("data.pkl") for n in names if n.split("/", 1)[-1] == "data.pkl"]
    if len(roots) != 1:
      raise UsageError(
        f"{path} is a zip archive, but not one of torch.save (it holds {_few(names)}); give a "
        ".pth, .pt or .npz, or unpack it first"
      )
    root = roots[0]
    byteorder = archive.read(f"{root}byteorder") if f"{root}byteorder" in names else b"little"
    content = _unpickle(io.BytesIO(archive.read(f"{root}data.pkl")), path)
    tensors = _state_dict(content, path)
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    raw = {key: archive.read(f"{root}data/{key}") for key in storages}
  return _arrays(tensors, raw, ">" if byteorder == b"big" else "<")


def _read_legacy(file: BinaryIO, path: Path) -> dict[str, np.ndarray]:
  if _unpickle(file, path) != _LEGACY_MAGIC:
    raise UsageError(
      f"{path} is a pickle, but not one of torch.save; in PyTorch, save the weights with "
      "torch.save(model.state_dict(), FILE)"
    )
  protocol = _unpickle(file, path)
  if protocol != _LEGACY_PROTOCOL:
    raise ValueError(f"format version {protocol!r}, expected {_LEGACY_PROTOCOL}")
  _unpickle(file, path)  # the machine that wrote it; the bytes are little-endian anyway
  storages: dict[str, _Storage] = {}
  tensors = _state_dict(_unpickle(file, path, storages), path)
  needed = {tensor.storage.key for tensor in tensors.values()}
  size = path.stat().st_size
  raw = {}
  for key in _unpickle(file, path):
    storage = storages[key]
    if int.from_bytes(file.read(8), "little") != storage.numel:
      raise ValueError(f"the length of storage {key} is not the announced {storage.numel}")
    if file.tell() + storage.nbytes > size:
      raise EOFError(f"the file ends within storage {key}")
    if key in needed:
      raw[key] = file.read(storage.nbytes)
    else:
      file.seek(storage.nbytes, io.SEEK_CUR)
  return _arrays(tensors, raw, "<")


class _Storage(NamedTuple):
  """A run of numbers in the file, and where in it a tensor's storage begins."""

  key: str
  dtype: np.dtype
  numel: int
  start: int  # in elements; other than 0 only in files of PyTorch before 0.4

  @property
  def nbytes(self) -> int:
    return self.numel * self.dtype.itemsize


class _Tensor(NamedTuple):
  """A view of a storage; offset and strides in elements."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


# A pickle can set attributes of whatever it gets hold of. What it gets here has none to set: names
# of storages, the built-in OrderedDict, and instances of these classes without a __dict__.
class _RebuildTensor:
  __slots__ = ()

  def __call__(self, storage, offset, shape, strides, *unused) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


class _RebuildParameter:
  __slots__ = ()

  def __call__(self, data, *unused):
    return data


class _Ignored:
  """Stands for a value that no tensor needs, such as a device or a NumPy scalar."""

  __slots__ = ()

  def __call__(self, *unused) -> "_Ignored":
    return self

  def __setstate__(self, state) -> None:
    pass


_ALLOWED: dict[str, Any] = {
  **{name: name for name in _DTYPES},
  "collections.OrderedDict": collections.OrderedDict,
  "torch._utils._rebuild_tensor": _RebuildTensor(),
  "torch._utils._rebuild_tensor_v2": _RebuildTensor(),
  "torch._utils._rebuild_parameter": _RebuildParameter(),
  "torch.Size": _Ignored(),
  "torch.device": _Ignored(),
  # A learning rate schedule's milestones, and NumPy scalars, such as the best accuracy so far.
  "collections.Counter": _Ignored(),
  "numpy.dtype": _Ignored(),
  "numpy.core.multiarray.scalar": _Ignored(),
  "numpy._core.multiarray.scalar": _Ignored(),
  "_codecs.encode": _Ignored(),
}


def _unpickle(file: BinaryIO, path: Path, storages: dict[str, _Storage] | None = None) -> Any:
  """What the pickle at this place of a file holds; gathers the storages that it refers to."""
  start = file.tell()
  for opcode, argument, place in pickletools.genops(file):
    # A few bytes could have the unpickler make a table for 4 billion objects.
    if "PUT" in opcode.name and int(argument or 0) > (place or 0) - start:
      raise ValueError(f"object number {argument} in a pickle of fewer bytes")
  file.seek(start)
  return _Unpickler(file, path, {} if storages is None else storages).load()


def _check_sizes(archive: zipfile.ZipFile, path: Path) -> None:
  """Raises UsageError if an archive would unpack to far more than weights can be packed to."""
  size = sum(info.file_size for info in archive.infolist())
  if unpacks_too_far(size, path.stat().st_size):
    raise UsageError(
      f"{path} is refused: it would unpack to {size:,} bytes, {size // path.stat().st_size:,} "
      "times its size; weights can hardly be packed at all"
    )


class _Unpickler(pickle.Unpickler):
  """Unpickles tensors as `_Tensor` and refuses every name that is not in `_ALLOWED`."""

  def __init__(self, file: BinaryIO, path: Path, storages: dict[str, _Storage]):
    super().__init__(file, encoding="utf-8")  # of text that Python 2 wrote
    self.path = path
    self.storages = storages

  def find_class(self, module: str, name: str) -> Any:
    full_name = f"{module}.{name}"
    if full_name not in _ALLOWED:
      raise UsageError(
        f"{self.path} is refused: it refers to {full_name!r}, which is not part of a tensor, and "
        "could run code when loaded. If you trust the file, load it in PyTorch and save "
        "model.state_dict() alone"
      )
    return _ALLOWED[full_name]

  def persistent_load(self, pid: Any) -> _Storage:
    tag, dtype, key, _, numel, *view = pid
    if tag != "storage":
      raise ValueError(f"unknown reference {tag!r}")
    start = view[0][1] if view and view[0] else 0
    storage = _Storage(key, _DTYPES[dtype], numel, start)
    self.storages[key] = storage
    return storage


def _state_dict(content: Any, path: Path) -> dict[str, _Tensor]:
  """The tensors among the entries of a state_dict, taken out of what is around it."""
  for _ in range(2):  # two deep at most: a pickle may contain itself
    if isinstance(content, dict):
      inner = (content.get(key) for key in _WRAPPERS)
      content = next((entry for entry in inner if isinstance(entry, dict)), content)
  if not isinstance(content, dict):
    kind = "a single tensor" if isinstance(content, _Tensor) else f"a {type(content).__name__}"
    raise UsageError(
      f"{path} holds {kind}, not the weights of a network; in PyTorch, save them with "
      "torch.save(model.state_dict(), FILE)"
    )
  tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, _Tensor)}
  if not tensors:
    raise UsageError(
      f"{path} holds no tensors (its entries: {_few(map(repr, content))}); expected a state_dict, "
      f"bare or under one of {', '.join(_WRAPPERS)}"
    )
  return tensors


def _arrays(
  tensors: dict[str, _Tensor], raw: dict[str, bytes], byteorder: str
) -> dict[str, np.ndarray]:
  storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
  native = {}
  for key, data in raw.items():
    unsigned = f"u{storages[key].dtype.itemsize}"
    native[key] = np.frombuffer(data, byteorder + unsigned).astype(unsigned, copy=False)
  return {name: _array(tensor, native[tensor.storage.key]) for name, tensor in tensors.items()}


def _array(tensor: _Tensor, data: np.ndarray) -> np.ndarray:
  """A view of the storage's bytes as the tensor's elements."""
  storage, _, shape, strides = tensor
  offset = storage.start + tensor.offset
  last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  # In Python's integers: NumPy's own check can overflow.
  inside = 0 in shape or last < storage.numel
  if data.nbytes != storage.nbytes or min(offset, *shape, *strides, 0) < 0 or not inside:
    raise ValueError(
      f"a tensor of shape {tuple(shape)} is not inside its storage of {data.nbytes} bytes"
    )
  # A stride of zero makes one number a tensor of any size, which would fill memory when copied.
  if math.prod(shape) > max(storage.numel, _MAX_REPEATED):
    raise ValueError(f"a tensor of shape {tuple(shape)} repeats the {storage.numel} numbers it has")
  itemsize = storage.dtype.itemsize
  return np.ndarray(shape, storage.dtype, data, offset * itemsize, [s * itemsize for s in strides])


def _few(names: Iterable[str]) -> str:
  names = list(names)
  return (", ".join(names[:8]) or "nothing") + (", ..." if len(names) > 8 else "")
