"""What the paper's networks need on TPUs, by the compiler's account: the tables of docs/tpu.md.

  python benchmarks/tpu_table.py                      # compiles what is missing, prints the tables
  python benchmarks/tpu_table.py --print              # prints what there is, compiles nothing
  python benchmarks/tpu_table.py --detectors          # the same of detectors alone
  python benchmarks/tpu_table.py --sizes 8 16 32 64 128 256 --generations v5e

Needs the `tpu` extra, and no TPU. Figures are kept in RESULTS (runs/tpu_table.jsonl), so that the
same command goes on where it was interrupted. The smallest slices come first. What was not compiled
reads "not yet compiled".
"""

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

from compiled import Program, add_arguments, memory_cells, results, training_cells

from lip_jax.tools import paper

NETWORKS = ("lip_resnet50", "lip_resnet101", "lip_densenet121")
SHAPES = {
  2: {8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
  3: {8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"},
}
DIMENSIONS = {"v5e": 2, "v6e": 2, "v4": 3, "v5p": 3}

# Images on a chip: the greatest power of two, up to 256, that is to leave a tenth of the memory,
# as the table shows; --greater tries the next one. Beyond 256, steps of a few chips would be so
# large that the learning rate has to be tuned anew.
BATCHES = {
  "lip_resnet50": {"v5e": 256, "v6e": 256, "v4": 256, "v5p": 256},
  "lip_resnet101": {"v5e": 128, "v6e": 256, "v4": 256, "v5p": 256},
  "lip_densenet121": {"v5e": 256, "v6e": 256, "v4": 256, "v5p": 256},
}

# Chips of the slices, unless --sizes says others.
SIZES = [8, 256]
BETWEEN = 64  # of EXAMPLE, to see that it is alike

# What each option costs and saves, on one slice.
EXAMPLE = ("lip_resnet50", "v5e", 8)
OPTIONS: tuple[dict[str, str], ...] = (
  {},
  {"gradient_dtype": "bfloat16"},
  {"fsdp": "8"},
  {"accumulation_steps": "4"},
  {"remat": "True"},
  {"dtype": "float32"},
)

# Rows of configs/coco.py with the recipe's two images on a chip, on the slice whose step is then of
# 32.
DETECTORS = tuple(dict.fromkeys(row.argument for row in paper.DETECTORS.values()))
DETECTORS_ON, DETECTORS_BATCH = "v5e:4x4", 2
BUCKETS = ("800x1344", "1344x800")


def main() -> None:
  """Compiles what is missing and prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add_arguments(parser, "runs/tpu_table.jsonl")
  parser.add_argument("--sizes", type=int, nargs="+", choices=SHAPES[2], help="chips of a slice")
  parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
  parser.add_argument("--generations", nargs="+", choices=DIMENSIONS, default=list(DIMENSIONS))
  parser.add_argument("--greater", action="store_true", help="twice the batches, to see they fail")
  parser.add_argument("--options", action="store_true", help="also what each setting costs")
  parser.add_argument("--detectors", action="store_true", help="detectors in place of classifiers")
  args = parser.parse_args()

  if args.detectors:
    return _print_detectors(results(args, _detector_programs()))
  found = results(args, _programs(args))
  _print_table(args, found)
  _print_options(found)


def _programs(args: argparse.Namespace) -> Iterator[Program]:
  """In the order in which they are compiled."""
  for network, generation, size in sorted(_slices(args), key=lambda one: one[2]):
    yield _program(network, generation, size, factor=2 if args.greater else 1)
  if args.options:
    yield from _options_programs()


def _slices(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
  """Network, generation and chips of each row, in the order of the table."""
  for network, generation in itertools.product(args.networks, args.generations):
    sizes = args.sizes or SIZES + [BETWEEN] * ((network, generation) == EXAMPLE[:2])
    for size in sorted(sizes):
      yield network, generation, size


def _program(network: str, generation: str, size: int, factor: int = 1) -> Program:
  shape = SHAPES[DIMENSIONS[generation]][size]
  batch = BATCHES[network][generation] * factor
  return Program(network, f"{generation}:{shape}", batch, {"dtype": "bfloat16"})


def _detector_programs() -> Iterator[Program]:
  """In the order in which they are compiled."""
  for step, bucket, detector in itertools.product(("train", "eval"), BUCKETS, DETECTORS):
    yield _detector_program(detector, step, bucket)


def _detector_program(detector: str, step: str, bucket: str) -> Program:
  options = {"dtype": "bfloat16", "data.buckets": f"('{bucket}',)"}
  program = Program(detector, DETECTORS_ON, DETECTORS_BATCH, options)
  return program._replace(step=step, configs="coco")


def _options_programs() -> Iterator[Program]:
  program = _program(*EXAMPLE)
  for options in OPTIONS:
    yield program._replace(options={**program.options, **options})


def _print_table(args: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
  print(
    "| network | slice | chips | images a chip | peak memory | left | GFLOPs | GB accessed "
    "| collectives, MB | / gradients | step, estimate | images/s/chip, estimate |"
  )
  print("|---|---|---|---|---|---|---|---|---|---|---|---|")
  for network, generation, size in _slices(args):
    program = _program(network, generation, size)
    cells = [network, program.topology, str(size), str(program.batch)]
    print("| " + " | ".join(cells + _cells(found.get(program.key), network)) + " |")


def _print_options(found: dict[str, dict[str, Any]]) -> None:
  network, example = EXAMPLE[0], _program(*EXAMPLE)
  print(f"\n{network} on {example.topology}, {example.batch} images a chip:\n")
  print(
    "| settings | peak memory | left | GFLOPs | GB accessed | collectives, MB "
    "| / gradients | step, estimate | images/s/chip, estimate |"
  )
  print("|---|---|---|---|---|---|---|---|---|")
  for program, options in zip(_options_programs(), OPTIONS, strict=True):
    name = ", ".join(f"{key}={value}" for key, value in options.items()) or "bfloat16"
    print("| " + " | ".join([name, *_cells(found.get(program.key), network)]) + " |")


def _print_detectors(found: dict[str, dict[str, Any]]) -> None:
  print(
    "| detector | step | bucket | peak memory | left | GFLOPs | GB accessed | HLO instructions "
    "| seconds to compile |"
  )
  print("|---|---|---|---|---|---|---|---|---|")
  steps = {"train": "training", "eval": "evaluation"}
  missing = []
  for detector, step, bucket in itertools.product(DETECTORS, steps, BUCKETS):
    result = found.get(_detector_program(detector, step, bucket).key)
    cells = [detector, steps[step], bucket]
    if result is None:
      missing.append(" ".join(cells))
      continue
    if "error" in result:
      cells += ["does not fit", *[""] * 5]
    else:
      figures = result["steps"][step]
      cells += memory_cells(figures)
      cells += [f"{figures['instructions']:,}", f"{figures['compile_seconds']:,.0f}"]
    print("| " + " | ".join(cells) + " |")
  if missing:
    print(f"\nNot yet compiled: {', '.join(missing)}.")


def _cells(result: dict[str, Any] | None, network: str) -> list[str]:
  """Of one program, behind the columns that name it."""
  if result is None:
    return ["not yet compiled", *[""] * 7]
  if "error" in result:
    return ["does not fit", *[""] * 7]
  return training_cells(network, result)


if __name__ == "__main__":
  main()
