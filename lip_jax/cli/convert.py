"""`lip-jax convert`: files of PyTorch weights to exported folders, and back."""

import argparse
from typing import Any

from lip_jax.cli.arguments import add, add_command, option, select
from lip_jax.cli.output import say
from lip_jax.errors import UsageError


def add_commands(commands: Any) -> None:
  """Adds `convert` to the subparsers `commands`."""
  text = "convert a file of PyTorch weights to an exported folder, or such a folder to a file"
  convert = add_command(commands, "convert", _convert, text)
  arguments = {
    "source SOURCE": "file of weights, or exported folder",
    "out OUT": "folder, or file, to write",
    "--model NAME": "for a file: the model that it is of",
    "--num-classes N": "for a file: classes (default: as in the file)",
  }
  add(convert, arguments)
  text = "for a file: an option of the model, such as logit_width=64; may be repeated"
  add(convert, {"--option KEY=VALUE": text}, action="append", default=[], type=option)
  add(convert, {"--overwrite": "replace OUT if it exists"})


def _convert(args: argparse.Namespace) -> None:
  from lip_jax.export.torch_convert import convert_weights

  options = dict(args.option)
  flags = {"model": "--model", "num_classes": "--num-classes", "overwrite": "--overwrite"}
  for name in options.keys() & flags.keys():
    raise UsageError(f"{name} is no option of a model; give it as {flags[name]}")
  say(convert_weights(args.source, args.out, **select(args, *flags), **options))
