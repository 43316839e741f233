"""`lip-jax convert`: files of PyTorch weights to exported folders, and back."""

import argparse
from typing import Any

from lip_jax.cli.arguments import option, positive
from lip_jax.errors import UsageError


def add_commands(commands: Any) -> None:
  """Adds `convert` to the subparsers `commands`."""
  text = "convert a file of PyTorch weights to an exported folder, or such a folder to a file"
  convert = commands.add_parser("convert", help=text, description=text)
  convert.add_argument("source", metavar="SOURCE", help="file of weights, or exported folder")
  convert.add_argument("out", metavar="OUT", help="folder, or file, to write")
  convert.add_argument("--model", metavar="NAME", help="for a file: the model that it is of")
  convert.add_argument(
    "--num-classes",
    type=positive,
    metavar="N",
    help="for a file: classes (default: as in the file)",
  )
  convert.add_argument(
    "--option",
    action="append",
    default=[],
    type=option,
    metavar="KEY=VALUE",
    help="for a file: an option of the model, such as logit_width=64; may be repeated",
  )
  convert.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
  convert.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
  from lip_jax.export.torch_convert import convert_weights

  options = dict(args.option)
  flags = {"model": "--model", "num_classes": "--num-classes", "overwrite": "--overwrite"}
  for name in options.keys() & flags.keys():
    raise UsageError(f"{name} is no option of a model; give it as {flags[name]}")
  given = {key: getattr(args, key) for key in flags}
  print(convert_weights(args.source, args.out, **given, **options))
