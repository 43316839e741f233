"""`lip-jax models` and `lip-jax tables`: the networks' cost, and the paper's tables."""

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from lip_jax.cli.arguments import positive
from lip_jax.cli.output import progress, table

if TYPE_CHECKING:
  from lip_jax.models.cost import Cost
  from lip_jax.tools.paper import Row


def add_commands(commands: Any) -> None:
  """Adds `models` and `tables` to the subparsers `commands`."""
  text = "list the networks: parameters and multiply-adds, beside the paper's figures"
  models = commands.add_parser("models", help=text, description=text)
  models.add_argument(
    "names",
    nargs="*",
    metavar="NAME",
    help="model, or row of the paper's tables (default: all models, and tables 1, 3 and 4)",
  )
  models.add_argument(
    "--image-size", type=positive, default=224, help="height and width in pixels (default: 224)"
  )
  models.add_argument("--json", action="store_true", help="every digit, for machines")
  models.set_defaults(run=_models)

  text = "list tables 1 to 4 of the paper: its results, the command for each row, and our results"
  tables = commands.add_parser("tables", help=text, description=text)
  tables.add_argument(
    "--runs",
    default="runs",
    metavar="DIR",
    help="where the runs are, each in DIR/<row> (default: runs)",
  )
  tables.add_argument("--json", action="store_true", help="for machines")
  tables.set_defaults(run=_tables)


def _models(args: argparse.Namespace) -> None:
  from lip_jax.models import cost

  total = len(args.names or cost.default_names())
  costs = []
  try:
    for number, one in enumerate(cost.costs(args.names, args.image_size), start=1):
      costs.append(one)
      progress(f"{number}/{total} {one.name}")
  finally:
    progress("")
  if args.json:
    values = [_cost_values(one, args.image_size) for one in costs]
    print(json.dumps({"rule": cost.RULE, "networks": values}, indent=2))
    return
  heading = ("network", "parameters", "paper", "difference", "multiply-adds", "paper", "difference")
  print(table([heading, *(_cost_cells(one, args.image_size) for one in costs)]))
  print(f"\nOne image of {args.image_size} px: {cost.RULE}.")
  print(
    f"Paper: n/a where its figure could not be obtained. {_SOURCES}; docs/paper_vs_code.md "
    "explains the differences."
  )


_SOURCES = "lip_jax/tools/paper.py has the sources"
_PAPER_SIZE = 224  # pixels, of the images that the paper's multiply-adds are of


def _cost_cells(one: "Cost", image_size: int) -> tuple[str, ...]:
  parameters = one.row.parameters_m if one.row else None
  multiply_adds = one.row.multiply_adds_g if one.row else None
  cells = [one.name, f"{one.parameters:,}"]
  cells += _comparison(one.parameters / 1e6, parameters, "{:.1f}", "M")
  cells.append(f"{one.multiply_adds / 1e9:.3f} G")
  cells += _comparison(one.multiply_adds / 1e9, multiply_adds, "{:.2f}", "G")
  # What is not in the paper, or of another size, has no figures that are missing.
  for start, comparable in ((2, True), (5, image_size == _PAPER_SIZE)):
    if not (one.row and comparable):
      cells[start : start + 2] = ["", ""]
  return tuple(cells)


def _comparison(ours: float, paper: float | None, form: str, unit: str) -> list[str]:
  """The paper's figure, and how ours differs from it."""
  if paper is None:
    return ["n/a", ""]
  difference = f"{ours - paper:+.2f} {unit} {100 * (ours / paper - 1):+5.1f} %"
  return [f"{form.format(paper)} {unit}", difference]


def _cost_values(one: "Cost", image_size: int) -> dict[str, Any]:
  values = {**one._asdict(), "image_size": image_size, "row": one.row and one.row.name}
  parameters = one.row.parameters_m if one.row else None
  multiply_adds = one.row.multiply_adds_g if one.row and image_size == _PAPER_SIZE else None
  for name, ours, paper, unit in (
    ("parameters", one.parameters / 1e6, parameters, "m"),
    ("multiply_adds", one.multiply_adds / 1e9, multiply_adds, "g"),
  ):
    values[f"paper_{name}_{unit}"] = paper
    values[f"difference_{name}_{unit}"] = None if paper is None else ours - paper
    values[f"difference_{name}_percent"] = None if paper is None else 100 * (ours / paper - 1)
  return {**values, "source": one.row and one.row.source}


def _tables(args: argparse.Namespace) -> None:
  from lip_jax.tools import paper

  results = {row.name: paper.result(row, args.runs) for row in paper.ROWS}
  if args.json:
    values = [
      {
        **{name: getattr(row, name) for name in ("name", "table", "label", "model", "options")},
        "paper_top1": row.top1,
        "paper_top5": row.top5,
        "source": row.source,
        "command": paper.command(row, args.runs),
        "result": dataclasses.asdict(results[row.name]),
      }
      for row in paper.ROWS
    ]
    print(json.dumps({"rows": values}, indent=2))
    return
  for number, title in paper.TITLES.items():
    print(f"Table {number}: {title}")
    lines: list[tuple[str, ...]] = [("row", "", "paper", "ours", "command")]
    for row in paper.ROWS:
      if row.table == number:
        command = paper.command(row, args.runs)
        lines.append((row.name, row.label, _accuracies(row), str(results[row.name]), command))
    print(table(lines, right=()) + "\n")
  print(f"Top-1 / top-5 in percent; n/a: could not be obtained. {_SOURCES}.")


def _accuracies(row: "Row") -> str:
  if row.top1 is None and row.top5 is None:
    return "n/a"
  return " / ".join("n/a" if value is None else f"{value:.2f}" for value in (row.top1, row.top5))
