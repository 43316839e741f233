"""Compiles the steps of a run for TPUs that are not there, and says what they will need.

The compiler of the `tpu` extra (libtpu) works on any machine. All figures are its own, of one chip;
none is measured.
"""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from lip_jax.errors import UsageError
from lip_jax.tools import paper
from lip_jax.tools.collectives import Collective, collectives
from lip_jax.training import task as task_lib
from lip_jax.training.config import Config
from lip_jax.training.task import Task
from lip_jax.training.train_step import Program


class Chip(NamedTuple):
  """Public figures of one TPU chip (cloud.google.com/tpu/docs, the page of each generation).

  Memory is counted in units of 10^9 bytes, a little less than what the compiler lets a program use.
  """

  flops: float  # a second, bfloat16, at most
  hbm: float  # bytes
  hbm_bandwidth: float  # bytes a second
  # Bytes a second that a chip sends over all of its links in one direction: what the pages give as
  # all-reduce bandwidth of a pod, for each chip (v5p: as interchip interconnect bandwidth).
  ici_bandwidth: float
  dimensions: int  # of the torus
  options: dict[str, Any]  # of the topology: what makes a chip one device, as it is on Cloud TPU


CHIPS = {
  "v4": Chip(275e12, 32e9, 1200e9, 269e9, 3, {"chip_config_name": "megacore"}),
  "v5e": Chip(197e12, 16e9, 819e9, 200e9, 2, {}),
  "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 3, {}),
  "v6e": Chip(918e12, 32e9, 1638e9, 400e9, 2, {}),
}
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?[\w.-]+ = ", re.MULTILINE)
_EXAMPLES = "v5e:2x4, v5e:16x16, v6e:8x8, v4:2x2x2, v5p:4x4x4"


class Topology(NamedTuple):
  """A slice of TPU chips, to compile for."""

  name: str
  chip: Chip
  devices: Sequence[jax.Device]  # one for each chip


@dataclasses.dataclass(frozen=True)
class Figures:
  """What a compiled program needs of each device, by the compiler's account. Memory in bytes."""

  arguments: int
  outputs: int
  temporaries: int
  code: int
  aliased: int  # outputs that take the place of arguments
  flops: float
  bytes_accessed: float
  collectives: tuple[Collective, ...]
  instructions: int  # of HLO, in all computations, also those inside of fusions

  @property
  def peak(self) -> int:
    """Memory while it runs."""
    return self.arguments + self.outputs + self.temporaries + self.code - self.aliased


class Roofline(NamedTuple):
  """Seconds of a step, an estimate: for each of what it needs, at the chip's peak rate."""

  compute: float
  memory: float
  communication: float

  @property
  def step(self) -> float:
    """Seconds, if all three go on at the same time."""
    return max(self)


def topology(name: str) -> Topology:
  """The slice of that name, such as v5e:4x4: a generation and its chips along each axis.

  Raises:
    UsageError: there is no such slice, or no compiler for TPUs.
  """
  generation, _, shape = name.partition(":")
  if generation not in CHIPS:
    raise UsageError(
      f"unknown TPU {generation!r} in topology {name!r}; expected one of {', '.join(CHIPS)} and "
      f"the number of chips along each axis, for example {_EXAMPLES}"
    )
  chip = CHIPS[generation]
  sizes = [int(size) for size in shape.split("x")] if re.fullmatch(r"\d+(x\d+)*", shape) else []
  if len(sizes) != chip.dimensions or not all(sizes):
    raise UsageError(
      f"topology {name!r}: {generation} chips lie along {chip.dimensions} axes; for example "
      f"{', '.join(one for one in _EXAMPLES.split(', ') if one.startswith(generation))}"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise UsageError(
      "the compiler for TPUs is missing: pip install 'lip-jax[tpu]', which brings libtpu; it needs "
      "no TPU"
    )
  # Whether the links of each axis close to a ring: in whole cubes of 4, or rows of 16.
  cubes = all(size % 4 == 0 for size in sizes)
  wrap = (cubes,) * 3 if len(sizes) == 3 else (sizes[0] == 16, sizes[1] == 16, False)
  try:
    description = topologies.get_topology_desc(
      platform="tpu", topology_name=name, wrap=wrap, **chip.options
    )
  except Exception as error:  # of libtpu, whose types depend on its version
    reason = str(error).strip().splitlines()[0]
    raise UsageError(
      f"cannot compile for topology {name!r}: {reason}; slices that exist are, for example, "
      f"{_EXAMPLES}"
    ) from error
  return Topology(name, chip, description.devices)


def num_classes(config: Config) -> int:
  """Classes of a run's data set, which need not be there if it is ImageNet or COCO.

  Raises:
    UsageError: the data set is needed, and not there.
  """
  known = {paper.DATASET: 1000, paper.DETECTION_DATASET: 80}
  return known.get(config.data.dataset.partition(":")[0]) or task_lib.make(config).num_classes


def train_step(config: Config, classes: int, devices: Sequence[jax.Device], bucket: str) -> Figures:
  """Figures of the training step of a run; minutes for a large network.

  Args:
    devices: to compile for, of a `Topology` or of this machine.
    bucket: which of the task's, as batches of another shape are another program.

  Raises:
    UsageError: a batch that cannot be divided among the devices, or too little memory.
  """
  _, program = _program(config, classes, devices)
  found = _compile(lambda: program.update.lower(*program.arguments(bucket)))
  if devices[0].platform != "tpu":
    return found
  # The compiler for TPUs counts one round of a loop. What is outside, the update of the parameters,
  # is little, and counted as often here.
  rounds = config.accumulation_steps
  return dataclasses.replace(
    found, flops=found.flops * rounds, bytes_accessed=found.bytes_accessed * rounds
  )


def eval_step(config: Config, classes: int, devices: Sequence[jax.Device], bucket: str) -> Figures:
  """Figures of the evaluation step of a run, as `train_step`."""
  task, program = _program(config, classes, devices)
  params, batch_stats = jax.eval_shape(program.weights, program.state)
  return _compile(
    lambda: task.lower_evaluation(program.graph, program.mesh, params, batch_stats, bucket)
  )


def _program(config: Config, classes: int, devices: Sequence[jax.Device]) -> tuple[Task, Program]:
  task = task_lib.make(config, num_classes=classes)
  # How long an epoch is decides about constants of the learning rate, and nothing else.
  return task, Program(task, steps_per_epoch=1000, devices=devices)


def roofline(figures: Figures, chip: Chip) -> Roofline:
  """Estimated seconds of a step at the public peak rates of a chip (Williams et al. 2009).

  Memory: the compiler counts what every operation reads and writes, also what stays on the chip
  between two of them, so that this can be too much. Communication: rings over many chips, in which
  every chip sends the bytes of an all-reduce twice, and those of anything else once, over all of
  its links. Small slices, whose links do not close to rings or lead nowhere, take longer.
  """
  sent = sum(one.bytes * (2 if one.kind == "all-reduce" else 1) for one in figures.collectives)
  return Roofline(
    figures.flops / chip.flops,
    figures.bytes_accessed / chip.hbm_bandwidth,
    sent / chip.ici_bandwidth,
  )


def figures(compiled: jax.stages.Compiled) -> Figures:
  """Figures of any compiled program."""
  memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
  if not (memory and cost and text):
    raise ValueError("the compiler of this platform tells nothing of its programs")
  return Figures(
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    code=memory.generated_code_size_in_bytes,
    aliased=memory.alias_size_in_bytes,
    flops=cost.get("flops", math.nan),
    bytes_accessed=cost.get("bytes accessed", math.nan),
    collectives=tuple(collectives(text)),
    instructions=len(_INSTRUCTION.findall(text)),
  )


def _compile(lower: Callable[[], jax.stages.Lowered]) -> Figures:
  try:
    return figures(lower().compile())
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise UsageError(out_of_memory(str(error))) from error


def out_of_memory(message: str) -> str:
  """What to do when the compiler says that a program does not fit."""
  sizes = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", message)
  if sizes:
    needs, has = (
      float(number) * 1024 ** "KMGT".index(unit) / 1024**2
      for number, unit in (sizes.group(1, 2), sizes.group(3, 4))
    )
    what = f"it needs {needs:.2f} GiB of the chip's {has:.2f}, {needs - has:.2f} too much"
  else:
    what = message.strip().splitlines()[0]
  return (
    f"the program does not fit the chip's memory: {what}. Take fewer images for each chip (a lower "
    "config.global_batch_size or more chips), config.dtype=bfloat16, a greater "
    "config.accumulation_steps or config.remat=True; config.fsdp splits parameters and momentum, "
    "which are little beside the activations"
  )
