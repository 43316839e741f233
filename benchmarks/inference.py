"""Images/s of networks in evaluation, by batch size.

  python benchmarks/inference.py --dtype=bfloat16                          # GPU or TPU
  python benchmarks/inference.py --networks resnet50 lip_resnet50 --batches 1 8 32   # CPU
  python benchmarks/inference.py --networks lip_resnet50 resnet50 --batches 1 32 --json infer.json
  python benchmarks/inference.py --image-size=64 --batches 1 2 --repeats=3 # CPU: does it work?

Weights are random, batch norms folded, images are noise that is on the device. Where torch is
installed for a CPU or GPU, networks that tests/torch_reference.py has in PyTorch run beside ours,
from the same weights, in channels_last. All take turns at each batch size, in changing order, and a
time is the median over the turns, from the call to its result.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lip_jax import create_model, fold_batch_norm, to_torch_state_dict
from lip_jax.errors import UsageError

NETWORKS = (
  "lip_resnet50",
  "resnet50",
  "lip_resnet101",
  "resnet101",
  "lip_densenet121",
  "densenet121",
)


def main() -> None:
  """Measures and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--networks", nargs="+", default=NETWORKS)
  parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 64, 256))
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--image-size", type=int, default=224)
  parser.add_argument("--repeats", type=int, default=20, help="turns that medians are taken of")
  parser.add_argument("--json", type=Path, help="also write the figures to this file")
  args = parser.parse_args()
  if min(args.batches) < 1 or args.repeats < 1 or args.image_size < 32:
    parser.error("--batches and --repeats must be at least 1, and --image-size at least 32")
  try:
    models = {name: _model(name, args.dtype) for name in args.networks}
    peers = {f"{name}, PyTorch": _torch(name, args.dtype) for name in args.networks}
  except UsageError as error:
    sys.exit(f"error: {error}")

  device = jax.devices()[0].device_kind
  print(f"{device}, {args.image_size} px, {args.dtype}, medians of {args.repeats}\n")
  print("| network | batch | latency, ms | images/s | time / baseline's | temporary, MB |")
  print("|---|---|---|---|---|---|")
  rows: list[dict[str, Any]] = []
  for batch in args.batches:
    for row in _measure(models, peers, batch, args):
      print(_line(row), flush=True)
      rows.append(row)
  if args.json:
    result = {"device": device, "image_size": args.image_size, "dtype": args.dtype, "rows": rows}
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _model(name: str, dtype: str) -> tuple[nnx.GraphDef, Any]:
  model = create_model(name, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
  model.eval()
  return nnx.split(fold_batch_norm(model))


def _torch(name: str, dtype: str) -> Callable[[np.ndarray], Callable[[], Any]] | None:
  """The network in PyTorch: from images [N, H, W, 3] to what computes their logits."""
  if importlib.util.find_spec("torch") is None:
    return None
  import torch

  backend = jax.default_backend()
  if backend not in ("cpu", "gpu") or (backend == "gpu" and not torch.cuda.is_available()):
    return None
  sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
  reference = importlib.import_module("torch_reference")
  kind = reference.DenseNet if "densenet" in name else reference.ResNet
  options: Any = {"device": "cuda" if backend == "gpu" else "cpu", "dtype": getattr(torch, dtype)}
  weights = {}
  for key, value in to_torch_state_dict(create_model(name, rngs=nnx.Rngs(0))).items():
    if not key.endswith("num_batches_tracked"):
      weights[key] = torch.tensor(value).to(**options)
      if value.ndim == 4:
        weights[key] = weights[key].contiguous(memory_format=torch.channels_last)
  network = kind(weights)

  def of(images: np.ndarray) -> Callable[[], Any]:
    x = torch.tensor(images).permute(0, 3, 1, 2).to(**options)

    def run():
      with torch.inference_mode():
        logits = network(x)
      if backend == "gpu":
        torch.cuda.synchronize()
      return logits.float().cpu()

    return run

  return of


def _measure(
  models: dict[str, Any], peers: dict[str, Any], batch: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
  """A row for each network."""
  shape = (batch, args.image_size, args.image_size, 3)
  images = jax.random.normal(jax.random.key(0), shape)
  calls: dict[str, Callable[[], Any]] = {}
  memory = {}
  for name, (graph, state) in models.items():
    print(f"compiling {name}, batch {batch}", file=sys.stderr, flush=True)

    def network(state, images, graph=graph):
      return nnx.merge(graph, state)(images)

    program = jax.jit(network).lower(state, images).compile()
    memory[name] = program.memory_analysis()
    calls[name] = functools.partial(program, state, images)
  calls |= {name: peer(np.asarray(images)) for name, peer in peers.items() if peer is not None}

  times: dict[str, list[float]] = {name: [] for name in calls}
  for turn in range(args.repeats + 1):
    for name, call in random.Random(turn).sample(list(calls.items()), len(calls)):
      start = time.perf_counter()
      np.asarray(call())
      if turn:  # the first warms up
        times[name].append(time.perf_counter() - start)

  seconds = {name: statistics.median(all_) for name, all_ in times.items()}
  rows = []
  for name, second in seconds.items():
    baseline = name.removeprefix("lip_")
    used = memory.get(name)
    rows.append(
      {
        "network": name,
        "batch": batch,
        "latency": second,
        "images_per_second": batch / second,
        "to_baseline": second / seconds[baseline] if baseline in seconds else None,
        "temporary": used.temp_size_in_bytes if used else None,
      }
    )
  return rows


def _line(row: dict[str, Any]) -> str:
  cells = [
    row["network"],
    str(row["batch"]),
    f"{1e3 * row['latency']:.2f}",
    f"{row['images_per_second']:,.1f}",
    "" if row["to_baseline"] is None else f"{row['to_baseline']:.2f}",
    "" if row["temporary"] is None else f"{row['temporary'] / 1e6:.1f}",
  ]
  return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
  main()
