"""`lip-jax models` and `lip-jax tables`: the networks' cost, and the paper's tables."""

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lip_jax.cli.arguments import add, add_command, positive
from lip_jax.cli.output import progress, table, working

if TYPE_CHECKING:
  from lip_jax.tools.cost import Cost
  from lip_jax.tools.paper import Row
  from lip_jax.tools.paper_results import Classified, Detected

  # None: no network here; of a detector no cost is said.
  Entry = tuple[Row, Cost | None, Classified | Detected | None]


def add_commands(commands: Any) -> None:
  """Adds `models` and `tables` to the subparsers `commands`."""
  text = "list the networks: parameters and FLOPs, beside the paper's figures"
  models = add_command(commands, "models", _models, text)
  text = "model, or row of the paper's tables (default: all models, and tables 1, 3 and 4)"
  add(models, {"names NAME": text}, nargs="*")
  text = "height and width in pixels (default: 224)"
  add(models, {"--image-size IMAGE_SIZE": text}, type=positive, default=224)
  add(models, {"--json": "every digit, for machines"})

  text = "list the paper's tables: each row as printed, our network's size, and our result"
  tables = add_command(commands, "tables", _tables, text)
  text = "table, 1 to 6 (default: all, and our further poolings)"
  add(tables, {"numbers N": text}, nargs="*", type=_number)
  text = "where the runs are, each in DIR/<row> (default: runs)"
  add(tables, {"--runs DIR": text}, default="runs")
  forms = {
    "--json": "every digit and command, for machines",
    "--markdown": "for the documentation",
  }
  add(tables.add_mutually_exclusive_group(), forms)


def _number(text: str) -> int:
  if text not in ("1", "2", "3", "4", "5", "6"):
    raise argparse.ArgumentTypeError(f"the paper has tables 1 to 6, got {text!r}")
  return int(text)


def _models(args: argparse.Namespace) -> None:
  from lip_jax.models.cost import RULE
  from lip_jax.tools import cost

  total = len(args.names or cost.default_names())
  values = []
  with working():
    for number, one in enumerate(cost.costs(args.names, args.image_size), start=1):
      values.append(_cost_values(one, args.image_size))
      progress(f"{number}/{total} {one.name}")
  if args.json:
    print(json.dumps({"rule": RULE, "networks": values}, indent=2))
    return
  heading = ("network", "parameters", "paper", "difference", "FLOPs", "paper", "difference")
  print(table([heading, *map(_cost_cells, values)]))
  print()
  print(textwrap.fill(f"One image of {args.image_size} px: {RULE}.", _WIDTH))
  print("docs/paper_vs_code.md explains the differences.")


_PAPER_SIZE = 224  # pixels, of the images that the paper's FLOPs are of


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


def _cost_cells(values: dict[str, Any]) -> tuple[str, ...]:
  cells = [values["name"]]
  for name, ours, unit, digits in (
    ("parameters", f"{values['parameters']:,}", "M", 1),
    ("flops", f"{values['flops'] / 1e9:.3f} G", "G", 2),
  ):
    paper, difference = (values[f"{of}_{name}_{unit.lower()}"] for of in ("paper", "difference"))
    percent = values[f"difference_{name}_percent"]
    compared = ["", ""]
    if paper is not None:
      compared = [f"{paper:.{digits}f} {unit}", f"{difference:+.2f} {unit} {percent:+5.1f} %"]
    cells += [ours, *compared]
  return tuple(cells)


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
    notes_of = {number: paper.NOTES[number] for _, number, _ in groups if number in paper.NOTES}
    print(json.dumps({"rule": RULE, "notes": notes_of, "rows": values}, indent=2))
    return
  show = _show_markdown if args.markdown else _show
  for title, number, rows in groups:
    entries, columns = _entries(rows, args.runs), paper.COLUMNS[number or 1]
    notes = [paper.NOTES[number]] if number in paper.NOTES else []
    notes += [f"{row.name}: {result}." for row, _, result in entries if result and result.why]
    heading = ("row", "", *(text for column in columns for text in _HEADINGS[column]))
    lines = [line for entry in entries for line in _lines(entry, columns)]
    show(title, [heading, *lines], notes)
  if args.markdown:
    return
  counted = any("flops_g" in paper.COLUMNS[number or 1] for _, number, _ in groups)
  print(textwrap.fill("In percent; here: ours." + (f" {RULE}." if counted else ""), _WIDTH))
  listed = [row for _, _, rows in groups for row in rows]
  if any(row.model for row in listed):
    print("A row's network, if there is one here:")
    print(f"  python train.py --config=configs/imagenet.py:ROW --workdir={args.runs}/ROW")
  if any(row.name in paper.DETECTORS for row in listed):
    print("A detector, from a classifier; below its row, if it has been trained: ours, on val2017:")
    places = f"--weights={args.runs}/table4_BACKBONE --workdir={args.runs}/ROW"
    print(f"  python train.py --config=configs/coco.py:DETECTOR_BACKBONE {places}")


def _entries(rows: "Sequence[Row]", runs: str) -> "list[Entry]":
  from lip_jax.tools import cost, paper_results

  entries: list[Entry] = []
  with working():
    for row in rows:
      progress(row.name)
      size = next(cost.costs([row.name])) if row.model else None
      entries.append((row, size, paper_results.result(row, runs)))
  return entries


def _row_values(entry: "Entry", runs: str) -> dict[str, Any]:
  from lip_jax.tools import paper_results

  row, size, result = entry
  return {
    **dataclasses.asdict(row),
    "parameters": size and size.parameters,
    "multiply_adds": size and size.multiply_adds,
    "flops": size and size.flops,
    "command": paper_results.command(row, runs),
    "result": result and dataclasses.asdict(result),
  }


def _lines(entry: "Entry", columns: Sequence[str]) -> list[tuple[str, ...]]:
  """What a table shows of a row: for each column the printed figure, and ours where there is one.

  A detector's own figures are a line of their own.
  """
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
  lines = [tuple(cells)]
  if size is None and result and result.status != "not yet run":
    figures = [getattr(result, column) for column in columns]
    text = "not counted" if result.why else str(result)
    cells = ["", f"here: {text}", *("" if one is None else f"{one:.1f}" for one in figures)]
    lines.append(tuple(cells))
  return lines


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
    print(f"| {name and f'`{name}`'} | {' | '.join(cells)} |")
  for note in notes:
    print(f"\n{note}")
  print()
