"""`lip-jax evaluate` and `lip-jax predict`: what a network is worth, and what it sees."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lip_jax.cli import distributed
from lip_jax.cli.arguments import AS_STORED, DATA_DIR, add, add_command, option, select
from lip_jax.cli.output import progress, say, table, working
from lip_jax.errors import UsageError, printable

_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors", ".npz")
_PATH = {
  "path PATH": "training run, one of its checkpoints RUN/checkpoints/STEP, exported folder, "
  "hf://ORGANISATION/NAME[@REVISION], or a file of PyTorch weights with --model"
}
_DRAWN = 16  # images in a picture of importance maps, at most


def add_commands(commands: Any) -> None:
  """Adds `evaluate` and `predict` to the subparsers `commands`."""
  network = argparse.ArgumentParser(add_help=False)
  add(network, {"--model NAME": "for a file of weights: of which model"})
  text = "for a file of weights: an option of the model; may be repeated"
  add(network, {"--option KEY=VALUE": text}, action="append", default=[], type=option)
  arguments = {
    "--dtype {float32,bfloat16}": "of the computation (default: a training run's own, else "
    "float32)",
    "--json": "every digit, for machines",
  }
  add(network, arguments)

  text = "evaluate a network over all images of a split: top-1, top-5 and loss; or COCO's metric"
  more = " of a detector's run, or of detections in a file. All are exact."
  evaluate = add_command(commands, "evaluate", _evaluate, text, more, parents=[network])
  add(evaluate, _PATH, nargs="?")
  arguments = {
    "--data DATASET": "TFDS name such as imagenet2012, or folder:DIR (default: that of the "
    "training run)",
    **DATA_DIR,
    "--checkpoint WHICH": "of a training run: best, latest or a step number (default: best)",
    "--split SPLIT": "(default: validation, or that of the training run)",
    "--batch-size N": "images at once on all devices; results do not depend on it (default: 128)",
  }
  add(evaluate, arguments)
  text = "of which logits are averaged: centre, with corners, with mirrored (default: 1)"
  evaluate.add_argument("--crops", type=int, choices=(1, 5, 10), help=text)
  arguments = {
    "--annotations J": "of a detector: file with the ground truth, such as "
    "instances_val2017.json (default: what the data set says)",
    "--save-detections D": "of a detector: write what it finds, as COCO's results",
    "--detections D": "in place of PATH: what a detector found, to compare with --annotations",
  }
  add(evaluate, arguments)
  distributed.add_flags(evaluate)

  text = "print the most probable classes of images; exit status 1 if any cannot be read"
  predict = add_command(commands, "predict", _predict, text, parents=[network])
  add(predict, _PATH)
  arguments = {
    "images IMAGE...": "JPEG, PNG or other file",
    "--top N": "(default: 5)",
    "--importance OUT.png": "draw what each LIP layer finds important in the images, of the "
    f"first {_DRAWN}",
    **AS_STORED,
  }
  add(predict, arguments)
  predict.set_defaults(top=5)


def _load(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
  from lip_jax.export import loading

  if Path(args.path).is_file() and args.path.endswith(_SUFFIXES):
    if args.model is None:
      from lip_jax import list_models

      raise UsageError(
        f"which network are the weights in {args.path} of? Give --model, one of "
        f"{', '.join(list_models())}"
      )
    if getattr(args, "checkpoint", None):
      raise UsageError(f"{args.path} is a file of weights; leave out --checkpoint")
    return loading.load_file(args.path, args.model, dict(args.option), dtype=args.dtype)
  if args.model is not None or args.option:
    raise UsageError(
      f"{args.path} says itself what network it is, if it is there; leave out --model and "
      f"--option, which are for files of weights ({', '.join(_SUFFIXES)})"
    )
  return loading.load(args.path, dtype=args.dtype, checkpoint=getattr(args, "checkpoint", None))


def _evaluate(args: argparse.Namespace) -> None:
  try:
    from lip_jax.classification.evaluation import evaluate_loaded
    from lip_jax.export import loading
  except ImportError as error:
    raise UsageError(f"evaluation needs lip-jax[train] ({error}); install it") from error

  if (args.path is None) == (args.detections is None):
    raise UsageError("give a network to evaluate, or --detections with --annotations")
  if args.path is None or loading.task_of(args.path) == "detection":
    return _evaluate_detector(args)
  if args.annotations or args.save_detections:
    raise UsageError(f"{args.path} is no detector's run; leave out --annotations and such")
  given = select(args, "data_dir", "split", "batch_size", "crops")
  with distributed.joined(args, log=False) as first, working("loading the network"):
    model, config = _load(args)
    progress("compiling")
    results = evaluate_loaded(model, config, dataset=args.data, **given)
  if not first:
    return
  if args.json:
    values = {key: config[key] for key in ("model", "source")}
    print(json.dumps({**results, **values}, indent=2))
    return
  say(f"top-1: {100 * results['top1']:.2f}%")
  say(f"top-5: {100 * results['top5']:.2f}%")
  say(f"loss: {results['loss']:.4f}")
  say(f"{results['count']} images of {results['data']}, {results['images_per_second']:.1f}/s")
  say(f"network: {config['model']['name']}, {_named(config['source'])}")


def _evaluate_detector(args: argparse.Namespace) -> None:
  from lip_jax.detection import run_evaluation
  from lip_jax.export import folders

  if args.path is None:
    if args.annotations is None:
      raise UsageError(f"--detections {args.detections} needs --annotations, the ground truth")
    results = run_evaluation.evaluate_files(args.detections, args.annotations)
    return _print_scores(results, as_json=args.json)
  if args.data or args.crops or args.model:
    raise UsageError(f"{args.path} is a detector's run; leave out --data, --crops and --model")
  given = select(
    args, "checkpoint", "data_dir", "split", "batch_size", "annotations", "save_detections"
  )
  with distributed.joined(args, log=False) as first, working("loading the network"):
    run, step = folders.find_run(args.path) or (args.path, None)
    results = run_evaluation.evaluate_run(run, **{"checkpoint": step, **given})
  if first:
    _print_scores(results, as_json=args.json)


def _print_scores(results: dict[str, Any], *, as_json: bool) -> None:
  if as_json:
    print(json.dumps(results, indent=2))
    return
  from lip_jax.detection.coco_metric import NAMES

  for name in NAMES:
    say(f"{name}: {100 * results[name]:.1f}" if results[name] >= 0 else f"{name}: no object")
  say(f"{results['count']} images of {results['data']}")
  say(f"ground truth: {results['ground_truth']}; by {results['library']}")


def _named(source: dict[str, Any]) -> str:
  text = f"{source['kind']} {source['path']}"
  text += "" if source["revision"] is None else f" at {source['revision']}"
  return text if source["step"] is None else f"{text}, step {source['step']}"


def _predict(args: argparse.Namespace) -> int:
  import numpy as np

  from lip_jax.classification import prediction
  from lip_jax.visualize import figures

  if args.importance:
    figures.check_format(args.importance)  # before the work
  with working("loading the network"):
    model, config = _load(args)
    progress("computing")
    images = list(prediction.read(args.images, config, upright=not args.as_stored))
    readable = [image for image in images if image.pixels is not None]
    pixels = np.array([image.pixels for image in readable])
    predictions = prediction.predict(model, config, pixels, args.top) if readable else []
  found = iter(predictions)
  values: list[dict[str, Any]] = []
  for image in images:
    if image.error is not None:
      values.append({"image": image.path, "error": image.error})
      print(printable(f"error: cannot read {image.path}: {image.error}"), file=sys.stderr)
      continue
    best = next(found)
    values.append({"image": image.path, "classes": [one._asdict() for one in best]})
    if not args.json:
      say(image.path)
      print(table([(f"  {100 * one.probability:.2f}%", one.name) for one in best], right=(0,)))
  if args.json:
    print(json.dumps(values, indent=2))
  if args.importance and readable:
    _draw(model, config, pixels[:_DRAWN], args.importance)
  return 0 if len(readable) == len(images) else 1


def _draw(model: Any, config: dict[str, Any], pixels: Any, out: str) -> None:
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
