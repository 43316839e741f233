"""Time and memory traffic of local importance pooling: all implementations, and PyTorch's.

  python benchmarks/pool.py                        # CPU: batch 8, float32
  python benchmarks/pool.py --dtype=bfloat16       # GPU or TPU: batch 128
  python benchmarks/pool.py --shapes 56x56x256 14x14x1024 --json pool.json

Window 3, stride 2, padding 1, on the shapes that LIP-ResNet-50 pools, with logits in [0, 12] as its
gates give them; "no range" does not tell the operator so, and "wide" are logits too far apart for
one shift. Where torch is installed, its primitive
avg_pool2d(x * w) / avg_pool2d(w) with w = exp(logits) runs beside it on the same device: eager, in
both memory formats, and through torch.compile.

All take turns, in changing order, and times are medians. "Share" is the bytes that have to
move (each input read once, each result written once; also the gradients in the backward pass)
per second, relative to a copy of as many bytes in the same turns. Backward is what forward and
backward take beyond forward. "Temporary" is the compiler's figure for forward and backward.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to PyTorch

import jax
import jax.numpy as jnp
import numpy as np

import lip_jax
from lip_jax.ops.lip_pool import IMPLEMENTATIONS

SHAPES = (
  "112x112x64",
  "56x56x128",
  "56x56x256",
  "28x28x256",
  "28x28x512",
  "14x14x512",
  "14x14x1024",
)
RANGE = (0.0, 12.0)
EAGER = ("torch, channels_last", "torch, contiguous")
COMPILED = "torch.compile"
WIDE = "auto, no range, wide"

Call = Callable[[], Any]


def main() -> None:
  """Measures shape by shape and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--batch", type=int, help="default: 8 on CPUs, 128 elsewhere")
  parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
  parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="HxWxC")
  parser.add_argument("--repeats", type=int, default=11, help="turns that medians are taken of")
  parser.add_argument("--json", type=Path, help="also write the figures to this file")
  args = parser.parse_args()
  if args.batch is None:
    args.batch = 8 if jax.default_backend() == "cpu" else 128
  shapes = [_shape(parser, text) for text in args.shapes]
  if args.batch < 1 or args.repeats < 1:
    parser.error("--batch and --repeats must be at least 1")

  device = jax.devices()[0]
  print(f"{device.device_kind}, batch {args.batch}, {args.dtype}, medians of {args.repeats}\n")
  print(
    "| shape | implementation | forward, ms | share of copy | forward + backward, ms "
    "| share of copy | backward's share | temporary, MB | same bits again |"
  )
  print("|---|---|---|---|---|---|---|---|---|")
  rows = []
  for shape in shapes:
    for row in _measure(shape, args):
      print(_line(row), flush=True)
      rows.append(row)
  print()
  ratios = _ratios(rows)
  for line in ratios:
    print(line)
  if args.json:
    result = {"device": device.device_kind, "batch": args.batch, "dtype": args.dtype, "rows": rows}
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _shape(parser: argparse.ArgumentParser, text: str) -> tuple[int, int, int]:
  try:
    height, width, channels = map(int, text.split("x"))
  except ValueError:
    parser.error(f"--shapes takes height x width x channels such as 56x56x256, got {text!r}")
  if min(height, width, channels) < 1:
    parser.error(f"--shapes must be positive, got {text!r}")
  return height, width, channels


def _measure(shape: tuple[int, int, int], args: argparse.Namespace) -> Iterable[dict[str, Any]]:
  """A row for each implementation."""
  height, width, channels = shape
  rng = np.random.default_rng(0)
  size = (args.batch, *shape)
  x = rng.standard_normal(size, np.float32)
  logits = RANGE[1] * rng.random(size, np.float32)
  out = (args.batch, (height + 1) // 2, (width + 1) // 2, channels)
  g = rng.standard_normal(out, np.float32)
  arrays = [jnp.asarray(a, args.dtype) for a in (x, logits, g)]
  wide = 10 * arrays[1]
  inputs, result = arrays[0].nbytes * 2, arrays[2].nbytes
  # Of forward; of forward and backward, which also reads all that and writes two gradients.
  floors = inputs + result, (inputs + result) + (inputs + result + inputs)

  calls: dict[str, tuple[Call, Call]] = {}
  temporary, same = {}, {}
  for name, options in _implementations().items():
    pool = functools.partial(lip_jax.lip_pool, **options)
    given = [arrays[0], wide, arrays[2]] if name == WIDE else arrays
    forward = jax.jit(pool).lower(*given[:2]).compile()
    both = jax.jit(functools.partial(_with_gradients, pool)).lower(*given).compile()
    memory = both.memory_analysis()
    temporary[name] = memory.temp_size_in_bytes if memory else None
    first, again = both(*given), both(*given)
    same[name] = all(bool((a == b).all()) for a, b in zip(first, again, strict=True))
    calls[name] = functools.partial(forward, *given[:2]), functools.partial(both, *given)
  copies = tuple(_copy(floor, args.dtype) for floor in floors)
  calls["copy"] = copies[0], copies[1]
  calls |= _torch_calls((x, logits, g), args.dtype)

  times = _medians(calls, args.repeats)
  copy = times.pop("copy")
  for name, (forward_s, both_s) in times.items():
    backward_share = None
    if both_s > forward_s:
      backward_share = (floors[1] - floors[0]) / (both_s - forward_s) * copy[1] / floors[1]
    yield {
      "shape": list(shape),
      "implementation": name,
      "forward": forward_s,
      "forward_share": copy[0] / forward_s,
      "both": both_s,
      "both_share": copy[1] / both_s,
      "backward_share": backward_share,
      "temporary": temporary.get(name),
      "same_bits": same.get(name),
      "copy_bytes_per_second": floors[1] / copy[1],
    }


def _implementations() -> dict[str, dict[str, Any]]:
  """Names and the options of `lip_pool`."""
  names = [name for name in IMPLEMENTATIONS if name != "pallas"]
  if "pallas" in IMPLEMENTATIONS and jax.default_backend() != "cpu":
    names.append("pallas")
  ranged: dict[str, dict[str, Any]] = {
    name: {"implementation": name, "logit_range": RANGE} for name in names
  }
  return {**ranged, "auto, no range": {}, WIDE: {}}


def _with_gradients(pool, x, logits, g):
  y, vjp = jax.vjp(pool, x, logits)
  return y, *vjp(g)


def _copy(count: int, dtype: str) -> Call:
  """Reads and writes, together, `count` bytes."""
  array = jnp.ones(count // 2 // jnp.dtype(dtype).itemsize, dtype)
  # What is given back unchanged is not copied at all.
  return functools.partial(jax.jit(jnp.negative).lower(array).compile(), array)


def _torch_calls(arrays: tuple[np.ndarray, ...], dtype: str) -> dict[str, tuple[Call, Call]]:
  """Of PyTorch's primitive, where it is installed for this device."""
  if importlib.util.find_spec("torch") is None:
    return {}
  import torch
  import torch.nn.functional as F  # noqa: N812 - its usual name

  backend = jax.default_backend()
  if backend == "gpu" and not torch.cuda.is_available():
    _once("PyTorch has no GPU here: left out")
    return {}
  if backend not in ("cpu", "gpu"):
    return {}
  device = "cuda" if backend == "gpu" else "cpu"

  def primitive(x, logits):
    weights = logits.exp()
    return F.avg_pool2d(x * weights, 3, 2, 1) / F.avg_pool2d(weights, 3, 2, 1)

  def calls(pool, last: bool) -> tuple[Call, Call]:
    x, logits, g = (
      torch.tensor(a).permute(0, 3, 1, 2).to(device=device, dtype=getattr(torch, dtype))
      for a in arrays
    )
    if not last:
      x, logits, g = (a.contiguous() for a in (x, logits, g))
    x.requires_grad_()
    logits.requires_grad_()

    def forward():
      with torch.no_grad():
        return pool(x, logits)

    def both():
      y = pool(x, logits)
      return y, *torch.autograd.grad(y, (x, logits), g)

    return forward, both

  found = {name: calls(primitive, last) for name, last in zip(EAGER, (True, False), strict=True)}
  torch._dynamo.reset()  # it gives up on a function that it has compiled for many shapes
  try:
    compiled = calls(torch.compile(primitive, dynamic=False), True)
    for call in compiled:
      call()
    found[COMPILED] = compiled
  except Exception as error:  # what is missing on a machine that cannot compile varies
    _once(f"torch.compile does not work here: left out ({str(error).splitlines()[0]})")
  return found


@functools.cache
def _once(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


def _medians(calls: dict[str, tuple[Call, Call]], repeats: int) -> dict[str, tuple[float, float]]:
  """Seconds of each call; they take turns."""
  several = 1 if jax.default_backend() == "cpu" else 20  # calls, under way together: hides dispatch
  times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
  for turn in range(repeats + 1):
    # In an order of its own: what ran before leaves its caches, and threads that still wait.
    for name, pair in random.Random(turn).sample(list(calls.items()), len(calls)):
      for call, kept in zip(pair, times[name], strict=True):
        start = time.perf_counter()
        for _ in range(several):
          result = call()
        _wait(result)
        if turn:  # the first warms up
          kept.append((time.perf_counter() - start) / several)
  return {
    name: (statistics.median(forward), statistics.median(both))
    for name, (forward, both) in times.items()
  }


def _wait(result: Any) -> None:
  """Until it is computed, by JAX or PyTorch."""
  jax.block_until_ready([leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)])
  torch = sys.modules.get("torch")
  if torch is not None and torch.cuda.is_available():
    torch.cuda.synchronize()


def _line(row: dict[str, Any]) -> str:
  def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"

  cells = [
    "x".join(map(str, row["shape"])),
    row["implementation"],
    f"{1e3 * row['forward']:.3f}",
    percent(row["forward_share"]),
    f"{1e3 * row['both']:.3f}",
    percent(row["both_share"]),
    percent(row["backward_share"]),
    "" if row["temporary"] is None else f"{row['temporary'] / 1e6:.1f}",
    {None: "", True: "yes", False: "no"}[row["same_bits"]],
  ]
  return "| " + " | ".join(cells) + " |"


def _ratios(rows: list[dict[str, Any]]) -> list[str]:
  """Geometric means over the shapes of how much faster ours are than the others."""
  times: dict[str, dict[str, list[float]]] = {}
  for row in rows:
    of_one = times.setdefault(row["implementation"], {"forward": [], "both": []})
    for part in of_one:
      of_one[part].append(row[part])
  if EAGER[0] in times:
    times["torch, better of both"] = {
      part: [min(pair) for pair in zip(*(times[name][part] for name in EAGER), strict=True)]
      for part in ("forward", "both")
    }
  peers = [n for n in ("reference", "torch, better of both", COMPILED) if n in times]
  ours = [n for n in times if not n.startswith("torch") and n != "reference"]
  lines = [
    "| times faster, geometric mean | " + " | ".join(f"than {peer}" for peer in peers) + " |",
    "|---" * (len(peers) + 1) + "|",
  ]
  for part, title in (("forward", "forward"), ("both", "forward + backward")):
    for name in ours:
      cells = [_mean_ratio(times[peer][part], times[name][part]) for peer in peers]
      lines.append(f"| {name}: {title} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
  return lines


def _mean_ratio(one: list[float], other: list[float]) -> float:
  return math.exp(statistics.mean(math.log(a / b) for a, b in zip(one, other, strict=True)))


if __name__ == "__main__":
  main()
