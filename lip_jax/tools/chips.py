"""Public figures of the chips that programs are compiled for, and the slices and hosts they form.

TPUs: cloud.google.com/tpu/docs, the page of each generation. GPUs: NVIDIA's data sheets and
architecture white papers, and the table of compute capabilities in the CUDA programming guide;
rates of the tensor cores without sparsity.
"""

import importlib.util
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from lip_jax.errors import UsageError


class Chip(NamedTuple):
  """One TPU chip or one GPU."""

  flops: float  # a second, bfloat16, at most
  # In units of 10^9 bytes, a little less than what a program may use.
  memory: float
  memory_bandwidth: float  # bytes a second
  # Bytes a second that it sends over all of its links in one direction. TPUs: what the pages give
  # as all-reduce bandwidth of a pod, for each chip (v5p: as interchip interconnect bandwidth).
  link_bandwidth: float
  architecture: str = ""  # of a GPU, as its assembler calls it


class _Tpu(NamedTuple):
  chip: Chip
  dimensions: int  # of the torus
  options: dict[str, Any]  # of the topology: what makes a chip one device, as it is on Cloud TPU


class _Gpu(NamedTuple):
  chip: Chip
  network: float  # bytes a second from a host to others, for each of its GPUs
  capability: tuple[int, int]
  processors: int  # streaming multiprocessors, each with
  lanes: int  # of float32
  threads: int
  shared: int  # KiB; a block can have all but one
  cache: int  # of the second level, MiB
  clock: float  # GHz, at most

  def target(self) -> str:
    """What XLA's compiler asks for: a GpuTargetConfigProto in text form."""
    return f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {self.threads}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        shared_memory_per_block: 49152 shared_memory_per_core: {self.shared * 1024}
        shared_memory_per_block_optin: {(self.shared - 1) * 1024}
        core_count: {self.processors} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock}
        l2_cache_size: {self.cache * 1024**2} device_memory_size: {self.chip.memory:.0f}
        memory_bandwidth: {self.chip.memory_bandwidth:.0f}
        cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
      }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    """


_TPUS = {
  "v4": _Tpu(Chip(275e12, 32e9, 1200e9, 269e9), 3, {"chip_config_name": "megacore"}),
  "v5e": _Tpu(Chip(197e12, 16e9, 819e9, 200e9), 2, {}),
  "v5p": _Tpu(Chip(459e12, 95e9, 2765e9, 600e9), 3, {}),
  "v6e": _Tpu(Chip(918e12, 32e9, 1638e9, 400e9), 2, {}),
}
# SXM modules, with the network of NVIDIA's own hosts of 8 (DGX); l4: PCIe, in Google's G2 machines.
GPUS = {
  "a100": _Gpu(Chip(312e12, 80e9, 2039e9, 300e9), 25e9, (8, 0), 108, 64, 2048, 164, 40, 1.41),
  "h100": _Gpu(Chip(989e12, 80e9, 3350e9, 450e9), 50e9, (9, 0), 132, 128, 2048, 228, 50, 1.98),
  "h200": _Gpu(Chip(989e12, 141e9, 4800e9, 450e9), 50e9, (9, 0), 132, 128, 2048, 228, 50, 1.98),
  "b200": _Gpu(Chip(2250e12, 180e9, 8000e9, 900e9), 50e9, (10, 0), 148, 128, 2048, 228, 126, 1.96),
  "l4": _Gpu(Chip(121e12, 24e9, 300e9, 32e9), 1.5625e9, (8, 9), 58, 128, 1536, 100, 48, 2.04),
}
_TPU_EXAMPLES = "v5e:2x4, v5e:16x16, v6e:8x8, v4:2x2x2, v5p:4x4x4"
_GPU_EXAMPLES = "h100:8, h100:32x8, a100:8, h200:8, b200:8, l4:1"


class Topology(NamedTuple):
  """Chips to compile for."""

  name: str
  chip: Chip
  devices: Sequence[jax.Device]  # one for each chip


def topology(name: str) -> Topology:
  """The chips of that name: a slice of TPUs such as v5e:4x4, or GPUs such as h100:8.

  A generation of TPUs and its chips along each axis, or a GPU and how many, as h100:32x8 on several
  hosts.

  Raises:
    UsageError: there is no such thing, or no compiler for it.
  """
  generation, _, shape = name.partition(":")
  sizes = [int(size) for size in shape.split("x")] if re.fullmatch(r"\d+(x\d+)*", shape) else []
  if not all(sizes):
    sizes = []
  if generation in _TPUS:
    return _slice(name, generation, sizes)
  if generation in GPUS:
    return _hosts(name, generation, sizes)
  raise UsageError(
    f"unknown chip {generation!r} in topology {name!r}; expected a TPU, one of {', '.join(_TPUS)}, "
    f"and the number of chips along each axis, for example {_TPU_EXAMPLES}; or a GPU, one of "
    f"{', '.join(GPUS)}, and how many, for example {_GPU_EXAMPLES}"
  )


def _slice(name: str, generation: str, sizes: list[int]) -> Topology:
  tpu = _TPUS[generation]
  if len(sizes) != tpu.dimensions:
    raise UsageError(
      f"topology {name!r}: {generation} chips lie along {tpu.dimensions} axes; for example "
      f"{', '.join(one for one in _TPU_EXAMPLES.split(', ') if one.startswith(generation))}"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise UsageError(
      "the compiler for TPUs is missing: pip install 'lip-jax[tpu]', which brings libtpu; it needs "
      "no TPU"
    )
  # Whether the links of each axis close to a ring: in whole cubes of 4, or rows of 16.
  cubes = all(size % 4 == 0 for size in sizes)
  wrap = (cubes,) * 3 if len(sizes) == 3 else (sizes[0] == 16, sizes[1] == 16, False)
  devices = _devices("tpu", name, _TPU_EXAMPLES, topology_name=name, wrap=wrap, **tpu.options)
  return Topology(name, tpu.chip, devices)


def _hosts(name: str, generation: str, sizes: list[int]) -> Topology:
  gpu = GPUS[generation]
  if len(sizes) not in (1, 2):
    raise UsageError(
      f"topology {name!r}: expected how many GPUs, or how many hosts and how many GPUs on each; "
      f"for example {_GPU_EXAMPLES}"
    )
  if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    raise UsageError(
      "the compiler for GPUs is missing: pip install 'lip-jax[gpu-compile]', which brings "
      "jax-cuda13-plugin; it needs no GPU"
    )
  hosts, each = sizes if len(sizes) == 2 else (1, sizes[0])
  devices = _devices(
    "cuda",
    name,
    _GPU_EXAMPLES,
    topology_name=generation,
    topology=f"1x{hosts}x{each}",
    target_config=gpu.target(),
  )
  chip = gpu.chip._replace(architecture="sm_{}{}".format(*gpu.capability))
  if hosts > 1:  # a ring through all of them enters and leaves a host on each of its GPUs' links
    across = each * gpu.network
    chip = chip._replace(link_bandwidth=min(across, chip.link_bandwidth) if each > 1 else across)
  return Topology(name, chip, devices)


def _devices(platform: str, name: str, examples: str, **options: Any) -> Sequence[jax.Device]:
  try:
    return topologies.get_topology_desc(platform=platform, **options).devices
  except Exception as error:  # of a compiler, whose types depend on its version
    reason = str(error).strip().splitlines()[0]
    raise UsageError(
      f"cannot compile for topology {name!r}: {reason}; those that exist are, for example, "
      f"{examples}"
    ) from error
