"""Compiles the steps of a run for TPUs and GPUs that are not there, and says what they will need.

The compilers of the `tpu` and `gpu-compile` extras work on any machine. All figures are their own,
of one chip, or counted in the program that they give; none is measured.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from lip_jax.errors import UsageError
from lip_jax.tools import hlo, paper
from lip_jax.tools.chips import Chip
from lip_jax.tools.collectives import Collective, collectives
from lip_jax.tools.traffic import Traffic, kernels_of, traffic
from lip_jax.training import task as task_lib
from lip_jax.training.config import Config
from lip_jax.training.task import Task
from lip_jax.training.train_step import Program

_FITS_NOT = (
  "the program does not fit the chip's memory: {}. Take fewer images for each chip (a lower "
  "config.global_batch_size or more chips), config.dtype=bfloat16, a greater "
  "config.accumulation_steps or config.remat=True; config.fsdp splits parameters and momentum, "
  "which are little beside the activations"
)


@dataclasses.dataclass(frozen=True)
class Figures:
  """What a compiled program needs of each device, by the compiler's account. Memory in bytes.

  Compilers for GPUs tell neither FLOPs nor bytes accessed: these are counted in the program, FLOPs
  of convolutions and matrix products only.
  """

  arguments: int
  outputs: int
  temporaries: int
  code: int
  aliased: int  # outputs that take the place of arguments
  flops: float
  bytes_accessed: float
  collectives: tuple[Collective, ...]
  instructions: int  # of HLO, in all computations, also those inside of fusions
  # Of GPUs: what adds up to `bytes_accessed`, and the PTX of the kernels that are not XLA's.
  traffic: tuple[Traffic, ...] = ()
  kernels: tuple[str, ...] = ()

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
    devices: to compile for, of a `chips.Topology` or of this machine.
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
  its links. Small slices of TPUs, whose links do not close to rings or lead nowhere, take longer.
  """
  sent = sum(one.bytes * (2 if one.kind == "all-reduce" else 1) for one in figures.collectives)
  return Roofline(
    figures.flops / chip.flops,
    figures.bytes_accessed / chip.memory_bandwidth,
    sent / chip.link_bandwidth,
  )


def figures(compiled: jax.stages.Compiled) -> Figures:
  """Figures of any compiled program."""
  memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
  if not (memory and text):
    raise ValueError("the compiler of this platform tells nothing of its programs")
  program = hlo.read(text)
  of_kinds = () if cost else tuple(traffic(program))
  cost = cost or {
    "flops": sum(one.flops for one in of_kinds),
    "bytes accessed": sum(one.bytes for one in of_kinds),
  }
  return Figures(
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    code=memory.generated_code_size_in_bytes,
    aliased=memory.alias_size_in_bytes,
    flops=cost.get("flops", math.nan),
    bytes_accessed=cost.get("bytes accessed", math.nan),
    collectives=tuple(collectives(program)),
    instructions=sum(map(len, program.computations.values())),
    traffic=of_kinds,
    kernels=tuple(kernels_of(text)),
  )


def _compile(lower: Callable[[], jax.stages.Lowered]) -> Figures:
  try:
    return figures(lower().compile())
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise UsageError(out_of_memory(str(error))) from error


def check_memory(figures: Figures, chip: Chip) -> None:
  """Compilers for GPUs do not refuse a program that is too large.

  Raises:
    UsageError: it needs more than the chip has.
  """
  if figures.peak > chip.memory:
    needs, has = figures.peak / 1024**3, chip.memory / 1024**3
    raise UsageError(_too_large(needs, has))


def out_of_memory(message: str) -> str:
  """What to do when the compiler says that a program does not fit."""
  sizes = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", message)
  if not sizes:
    return _FITS_NOT.format(message.strip().splitlines()[0])
  needs, has = (
    float(number) * 1024 ** "KMGT".index(unit) / 1024**2
    for number, unit in (sizes.group(1, 2), sizes.group(3, 4))
  )
  return _too_large(needs, has)


def _too_large(needs: float, has: float) -> str:
  """Both in GiB."""
  return _FITS_NOT.format(
    f"it needs {needs:.2f} GiB of the chip's {has:.2f}, {needs - has:.2f} too much"
  )
