"""Images/s and peak memory of training steps: LIP networks, their baselines, and PyTorch.

  python benchmarks/train_step.py --dtype=bfloat16                     # GPU or TPU: batch 128
  python benchmarks/train_step.py --networks lip_resnet50 resnet50 --json train.json
  python benchmarks/train_step.py --batch=2 --image-size=64 --steps=2  # CPU: does it work?

A step is what `train.py` does with a batch that is on the device: augmentation, forward, backward,
update. The networks take turns, and a time is the median over the turns: on accelerators of ten
steps in a row, as training does not wait for each. Memory is the compiler's figure for the whole
step: parameters, optimizer state, batch and temporary arrays.

On a GPU with torch, networks that tests/torch_reference.py has in PyTorch run beside ours, from the
same weights: eager and through torch.compile, in channels_last, under AMP where --dtype is
bfloat16, with torch's SGD. Their memory is the allocator's peak. --torch does so on a CPU, too.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import os
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to PyTorch

import jax
import numpy as np
from flax import nnx

from lip_jax import create_model
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.models import torch_names
from lip_jax.training import config as config_lib
from lip_jax.training import task as task_lib
from lip_jax.training.train_step import Program

ROOT = Path(__file__).parents[1]
NETWORKS = (
  "lip_resnet50",
  "resnet50",
  "lip_resnet101",
  "resnet101",
  "lip_densenet121",
  "densenet121",
)
CLASSES = 1000


class Candidate(NamedTuple):
  """Something that trains a network."""

  name: str
  network: str
  step: Callable[[], Callable[[], Any]]  # begins one, and gives what waits for it
  peak: int | None  # bytes


def main() -> None:
  """Measures and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--networks", nargs="+", default=NETWORKS)
  parser.add_argument("--batch", type=int, help="default: 8 on CPUs, 128 elsewhere")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--image-size", type=int, default=224)
  parser.add_argument("--steps", type=int, default=20, help="turns that medians are taken of")
  parser.add_argument("--torch", action="store_true", help="PyTorch on a CPU as well")
  parser.add_argument("--json", type=Path, help="also write the figures to this file")
  args = parser.parse_args()
  if args.batch is None:
    args.batch = 8 if jax.default_backend() == "cpu" else 128
  if args.batch < 1 or args.steps < 1 or args.image_size < 32:
    parser.error("--batch and --steps must be at least 1, and --image-size at least 32")
  try:
    _run(args)
  except UsageError as error:
    sys.exit(f"error: {error}")


def _run(args: argparse.Namespace) -> None:
  candidates = []
  for network in args.networks:
    _say(f"compiling {network}")
    candidates.append(_ours(network, args))
    candidates += _torch(network, args)

  times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
  several = 1 if jax.default_backend() == "cpu" else 10
  for turn in range(args.steps + 1):
    _say(f"turn {turn} of {args.steps}")
    for candidate in candidates:
      start = time.perf_counter()
      for _ in range(several):
        wait = candidate.step()
      wait()
      if turn:  # the first warms up
        times[candidate.name].append((time.perf_counter() - start) / several)

  device = jax.devices()[0].device_kind
  seconds = {name: statistics.median(all_) for name, all_ in times.items()}
  rows = []
  print(f"{device}, batch {args.batch}, {args.image_size} px, {args.dtype}\n")
  print("| training | step, ms | images/s | peak memory, GB | step / baseline's | faster than |")
  print("|---|---|---|---|---|---|")
  for candidate in candidates:
    row = {
      "name": candidate.name,
      "step": seconds[candidate.name],
      "images_per_second": args.batch / seconds[candidate.name],
      "peak": candidate.peak,
      "to_baseline": _ratio(seconds, candidate.name, candidate.network.removeprefix("lip_")),
      "speed_up": {
        peer: seconds[peer] / seconds[candidate.name]
        for peer in (f"{candidate.network}, PyTorch", f"{candidate.network}, torch.compile")
        if peer in seconds and candidate.name == candidate.network
      },
    }
    rows.append(row)
    print(_line(row))
  if args.json:
    result = {"device": device, "batch": args.batch, "image_size": args.image_size}
    result |= {"dtype": args.dtype, "rows": rows}
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _ratio(seconds: dict[str, float], name: str, baseline: str) -> float | None:
  """Of a LIP network of ours to its baseline."""
  if not name.startswith("lip_") or "," in name or baseline not in seconds:
    return None
  return seconds[name] / seconds[baseline]


def _line(row: dict[str, Any]) -> str:
  cells = [
    row["name"],
    f"{1e3 * row['step']:.1f}",
    f"{row['images_per_second']:,.1f}",
    "" if row["peak"] is None else f"{row['peak'] / 1e9:.2f}",
    "" if row["to_baseline"] is None else f"{row['to_baseline']:.2f}",
    ", ".join(f"{peer.partition(', ')[2]}: {x:.2f} times" for peer, x in row["speed_up"].items()),
  ]
  return "| " + " | ".join(cells) + " |"


def _ours(network: str, args: argparse.Namespace) -> Candidate:
  values = runpy.run_path(str(ROOT / "configs" / "imagenet.py"))["get_config"](network)
  values.dtype = args.dtype
  values.global_batch_size = values.eval_batch_size = args.batch
  values.data.image_size = args.image_size
  values.data.eval_resize = None
  if args.batch % values.model.bn_group_size:
    values.model.bn_group_size = 0
  config = config_lib.from_dict(values.to_dict())
  task = task_lib.make(config, num_classes=CLASSES)
  program = Program(task, steps_per_epoch=1e6, devices=jax.local_devices()[:1])
  compiled = program.update.lower(*program.arguments("all")).compile()
  memory = compiled.memory_analysis()
  peak = None
  if memory is not None:
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak -= memory.alias_size_in_bytes
  state, stop = program.init(), sharding.StopFlags(program.mesh)(False)
  images, labels = _batch(args)
  batch = sharding.put_batch({"image": images, "label": labels}, program.mesh)

  def step() -> Callable[[], Any]:
    nonlocal state
    state, metrics = compiled(state, batch, stop)
    return functools.partial(jax.block_until_ready, (state, metrics))

  return Candidate(network, network, step, peak)


def _batch(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  shape = (args.batch, args.image_size, args.image_size, 3)
  return rng.integers(0, 256, shape, np.uint8), rng.integers(0, CLASSES, args.batch, np.int32)


def _torch(network: str, args: argparse.Namespace) -> Iterator[Candidate]:
  """The network in PyTorch, eager and compiled."""
  on_gpu = jax.default_backend() == "gpu"
  if not (on_gpu or args.torch) or importlib.util.find_spec("torch") is None:
    return
  import torch

  device = "cuda" if on_gpu else "cpu"
  if on_gpu and not torch.cuda.is_available():
    _say("PyTorch has no GPU here: left out")
    return
  for title, compiled in (("PyTorch", False), ("torch.compile", True)):
    name = f"{network}, {title}"
    _say(f"preparing {name}")
    others = torch.cuda.memory_allocated() if on_gpu else 0  # weights of the candidates before
    if on_gpu:
      torch.cuda.reset_peak_memory_stats()
    try:
      step = _torch_step(network, args, device, compiled)
      step()()
    except Exception as error:  # what is missing on a machine that cannot compile varies
      _say(f"{name} does not work here: left out ({str(error).splitlines()[0]})")
      continue
    peak = torch.cuda.max_memory_allocated() - others if on_gpu else None
    yield Candidate(name, network, step, peak)


def _torch_step(
  network: str, args: argparse.Namespace, device: str, compiled: bool
) -> Callable[[], Callable[[], Any]]:
  import torch

  sys.path.insert(0, str(ROOT / "tests"))  # torch.compile wants its functions' module by name
  reference = importlib.import_module("torch_reference")
  kind = reference.DenseNet if "densenet" in network else reference.ResNet
  model = create_model(network, num_classes=CLASSES, rngs=nnx.Rngs(0))
  weights = {
    name: torch.tensor(value, device=device)
    for name, value in torch_names.to_torch_state_dict(model).items()
    if not name.endswith("num_batches_tracked")
  }
  for name, value in weights.items():
    if value.ndim == 4:
      weights[name] = value.contiguous(memory_format=torch.channels_last)
  learned = [w for name, w in weights.items() if ".running_" not in name]
  for weight in learned:
    weight.requires_grad_()
  function = kind(weights, training=True)
  optimizer = torch.optim.SGD(learned, lr=0.05, momentum=0.9, weight_decay=1e-4)
  array, targets = _batch(args)
  mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in ((120.0,) * 3, (57.0,) * 3))
  images = torch.tensor(array, device=device).permute(0, 3, 1, 2)
  labels = torch.tensor(targets, device=device, dtype=torch.int64)

  def loss_of(images: Any, labels: Any) -> Any:
    return torch.nn.functional.cross_entropy(function((images - mean) / std).float(), labels)

  if compiled:
    loss_of = torch.compile(loss_of, dynamic=False)

  def step() -> Callable[[], Any]:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
      loss = loss_of(images, labels)
    loss.backward()
    optimizer.step()
    return loss.item

  return step


def _say(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
  main()
