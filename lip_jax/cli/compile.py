"""`lip-jax compile`: what the steps of a run need on TPUs or GPUs that are not there."""

import argparse
import contextlib
import dataclasses
import itertools
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
  from lip_jax.tools.aot_compile import Figures
  from lip_jax.tools.chips import Chip

_STEPS = {"train": "training step", "eval": "evaluation step"}


def add_commands(commands: Any) -> None:
  """Adds `compile` to the subparsers `commands`."""
  text = (
    "compile a run for TPUs or GPUs that are not there: memory, FLOPs, traffic, estimated speed"
  )
  more = "; docs/tpu.md and docs/gpu.md explain the figures. Takes minutes for a large network."
  parser = add_command(commands, "compile", _compile, text, more)
  arguments = {
    "--config FILE": "such as configs/imagenet.py:lip_resnet50",
    "--topology NAME": "TPU generation and chips along each axis, such as v5e:16x16 or v5p:4x4x4; "
    "GPU and how many, such as h100:8, or h100:32x8 on 32 hosts",
  }
  add(parser, arguments, required=True)
  configuration.add_changes(parser)
  arguments = {
    "--per-device-batch N": "images of a step on each chip (default: the configuration's batch "
    "sizes, divided)",
    "--num-classes N": "classes of the data set (default: 1000 of imagenet2012, or what the data "
    "set says)",
    "--only {train,eval}": "one of the two steps (default: both)",
    "--json": "every digit, for machines",
  }
  add(parser, arguments)


def _compile(args: argparse.Namespace) -> None:
  _prepare_process()
  from lip_jax.tools import aot_compile, chips
  from lip_jax.training import task as task_lib

  config = configuration.load(args.config, args.set)
  # Which refuses unknown options, before a compiler is looked for.
  buckets = task_lib.make(config).buckets
  topology = chips.topology(args.topology)
  count = len(topology.devices)
  if args.per_device_batch:
    batch = args.per_device_batch * count
    config = dataclasses.replace(config, global_batch_size=batch, eval_batch_size=batch)
  classes = args.num_classes or aot_compile.num_classes(config)
  functions = {"train": aot_compile.train_step, "eval": aot_compile.eval_step}
  batches = {"train": config.global_batch_size, "eval": config.eval_batch_size}
  steps = {}
  for step, bucket in itertools.product([args.only] if args.only else _STEPS, buckets):
    name = step if len(buckets) == 1 else f"{step} {bucket}"
    started = time.monotonic()
    with _busy(f"compiling the {_STEPS[step]} for {count} chips"):
      figures = functions[step](config, classes, topology.devices, bucket)
    aot_compile.check_memory(figures, topology.chip)
    steps[name] = _values(figures, topology.chip, batches[step] / count)
    steps[name]["compile_seconds"] = time.monotonic() - started
  values = {
    "model": dict(config.model),
    "dtype": config.dtype,
    "gradient_dtype": config.gradient_dtype,
    "topology": topology.name,
    "chips": count,
    "memory": topology.chip.memory,
    "steps": steps,
  }
  print(json.dumps(values, indent=2) if args.json else _report(values))


def _prepare_process() -> None:
  """Keeps this process, which computes nothing, away from the devices that this machine has."""
  import jax

  jax.config.update("jax_platforms", "cpu")  # JAX has read its variable
  # libtpu ends the process over flags for other devices. Its own are in LIBTPU_INIT_ARGS.
  os.environ.pop("XLA_FLAGS", None)
  # The compiler for GPUs needs none of CUDA's libraries.
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
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


def _values(figures: "Figures", chip: "Chip", images: float) -> dict[str, Any]:
  """All that is said of a step that takes so many images on each chip."""
  from lip_jax.tools import ptx
  from lip_jax.tools.aot_compile import roofline

  bound = roofline(figures, chip)
  kernels = ptx.kernels(figures.kernels, chip.architecture) if ptx.assembler() else ()
  return {
    "images_per_chip": images,
    **dataclasses.asdict(figures),
    "collectives": [each._asdict() for each in figures.collectives],
    "traffic": [each._asdict() for each in figures.traffic],
    "kernels": [each._asdict() for each in kernels],
    "peak": figures.peak,
    "free": 1 - figures.peak / chip.memory,
    "estimate": {**bound._asdict(), "step": bound.step, "images_per_second": images / bound.step},
  }


def _report(values: dict[str, Any]) -> str:
  steps = values["steps"]
  columns = [_column(one, values["memory"]) for one in steps.values()]
  rows = [("each chip", *steps)]
  rows += [(name, *(column[name] for column in columns)) for name in columns[0]]
  notes = [
    f"{values['model']['name']} in {values['dtype']} on {values['topology']}, {values['chips']} "
    "chips",
    table(rows),
    *(_collectives(step, one["collectives"]) for step, one in steps.items()),
    *(_traffic(step, one["traffic"]) for step, one in steps.items() if one["traffic"]),
    *(_kernels(step, one["kernels"]) for step, one in steps.items() if one["kernels"]),
    "The compiler's figures and, in the estimate, public peak rates of the chip; nothing is "
    "measured.\ndocs/tpu.md and docs/gpu.md explain them.",
  ]
  if values["dtype"] == "float32":
    notes.append("--config.dtype=bfloat16 is recommended: activations take half the bytes.")
  return "\n\n".join(notes)


def _column(step: dict[str, Any], memory: float) -> dict[str, str]:
  """What the table says of a step."""
  estimate = step["estimate"]
  return {
    "images": f"{step['images_per_chip']:,.0f}",
    "memory: arguments": _giga(step["arguments"]),
    "  outputs": _giga(step["outputs"]),
    "  of them in the place of arguments": _giga(step["aliased"]),
    "  temporary": _giga(step["temporaries"]),
    "  code": _giga(step["code"]),
    "  peak": _giga(step["peak"]),
    f"  left of {_giga(memory)}": f"{100 * step['free']:.1f} %",
    "FLOPs": f"{step['flops'] / 1e9:,.3f} G",
    "bytes accessed": _giga(step["bytes_accessed"]),
    "HLO instructions": f"{step['instructions']:,}",
    "seconds to compile": f"{step['compile_seconds']:,.0f}",
    "estimate: computing": _milli(estimate["compute"]),
    "  memory accesses": _milli(estimate["memory"]),
    "  communication": _milli(estimate["communication"]),
    "  step, the greatest of them": _milli(estimate["step"]),
    "  images/s": f"{estimate['images_per_second']:,.0f}",
  }


def _giga(count: float) -> str:
  return f"{count / 1e9:,.3f} GB"


def _milli(seconds: float) -> str:
  return f"{1e3 * seconds:,.3f} ms"


def _collectives(step: str, collectives: list[dict[str, Any]]) -> str:
  if not collectives:
    return f"Collectives of a chip, {step}: none"
  rows = [("kind", "type", "operations", "bytes")]
  rows += [
    (each["kind"], each["dtype"], f"{each['operations']:,}", f"{each['bytes']:,}")
    for each in collectives
  ]
  return (
    f"Collectives of a chip, {step} (bytes that go into one; of all-gather those that come out):\n"
    + table(rows, right=(2, 3))
  )


def _traffic(step: str, traffic: list[dict[str, Any]]) -> str:
  rows = [("kind of operation", "operations", "bytes", "share", "GFLOPs")]
  total = sum(each["bytes"] for each in traffic)
  rows += [
    (
      each["kind"],
      f"{each['operations']:,}",
      f"{each['bytes']:,}",
      f"{each['bytes'] / total:.1%}",
      f"{each['flops'] / 1e9:,.1f}",
    )
    for each in traffic
  ]
  return f"What operations read and write, {step}:\n" + table(rows, right=(1, 2, 3, 4))


def _kernels(step: str, kernels: list[dict[str, Any]]) -> str:
  rows = [("kernel", "registers", "bytes spilled", "bytes shared")]
  rows += [
    (each["name"], *(f"{each[key]:,}" for key in ("registers", "spilled", "shared")))
    for each in kernels
  ]
  return f"Custom kernels, {step}:\n" + table(rows, right=(1, 2, 3))
