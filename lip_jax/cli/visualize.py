"""`lip-jax visualize`: what networks look at, side by side, and how steady they are."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lip_jax.cli.arguments import AS_STORED, DATA_DIR, add, add_command
from lip_jax.cli.output import progress, say, table, working
from lip_jax.errors import UsageError

if TYPE_CHECKING:
  from lip_jax.visualize.compare import Images, Network
  from lip_jax.visualize.figures import Plot

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_OUT = "visualize.png"

_EPILOG = """\
Shift consistency: the fraction of (image, direction) whose prediction is that of the unshifted
image, over eight directions (along the rows, the columns, and both). Deletion: pixels are occluded
from the most important one on, from the least important one on, and in random order; the area is
that under the label's mean probability, against the occluded part of the image. A smaller area for
"most important first" means that the pixels that count were found.

  lip-jax visualize lip strided average --data=cluttered_digits/classify
  lip-jax visualize lip_resnet50 cat.jpg dog.jpg --layers --out=layers.svg
  lip-jax visualize lip strided --shift-consistency --deletion --data=imagenet2012 --json
"""


def add_commands(commands: Any) -> None:
  """Adds `visualize` to the subparsers `commands`."""
  text = "draw what networks look at, side by side, or measure how steady they are"
  more = (
    ": importance maps of LIP, class activation maps, effective receptive fields (figure 5 of the "
    "paper); shift consistency and deletion curves"
  )
  visualize = add_command(commands, "visualize", _visualize, text, more, epilog=_EPILOG)
  arguments = {
    "paths PATH...": "networks, as lip_jax.load takes them, and image files; without image files "
    "the first images of the data set are taken",
    "--out FILE": f"figure to write: .png, .svg or .pdf (default: {_OUT}; none where numbers are "
    "printed)",
    "--names NAME...": "of the networks (default: of their folders)",
    "--count N": "images of the data set (default: 2 to draw, 8 with --layers, 200 to measure)",
    **AS_STORED,
  }
  add(visualize, arguments)
  add(
    visualize.add_argument_group("data set, where no image files are given"),
    {
      "--data DATASET": "TFDS name, folder:DIR or fake (default: what the network was trained on)",
      "--split SPLIT": "(default: validation)",
      **DATA_DIR,
    },
  )
  _add_figure_options(visualize.add_argument_group("figure"))
  _add_number_options(visualize.add_argument_group("numbers, instead of the figure"))
  visualize.set_defaults(split="validation", fill="dataset")


def _add_figure_options(figure: Any) -> None:
  add(figure, {"--layers": "importance maps of every LIP layer, of one network"})
  text = "name or number of the class of the activation maps (default: what is predicted)"
  add(figure, {"--class CLASS": text}, dest="label")
  text = (
    "of the class activation map, whose receptive field to draw; may be repeated (default: where "
    "the map is largest)"
  )
  add(figure, {"--location ROW,COLUMN": text}, action="append", type=_location)


def _add_number_options(numbers: Any) -> None:
  arguments = {
    "--shift-consistency": "how often the prediction survives a shift of 1 to 8 pixels",
    "--border {crop,reflect,zero,wrap}": "what a shift brings in: the image beyond the central "
    "crop, its mirror image, the data set's mean colour, or its other side (default: crop if the "
    "crop leaves 8 pixels, else reflect)",
    "--deletion": "what is left of the prediction as pixels are occluded",
    "--by {importance,cam}": "which pixels are important: by LIP's importance maps, or the class "
    "activation map (default: the first if the network has LIP)",
    "--fill {dataset,image}": "mean colour that takes the place of occluded pixels (default: "
    "dataset)",
    "--json": "every digit, for machines",
  }
  add(numbers, arguments)


def _visualize(args: argparse.Namespace) -> None:
  from lip_jax.visualize import compare, figures

  measuring = args.shift_consistency or args.deletion
  if args.json and not measuring:
    raise UsageError("--json prints numbers; add --shift-consistency or --deletion")
  if measuring and (args.layers or args.label or args.location):
    raise UsageError("--layers, --class and --location are for figures; leave them or the rest out")
  out = args.out or (None if measuring else _OUT)
  if out is not None:
    figures.check_format(out)
  files = [path for path in args.paths if _is_image(path)]
  folders = [path for path in args.paths if not _is_image(path)]
  if not folders:
    raise UsageError("no network is given; name its folder before the images")
  if files and args.data:
    raise UsageError("image files and --data are given; leave one of them out")
  if args.layers and len(folders) > 1:
    raise UsageError(f"--layers is for one network, got {len(folders)}")
  with working("loading"):
    networks = compare.load_networks(folders, args.names)

    def images(default_count: int, margin: int = 0) -> "Images":
      if files:
        return compare.read_images(networks, files, margin, upright=not args.as_stored)
      data = compare.Data(args.data, args.split, args.data_dir) if args.data else None
      return compare.first_images(
        networks, data, args.count or default_count, margin, upright=not args.as_stored
      )

    if measuring:
      _measure(args, networks, images, out)
    elif args.layers:
      pixels, normalize = images(8).pixels, networks[0].normalize
      if not figures.draw_importance(networks[0].model, pixels, normalize, out or _OUT):
        raise UsageError(
          f"{networks[0].path} has no LIP layer; leave --layers out for the other maps"
        )
    else:
      _draw(args, networks, images(2), out or _OUT)
  if out is not None and not args.json:
    say(f"figure: {out}")


def _draw(args: argparse.Namespace, networks: "list[Network]", images: "Images", out: str) -> None:
  from lip_jax.visualize import compare, figures

  columns = []
  for number, network in enumerate(networks, start=1):
    progress(f"{number}/{len(networks)} {network.name}")
    label = None if args.label is None else compare.find_class(network, args.label)
    columns.append(compare.column(network, images.pixels, label=label, locations=args.location))
  figures.save_figure(figures.comparison_figure(images.pixels, columns, images.titles), out)


def _measure(
  args: argparse.Namespace,
  networks: "list[Network]",
  images: "Callable[..., Images]",
  out: str | None,
) -> None:
  from lip_jax.visualize import figures

  report: dict[str, Any] = {"networks": [{"name": n.name, "path": n.path} for n in networks]}
  plots = []
  for wanted, measure in ((args.shift_consistency, _shifts), (args.deletion, _deletion)):
    if wanted:
      text, plot = measure(args, networks, images, report)
      plots.append(plot)
      progress("")
      if not args.json:
        say(text)
  if args.json:
    print(json.dumps(report, indent=2))
  if out is not None:
    figures.save_figure(figures.curves_figure(plots), out)


def _shifts(
  args: argparse.Namespace,
  networks: "list[Network]",
  images: "Callable[..., Images]",
  report: dict[str, Any],
) -> "tuple[str, Plot]":
  """Measures, adds to the report, and returns what to print and to draw."""
  from lip_jax.visualize import compare
  from lip_jax.visualize.figures import Curve, Plot

  most, room = compare.SHIFTS[-1], compare.room(networks)
  border: Any = args.border or ("crop" if room >= most else "reflect")
  report |= {"border": border, "directions": 8}
  if border == "crop" and room < most:
    raise UsageError(
      f"--border=crop needs {most} pixels around the central crop, and there are {room}; take "
      "reflect, zero or wrap"
    )
  chosen = images(200, most if border == "crop" else 0)
  lines, curves = [], []
  for network, entry in zip(networks, report["networks"], strict=True):
    found = compare.shift_consistency(network, chosen, border, _watch)
    mean = sum(found.values()) / len(found)
    entry["images"] = len(chosen.pixels)
    entry["shift_consistency"] = found
    entry["mean_shift_consistency"] = mean
    percent = [100 * value for value in found.values()]
    lines.append((network.name, *(f"{value:.1f}" for value in (*percent, 100 * mean))))
    curves.append(Curve(network.name, "", list(found), percent))
  heading = ("network", *(f"{shift} px" for shift in compare.SHIFTS), "mean")
  text = (
    f"{table([heading, *lines], right=range(1, len(heading)))}\n\n"
    f"Predictions that survive a shift, in percent: {len(chosen.pixels)} images in 8 directions, "
    f"border: {border}.\n"
  )
  return text, Plot("Shift consistency", "shift (pixels)", "same prediction (%)", curves)


def _deletion(
  args: argparse.Namespace,
  networks: "list[Network]",
  images: "Callable[..., Images]",
  report: dict[str, Any],
) -> "tuple[str, Plot]":
  """Measures, adds to the report, and returns what to print and to draw."""
  from lip_jax.visualize import compare
  from lip_jax.visualize.figures import Curve, Plot

  chosen = images(200)
  report["fill"] = args.fill
  parts = (0, 0.1, 0.2, 0.3, 0.5, 0.8, 1)
  lines, curves = [], []
  for network, entry in zip(networks, report["networks"], strict=True):
    scores, found = compare.deletion_curves(
      network, chosen, scores=args.by, fill=args.fill, watch=_watch
    )
    entry["images"] = len(chosen.pixels)
    entry["labels"] = "predicted" if chosen.labels is None else "of the data set"
    entry["deletion"] = {"pixels_by": scores}
    for order, curve in found.items():
      cells = [f"{100 * curve.accuracy[round(20 * part)]:.1f}" for part in parts]
      lines.append((network.name, scores, order, *cells, f"{curve.area:.3f}"))
      curves.append(Curve(network.name, order, 100 * curve.fractions, 100 * curve.accuracy))
      areas = {"area": curve.area, "accuracy_area": curve.accuracy_area}
      arrays = {name: array.tolist() for name, array in curve._asdict().items()}
      entry["deletion"][order] = arrays | areas
  against = "their predictions for the whole images" if chosen.labels is None else "the labels"
  heading = ("network", "pixels by", "order", *(f"{part:.0%}" for part in parts), "area")
  text = (
    f"{table([heading, *lines], right=range(3, len(heading)))}\n\n"
    f"Accuracy against {against}, in percent, by the occluded part of the pixels; area under the "
    f"label's probability. {len(chosen.pixels)} images; occluded pixels take the {args.fill}'s "
    "mean colour.\n"
  )
  return text, Plot("Deletion", "occluded pixels (%)", "top-1 accuracy (%)", curves)


def _watch(predict: Any, what: str, total: int) -> Any:
  """`predict` that shows how many of `total` images are done."""
  done = 0

  def counted(images: Any) -> Any:
    nonlocal done
    progress(f"{what} {done}/{total} images")
    logits = predict(images)
    done += len(images)
    return logits

  return counted


def _is_image(path: str) -> bool:
  return Path(path).suffix.lower() in _IMAGE_SUFFIXES and not Path(path).is_dir()


def _location(text: str) -> tuple[int, int]:
  row, comma, column = text.partition(",")
  if not (comma and row.strip().isdecimal() and column.strip().isdecimal()):
    raise argparse.ArgumentTypeError(f"{text!r} is not of the form ROW,COLUMN")
  return int(row), int(column)
