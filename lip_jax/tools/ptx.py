"""Registers and spills of GPU kernels, by NVIDIA's assembler."""

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lip_jax.ops.kernels import nvrtc

_ENTRY = re.compile(
  r"Compiling entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, "
  r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
  r"(?:.*?(?P<shared>\d+) bytes smem)?",
  re.DOTALL,
)


class Kernel(NamedTuple):
  """One kernel, for one shape."""

  name: str
  registers: int  # of a thread
  spilled: int  # bytes that a thread stores to memory and loads again, for want of registers
  shared: int  # bytes of a block


def assembler() -> str | None:
  """Path of ptxas, of the packages for compiling or of a CUDA installation, if there is one."""
  return nvrtc.nvidia_file("bin/ptxas") or shutil.which("ptxas")


def kernels(sources: Iterable[str], architecture: str) -> Iterator[Kernel]:
  """Those of texts of PTX, for an architecture such as sm_90."""
  path = assembler()
  assert path is not None, "asked for only where there is one"
  for source in sources:
    command = [path, f"-arch={architecture}", "-v", "-o", "/dev/null", "/dev/stdin"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=True)
    for one in _ENTRY.finditer(done.stderr):
      spilled = int(one["stores"]) + int(one["loads"])
      yield Kernel(one["name"], int(one["registers"]), spilled, int(one["shared"] or 0))
