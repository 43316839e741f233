"""CUDA C++ to PTX by NVIDIA's runtime compiler, which comes with JAX for GPUs and needs no GPU."""

import ctypes
import ctypes.util
import functools
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

# What all GPUs from Ampere on run. Later versions of the notation, which the compiler writes into
# the first line, add nothing that is used here but hints, and drivers refuse those newer than they.
_ARCHITECTURE, _NOTATION = "compute_80", "7.0"


def nvidia_file(pattern: str) -> str | None:
  """Path of a file of NVIDIA's Python packages for CUDA 12 or 13, if they are installed."""
  for package in ("cu13", "cuda_nvrtc", "cuda_nvcc"):
    try:
      spec = importlib.util.find_spec(f"nvidia.{package}")
    except ModuleNotFoundError:  # no nvidia at all
      return None
    for folder in (spec and spec.submodule_search_locations) or ():
      for path in Path(folder).glob(pattern):
        return str(path)
  return None


@functools.cache
def _library() -> ctypes.CDLL | None:
  path = nvidia_file("lib/libnvrtc.so.*") or ctypes.util.find_library("nvrtc")
  try:
    return ctypes.CDLL(path) if path else None
  except OSError:  # another machine's
    return None


def available() -> bool:
  """Whether there is a compiler."""
  return _library() is not None


@functools.cache
def compiled(source: str, definitions: Sequence[str]) -> str:
  """PTX of a file of CUDA C++.

  Args:
    source: its text.
    definitions: of macros, NAME=VALUE.
  """
  library, program = _library(), ctypes.c_void_p()
  assert library is not None, "asked for only where it is available"
  options = [f"--gpu-architecture={_ARCHITECTURE}", "--std=c++17", *(f"-D{d}" for d in definitions)]
  encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
  _check(
    library, library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), None, 0, None, None)
  )
  try:
    status = library.nvrtcCompileProgram(program, len(options), encoded)
    if status:
      raise RuntimeError(
        f"the GPU kernels do not compile:\n{_text(library, program, 'ProgramLog')}"
      )
    ptx = _text(library, program, "PTX")
  finally:
    library.nvrtcDestroyProgram(ctypes.byref(program))
  ptx = re.sub(r"^\.version \S+", f".version {_NOTATION}", ptx, count=1, flags=re.MULTILINE)
  return re.sub(r'^\s*\.pragma "used_bytes_mask[^;]*;\n', "", ptx, flags=re.MULTILINE)


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
  size = ctypes.c_size_t()
  _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
  text = ctypes.create_string_buffer(size.value)
  _check(library, getattr(library, f"nvrtcGet{what}")(program, text))
  return text.value.decode()


def _check(library: ctypes.CDLL, status: int) -> None:
  if status:
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    raise RuntimeError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")
