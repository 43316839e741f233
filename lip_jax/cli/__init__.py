"""The `lip-jax` command: networks and what they do, the paper's tables, data sets, machines."""

import argparse
import os
import re
import sys
from collections.abc import Sequence

from lip_jax import __version__
from lip_jax.cli import compile, convert, data, doctor, export, inference, tables, visualize
from lip_jax.errors import UsageError

# Each adds its subcommands, in the order of --help. They import what they need when they run, so
# that --help and mistakes are answered at once.
_COMMANDS = (inference, visualize, tables, convert, export, data, doctor, compile)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one subcommand.

  Args:
    argv: arguments behind the command's name; None: those of the process.

  Returns:
    Exit status: 0; 1 after an error of the user's, which is printed in one line, or a fault that
    was found; or 130 after Ctrl-C. Arguments that cannot be parsed end the process with 2.
  """
  parser = _parser()
  argv = sys.argv[1:] if argv is None else argv
  # What configurations are changed by is written as train.py has it, too.
  args = parser.parse_args([re.sub(r"^--config\.", "--set=", arg) for arg in argv])
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
  for module in _COMMANDS:
    module.add_commands(commands)
  return parser
