"""`lip-jax predict`: what a network sees in images."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lip_jax.cli.arguments import AS_STORED, add, add_command
from lip_jax.cli.inference import PATH, load, network_arguments
from lip_jax.cli.output import progress, say, table, working
from lip_jax.errors import UsageError, printable

_PICTURES = (".png", ".svg", ".pdf")
_DRAWN = 16  # images in a picture, at most
_TOP, _THRESHOLD = 5, 0.5

Values = list[dict[str, Any]]  # of each image, for JSON


def add_commands(commands: Any) -> None:
  """Adds `predict` to the subparsers `commands`."""
  text = "print the most probable classes of images, or the boxes that a detector finds"
  more = "; exit status 1 if any cannot be read"
  predict = add_command(commands, "predict", _predict, text, more, None, [network_arguments()])
  add(predict, PATH)
  images = predict.add_argument(
    "images", metavar="IMAGE", nargs="+", help="JPEG, PNG or other file"
  )
  arguments = {
    "--top N": f"of a classifier: how many classes (default: {_TOP})",
    "--threshold SCORE": f"of a detector: least score of a box (default: {_THRESHOLD})",
    "--output OUT.png": f"draw it, of the first {_DRAWN} images",
    **AS_STORED,
  }
  add(predict, arguments)
  text = "draw what the LIP layers find important in the images, too, into this file or --output"
  given: dict[str, Any] = {"action": _File, "images": images, "nargs": "?"}
  predict.add_argument(
    "--importance", metavar="OUT.png", ends=_PICTURES, help=text, const="", **given
  )
  text = "every digit, for machines, into this file or printed"
  predict.add_argument("--json", metavar="OUT.json", ends=(".json",), help=text, const="", **given)


class _File(argparse.Action):
  """An option with or without a file to write: a file of another ending that is there is an image.

  So images may follow the option.
  """

  def __init__(self, *args: Any, images: argparse.Action, ends: Sequence[str], **settings: Any):
    super().__init__(*args, **settings)
    self._images, self._ends = images, tuple(ends)

  def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
    if values and not values.lower().endswith(self._ends) and Path(values).is_file():
      namespace.first_images = [*getattr(namespace, "first_images", ()), values]
      self._images.required = False
      values = self.const
    setattr(namespace, self.dest, values)


def _predict(args: argparse.Namespace) -> int:
  args.images = [*getattr(args, "first_images", ()), *(args.images or ())]
  outputs = [args.output, args.importance or None]
  if all(outputs):
    raise UsageError("--output and --importance name a file each; name one of them")
  picture = args.output or args.importance
  if args.importance is not None and not picture:
    raise UsageError("--importance needs a file to draw into; give --output, too")
  _check_outputs(args.images, picture, args.json)
  with working("loading the network"):
    model, config = load(args)
    run = _boxes if config["task"] == "detection" else _classes
    values = run(args, model, config, picture)
  if args.json == "":
    print(json.dumps(values, indent=2))
  elif args.json:
    Path(args.json).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
  return 1 if any("error" in one for one in values) else 0


def _check_outputs(images: Sequence[str], picture: str | None, text: str | None) -> None:
  """Raises UsageError, before the work, where nothing could be or should be written."""
  from lip_jax.visualize import figures

  if picture:
    figures.check_format(picture)
  if text and not text.lower().endswith(".json"):
    raise UsageError(f"cannot write {text}: its name must end in .json; give --json={text}.json")
  taken = {Path(image).resolve() for image in images}
  for path in (picture, text):
    if path and Path(path).resolve() in taken:
      raise UsageError(f"{path} is one of the images, and would be overwritten; take another name")


def _classes(
  args: argparse.Namespace, model: Any, config: dict[str, Any], picture: str | None
) -> Values:
  import numpy as np

  from lip_jax.classification import prediction

  if args.threshold is not None:
    raise UsageError(f"{args.path} is a classifier, which finds no boxes; leave out --threshold")
  if picture and args.importance is None:
    raise UsageError("of a classifier, importance is drawn; give --importance, too")
  progress("computing")
  images = list(prediction.read(args.images, config, upright=not args.as_stored))
  readable = [image for image in images if image.pixels is not None]
  pixels = np.array([image.pixels for image in readable])
  top = args.top or _TOP
  found = iter(prediction.predict(model, config, pixels, top) if readable else [])
  progress("")
  values: Values = []
  for image in images:
    if image.error is not None:
      values.append(_unreadable(image.path, image.error))
      continue
    best = next(found)
    values.append({"image": image.path, "classes": [one._asdict() for one in best]})
    if args.json is None:
      say(image.path)
      print(table([(f"  {100 * one.probability:.2f}%", one.name) for one in best], right=(0,)))
  if args.importance is not None and readable:
    _draw_importance(model, config, pixels[:_DRAWN], picture or "")
  return values


def _boxes(
  args: argparse.Namespace, model: Any, config: dict[str, Any], picture: str | None
) -> Values:
  from lip_jax.detection import prediction
  from lip_jax.visualize import Picture, boxes_figure, save_figure

  threshold = _THRESHOLD if args.threshold is None else args.threshold
  if not 0 <= threshold <= 1:
    raise UsageError(f"--threshold must be from 0 to 1, got {threshold}")
  if args.top is not None:
    raise UsageError(f"{args.path} is a detector, which gives boxes; leave out --top")
  if args.importance:
    raise UsageError(
      f"of a detector, --importance is drawn beside the boxes; write --output={args.importance} "
      "--importance"
    )
  names = config["class_names"] or [str(label) for label in range(config["num_classes"])]
  values: Values = []
  pictures: list[Picture] = []
  found = prediction.predict(
    model, config, args.images, threshold=threshold, upright=not args.as_stored
  )
  count = len(args.images)
  progress(f"compiling, image 1 of {count}")  # and again for each shape
  for number, one in enumerate(found, start=1):
    progress("")
    if one.boxes is None or one.pixels is None:
      values.append(_unreadable(one.path, one.error or ""))
    else:
      values.append({"image": one.path, "boxes": _listed(one.boxes, names, config)})
      if args.json is None:
        _print_boxes(one.path, values[-1]["boxes"])
      if picture and len(pictures) < _DRAWN:
        importance = None if args.importance is None else one.importance
        if args.importance is not None and importance is None:
          raise UsageError(
            f"{config['model']['backbone']} has no LIP layer, so there is no importance to draw; "
            "leave out --importance"
          )
        title = printable(Path(one.path).name)
        pictures.append(Picture(title, one.pixels, {"found": one.boxes}, importance))
    if number < count:
      progress(f"image {number + 1} of {count}")
  if pictures:
    save_figure(boxes_figure(pictures, names), picture or "")
    print(printable(f"boxes: {picture}"), file=sys.stderr)
  return values


def _listed(boxes: Any, names: Sequence[str], config: dict[str, Any]) -> Values:
  ids = config["category_ids"]
  return [
    {
      "box": [float(value) for value in box],  # x1, y1, x2, y2 in pixels of the image, upright
      "label": int(label),
      "name": names[int(label)],
      "category_id": None if ids is None else ids[int(label)],
      "score": float(score),
    }
    for box, label, score in zip(boxes.boxes, boxes.labels, boxes.scores, strict=True)
  ]


def _print_boxes(path: str, boxes: Values) -> None:
  say(path)
  if boxes:
    rows = [
      (f"  {100 * one['score']:.0f}%", one["name"], *(f"{value:.0f}" for value in one["box"]))
      for one in boxes
    ]
    print(table(rows, right=(0, 2, 3, 4, 5)))
  else:
    print("  nothing")


def _unreadable(path: str, error: str) -> dict[str, Any]:
  print(printable(f"error: cannot read {path}: {error}"), file=sys.stderr)
  return {"image": path, "error": error}


def _draw_importance(model: Any, config: dict[str, Any], pixels: Any, out: str) -> None:
  from lip_jax import visualize
  from lip_jax.classification import prediction

  try:
    drawn = visualize.draw_importance(
      model, pixels, lambda images: prediction.normalize(images, config), out
    )
  except ImportError as error:
    raise UsageError(f"pictures need lip-jax[train] ({error}); install it") from error
  if not drawn:
    raise UsageError(
      f"{config['model']['name']} has no LIP layer, so there is no importance to draw; leave out "
      "--importance"
    )
  print(f"importance maps: {out}", file=sys.stderr)
