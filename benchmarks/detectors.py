"""Images/s of training steps of the detectors of configs/coco.py, on noise.

python benchmarks/detectors.py --set dtype=bfloat16
python benchmarks/detectors.py --networks retinanet_lip_resnet50,tiny --seconds 0.1   # CPU
"""

import argparse
import json
from pathlib import Path

import jax

from lip_jax.cli import configuration
from lip_jax.tools import step_bench

ROOT = Path(__file__).parents[1]


def main() -> None:
  """Measures and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  networks = ("retinanet_lip_resnet50", "retinanet_resnet50")
  parser.add_argument("--networks", nargs="+", default=networks)
  parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="as for train.py")
  parser.add_argument("--seconds", type=float, default=5, help="of each network")
  parser.add_argument("--json", type=Path, help="also write the figures to this file")
  args = parser.parse_args()
  rows = []
  print("| detector | speed |\n|---|---|")
  for network in args.networks:
    config = configuration.load(f"{ROOT / 'configs' / 'coco.py'}:{network}", args.set)
    found = step_bench.measure(config, seconds=args.seconds)
    print(f"| {network} | {found} |", flush=True)
    rows.append({"name": network, "images_per_second": found.rate, "batch": found.batch_size})
  if args.json:
    result = {"device": jax.devices()[0].device_kind, "rows": rows}
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
