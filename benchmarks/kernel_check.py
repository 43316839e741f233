"""Whether the operator is right on this machine's device: against float64, and from run to run.

  python benchmarks/kernel_check.py                    # GPU: the kernels
  python benchmarks/kernel_check.py --shapes 9x8x3 --dtypes bfloat16 --modes fused   # CPU

Forward and both gradients, with a known range of logits, without, and with the fused tail of the
logit module, window 3 and 2, against the XLA form in float64 on the same device. The error is the
greatest difference, relative to the greatest result, and for bfloat16 in units of its rounding.
"""

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lip_jax

SHAPES = ("112x112x64", "56x56x128", "28x28x512", "14x14x1024", "13x9x3", "7x7x24")
MODES = ("range known", "range unknown", "fused")
LIMITS = {"float32": 2e-6, "bfloat16": 2.0}  # the latter in units of rounding


def main() -> None:
  """Prints a row for each, and fails if one is wrong."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="HxWxC")
  parser.add_argument("--dtypes", nargs="+", choices=LIMITS, default=list(LIMITS))
  parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
  parser.add_argument("--json", type=Path, help="also write the figures to this file")
  args = parser.parse_args()
  jax.config.update("jax_enable_x64", True)
  rows = []
  print("| shape | dtype | logits | window | kernels | error | same bits again | right |")
  print("|---|---|---|---|---|---|---|---|")
  for row in _rows(args):
    rows.append(row)
    cells = [row["shape"], row["dtype"], row["mode"], str(row["window"]), str(row["kernels"])]
    cells += [f"{row['error']:.2g}", "yes" if row["same"] else "NO", "yes" if row["ok"] else "NO"]
    print("| " + " | ".join(cells) + " |", flush=True)
  if args.json:
    result = {"device": jax.devices()[0].device_kind, "rows": rows}
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
  sys.exit(not all(row["ok"] and row["same"] for row in rows))


def _rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
  for text, dtype, mode, window in itertools.product(args.shapes, args.dtypes, args.modes, (3, 2)):
    shape = (args.batch, *map(int, text.split("x")))
    yield {
      "shape": "x".join(map(str, shape)),
      **{"dtype": dtype, "mode": mode, "window": window},
      **_compare(shape, dtype, mode, window),
    }


def _compare(shape: tuple[int, ...], dtype: str, mode: str, window: int) -> dict[str, Any]:
  rng = np.random.default_rng(0)
  options: dict[str, Any] = {"window": window, "stride": 2, "padding": window // 2}
  x = jnp.asarray(rng.standard_normal(shape), dtype)
  h = jnp.asarray(12 * rng.random(shape), dtype)
  statistics = [jnp.asarray(rng.standard_normal(shape[3]), jnp.float32) for _ in range(2)]

  if mode == "range known":
    options["logit_range"] = (0, 12)

  def pool(*arrays, implementation):
    function = lip_jax.gated_lip_pool if mode == "fused" else lip_jax.lip_pool
    return function(*arrays, **options, implementation=implementation)

  def results(implementation, *arrays):
    y, vjp = jax.vjp(functools.partial(pool, implementation=implementation), *arrays)
    g = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), dtype).astype(y.dtype)
    return y, *vjp(g)[:2]

  arrays = [x, h, *(statistics if mode == "fused" else [])]
  compiled = jax.jit(functools.partial(results, "auto")).lower(*arrays).compile()
  found, again = compiled(*arrays), compiled(*arrays)
  expected = jax.jit(functools.partial(results, "xla"))(*(a.astype(jnp.float64) for a in arrays))
  error = max(_error(*pair, dtype) for pair in zip(found, expected, strict=True))
  return {
    "kernels": (compiled.as_text() or "").count('custom_call_target="__gpu$xla.gpu.ptx"'),
    "error": error,
    "same": all(bool((a == b).all()) for a, b in zip(found, again, strict=True)),
    "ok": bool(error <= LIMITS[dtype]),
  }


def _error(found: jax.Array, expected: jax.Array, dtype: str) -> float:
  difference = jnp.abs(found.astype(jnp.float64) - expected)
  largest = jnp.abs(expected).max()
  if dtype == "float32":
    return float(difference.max() / largest)
  unit = float(jnp.finfo(dtype).eps)  # of a number, and of the rounding of sums beside it
  return float((difference / (unit * (jnp.abs(expected) + 1e-3 * largest))).max())


if __name__ == "__main__":
  main()
