"""The `lip-jax` command: training, networks and what they do, the paper's tables, data sets."""

import argparse
import difflib
import gc
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from lip_jax import __version__
from lip_jax.cli import (
  compile,
  convert,
  data,
  doctor,
  export,
  inference,
  prediction,
  tables,
  train,
  visualize,
)
from lip_jax.errors import UsageError, log_to, printable

# Each adds its subcommands, in the order of --help. They import what they need when they run, so
# that --help and mistakes are answered at once.
_COMMANDS = (
  train,
  inference,
  prediction,
  visualize,
  tables,
  convert,
  export,
  data,
  doctor,
  compile,
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one subcommand; the process looks for garbage less often from then on.

  Args:
    argv: arguments behind the command's name; None: those of the process.

  Returns:
    Exit status: 0; 1 after an error of the user's, which is printed in one line, or a fault that
    was found; 75 where another process was lost; or 130 after Ctrl-C. Arguments that cannot be
    parsed end the process with 2.
  """
  # Tracing makes many objects that are not garbage; looking for it was an eighth of a start.
  gc.set_threshold(100_000)
  argv = sys.argv[1:] if argv is None else argv
  if isinstance(sys.stdout, io.TextIOWrapper):  # of any encoding, which may lack characters
    sys.stdout.reconfigure(errors="backslashreplace")
  args = _parse(argv)
  log_to(sys.stderr, "warning: %(message)s")
  try:
    status = args.run(args) or 0
    sys.stdout.flush()
    return status
  except BrokenPipeError:  # if it is stdout's, who reads has enough: lip-jax tables | head
    if argv[0] == "train":
      raise
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    return 0
  except UsageError as error:
    print(f"error: {printable(str(error))}", file=sys.stderr)
    return error.status
  except OSError as error:
    if error.filename is None:
      raise
    # Of files and folders of people; what belongs to the machine has no name.
    print(
      f"error: {printable(str(error.filename))}: {error.strerror}; see that it is there and that "
      "this user may use it",
      file=sys.stderr,
    )
    return 1
  except KeyboardInterrupt:
    print("error: interrupted", file=sys.stderr)
    return 130


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"error: {printable(message)} (see {self.prog} --help)\n")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = _Parser(prog="lip-jax", description=__doc__)
  parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
  commands = parser.add_subparsers(metavar="COMMAND", required=True)
  for module in _COMMANDS:
    module.add_commands(commands)
  for argument in argv:
    if re.fullmatch(r"--config\.[\w.]+", argument):
      parser.error(f"{argument} lacks its value: write {argument}=VALUE")
  args, unknown = parser.parse_known_args(
    [re.sub(r"^--config\.", "--set=", argument) for argument in argv]
  )
  if unknown:
    chosen = commands.choices[next(one for one in argv if one in commands.choices)]
    flags = re.findall(r"--[\w-]+", chosen.format_help())
    given = re.sub(r"^--set=", "--config.", unknown[0])
    near = difflib.get_close_matches(given.partition("=")[0], flags, 1)
    chosen.error(f"unexpected argument {given!r}" + (f"; did you mean {near[0]}?" if near else ""))
  return args
