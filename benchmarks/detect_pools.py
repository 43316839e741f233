"""What pooling does for a detector: RetinaNet with each, paired by seed.

  python benchmarks/detect_pools.py            # five backbones, five seeds each: 25 trainings
  python benchmarks/detect_pools.py --quick    # does it work? two minutes, numbers mean nothing

Trains the detector of configs/detect_digits.py with each pooling in its backbone and each seed (of
fresh weights and the order of images) in WORKDIR/<network>-<seed>. What came out is written to
WORKDIR/<network>-<seed>.json; table.md and detect_pools.png are drawn of the seeds that all
networks have. Interrupted, the same command goes on where it stopped; what is finished is not done
again. Several processes may share the work: give them the same WORKDIR and other --seeds, and a
core each (taskset); the last one draws all.
"""

import argparse
import json
import runpy
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
from etils import epath
from scipy import stats
from small_objects import STYLES, recipe

from lip_jax.detection.config import Config
from lip_jax.detection.registry import abstract_detector
from lip_jax.errors import UsageError
from lip_jax.models.cost import count_parameters
from lip_jax.training import config as config_lib
from lip_jax.training import trainer
from lip_jax.training.checkpoint.checkpoints import has_checkpoints
from lip_jax.training.metrics import log_to_stdout
from lip_jax.training.workdir import write_text

CONFIG = Path(__file__).parents[1] / "configs" / "detect_digits.py"

LIP = "LIP"
NETWORKS: dict[str, dict[str, Any]] = {
  "strided": {"backbone": "resnet_small", "pool": "strided"},
  "average": {"backbone": "resnet_small", "pool": "average"},
  "max": {"backbone": "resnet_small", "pool": "max"},
  "SoftPool": {"backbone": "resnet_small", "pool": "soft"},
  LIP: {"backbone": "lip_resnet_small", "logit_width": 8},
}
METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
DRAWN = {"AP": "AP", "AP_small": "AP of small digits"}
CONFIDENCE = 0.95
EPOCHS = 0.5
QUICK_EPOCHS = 0.01
QUICK_IMAGES = 50

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]  # by network and seed


def main(arguments: Sequence[str] | None = None) -> None:
  """Trains what has not been, then writes table and figure."""
  args = _parse(arguments)
  log_to_stdout()
  jax.config.update("jax_compilation_cache_dir", str((args.workdir / "compiled").resolve()))
  runs = [(name, seed) for seed in args.seeds for name in NETWORKS]
  try:
    for number, (name, seed) in enumerate(runs, 1):
      config = make_config(name, seed, args)
      if read_result(args.workdir, config, name, seed) is None:
        print(f"== {number}/{len(runs)}: {name}, seed {seed}", flush=True)
        run(name, seed, config, args.workdir)
  except UsageError as error:
    sys.exit(f"error: {error}")
  results = read_results(args)
  seeds = sorted(set.intersection(*map(set, results.values())))
  text = table(results, seeds)
  (args.workdir / "table.md").write_text(text + "\n", encoding="utf-8")
  draw(results, seeds, args.workdir / "detect_pools.png")
  print(text)
  print(f"\nfigure: {args.workdir / 'detect_pools.png'}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=Path, help="default: runs/detect_pools")
  parser.add_argument(
    "--seeds", type=int, nargs="+", metavar="SEED", help="default: 0 1 2 3 4; with --quick, 0"
  )
  parser.add_argument(
    "--epochs", type=float, default=EPOCHS, help=f"of each training (default: {EPOCHS})"
  )
  parser.add_argument("--data-dir", help="TFDS directory (default: ~/tensorflow_datasets)")
  parser.add_argument(
    "--quick", action="store_true", help="one seed, few steps and images: a trial"
  )
  args = parser.parse_args(arguments)
  if args.epochs <= 0:
    parser.error(f"--epochs must be above 0, got {args.epochs}")
  args.seeds = sorted(set(args.seeds or ((0,) if args.quick else range(5))))
  if args.workdir is None:
    args.workdir = Path("runs") / ("detect_pools-quick" if args.quick else "detect_pools")
  return args


def make_config(name: str, seed: int, args: argparse.Namespace) -> Config:
  """Configuration of one training: networks differ in their pooling only."""
  config = runpy.run_path(str(CONFIG))["get_config"]()
  del config.model.logit_width
  config.model.update(NETWORKS[name])
  config.seed = seed
  config.num_epochs = args.epochs
  config.figure_images = 0
  config.data.data_dir = args.data_dir
  if args.quick:
    config.num_epochs = QUICK_EPOCHS
    config.data.validation_split = f"validation[:{QUICK_IMAGES}]"
    config.eval_batch_size = QUICK_IMAGES
  return cast(Config, config_lib.from_dict(config.to_dict()))


def run(name: str, seed: int, config: Config, workdir: Path) -> None:
  """Trains, or goes on training, one detector, and writes its result."""
  directory = workdir / f"{name}-{seed}"
  resumed, start = has_checkpoints(directory), time.perf_counter()
  trained = trainer.train(config, directory)
  if not trained.finished:
    sys.exit(f"stopped; the same command goes on from {trained.checkpoint or 'the start'}")
  result = {
    "recipe": recipe(config),
    "parameters": count_parameters(abstract_detector(**config.model, num_classes=10)),
    "images": trained.step * config.global_batch_size,
    "seconds": None if resumed else round(time.perf_counter() - start, 1),
    "metrics": trained.metrics,
  }
  write_text(epath.Path(_path(workdir, name, seed)), json.dumps(result) + "\n")


def _path(workdir: Path, name: str, seed: int) -> Path:
  return workdir / f"{name}-{seed}.json"


def read_result(workdir: Path, config: Config, name: str, seed: int) -> dict[str, Any] | None:
  """What came out of such a training, if it has been done."""
  path = _path(workdir, name, seed)
  if not path.exists():
    return None
  try:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    raise UsageError(f"{path} is damaged ({error}); delete it") from error
  return result if result["recipe"] == recipe(config) else None


def read_results(args: argparse.Namespace) -> Results:
  """All results of this recipe in the workdir, of whatever seeds."""
  found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in NETWORKS}
  for name, by_seed in found.items():
    for path in args.workdir.glob(f"{name}-*.json"):
      seed = int(path.stem.rpartition("-")[2])
      result = read_result(args.workdir, make_config(name, seed, args), name, seed)
      if result is not None:
        by_seed[seed] = result
  return found


def values(results: Results, name: str, metric: str, seeds: Sequence[int]) -> list[float]:
  """A metric in percent, of each seed."""
  return [100 * results[name][seed]["metrics"][metric] for seed in seeds]


def paired(results: Results, name: str, metric: str, seeds: Sequence[int]) -> list[float]:
  """By how much LIP is above a network, in points, for each seed."""
  lip = values(results, LIP, metric, seeds)
  return [a - b for a, b in zip(lip, values(results, name, metric, seeds), strict=True)]


def interval(sample: Sequence[float]) -> tuple[float, float, float]:
  """Mean and ends of Student's interval of confidence for it; no ends (nan) of one value."""
  mean = statistics.mean(sample)
  if len(sample) < 2:
    return mean, float("nan"), float("nan")
  half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(sample) - 1) * stats.sem(sample))
  return mean, mean - half, mean + half


def table(results: Results, seeds: Sequence[int]) -> str:
  """Markdown: each metric by network; what LIP has more, paired by seed; what is drawn, by seed."""
  interval_of = f"[{100 * CONFIDENCE:.0f} % interval of the mean]"
  head = " | ".join(METRICS)
  lines = [f"mean over {len(seeds)} seeds {interval_of}, %", ""]
  lines += [f"| backbone pools by | parameters | {head} |", "|---" * (len(METRICS) + 2) + "|"]
  for name in NETWORKS:
    cells = [_cell(values(results, name, metric, seeds)) for metric in METRICS]
    lines.append(f"| {name} | {results[name][seeds[0]]['parameters']:,} | {' | '.join(cells)} |")
  lines += ["", f"LIP above each, points, paired by seed {interval_of}", ""]
  lines += [f"| LIP above | {head} |", "|---" * (len(METRICS) + 1) + "|"]
  for name in NETWORKS:
    if name != LIP:
      cells = [_cell(paired(results, name, metric, seeds), "+") for metric in METRICS]
      lines.append(f"| {name} | {' | '.join(cells)} |")
  lines += ["", f"{' / '.join(DRAWN)} of each seed, %", ""]
  lines += [f"| backbone pools by | {' | '.join(map(str, seeds))} |"]
  lines += ["|---" * (len(seeds) + 1) + "|"]
  for name in NETWORKS:
    by_seed = zip(*(values(results, name, metric, seeds) for metric in DRAWN), strict=True)
    cells = [" / ".join(f"{value:.1f}" for value in found) for found in by_seed]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines)


def _cell(sample: Sequence[float], sign: str = "") -> str:
  mean, low, high = interval(sample)
  ends = "" if len(sample) < 2 else f" [{low:{sign}.1f}, {high:{sign}.1f}]"
  return f"{mean:{sign}.1f}{ends}"


def draw(results: Results, seeds: Sequence[int], path: Path) -> None:
  """Draws each seed's AP, of all and of small digits, joined over the networks, and the means."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 4), layout="constrained")
  names = list(NETWORKS)
  for axes, (metric, title) in zip(figure.subplots(1, 2), DRAWN.items(), strict=True):
    for seed in seeds:
      points = [values(results, name, metric, [seed])[0] for name in names]
      axes.plot(range(len(names)), points, color="#cccccc", linewidth=1, zorder=1)
    for place, name in enumerate(names):
      colour, marker = STYLES.get(name, STYLES["LIP bottleneck"])
      sample = values(results, name, metric, seeds)
      mean, low, high = interval(sample)
      axes.scatter([place] * len(sample), sample, s=14, color=colour, alpha=0.5, zorder=2)
      bars = [[mean - low], [high - mean]] if len(sample) > 1 else None
      axes.errorbar(
        place, mean, bars, color=colour, marker=marker, markersize=9, capsize=4, zorder=3
      )
    axes.set(title=title, ylabel=f"{metric} (%)")
    axes.set_xticks(range(len(names)), names)
    axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=130)


if __name__ == "__main__":
  main()
