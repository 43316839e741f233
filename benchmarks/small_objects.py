"""What LIP is for: accuracy by pooling as the object gets smaller and the clutter denser.

  python benchmarks/small_objects.py           # seven networks, three seeds each
  python benchmarks/small_objects.py --quick   # does it work? a minute or two, numbers mean nothing

Trains the network of configs/small_objects.py with each pooling and seed, on images of all sizes
and densities, in WORKDIR/<network>-<seed>, and counts what it gets right in each condition: one
height of the digit and one number of fragments. Results go to WORKDIR/results.jsonl, one line a
training; table.md and small_objects.png are drawn of those that are there. Interrupted, the same
command goes on where it stopped; what is finished is not done again.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import runpy
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import tqdm
from etils import epath
from flax import nnx

from lip_jax.classification import evaluation
from lip_jax.classification.config import Config
from lip_jax.data import pipeline, transforms
from lip_jax.data.prepare.cluttered_digits import ClutteredDigits
from lip_jax.data.prepare.cluttered_scene import Condition
from lip_jax.data.source import open_split
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.models import abstract_model
from lip_jax.models.cost import count_parameters, multiply_adds
from lip_jax.training import config as config_lib
from lip_jax.training import train_state, trainer
from lip_jax.training.checkpoint.checkpoints import Checkpoints, has_checkpoints
from lip_jax.training.metrics import log_to_stdout
from lip_jax.training.workdir import write_text

CONFIG = Path(__file__).parents[1] / "configs" / "small_objects.py"

NETWORKS: dict[str, dict[str, Any]] = {
  "strided": {"pool": "strided"},
  "average": {"pool": "average"},
  "max": {"pool": "max"},
  "SoftPool": {"pool": "soft"},
  "DPP": {"pool": "dpp_lite_sym"},
  "LIP projection": {"pool": "lip", "logit": "projection"},
  "LIP bottleneck": {"pool": "lip", "logit": "bottleneck"},
}
# Okabe and Ito's colours, which the colour-blind can tell apart; and a marker each.
STYLES = {
  "strided": ("#000000", "o"),
  "average": ("#999999", "s"),
  "max": ("#E69F00", "^"),
  "SoftPool": ("#56B4E9", "v"),
  "DPP": ("#009E73", "D"),
  "LIP projection": ("#CC79A7", "P"),
  "LIP bottleneck": ("#D55E00", "*"),
}
QUICK_NETWORKS = ("average", "LIP projection")
QUICK_STEPS = 20
QUICK_IMAGES = 50  # of each condition

Result = dict[str, Any]  # a line of results.jsonl


def main(arguments: Sequence[str] | None = None) -> None:
  """Trains and evaluates what has not been, then writes table and figure."""
  args = _parse(arguments)
  log_to_stdout()
  jax.config.update("jax_compilation_cache_dir", str((args.workdir / "compiled").resolve()))
  runs = [(name, seed) for seed in range(args.seeds) for name in args.networks]
  results = read_results(args.workdir)
  conditions: Sequence[Condition] = ()
  shown: list[Result] = []
  try:
    # All networks with one seed before the next: what is there can be compared at any time.
    for number, (name, seed) in enumerate(runs, 1):
      config = make_config(name, seed, args)
      conditions = conditions_of(config)
      result = find(results, name, seed, config)
      if result is None:
        print(f"== {number}/{len(runs)}: {name}, seed {seed}", flush=True)
        result = run(name, seed, config, args)
        results.append(result)
        write_results(args.workdir, results)
      shown.append(result)
      draw(shown, conditions, args.workdir / "small_objects.png")
      text = table(shown, conditions)
      (args.workdir / "table.md").write_text(text + "\n", encoding="utf-8")
  except UsageError as error:
    sys.exit(f"error: {error}")
  print(text)
  print(f"\nfigure: {args.workdir / 'small_objects.png'}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=Path, help="default: runs/small_objects, or with -SIZE")
  parser.add_argument("--size", choices=("small", "large"), default="small", help="of the images")
  parser.add_argument("--seeds", type=int, default=3, help="trainings of each network (default: 3)")
  parser.add_argument(
    "--networks",
    nargs="+",
    choices=tuple(NETWORKS),
    metavar="NAME",
    help=f"some of: {', '.join(NETWORKS)} (default: all)",
  )
  parser.add_argument("--data-dir", help="TFDS directory (default: ~/tensorflow_datasets)")
  parser.add_argument(
    "--quick",
    action="store_true",
    help=f"one seed of {' and '.join(QUICK_NETWORKS)}, {QUICK_STEPS} steps, few images: a trial",
  )
  args = parser.parse_args(arguments)
  if args.seeds < 1:
    parser.error(f"--seeds must be at least 1, got {args.seeds}")
  if args.quick:
    args.seeds = 1
  args.networks = args.networks or (QUICK_NETWORKS if args.quick else tuple(NETWORKS))
  if args.workdir is None:
    name = "small_objects" if args.size == "small" else f"small_objects-{args.size}"
    args.workdir = Path("runs") / (f"{name}-quick" if args.quick else name)
  return args


def make_config(name: str, seed: int, args: argparse.Namespace) -> Config:
  """Configuration of one training: networks differ in their pooling only."""
  config = runpy.run_path(str(CONFIG))["get_config"](args.size)
  config.model.name = "resnet_small"
  config.model.update(NETWORKS[name])
  config.seed = seed
  config.data.data_dir = args.data_dir
  if args.quick:
    config.data.validation_split = f"validation[:{QUICK_IMAGES}]"
    config.eval_batch_size = QUICK_IMAGES
    config.num_epochs = QUICK_STEPS * config.global_batch_size / _builder(config).num_train
  return cast(Config, config_lib.from_dict(config.to_dict()))


def _builder(config: Any) -> Any:
  return ClutteredDigits.builder_configs[config.data.dataset.partition("/")[2]]


def conditions_of(config: Config) -> Sequence[Condition]:
  """The conditions that its data set has splits of."""
  return _builder(config).conditions


def run(name: str, seed: int, config: Config, args: argparse.Namespace) -> Result:
  """Trains, or goes on training, and evaluates one network."""
  workdir = args.workdir / f"{name.replace(' ', '-')}-{seed}"
  resumed, start = has_checkpoints(workdir), time.perf_counter()
  trained = trainer.train(config, workdir)
  if not trained.finished:
    sys.exit(f"stopped; the same command goes on from {trained.checkpoint or 'the start'}")
  seconds = time.perf_counter() - start
  model = abstract_model(**config.model, num_classes=10)
  return {
    "network": name,
    "seed": seed,
    "recipe": recipe(config),
    "steps": trained.step,
    "seconds": None if resumed else round(seconds, 1),
    "parameters": count_parameters(model),
    "multiply_adds": multiply_adds(model, config.data.shape[0]),
    "validation": trained.metrics["top1"],
    "conditions": evaluate_conditions(config, workdir, QUICK_IMAGES if args.quick else None),
  }


def evaluate_conditions(
  config: Config, workdir: Path, images: int | None = None
) -> dict[str, dict[str, float]]:
  """Top-1, top-5, loss and count of a finished run in each condition, by its split.

  Args:
    config: of the run.
    workdir: of the run.
    images: of each condition; None: all.
  """
  mesh = sharding.make_mesh()
  with Checkpoints(workdir, read_only=True) as checkpoints:
    last = checkpoints.resolve("latest")
    params, batch_stats = checkpoints.restore_weights(last, sharding.replicated(mesh))
  graph = nnx.graphdef(abstract_model(**config.model, num_classes=10))
  step = evaluation.jitted_step(config.data, graph, mesh)
  batch_stats = train_state.averaged(batch_stats)
  found = {}
  for condition in tqdm.tqdm(
    conditions_of(config), desc="conditions", leave=False, disable=not sys.stderr.isatty()
  ):
    split = condition.split if images is None else f"{condition.split}[:{images}]"
    batches = pipeline.eval_batches(
      open_split(config.data.dataset, split, config.data.data_dir),
      transforms.EvalCrop(config.data.image_size),
      global_batch_size=config.eval_batch_size,
      num_threads=config.data.num_threads,
    )
    results = evaluation.evaluate(step, params, batch_stats, batches, mesh)
    assert results is not None  # nobody asks to stop
    found[condition.split] = results
  return found


def recipe(config: Config) -> str:
  """Names all that decides a result beside the seed; changed, everything is trained again."""
  values = json.loads(config_lib.to_json(dataclasses.replace(config, seed=0)))
  values["data"]["data_dir"] = None
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def read_results(workdir: Path) -> list[Result]:
  """Lines of results.jsonl, none if there is no such file."""
  path = workdir / "results.jsonl"
  if not path.exists():
    return []
  try:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  except json.JSONDecodeError as error:
    sys.exit(f"error: {path} is damaged ({error}); delete the line, or the file")


def write_results(workdir: Path, results: Sequence[Result]) -> None:
  """Replaces results.jsonl as a whole, so that it is never half written."""
  text = "".join(json.dumps(line) + "\n" for line in results)
  write_text(epath.Path(workdir / "results.jsonl"), text)


def find(results: Sequence[Result], name: str, seed: int, config: Config) -> Result | None:
  """The result of such a training, if there is one."""
  for result in results:
    if (result["network"], result["seed"], result["recipe"]) == (name, seed, recipe(config)):
      return result
  return None


def accuracy(
  results: Sequence[Result], name: str, conditions: Sequence[Condition]
) -> tuple[float, float]:
  """Top-1 in %, mean over conditions: its mean and standard deviation (nan of one) over seeds."""
  top1 = [
    100 * statistics.mean(result["conditions"][c.split]["top1"] for c in conditions)
    for result in results
    if result["network"] == name
  ]
  return statistics.mean(top1), statistics.stdev(top1) if len(top1) > 1 else float("nan")


def fixed(conditions: Sequence[Condition]) -> Condition:
  """What is held while the other varies: the second smallest digit, the second densest clutter."""
  heights = sorted({c.digit_height for c in conditions})
  fragments = sorted({c.fragments for c in conditions})
  return Condition(heights[1], fragments[-2])


def panels(conditions: Sequence[Condition]) -> list[tuple[str, str, str, list[Condition]]]:
  """(attribute that varies, its axis, the title, the conditions in order) of figure and table."""
  hold = fixed(conditions)
  return [
    (
      "digit_height",
      "height of the digit (px)",
      f"smaller objects, among {hold.fragments} fragments",
      sorted(c for c in conditions if c.fragments == hold.fragments),
    ),
    (
      "fragments",
      "fragments of other digits",
      f"denser clutter, digits of {hold.digit_height} px",
      sorted(c for c in conditions if c.digit_height == hold.digit_height),
    ),
  ]


def table(results: Sequence[Result], conditions: Sequence[Condition]) -> str:
  """Markdown: cost and mean of all conditions; then the two series of the figure."""
  names = [name for name in NETWORKS if any(r["network"] == name for r in results)]
  blocks = [
    [
      "| network | parameters | multiply-adds (M) | top-1 over all conditions (%) | each seed |",
      "|---|---|---|---|---|",
    ]
  ]
  for name in names:
    mine = [result for result in results if result["network"] == name]
    each = ", ".join(f"{accuracy([result], name, conditions)[0]:.1f}" for result in mine)
    blocks[0].append(
      f"| {name} | {mine[0]['parameters']:,} | {mine[0]['multiply_adds'] / 1e6:.2f} "
      f"| {_spread(accuracy(mine, name, conditions))} | {each} |"
    )
  for attribute, axis, title, chosen in panels(conditions):
    head = " | ".join(str(getattr(c, attribute)) for c in chosen)
    lines = [
      f"{title}; columns: {axis}",
      "",
      f"| network | {head} |",
      "|---" * (len(chosen) + 1) + "|",
    ]
    for name in names:
      cells = " | ".join(_spread(accuracy(results, name, [c])) for c in chosen)
      lines.append(f"| {name} | {cells} |")
    blocks.append(lines)
  return "\n\n".join("\n".join(block) for block in blocks)


def _spread(value: tuple[float, float]) -> str:
  mean, deviation = value
  return f"{mean:.1f}" if math.isnan(deviation) else f"{mean:.1f} +- {deviation:.1f}"


def draw(results: Sequence[Result], conditions: Sequence[Condition], path: Path) -> None:
  """Draws accuracy against the size of the digit, and against clutter."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 4), layout="constrained")
  names = [name for name in NETWORKS if any(r["network"] == name for r in results)]
  all_axes = figure.subplots(1, 2, sharey=True)
  for axes, (attribute, axis, title, chosen) in zip(all_axes, panels(conditions), strict=True):
    for place, name in enumerate(names):
      colour, marker = STYLES[name]
      points = [accuracy(results, name, [c]) for c in chosen]
      shift = 0.12 * (place - (len(names) - 1) / 2)  # error bars beside each other
      axes.errorbar(
        [getattr(c, attribute) + shift for c in chosen],
        [mean for mean, _ in points],
        [0.0 if math.isnan(spread) else spread for _, spread in points],
        color=colour,
        marker=marker,
        markersize=9 if marker == "*" else 6,
        linewidth=2.2 if name.startswith("LIP") else 1.3,
        capsize=2,
        label=name,
      )
    axes.axhline(10, color="#666666", linestyle=":", linewidth=1)
    axes.set(xlabel=axis, title=title, xticks=[getattr(c, attribute) for c in chosen])
    axes.spines[["top", "right"]].set_visible(False)
  all_axes[0].invert_xaxis()  # harder to the right in both
  all_axes[0].set(ylabel="top-1 (%)", ylim=(0, 100))
  all_axes[0].annotate(
    "chance",
    (1, 10),
    (-2, 2),
    xycoords=("axes fraction", "data"),
    textcoords="offset points",
    ha="right",
    fontsize=8,
    color="#666666",
  )
  handles, labels = all_axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside right upper", frameon=False)
  figure.savefig(path, dpi=130)


if __name__ == "__main__":
  main()
