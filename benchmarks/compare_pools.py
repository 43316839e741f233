"""Compares poolings: the embedded job's network with each, over several seeds.

  python benchmarks/compare_pools.py --workdir=runs/compare_pools

Trains the network of configs/cluttered_digits.py once for each pooling and seed, in
WORKDIR/<name>-<seed>, and prints a table of validation top-1, written to WORKDIR/table.md as well.
Interrupted, the same command goes on where it stopped.
"""

import argparse
import math
import runpy
import statistics
import sys
from pathlib import Path

from lip_jax.errors import UsageError
from lip_jax.models import abstract_model
from lip_jax.models.cost import count_parameters
from lip_jax.training import config as config_lib
from lip_jax.training import trainer
from lip_jax.training.metrics import log_to_stdout

CONFIG = Path(__file__).parents[1] / "configs" / "cluttered_digits.py"

NETWORKS = {
  "strided convolution": {"pool": "strided"},
  "average pooling": {"pool": "average"},
  "max pooling": {"pool": "max"},
  "LIP": {"pool": "lip"},
}


def main() -> None:
  """Trains what has not been trained yet and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=Path, default=Path("runs/compare_pools"))
  parser.add_argument("--seeds", type=int, default=3, help="runs of each network (default: 3)")
  parser.add_argument("--epochs", type=float, help="epochs of each run (default: the config's)")
  parser.add_argument("--data-dir", help="TFDS directory (default: ~/tensorflow_datasets)")
  args = parser.parse_args()
  if args.seeds < 1:
    parser.error(f"--seeds must be at least 1, got {args.seeds}")
  log_to_stdout()

  table = [
    "| down-sampling | top-1, mean +- standard deviation (%) | each seed | parameters |",
    "|---|---|---|---|",
  ]
  for name, options in NETWORKS.items():
    top1 = []
    for seed in range(args.seeds):
      config = _config(options, seed, args)
      print(f"== {name}, seed {seed}", flush=True)
      try:
        result = trainer.train(config, args.workdir / f"{name.replace(' ', '-')}-{seed}")
      except UsageError as error:
        sys.exit(f"error: {error}")
      if not result.finished:
        sys.exit(f"stopped; the same command goes on from {result.checkpoint}")
      top1.append(100 * result.metrics["top1"])
    spread = statistics.stdev(top1) if len(top1) > 1 else math.nan
    table.append(
      f"| {name} | {statistics.mean(top1):.1f} +- {spread:.1f} "
      f"| {', '.join(f'{value:.1f}' for value in top1)} | {_parameters(config):,} |"
    )
  text = "\n".join(table)
  (args.workdir / "table.md").write_text(text + "\n", encoding="utf-8")
  print(text)


def _config(options: dict[str, str], seed: int, args: argparse.Namespace) -> config_lib.Config:
  config = runpy.run_path(str(CONFIG))["get_config"]()
  config.model.update(options)
  config.seed = seed
  config.data.data_dir = args.data_dir
  config.importance_images = 0
  config.eval_every_epochs = 100.0  # at the end only
  if args.epochs:
    config.num_epochs = args.epochs
  return config_lib.from_dict(config.to_dict())


def _parameters(config: config_lib.Config) -> int:
  return count_parameters(abstract_model(**config.model, num_classes=10))


if __name__ == "__main__":
  main()
