"""The flags of commands that may run on several hosts, started alike on each."""

import argparse
import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lip_jax.cli.arguments import positive

if TYPE_CHECKING:
  from lip_jax.distributed import startup


def add_flags(parser: argparse.ArgumentParser, connect_timeout: float = 300) -> None:
  """Adds what says which process of how many this is."""
  group = parser.add_argument_group(
    "several hosts",
    "start the same command on each; on Cloud TPU, under SLURM, Open MPI and "
    "Kubernetes the processes find each other",
  )
  group.add_argument(
    "--distributed",
    choices=("auto", "on", "off"),
    default="auto",
    help="auto: one process of several if a cluster or the flags below say so. on: an error if "
    "they do not. off: this process is on its own, whatever they say (default: auto)",
  )
  group.add_argument(
    "--coordinator_address",
    metavar="HOST:PORT",
    help="of process 0, the same for all processes: any free port that they can reach",
  )
  group.add_argument("--num_processes", type=positive, metavar="N", help="of the run, on all hosts")
  group.add_argument("--process_id", type=int, metavar="K", help="which one this is, from 0")
  group.add_argument(
    "--local_device_ids",
    type=_numbers,
    metavar="K,K",
    help="GPUs of this host that this process uses, such as 0,1 (default: all, or one each where a "
    "launcher has started several processes on the host)",
  )
  group.add_argument(
    "--connect_timeout",
    type=float,
    default=connect_timeout,
    metavar="SECONDS",
    help=f"that the processes wait for each other at the start (default: {connect_timeout:g})",
  )
  group.add_argument(
    "--liveness_timeout",
    type=float,
    default=45.0,
    metavar="SECONDS",
    help="without a sign of life (frozen, unreachable) after which a process counts as lost and "
    "the others end with status 75 (default: 45)",
  )


def _numbers(text: str) -> list[int]:
  try:
    return [int(number) for number in text.split(",")]
  except ValueError:
    raise argparse.ArgumentTypeError(f"{text!r}: give numbers, such as 0,1") from None


def options(args: argparse.Namespace) -> "startup.Options":
  """What the flags of `add_flags` say."""
  from lip_jax.distributed import startup

  names = (field.name for field in dataclasses.fields(startup.Options))
  return startup.Options(**{name: getattr(args, name) for name in names})


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
