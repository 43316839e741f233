"""The flags of commands that may run on several hosts, started alike on each."""

import argparse
import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lip_jax.cli.arguments import add, select

if TYPE_CHECKING:
  from lip_jax.distributed import startup


def add_flags(parser: argparse.ArgumentParser, connect_timeout: float = 300) -> None:
  """Adds what says which process of how many this is."""
  group = parser.add_argument_group(
    "several hosts",
    "start the same command on each; on Cloud TPU, under SLURM, Open MPI and "
    "Kubernetes the processes find each other",
  )
  arguments = {
    "--distributed {auto,on,off}": "auto: one process of several if a cluster or the flags below "
    "say so. on: an error if they do not. off: this process is on its own, whatever they say "
    "(default: auto)",
    "--coordinator_address HOST:PORT": "of process 0, the same for all processes: any free port "
    "that they can reach",
    "--num_processes N": "of the run, on all hosts",
    "--process_id K": "which one this is, from 0",
  }
  add(group, arguments)
  text = (
    "GPUs of this host that this process uses, such as 0,1 (default: all, or one each where a "
    "launcher has started several processes on the host)"
  )
  add(group, {"--local_device_ids K,K": text}, type=_numbers)
  arguments = {
    "--connect_timeout SECONDS": "that the processes wait for each other at the start (default: "
    f"{connect_timeout:g})",
    "--liveness_timeout SECONDS": "without a sign of life (frozen, unreachable) after which a "
    "process counts as lost and the others end with status 75 (default: 45)",
  }
  add(group, arguments)
  parser.set_defaults(distributed="auto", connect_timeout=connect_timeout, liveness_timeout=45.0)


def _numbers(text: str) -> list[int]:
  try:
    return [int(number) for number in text.split(",")]
  except ValueError:
    raise argparse.ArgumentTypeError(f"{text!r}: give numbers, such as 0,1") from None


def options(args: argparse.Namespace) -> "startup.Options":
  """What the flags of `add_flags` say."""
  from lip_jax.distributed import startup

  names = (field.name for field in dataclasses.fields(startup.Options))
  return startup.Options(**select(args, *names))


@contextlib.contextmanager
def joined(args: argparse.Namespace, *, log: bool = True) -> Iterator[bool]:
  """Context in which this process takes part in the run; whether it is the one that reports.

  Args:
    args: with the flags of `add_flags`.
  """
  import jax

  from lip_jax.distributed import startup
  from lip_jax.training.metrics import log_to_stdout

  if log:
    log_to_stdout()
  with startup.join(options(args)):
    first = jax.process_index() == 0
    if log and not first:
      log_to_stdout(logging.WARNING)  # the rest is the same as process 0 says
    yield first
