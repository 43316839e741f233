"""`lip-jax evaluate`: what a network is worth; and how commands are told which network."""

import argparse
import json
from pathlib import Path
from typing import Any

from lip_jax.cli import distributed
from lip_jax.cli.arguments import DATA_DIR, add, add_command, option, positive, select
from lip_jax.cli.output import progress, say, working
from lip_jax.errors import UsageError

_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors", ".npz")
_OF_DETECTORS = (
  *("flip", "scales", "annotations", "save_detections", "save_annotations"),
  *("submission", "overwrite", "areas", "curves"),
)
PATH = {
  "path PATH": "training run, one of its checkpoints RUN/checkpoints/STEP, exported folder, "
  "hf://ORGANISATION/NAME[@REVISION], or a file of PyTorch weights with --model"
}


def network_arguments() -> argparse.ArgumentParser:
  """Parent of the commands that take a network, as `load` does; they add `PATH`."""
  network = argparse.ArgumentParser(add_help=False)
  add(network, {"--model NAME": "for a file of weights: of which model"})
  text = "for a file of weights: an option of the model; may be repeated"
  add(network, {"--option KEY=VALUE": text}, action="append", default=[], type=option)
  arguments = {
    "--dtype {float32,bfloat16}": "of the computation (default: a training run's own, else "
    "float32)",
  }
  add(network, arguments)
  return network


def add_commands(commands: Any) -> None:
  """Adds `evaluate` to the subparsers `commands`."""
  text = "evaluate a network over all images of a split: top-1, top-5 and loss; or COCO's metric"
  more = " of a detector's run, or of detections in a file. All are exact."
  evaluate = add_command(commands, "evaluate", _evaluate, text, more, None, [network_arguments()])
  add(evaluate, PATH, nargs="?")
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
  text = "of a detector: shorter sides of the images to look at, what is found in all is merged "
  text += "(default: the network's own)"
  evaluate.add_argument("--scales", type=positive, nargs="+", metavar="S", help=text)
  arguments = {
    "--flip": "of a detector: look at each image with left and right swapped, too, and merge",
    "--annotations J": "of a detector: file with the ground truth, such as "
    "instances_val2017.json (default: what the data set says)",
    "--save-detections D": "of a detector: write what it finds, as COCO's results",
    "--save-annotations J": "of a detector: write the ground truth, as COCO's annotations",
    "--submission OUT.zip": "of a detector: write what it finds for COCO's evaluation server, also "
    "of images without annotations, such as coco:image_info_test-dev2017.json@test2017",
    "--overwrite": "replace OUT.zip if it exists",
    "--detections D": "in place of PATH: what a detector found, to compare with --annotations",
    "--curves OUT.png": "of a detector: draw precision over recall",
    "--json": "every digit, for machines",
  }
  add(evaluate, arguments)
  text = "of a detector: up to which objects are small, and medium, in pixels^2 (default: what the "
  text += 'ground truth says in info["area_limits"], else 1024 and 9216, COCO\'s)'
  metavar = ("SMALL", "MEDIUM")
  evaluate.add_argument("--areas", type=float, nargs=2, metavar=metavar, help=text)
  distributed.add_flags(evaluate)


def load(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
  """The network of `path`, or of `--model` in a file of weights, and what is known of it."""
  from lip_jax.export import loading

  if Path(args.path).is_file() and args.path.endswith(_SUFFIXES):
    if args.model is None:
      from lip_jax import list_models
      from lip_jax.export.networks import DETECTORS

      raise UsageError(
        f"which network are the weights in {args.path} of? Give --model, one of "
        f"{', '.join([*list_models(), *DETECTORS])}"
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
    from lip_jax.visualize import figures
  except ImportError as error:
    raise UsageError(f"evaluation needs lip-jax[train] ({error}); install it") from error

  if (args.path is None) == (args.detections is None):
    raise UsageError("give a network to evaluate, or --detections with --annotations")
  if args.curves:
    figures.check_format(args.curves)  # before the work
  if args.path is None:
    return _evaluate_files(args)
  with distributed.joined(args, log=False) as first, working("loading the network"):
    model, config = load(args)
    progress("compiling")
    if config["task"] == "detection":
      results = _evaluate_detector(args, model, config)
    elif any(select(args, *_OF_DETECTORS).values()):
      raise UsageError(f"{args.path} is no detector; leave out --annotations and such")
    else:
      given = select(args, "data_dir", "split", "batch_size", "crops")
      results = evaluate_loaded(model, config, dataset=args.data, **given)
  if not first:
    return
  if args.submission and not args.json:
    say(f"{args.submission} is for COCO's evaluation server")
  if config["task"] == "detection":
    return _print_scores(results, as_json=args.json)
  if args.json:
    values = {key: config[key] for key in ("model", "source")}
    print(json.dumps({**results, **values}, indent=2))
    return
  say(f"top-1: {100 * results['top1']:.2f}%")
  say(f"top-5: {100 * results['top5']:.2f}%")
  say(f"loss: {results['loss']:.4f}")
  say(f"{results['count']} images of {results['data']}, {results['images_per_second']:.1f}/s")
  say(f"network: {config['model']['name']}, {_named(config['source'])}")


def _evaluate_files(args: argparse.Namespace) -> None:
  from lip_jax.detection import run_evaluation

  if args.annotations is None:
    raise UsageError(f"--detections {args.detections} needs --annotations, the ground truth")
  given = select(args, "areas", "curves")
  results = run_evaluation.evaluate_files(args.detections, args.annotations, **given)
  _print_scores(results, as_json=args.json)


def _evaluate_detector(
  args: argparse.Namespace, model: Any, config: dict[str, Any]
) -> dict[str, Any]:
  from lip_jax.detection import run_evaluation

  if args.crops:
    raise UsageError(f"{args.path} is a detector; leave out --crops")
  given = select(args, "data_dir", "split", "batch_size", *_OF_DETECTORS)
  results = run_evaluation.evaluate_loaded(model, config, dataset=args.data, **given)
  return {**results, "model": config["model"], "source": config["source"]}


def _print_scores(results: dict[str, Any], *, as_json: bool) -> None:
  if as_json:
    print(json.dumps(results, indent=2))
    return
  from lip_jax.detection.coco_metric import NAMES

  if "AP" not in results:
    say(f"{results['count']} images of {results['data']}: there are no annotations to compare with")
    return
  for name in NAMES:
    say(f"{name}: {100 * results[name]:.1f}" if results[name] >= 0 else f"{name}: no object")
  small, medium = results["area_limits"]
  say(f"small: up to {small:g} pixels^2, medium: up to {medium:g}")
  say(f"{results['count']} images of {results['data']}")
  say(f"ground truth: {results['ground_truth']}; by {results['library']}")


def _named(source: dict[str, Any]) -> str:
  text = f"{source['kind']} {source['path']}"
  text += "" if source["revision"] is None else f" at {source['revision']}"
  return text if source["step"] is None else f"{text}, step {source['step']}"
