"""`lip-jax compile`: what the steps of a run need on TPUs that are not there."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lip_jax.cli import configuration
from lip_jax.cli.arguments import add, add_command
from lip_jax.cli.output import progress, table

if TYPE_CHECKING:
  from lip_jax.tools.aot_compile import Chip, Figures, Topology
  from lip_jax.training.config import Config

_STEPS = {"train": "training step", "eval": "evaluation step"}


def add_commands(commands: Any) -> None:
  """Adds `compile` to the subparsers `commands`."""
  text = "compile a run for TPUs that are not there: memory, FLOPs, traffic, estimated speed"
  more = "; docs/tpu.md explains the figures. Takes minutes for a large network."
  parser = add_command(commands, "compile", _compile, text, more)
  add(
    parser,
    {
      "--config FILE": "such as configs/imagenet.py:lip_resnet50",
      "--topology NAME": "TPU generation and chips along each axis, such as v5e:16x16 or v5p:4x4x4",
    },
    required=True,
  )
  configuration.add_changes(parser)
  add(
    parser,
    {
      "--per-device-batch N": "images of a step on each chip (default: the configuration's batch "
      "sizes, divided)",
      "--num-classes N": "classes of the data set (default: 1000 of imagenet2012, or what the data "
      "set says)",
      "--only {train,eval}": "one of the two steps (default: both)",
      "--json": "every digit, for machines",
    },
  )


def _compile(args: argparse.Namespace) -> None:
  _prepare_process()
  from lip_jax.tools import aot_compile

  config = configuration.load(args.config, args.set)
  topology = aot_compile.topology(args.topology)
  if args.per_device_batch:
    config = aot_compile.with_batch(config, args.per_device_batch * len(topology.devices))
  classes = args.num_classes or aot_compile.num_classes(config)
  functions = {"train": aot_compile.train_step, "eval": aot_compile.eval_step}
  figures, seconds = {}, {}
  for step in [args.only] if args.only else _STEPS:
    started = time.monotonic()
    with _busy(f"compiling the {_STEPS[step]} for {len(topology.devices)} chips"):
      figures[step] = functions[step](config, classes, topology.devices)
    seconds[step] = time.monotonic() - started
  if args.json:
    print(json.dumps(_values(config, topology, figures, seconds), indent=2))
  else:
    print(_report(config, topology, figures))


def _prepare_process() -> None:
  """Keeps this process, which computes nothing, away from TPUs of this machine and their users."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  # libtpu ends the process over flags for other devices. Its own are in LIBTPU_INIT_ARGS.
  os.environ.pop("XLA_FLAGS", None)
  # No lock on chips that are not used, and no questions about them to the metadata server of a
  # cloud machine; then libtpu wants to be told what it would have asked for.
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
  os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"


@contextlib.contextmanager
def _busy(what: str) -> Iterator[None]:
  """Says that something takes long, and on a terminal for how long it has."""
  done = threading.Event()
  started = time.monotonic()

  def show() -> None:
    while not done.wait(1):
      progress(f"{what}: {time.monotonic() - started:.0f} s")

  if not sys.stderr.isatty():
    print(f"{what}: minutes for a large network", file=sys.stderr, flush=True)
  ticker = threading.Thread(target=show, daemon=True)
  ticker.start()
  try:
    yield
  finally:
    done.set()
    ticker.join()
    progress("")


def _values(
  config: "Config",
  topology: "Topology",
  figures: dict[str, "Figures"],
  seconds: dict[str, float],
) -> dict[str, Any]:
  from lip_jax.tools.aot_compile import roofline

  steps = {}
  for step, one in figures.items():
    images = _batch(config, step) / len(topology.devices)
    bound = roofline(one, topology.chip)
    steps[step] = {
      "images_per_chip": images,
      **dataclasses.asdict(one),
      "collectives": [each._asdict() for each in one.collectives],
      "peak": one.peak,
      "free": 1 - one.peak / topology.chip.hbm,
      "estimate": {**bound._asdict(), "step": bound.step, "images_per_second": images / bound.step},
      "compile_seconds": seconds[step],
    }
  return {
    "model": dict(config.model),
    "dtype": config.dtype,
    "gradient_dtype": config.gradient_dtype,
    "topology": topology.name,
    "chips": len(topology.devices),
    "hbm": topology.chip.hbm,
    "steps": steps,
  }


def _batch(config: "Config", step: str) -> int:
  return config.global_batch_size if step == "train" else config.eval_batch_size


def _report(config: "Config", topology: "Topology", figures: dict[str, "Figures"]) -> str:
  chips = len(topology.devices)
  columns = [
    _column(one, topology.chip, _batch(config, step) // chips) for step, one in figures.items()
  ]
  rows = [("each chip", *figures)]
  rows += [(name, *(column[name] for column in columns)) for name in columns[0]]
  notes = [
    f"{config.model['name']} in {config.dtype} on {topology.name}, {chips} chips",
    table(rows),
    *(_traffic(step, one) for step, one in figures.items()),
    "The compiler's figures and, in the estimate, public peak rates of the chip; nothing is "
    "measured.\ndocs/tpu.md explains them.",
  ]
  if config.dtype == "float32":
    notes.append("On TPUs --config.dtype=bfloat16 is recommended: activations take half the bytes.")
  return "\n\n".join(notes)


def _column(one: "Figures", chip: "Chip", images: int) -> dict[str, str]:
  """What the table says of a step."""
  from lip_jax.tools.aot_compile import roofline

  bound = roofline(one, chip)
  return {
    "images": f"{images:,}",
    "memory: arguments": _giga(one.arguments),
    "  outputs": _giga(one.outputs),
    "  of them in the place of arguments": _giga(one.aliased),
    "  temporary": _giga(one.temporaries),
    "  code": _giga(one.code),
    "  peak": _giga(one.peak),
    f"  left of {_giga(chip.hbm)}": f"{100 * (1 - one.peak / chip.hbm):.1f} %",
    "FLOPs": f"{one.flops / 1e9:,.3f} G",
    "bytes accessed": _giga(one.bytes_accessed),
    "estimate: computing": _milli(bound.compute),
    "  memory accesses": _milli(bound.memory),
    "  communication": _milli(bound.communication),
    "  step, the greatest of them": _milli(bound.step),
    "  images/s": f"{images / bound.step:,.0f}",
  }


def _giga(count: float) -> str:
  return f"{count / 1e9:,.3f} GB"


def _milli(seconds: float) -> str:
  return f"{1e3 * seconds:,.3f} ms"


def _traffic(step: str, one: "Figures") -> str:
  """The collectives of a step."""
  if not one.collectives:
    return f"Collectives of a chip, {step}: none"
  rows = [("kind", "type", "operations", "bytes")]
  rows += [
    (each.kind, each.dtype, f"{each.operations:,}", f"{each.bytes:,}") for each in one.collectives
  ]
  return (
    f"Collectives of a chip, {step} (bytes that go into one; of all-gather those that come out):\n"
    + table(rows, right=(2, 3))
  )
