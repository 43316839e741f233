"""The machine as the doctor sees it: packages, devices, memory.

Devices are asked in a process of their own, because a driver can crash or hang.
"""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from lip_jax.errors import UsageError
from lip_jax.ops.kernels import nvrtc

Status = Literal["ok", "warning", "problem"]
Verdict = tuple[Status, str] | tuple[Status, str, str]  # status, text, remedy of a `Finding`

_GIB = 2**30
_LITTLE_MEMORY = 4 * _GIB

# What may train a network here; the others are only worth a word when they are at fault.
_SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")

# Prints what jax sees, as JSON, in the last line.
_PROBE = """
import json, jax
devices = jax.local_devices()
stats = [(d.memory_stats() or {}) if d.platform != "cpu" else {} for d in devices]
print(json.dumps({
  "platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices),
  "all": jax.device_count(), "memory": min(s.get("bytes_limit", 0) for s in stats)}))
"""


def versions() -> Iterator[Verdict]:
  """Whether the packages that training needs are there, in versions that are supported."""
  requirements = _requirements()
  found = {one.name: _installed(one.name) for one in requirements}
  found["jaxlib"] = _installed("jaxlib")
  missing = [name for name, version in found.items() if version is None]
  wrong = [
    f"{one.name} {found[one.name]} (supported: {one.specifier})"
    for one in requirements
    if found[one.name] and not one.specifier.contains(found[one.name], prereleases=True)
  ]
  python = ".".join(map(str, sys.version_info[:3]))
  shown = ", ".join(f"{name} {found[name]}" for name in _SHOWN if name in found)
  if wrong:
    yield "problem", ", ".join(wrong), "pip install --upgrade 'lip-jax[train]'"
  if missing:
    yield "problem", f"not installed: {', '.join(missing)}", "pip install 'lip-jax[train]'"
  if not wrong and not missing:
    yield "ok", f"python {python}, {shown}"


def _requirements() -> list[Any]:
  """What lip-jax requires for training: of the installed package, or of the tree it runs from."""
  from packaging.requirements import Requirement

  project = Path(__file__).parents[2] / "pyproject.toml"
  if project.is_file():
    values = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    return [*map(Requirement, values["dependencies"] + values["optional-dependencies"]["train"])]
  requirements = map(Requirement, metadata.requires("lip-jax") or [])
  return [one for one in requirements if not one.marker or one.marker.evaluate({"extra": "train"})]


def _installed(package: str) -> str | None:
  """Version of a package, None if it is not installed."""
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def devices(timeout: float) -> Iterator[Verdict]:
  """Whether jax uses the accelerators of this machine.

  Args:
    timeout: seconds until devices that do not answer count as hanging.
  """
  present = _accelerators()
  wanted = os.environ.get("JAX_PLATFORMS", "")
  try:
    seen = ask(_PROBE, timeout=timeout)
  except subprocess.TimeoutExpired:
    text = (
      f"the devices do not answer within {timeout:g} s: another process holds them, or they are "
      "those of several hosts, and the same command has to be started on all"
    )
    yield "problem", text, _why_unused(present) or "see the message of jax"
    return
  except UsageError as error:
    text = f"jax cannot use its devices: {str(error)[:300]}"
    yield "problem", text, _why_unused(present) or "see the message of jax"
    return
  text = f"{seen['count']} {seen['platform']} device(s), {seen['kind']}"
  if seen["memory"]:
    text += f", {seen['memory'] / _GIB:.1f} GiB each for jax"
  if seen["all"] != seen["count"]:
    text += f", of {seen['all']} on all hosts"
  unused = [kind for kind in present if kind != seen["platform"]]
  if seen["platform"] != "cpu" or not unused:
    yield "ok", text + ("" if present else "; no accelerator in this machine")
  elif wanted and not set(wanted.split(",")) & {"cuda", "gpu", *unused}:
    yield "warning", f"{text}, but there is a {unused[0]}", f"unset JAX_PLATFORMS={wanted}"
  else:
    yield "problem", f"{text}, but there is a {unused[0]}", _why_unused(unused)
  if seen["platform"] == "gpu" and not nvrtc.available():
    text = (
      "NVRTC, which compiles LIP's kernels, is not installed: in plain XLA it takes twice as long"
    )
    yield "warning", text, "pip install nvidia-cuda-nvrtc"
  if _installed("libtpu") and "tpu" not in present and not wanted:
    yield "warning", "libtpu is installed, but there is no TPU", "set JAX_PLATFORMS=cpu or cuda"


def _accelerators() -> list[str]:
  """Kinds of accelerators that are in this machine, whether or not jax can use them."""
  vendors = set()
  for device in Path("/sys/bus/pci/devices").glob("*"):
    try:
      kind = (device / "class").read_text().strip()
      vendors.add((device / "vendor").read_text().strip() + ":" + kind[:4])
    except OSError:
      continue
  kinds = []
  # Display and 3D controllers are of class 03.
  if "0x10de:0x03" in vendors or any(Path("/dev").glob("nvidia[0-9]*")):
    kinds.append("gpu")
  if any(vendor.startswith("0x1ae0:") for vendor in vendors) or any(Path("/dev").glob("accel*")):
    kinds.append("tpu")
  return kinds


def _why_unused(kinds: list[str]) -> str:
  """What an accelerator that jax does not use is likely to lack."""
  if "tpu" in kinds:
    if not _installed("libtpu"):
      return "pip install 'lip-jax[tpu]'"
    return "end the process that holds it (`sudo lsof -w /dev/accel* /dev/vfio/*`)"
  if "gpu" in kinds:
    if not Path("/proc/driver/nvidia").exists():
      return "install the NVIDIA driver"
    plugins = {name: _installed(f"jax-{name}-plugin") for name in ("cuda12", "cuda13")}
    version = next(filter(None, plugins.values()), None)
    if version is None:
      return "pip install 'lip-jax[cuda]'"
    if version != _installed("jaxlib"):
      return (
        f"the CUDA plugin is {version}, jaxlib {_installed('jaxlib')}: "
        "pip install --upgrade 'lip-jax[cuda]'"
      )
    return "see what jax says: python -c 'import jax; jax.devices(\"cuda\")'"
  return ""


def ask(
  code: str,
  *arguments: str,
  timeout: float | None = None,
  env: Mapping[str, str] | None = None,
) -> Any:
  """What Python code prints in its last line, in JSON, in a process of its own.

  Raises:
    UsageError: it fails or crashes, with the last line of what it says.
    subprocess.TimeoutExpired: it does not end within `timeout` seconds.
  """
  done = subprocess.run(
    [sys.executable, "-c", code, *arguments],
    env=env,
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )
  if done.returncode:
    said = done.stderr.strip() or f"exit status {done.returncode}"
    raise UsageError(said.splitlines()[-1].removeprefix("error: "))
  return json.loads(done.stdout.splitlines()[-1])


def memory() -> Iterator[Verdict]:
  """Whether the host has memory left for the input pipeline and for writing checkpoints."""
  total, free = _host_memory()
  text = f"host: {total / _GIB:.1f} GiB, {free / _GIB:.1f} free"
  if free < _LITTLE_MEMORY:
    yield "warning", text, "fewer config.data.num_threads, or a machine with more"
  else:
    yield "ok", text


def _host_memory() -> tuple[int, int]:
  """Bytes in all and free, of the machine or of the container, whichever is less."""
  values = {}
  for line in Path("/proc/meminfo").read_text().splitlines():
    name, _, value = line.partition(":")
    values[name] = int(value.split()[0]) * 1024
  total, free = values["MemTotal"], values["MemAvailable"]
  group = Path("/sys/fs/cgroup")
  try:
    limit = int((group / "memory.max").read_text())
    return min(total, limit), min(free, limit - int((group / "memory.current").read_text()))
  except (OSError, ValueError):  # no container, or "max"
    return total, free
