"""Registers and spills of the GPU kernels of a compiled program, by NVIDIA's assembler."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

_TARGET = re.compile(r"^\.target (\w+)", re.MULTILINE)
_ENTRY = re.compile(
  r"Compiling entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, "
  r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
  re.DOTALL,
)


class Kernel(NamedTuple):
  """One kernel; those of one name that differ in shape are numbered at its end."""

  name: str
  registers: int  # of a thread
  spilled: int  # bytes that a thread stores to memory and loads again, for want of registers


def assembler() -> str | None:
  """Path of ptxas, of the packages for compiling or of a CUDA installation, if there is one."""
  for package in ("nvidia.cu13", "nvidia.cuda_nvcc"):
    try:
      spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # no nvidia at all
      break
    for folder in (spec and spec.submodule_search_locations) or ():
      if (path := Path(folder, "bin", "ptxas")).exists():
        return str(path)
  return shutil.which("ptxas")


def kernels(folder: Path, names: Collection[str]) -> list[Kernel]:
  """Kernels of these names in the PTX files that XLA has written to a folder (`xla_dump_to`)."""
  path = assembler()
  assert path is not None, "asked for only where there is one"
  return sorted(one for file in folder.glob("*.ptx") for one in _kernels(path, file, names))


def _kernels(path: str, file: Path, names: Collection[str]) -> Iterator[Kernel]:
  text = file.read_text(encoding="utf-8")
  target = _TARGET.search(text)
  entries = re.findall(r"\.entry (\w+)", text)
  if target is None or not any(_unnumbered(name) in names for name in entries):
    return
  command = [path, f"-arch={target[1]}", "-v", "-o", "/dev/null", str(file)]
  said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
  for one in _ENTRY.finditer(said):
    if _unnumbered(one["name"]) in names:
      yield Kernel(one["name"], int(one["registers"]), int(one["stores"]) + int(one["loads"]))


def _unnumbered(name: str) -> str:
  return re.sub(r"__?\d+$", "", name)
