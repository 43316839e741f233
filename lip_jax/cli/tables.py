"""`lip-jax models` and `lip-jax tables`: the networks' cost, and the paper's tables."""

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lip_jax.cli.arguments import positive
from lip_jax.cli.output import progress, table

if TYPE_CHECKING:
  from lip_jax.tools.cost import Cost
  from lip_jax.tools.paper import Row
  from lip_jax.tools.paper_results import Result


def add_commands(commands: Any) -> None:
  """Adds `models` and `tables` to the subparsers `commands`."""
  text = "list the networks: parameters and FLOPs, beside the paper's figures"
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

  text = "list the paper's tables: each row as printed, our network's size, and our result"
  tables = commands.add_parser("tables", help=text, description=text)
  tables.add_argument(
    "numbers",
    nargs="*",
    type=_number,
    metavar="N",
    help="table, 1 to 6 (default: all, and our further poolings)",
  )
  tables.add_argument(
    "--runs",
    default="runs",
    metavar="DIR",
    help="where the runs are, each in DIR/<row> (default: runs)",
  )
  form = tables.add_mutually_exclusive_group()
  form.add_argument("--json", action="store_true", help="every digit and command, for machines")
  form.add_argument("--markdown", action="store_true", help="for the documentation")
  tables.set_defaults(run=_tables)


def _number(text: str) -> int:
  if text not in ("1", "2", "3", "4", "5", "6"):
    raise argparse.ArgumentTypeError(f"the paper has tables 1 to 6, got {text!r}")
  return int(text)


def _models(args: argparse.Namespace) -> None:
  from lip_jax.models.cost import RULE
  from lip_jax.tools import cost

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
    print(json.dumps({"rule": RULE, "networks": values}, indent=2))
    return
  heading = ("network", "parameters", "paper", "difference", "FLOPs", "paper", "difference")
  print(table([heading, *(_cost_cells(one, args.image_size) for one in costs)]))
  print(f"\nOne image of {args.image_size} px: {RULE}.")
  print("docs/paper_vs_code.md explains the differences.")


_PAPER_SIZE = 224  # pixels, of the images that the paper's FLOPs are of


def _cost_cells(one: "Cost", image_size: int) -> tuple[str, ...]:
  printed = one.row.printed if one.row else {}
  flops = printed.get("flops_g") if image_size == _PAPER_SIZE else None
  return (
    one.name,
    f"{one.parameters:,}",
    *_comparison(one.parameters / 1e6, printed.get("parameters_m"), "{:.1f}", "M"),
    f"{one.flops / 1e9:.3f} G",
    *_comparison(one.flops / 1e9, flops, "{:.2f}", "G"),
  )


def _comparison(ours: float, paper: float | None, form: str, unit: str) -> list[str]:
  """The paper's figure, and how ours differs from it."""
  if paper is None:
    return ["", ""]
  difference = f"{ours - paper:+.2f} {unit} {100 * (ours / paper - 1):+5.1f} %"
  return [f"{form.format(paper)} {unit}", difference]


def _cost_values(one: "Cost", image_size: int) -> dict[str, Any]:
  values = {**one._asdict(), "image_size": image_size, "row": one.row and one.row.name}
  printed = one.row.printed if one.row else {}
  flops = printed.get("flops_g") if image_size == _PAPER_SIZE else None
  for name, ours, paper, unit in (
    ("parameters", one.parameters / 1e6, printed.get("parameters_m"), "m"),
    ("flops", one.flops / 1e9, flops, "g"),
  ):
    values[f"paper_{name}_{unit}"] = paper
    values[f"difference_{name}_{unit}"] = None if paper is None else ours - paper
    values[f"difference_{name}_percent"] = None if paper is None else 100 * (ours / paper - 1)
  return values


# What a table shows for each of its columns: what is printed, and where there are two, ours.
_HEADINGS = {
  "top1": ("top-1",),
  "top5": ("top-5", "here"),
  "parameters_m": ("M param.", "here"),
  "flops_g": ("G FLOPs", "here"),
  "ap": ("AP",),
  "ap50": ("AP50",),
  "ap75": ("AP75",),
  "ap_s": ("APs",),
  "ap_m": ("APm",),
  "ap_l": ("APl",),
}
_TWO_DIGITS = ("top1", "top5", "flops_g")
_WIDTH = 100  # of prose


class _Entry(NamedTuple):
  """A row, and what is ours of it: None where there is no network."""

  row: "Row"
  cost: "Cost | None"
  result: "Result | None"


def _tables(args: argparse.Namespace) -> None:
  from lip_jax.models.cost import RULE
  from lip_jax.tools import paper

  groups: list[tuple[str, int | None, list[Row]]] = [
    (f"Table {number}: {title}", number, [row for row in paper.ROWS if row.table == number])
    for number, title in paper.TITLES.items()
    if number in args.numbers or not args.numbers
  ]
  if not args.numbers:
    groups.append(("Further poolings of ResNet-50, not the paper's", None, [*paper.FURTHER]))
  if args.json:
    values = [
      _row_values(entry, args.runs) for _, _, rows in groups for entry in _entries(rows, args.runs)
    ]
    print(json.dumps({"rule": RULE, "notes": paper.NOTES, "rows": values}, indent=2))
    return
  show = _show_markdown if args.markdown else _show
  for title, number, rows in groups:
    entries, columns = _entries(rows, args.runs), paper.COLUMNS[number or 1]
    notes = [paper.NOTES[number]] if number in paper.NOTES else []
    notes += [f"{e.row.name}: {e.result}." for e in entries if e.result and e.result.why]
    show(title, [_heading(columns), *(_cells(entry, columns) for entry in entries)], notes)
  if not args.markdown:
    print(textwrap.fill(f"Accuracies in percent; here: ours. {RULE}.", _WIDTH))
    print("A row's network, if there is one here:")
    print(f"  python train.py --config=configs/imagenet.py:ROW --workdir={args.runs}/ROW")


def _entries(rows: "Sequence[Row]", runs: str) -> list[_Entry]:
  from lip_jax.tools import cost, paper_results

  entries = []
  for row in rows:
    progress(row.name)
    if row.model:
      (size,) = cost.costs([row.name])
      entries.append(_Entry(row, size, paper_results.result(row, runs)))
    else:
      entries.append(_Entry(row, None, None))
  progress("")
  return entries


def _row_values(entry: _Entry, runs: str) -> dict[str, Any]:
  from lip_jax.tools import paper_results

  row, size, result = entry
  return {
    **dataclasses.asdict(row),
    "parameters": size and size.parameters,
    "flops": size and size.flops,
    "command": paper_results.command(row, runs) if size else None,
    "result": result and dataclasses.asdict(result),
  }


def _heading(columns: Sequence[str]) -> tuple[str, ...]:
  return ("row", "", *(heading for column in columns for heading in _HEADINGS[column]))


def _cells(entry: _Entry, columns: Sequence[str]) -> tuple[str, ...]:
  """A line of a table: for each column the printed figure, and ours where there is one."""
  row, size, result = entry
  ours = {}
  if size and result:
    ours["top5"] = "not counted" if result.why else str(result)
    ours["parameters_m"] = f"{size.parameters / 1e6:.2f}"
    ours["flops_g"] = f"{size.flops / 1e9:.3f}"
  cells = [row.name, row.label]
  for column in columns:
    figure = row.printed.get(column)
    missing = "N/A" if row.printed else ""  # what the paper prints where a training failed
    digits = 2 if column in _TWO_DIGITS else 1
    cells.append(missing if figure is None else f"{figure:.{digits}f}")
    if len(_HEADINGS[column]) == 2:
      cells.append(ours[column])
  return tuple(cells)


def _show(title: str, lines: list[tuple[str, ...]], notes: list[str]) -> None:
  print(title)
  print(table(lines, right=range(2, len(lines[0]))))
  for note in notes:
    print(textwrap.fill(note, _WIDTH))
  print()


def _show_markdown(title: str, lines: list[tuple[str, ...]], notes: list[str]) -> None:
  heading, *rows = lines
  print(f"## {title}\n")
  print(f"| {' | '.join(heading)} |")
  print(f"|---|---|{'--:|' * (len(heading) - 2)}")
  for name, *cells in rows:
    print(f"| `{name}` | {' | '.join(cells)} |")
  for note in notes:
    print(f"\n{note}")
  print()
