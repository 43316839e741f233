"""Programs that `lip-jax compile` compiles for tables, each in a process of its own.

Figures of each are a line of a file, so that the same command goes on where it was interrupted.
Nothing is computed from the figures of other programs.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lip_jax.tools import cost

ROOT = Path(__file__).parents[1]

# With the operator in plain XLA, as it is for what has no kernel.
_WITHOUT_KERNELS = """
import sys
from lip_jax import cli
from lip_jax.ops.kernels import dispatch
dispatch.targets = set
sys.exit(cli.main(sys.argv[1:]))
"""


class Program(NamedTuple):
  """What to compile."""

  network: str
  topology: str
  batch: int  # images on a chip
  options: dict[str, str]
  kernels: bool = True
  step: str = "train"  # or "eval"
  configs: str = "imagenet"  # of which the network is a row

  @property
  def key(self) -> str:
    """Of its line in the results."""
    options = " ".join(f"{name}={value}" for name, value in sorted(self.options.items()))
    step = "" if self.step == "train" else self.step
    form = "" if self.kernels else " without kernels"
    return f"{self.network} {self.topology} {self.batch} {options} {step}".strip() + form


def add_arguments(parser: argparse.ArgumentParser, results: str) -> None:
  """Adds what both tables have."""
  parser.add_argument("--results", type=Path, default=Path(results))
  parser.add_argument("--print", action="store_true", help="compile nothing")


def results(args: argparse.Namespace, programs: Iterable[Program]) -> dict[str, dict[str, Any]]:
  """Figures, or why there are none, by key; compiles what is missing, unless only to print."""
  args.results.parent.mkdir(parents=True, exist_ok=True)
  found = _read(args.results)
  missing = [] if args.print else [one for one in programs if one.key not in found]
  for number, program in enumerate(missing, start=1):
    started = time.monotonic()
    print(f"{number}/{len(missing)} {program.key}", end=" ", file=sys.stderr, flush=True)
    result = {"key": program.key, **_compile(program)}
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    with args.results.open("a", encoding="utf-8") as lines:
      lines.write(json.dumps(result) + "\n")
    found[program.key] = result
  return found


def _read(path: Path) -> dict[str, dict[str, Any]]:
  if not path.exists():
    return {}
  lines = path.read_text(encoding="utf-8").splitlines()
  return {result["key"]: result for result in map(json.loads, lines)}


def _compile(program: Program) -> dict[str, Any]:
  command = [
    sys.executable,
    *(("-m", "lip_jax.cli") if program.kernels else ("-c", _WITHOUT_KERNELS)),
    *("compile", "--json", f"--only={program.step}"),
    f"--config={ROOT / 'configs' / program.configs}.py:{program.network}",
    f"--topology={program.topology}",
    f"--per-device-batch={program.batch}",
    *(f"--set={name}={value}" for name, value in program.options.items()),
  ]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode == 0:
    return json.loads(done.stdout)
  reason = done.stderr.strip().splitlines()[-1]
  if "does not fit the chip's memory" not in reason:
    sys.exit(f"{program.key}: {reason}")
  return {"error": reason}


def memory_cells(step: dict[str, Any]) -> list[str]:
  """Peak memory, what is left, GFLOPs and GB accessed."""
  return [
    f"{step['peak'] / 1e9:.2f} GB",
    f"{100 * step['free']:.0f} %",
    f"{step['flops'] / 1e9:,.0f}",
    f"{step['bytes_accessed'] / 1e9:.1f}",
  ]


def training_cells(network: str, result: dict[str, Any]) -> list[str]:
  """`memory_cells`, then collectives in MB and by the gradients', and what is estimated."""
  step = result["steps"]["train"]
  sent = sum(one["bytes"] for one in step["collectives"])
  parameters = next(cost.costs([network])).parameters
  gradients = parameters * (2 if result["gradient_dtype"] == "bfloat16" else 4)
  return [
    *memory_cells(step),
    f"{sent / 1e6:.2f}",
    f"{sent / gradients:.5f}",
    f"{1e3 * step['estimate']['step']:.1f} ms",
    f"{step['estimate']['images_per_second']:,.0f}",
  ]
