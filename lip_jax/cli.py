"""The `lip-jax` command: models and their cost, the paper's tables, weights, and data sets."""

import argparse
import ast
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lip_jax import __version__
from lip_jax.errors import UsageError

# The subcommands import what they need, so that --help and mistakes are answered at once.
if TYPE_CHECKING:
  from lip_jax.cost import Cost
  from lip_jax.paper import Row


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one subcommand.

  Args:
    argv: arguments behind the command's name; None: those of the process.

  Returns:
    Exit status: 0; 1 after an error of the user's, which is printed in one line, or a fault that
    was found; or 130 after Ctrl-C. Arguments that cannot be parsed end the process with 2.
  """
  parser = _parser()
  args = parser.parse_args(argv)
  try:
    status = args.run(args) or 0
    sys.stdout.flush()
    return status
  except BrokenPipeError:  # who reads has enough: lip-jax tables | head
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    return 0
  except UsageError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("error: interrupted", file=sys.stderr)
    return 130


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="lip-jax", description=__doc__)
  parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
  commands = parser.add_subparsers(metavar="COMMAND", required=True)

  text = "list the networks: parameters and multiply-adds, beside the paper's figures"
  models = commands.add_parser("models", help=text, description=text)
  models.add_argument(
    "names",
    nargs="*",
    metavar="NAME",
    help="model, or row of the paper's tables (default: all models, and tables 1, 3 and 4)",
  )
  models.add_argument(
    "--image-size", type=_positive, default=224, help="height and width in pixels (default: 224)"
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

  text = "convert a file of PyTorch weights to an exported folder, or such a folder to a file"
  convert = commands.add_parser("convert", help=text, description=text)
  convert.add_argument("source", metavar="SOURCE", help="file of weights, or exported folder")
  convert.add_argument("out", metavar="OUT", help="folder, or file, to write")
  convert.add_argument("--model", metavar="NAME", help="for a file: the model that it is of")
  convert.add_argument(
    "--num-classes",
    type=_positive,
    metavar="N",
    help="for a file: classes (default: as in the file)",
  )
  convert.add_argument(
    "--option",
    action="append",
    default=[],
    type=_option,
    metavar="KEY=VALUE",
    help="for a file: an option of the model, such as logit_width=64; may be repeated",
  )
  convert.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
  convert.set_defaults(run=_convert)

  _add_data_commands(commands)
  return parser


def _add_data_commands(commands: Any) -> None:
  text = "prepare, convert, check and measure data sets"
  data = commands.add_parser("data", help=text, description=f"{text}; docs/data.md is the guide")
  actions = data.add_subparsers(metavar="ACTION", required=True)
  directory = argparse.ArgumentParser(add_help=False)
  directory.add_argument(
    "--data-dir",
    metavar="DIR",
    help="directory of the data sets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)",
  )
  workers = argparse.ArgumentParser(add_help=False)
  workers.add_argument(
    "--num-workers",
    type=_positive,
    metavar="N",
    help="threads (default: one for each core, at most 16)",
  )
  writing = argparse.ArgumentParser(add_help=False)
  writing.add_argument(
    "--shorter-side", type=_positive, metavar="PIXELS", help="scale larger images down to this"
  )
  writing.add_argument(
    "--quality", type=int, metavar="Q", help="JPEG quality of images that are scaled (default: 95)"
  )
  writing.add_argument(
    "--num-shards", type=_positive, metavar="N", help="files of the train split (default: as TFDS)"
  )

  text = "make a data set in ArrayRecord format; the same command goes on if it is interrupted"
  prepare = actions.add_parser("prepare", help=text, description=text)
  kinds = prepare.add_subparsers(metavar="KIND", required=True)
  text = "imagenet2012, from the two tar files"
  imagenet = kinds.add_parser(
    "imagenet", help=text, description=text, parents=[directory, writing, workers]
  )
  imagenet.add_argument("--train-tar", required=True, metavar="FILE", help="..._img_train.tar")
  imagenet.add_argument("--val-tar", required=True, metavar="FILE", help="..._img_val.tar")
  imagenet.set_defaults(run=_prepare_imagenet)
  text = "a data set of one's own, from FOLDER/train/CLASS/IMAGE.jpg and FOLDER/validation/..."
  folder = kinds.add_parser(
    "folder", help=text, description=text, parents=[directory, writing, workers]
  )
  folder.add_argument("--folder", required=True, metavar="FOLDER", help="the image folder")
  folder.add_argument("--name", required=True, help="of the new data set")
  folder.set_defaults(run=_prepare_folder)

  text = "copy a TFDS data set from TFRecord to ArrayRecord files, without TensorFlow"
  convert = actions.add_parser("convert", help=text, description=text, parents=[directory, workers])
  convert.add_argument("dataset", metavar="DATASET", help="TFDS name, such as imagenet2012")
  convert.add_argument("--out-dir", required=True, metavar="DIR", help="where the new one goes")
  convert.set_defaults(run=_convert_data)

  text = "read a whole data set and say what is wrong with it; exit status 1 if anything is"
  verify = actions.add_parser("verify", help=text, description=text, parents=[directory, workers])
  verify.add_argument("dataset", metavar="DATASET", help="TFDS name, or folder:DIR")
  verify.add_argument(
    "--decode",
    choices=("sample", "all", "none"),
    default="sample",
    help="which images to decode as well (default: sample, one in 64)",
  )
  verify.set_defaults(run=_verify_data)

  text = "measure how fast this machine reads a data set, and how many cores a training needs"
  bench = actions.add_parser("bench", help=text, description=text, parents=[directory])
  bench.add_argument(
    "--source",
    required=True,
    metavar="DATASET",
    help="TFDS name, folder:DIR, or fake for images out of memory",
  )
  bench.add_argument("--split", default="train", help="(default: train)")
  bench.add_argument("--image-size", type=_positive, default=224, help="in pixels (default: 224)")
  bench.add_argument(
    "--num-threads", type=_positive, metavar="N", help="(default: one for each core)"
  )
  bench.add_argument(
    "--seconds", type=float, default=10.0, help="to measure for, in all (default: 10)"
  )
  bench.add_argument(
    "--images-per-second",
    type=float,
    nargs="+",
    metavar="RATE",
    help="of trainings that are to be fed (default: a few)",
  )
  bench.set_defaults(run=_bench_data)


def _positive(text: str) -> int:
  number = int(text)
  if number < 1:
    raise argparse.ArgumentTypeError(f"{text} is not positive")
  return number


def _option(text: str) -> tuple[str, Any]:
  """Key and value: a Python literal, or else a string."""
  key, equals, value = text.partition("=")
  if not (key.isidentifier() and equals):
    raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
  try:
    return key, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return key, value


def _models(args: argparse.Namespace) -> None:
  from lip_jax import cost

  total = len(args.names or cost.default_names())
  costs = []
  try:
    for number, one in enumerate(cost.costs(args.names, args.image_size), start=1):
      costs.append(one)
      _progress(f"{number}/{total} {one.name}")
  finally:
    _progress("")
  if args.json:
    values = [_cost_values(one, args.image_size) for one in costs]
    print(json.dumps({"rule": cost.RULE, "networks": values}, indent=2))
    return
  heading = ("network", "parameters", "paper", "difference", "multiply-adds", "paper", "difference")
  print(_table([heading, *(_cost_cells(one, args.image_size) for one in costs)]))
  print(f"\nOne image of {args.image_size} px: {cost.RULE}.")
  print(
    f"Paper: n/a where its figure could not be obtained. {_SOURCES}; docs/paper_vs_code.md "
    "explains the differences."
  )


_SOURCES = "lip_jax/paper.py has the sources"
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
  from lip_jax import paper

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
    print(_table(lines, right=()) + "\n")
  print(f"Top-1 / top-5 in percent; n/a: could not be obtained. {_SOURCES}.")


def _accuracies(row: "Row") -> str:
  if row.top1 is None and row.top5 is None:
    return "n/a"
  return " / ".join("n/a" if value is None else f"{value:.2f}" for value in (row.top1, row.top5))


def _convert(args: argparse.Namespace) -> None:
  from lip_jax.convert import convert

  options = dict(args.option)
  flags = {"model": "--model", "num_classes": "--num-classes", "overwrite": "--overwrite"}
  for name in options.keys() & flags.keys():
    raise UsageError(f"{name} is no option of a model; give it as {flags[name]}")
  print(
    convert(
      args.source,
      args.out,
      model=args.model,
      num_classes=args.num_classes,
      overwrite=args.overwrite,
      **options,
    )
  )


def _prepare_imagenet(args: argparse.Namespace) -> None:
  from lip_jax.data import prepare

  print(prepare.prepare_imagenet(args.train_tar, args.val_tar, args.data_dir, **_writing(args)))


def _prepare_folder(args: argparse.Namespace) -> None:
  from lip_jax.data import prepare

  print(prepare.prepare_folder(args.folder, args.name, args.data_dir, **_writing(args)))


def _writing(args: argparse.Namespace) -> dict[str, Any]:
  names = ("shorter_side", "quality", "num_shards", "num_workers")
  return {name: getattr(args, name) for name in names}


def _convert_data(args: argparse.Namespace) -> None:
  from lip_jax.data import prepare

  print(prepare.convert(args.dataset, args.data_dir, args.out_dir, num_workers=args.num_workers))


def _verify_data(args: argparse.Namespace) -> int:
  from lip_jax.data import verify

  report = verify.verify(
    args.dataset, args.data_dir, decode=args.decode, num_workers=args.num_workers
  )
  print(report)
  return 0 if report.ok else 1


def _bench_data(args: argparse.Namespace) -> None:
  from lip_jax.data import bench

  rates = {} if args.images_per_second is None else {"step_rates": args.images_per_second}
  print(
    bench.bench(
      args.source,
      data_dir=args.data_dir,
      split=args.split,
      image_size=args.image_size,
      num_threads=args.num_threads,
      seconds=args.seconds,
      **rates,
    )
  )


def _progress(text: str) -> None:
  """Replaces the progress line of a terminal; an empty text removes it."""
  if sys.stderr.isatty():
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _table(rows: Iterable[tuple[str, ...]], right: Sequence[int] = (1, 2, 3, 4, 5, 6)) -> str:
  """Aligned columns, those in `right` to the right."""
  rows = list(rows)
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = [
      cell.rjust(width) if index in right else cell.ljust(width)
      for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)


if __name__ == "__main__":
  sys.exit(main())
