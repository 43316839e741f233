"""What LIP moves on TPUs, by the compiler's account, against the floor.

  python benchmarks/pool_tpu.py   # the seven shapes of LIP-ResNet-50, four chips
  python benchmarks/pool_tpu.py --generations v5e --shapes 56x56x256 --json

Needs the `tpu` extra, and no TPU; nothing is measured. Each implementation is compiled forward, and
forward with its gradient, for one chip, bfloat16, window 3, stride 2, logits in [0, 12], and for
"fused" the tail of the logit module as well. Layouts of arguments and results are left to the
compiler, as they are inside of a network.

Bytes are the compiler's `bytes accessed`. It does not look into a kernel: for that it takes what
the kernel states, which is what its blocks read and write, halos included (column "kernels"). It
also copies operands of a later operation to the chip while another one runs, and counts each byte
of that four times, beside the operation's own accesses: "prefetched" are those bytes, once, and
"without" is what is left when their four times are taken away.

The floor counts each input once and each output once: 2.25 accesses for each pixel forward, 4.25
for the gradient. For "fused" also what the instance norm needs: its input is read once more forward
for the statistics, and in the gradient read twice and written once more.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

import lip_jax
from lip_jax.errors import UsageError
from lip_jax.ops.kernels import tpu_blocks
from lip_jax.ops.windows import Geometry
from lip_jax.tools import aot_compile, chips

SHAPES = (
  (112, 112, 64),
  (56, 56, 128),
  (56, 56, 256),
  (28, 28, 256),
  (28, 28, 512),
  (14, 14, 512),
  (14, 14, 1024),
)
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
IMPLEMENTATIONS = ("auto", "fused", "xla", "reference")
COLUMNS = (
  *("TPU", "shape", "implementation"),
  *("forward, MB", "prefetched", "without", "/ floor", "kernel"),
  *("with gradient, MB", "prefetched", "without", "/ floor", "kernels"),
  *("copies", "temporaries, MB"),
)


def main() -> None:
  """Compiles and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--generations", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
  parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="HxWxC")
  parser.add_argument("--batch", type=int, default=128, help="images on a chip (128)")
  parser.add_argument(
    "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS)
  )
  parser.add_argument("--json", action="store_true", help="one line for each row, and no table")
  args = parser.parse_args()
  # This process computes nothing, and stays away from TPUs of this machine and their users.
  os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
  jax.config.update("jax_platforms", "cpu")
  if not args.json:
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
  try:
    rows = []
    for row in _rows(args):
      rows.append(row)
      print(json.dumps(row) if args.json else _line(row), flush=True)
  except UsageError as error:
    sys.exit(f"error: {error}")
  if not args.json:
    _print_means(rows)


def _shape(text: str) -> tuple[int, int, int]:
  if not re.fullmatch(r"\d+x\d+x\d+", text):
    raise argparse.ArgumentTypeError(f"expected HxWxC such as 56x56x256, got {text!r}")
  height, width, channels = map(int, text.split("x"))
  return height, width, channels


def _rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
  for generation in args.generations:
    device = chips.topology(TOPOLOGIES[generation]).devices[0]
    for shape in args.shapes:
      for implementation in args.implementations:
        found = _figures(device, (args.batch, *shape), implementation)
        shown = "x".join(map(str, (args.batch, *shape)))
        yield {"tpu": generation, "shape": shown, "implementation": implementation, **found}


def _figures(
  device: jax.Device, shape: tuple[int, int, int, int], implementation: str
) -> dict[str, Any]:
  place = Format(Layout.AUTO, SingleDeviceSharding(device))
  x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  fused = implementation == "fused"
  statistics_of_x = [jax.ShapeDtypeStruct(shape[3:], jnp.float32)] * (2 if fused else 0)

  def pool(*arguments):
    if fused:
      return lip_jax.gated_lip_pool(*arguments)
    form: Any = implementation
    return lip_jax.lip_pool(*arguments, logit_range=(0, 12), implementation=form)

  def with_gradient(g, *arguments):
    y, vjp = jax.vjp(pool, *arguments)
    return y, vjp(g)

  def compiled(function, *arguments):
    jitted = jax.jit(function, in_shardings=place, out_shardings=place)
    return jitted.lower(*arguments).compile()

  y = jax.eval_shape(pool, x, x, *statistics_of_x)
  programs = {
    "forward": compiled(pool, x, x, *statistics_of_x),
    "with_gradient": compiled(with_gradient, y, x, x, *statistics_of_x),
  }
  share = y.size / x.size
  floors = {
    "forward": 2 + share + (1 if fused else 0),
    "with_gradient": 6 + 2 * share + (4 if fused else 0),
  }
  geometry = Geometry((3, 3), (2, 2), (1, 1))
  kernels = []
  for backward in (False, True):
    blocks = tpu_blocks.blocks_of(x, x, geometry, backward=backward)
    assert blocks is not None, "all of these shapes fit the chip"
    kernels.append(tpu_blocks.cost(blocks, x, x, backward=backward).bytes_accessed)
  result: dict[str, Any] = {}
  for name, program in programs.items():
    moved = aot_compile.figures(program).bytes_accessed
    prefetched = _prefetched(program.as_text())
    floor = floors[name] * x.dtype.itemsize * x.size
    result[name] = {
      "bytes": moved,
      "prefetched": prefetched,
      "without": moved - 4 * prefetched,
      "over_floor": (moved - 4 * prefetched) / floor,
      "floor": floor,
    }
    if "lip_pool_forward" in program.as_text():
      of_kernels = kernels[0] if name == "forward" else sum(kernels)
      result[name] |= {"kernels": of_kernels, "kernels_over_floor": of_kernels / floor}
  text = programs["with_gradient"].as_text()
  # Of large arrays, by operations that change the layout and nothing else.
  result["copies"] = len(re.findall(r"= bf16\[[\d,]{7,}\]\S* (?:copy|transpose)\(", text))
  result["temporaries"] = aot_compile.figures(programs["with_gradient"]).temporaries
  return result


def _prefetched(text: str) -> int:
  """Bytes that are copied to the chip ahead of their use: to another memory space than 0."""
  found = re.findall(r"= \((\w+)\[([\d,]+)\]\{[^}]*S\(\d\)[^}]*\}.*? copy-start\(", text)
  return sum(
    jnp.dtype({"bf16": "bfloat16", "f32": "float32"}[dtype]).itemsize
    * math.prod(map(int, shape.split(",")))
    for dtype, shape in found
  )


def _line(row: dict[str, Any]) -> str:
  cells = [row["tpu"], row["shape"], row["implementation"]]
  for name in ("forward", "with_gradient"):
    found = row[name]
    cells += [f"{found[key] / 1e6:,.0f}" for key in ("bytes", "prefetched", "without")]
    cells.append(f"{found['over_floor']:.2f}")
    cells.append(f"{found['kernels'] / 1e6:,.0f}" if "kernels" in found else "")
  cells += [str(row["copies"]), f"{row['temporaries'] / 1e6:,.0f}"]
  return "| " + " | ".join(cells) + " |"


def _print_means(rows: list[dict[str, Any]]) -> None:
  print("\nGeometric means over the shapes, and the greatest:\n")
  print("| TPU | implementation | forward / floor | with gradient / floor |")
  print("|---|---|---|---|")
  for name in dict.fromkeys((row["tpu"], row["implementation"]) for row in rows):
    of_name = [row for row in rows if (row["tpu"], row["implementation"]) == name]
    cells = []
    for key in ("forward", "with_gradient"):
      values = [row[key]["over_floor"] for row in of_name]
      cells.append(f"{statistics.geometric_mean(values):.2f}, {max(values):.2f}")
    print(f"| {name[0]} | {name[1]} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
  main()
