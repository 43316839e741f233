"""What the paper's networks need on GPUs, by the compiler's account: the tables of docs/gpu.md.

  python benchmarks/gpu_table.py                      # compiles what is missing, prints the tables
  python benchmarks/gpu_table.py --print              # prints what there is, compiles nothing

Needs the `gpu-compile` extra, and no GPU. Figures are kept in RESULTS (runs/gpu_table.jsonl), so
that the same command goes on where it was interrupted. What was not compiled reads "not yet
compiled". LIP networks are compiled with the kernels and with the operator in plain XLA.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from compiled import Program, add_arguments, results, training_cells

NETWORKS = (
  *("lip_resnet50", "resnet50", "lip_resnet101", "resnet101", "lip_densenet121", "densenet121"),
)
TOPOLOGIES = ("h100:8", "a100:8")
BATCH = 128  # images on a GPU

# Kinds of operations, as `lip-jax compile` names them.
KINDS = {
  "convolutions": "convolutions",
  "reductions": "reductions, and what is fused with them",
  "element by element": "element by element, and others",
  "kernels": "custom kernels",
  "copies": "copies and transpositions",
}


def main() -> None:
  """Compiles what is missing and prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add_arguments(parser, "runs/gpu_table.jsonl")
  parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
  parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
  args = parser.parse_args()
  programs = list(_programs(args))
  found = results(args, programs)
  _print(
    programs,
    found,
    ["peak memory", "left", "GFLOPs", "GB accessed", "collectives, MB", "/ gradients"]
    + ["step, estimate", "images/s/GPU, estimate"],
    training_cells,
  )
  print()
  registers = ["registers, forward", "backward", "bytes spilled"]
  _print(programs, found, [f"{kind}, GB" for kind in KINDS] + registers, _operations)


def _programs(args: argparse.Namespace) -> Iterator[Program]:
  for topology in args.topologies:
    for network in args.networks:
      for kernels in (True, False) if network.startswith("lip") else (True,):
        yield Program(network, topology, BATCH, {"dtype": "bfloat16"}, kernels)


def _print(programs: list[Program], found: dict[str, Any], columns: list[str], cells: Any) -> None:
  head = ["network", "form of LIP", "GPUs", *columns]
  print("| " + " | ".join(head) + " |")
  print("|" + "---|" * len(head))
  for program in programs:
    lip = program.network.startswith("lip")
    form = ("kernels" if program.kernels else "XLA") if lip else ""
    row = [program.network, form, program.topology]
    result = found.get(program.key)
    if result is None or "error" in result:
      missing = "not yet compiled" if result is None else "does not fit"
      row += [missing, *[""] * (len(columns) - 1)]
    else:
      row += cells(program.network, result)
    print("| " + " | ".join(row) + " |")


def _operations(network: str, result: dict[str, Any]) -> list[str]:
  del network
  step = result["steps"]["train"]
  moved = {one["kind"]: one["bytes"] for one in step["traffic"]}
  cells = [f"{moved.get(kind, 0) / 1e9:.1f}" for kind in KINDS.values()]
  for name in ("lip_pool_forward", "lip_pool_backward"):
    registers = [one["registers"] for one in step["kernels"] if one["name"] == name]
    cells.append(f"{min(registers)} to {max(registers)}" if registers else "")
  spilled = sum(one["spilled"] for one in step["kernels"])
  return [*cells, f"{spilled:,}" if step["kernels"] else ""]


if __name__ == "__main__":
  main()
