"""`lip-jax train`, and `python train.py`: trains a network, or goes on where that was stopped."""

import argparse
from typing import Any

from lip_jax.cli import configuration, distributed
from lip_jax.cli.arguments import add, add_command
from lip_jax.cli.output import say
from lip_jax.errors import UsageError

_EPILOG = """
Any value of the configuration can be set: --config.optim.base_lr=0.2 --config.model.pool=average

exit status:
  0    finished; or stopped by SIGTERM or SIGINT, with the state saved: the same command goes on
  1    an error, here or in another process, that starting again does not mend by itself
  2    flags that cannot be read
  75   another process was lost, or did not come in time: the same command, on all hosts, goes on
  130  interrupted before there was anything to save
"""


def add_commands(commands: Any) -> None:
  """Adds `train` and `config` to the subparsers `commands`."""
  text = "train a network, or go on where the run in --workdir stopped"
  parser = add_command(commands, "train", _train, text, epilog=_EPILOG)
  add(parser, {"--config FILE": "configuration, for example configs/cluttered_digits.py"})
  configuration.add_changes(parser)
  arguments = {
    "--workdir DIR": "of the run: checkpoints, metrics, TensorBoard files, pictures; or "
    "gs://BUCKET/RUN",
    "--start_from RUN/checkpoints/STEP": "checkpoint of another run, that a new run goes on from",
    "--weights PATH": "network that a new run starts from, to fine-tune it: a run, an exported "
    "folder or hf://ORGANISATION/NAME; its classifier is replaced if the data have other classes",
  }
  add(parser, arguments)
  distributed.add_flags(parser)
  configuration.add_config_command(commands)


def _train(args: argparse.Namespace) -> int:
  if not args.workdir:
    raise UsageError(
      "--workdir is missing; name the directory of the run, for example --workdir=runs/first"
    )
  if not args.config:
    raise UsageError("--config is missing; for example --config=configs/cluttered_digits.py")
  config = configuration.load(args.config, args.set)
  # Imported here, so that --help and mistakes are answered at once.
  with distributed.joined(args) as first:
    from lip_jax.training import trainer

    result = trainer.train(config, args.workdir, start_from=args.start_from, weights=args.weights)
    if not result.finished:
      # On every process: what keeps the run running on a host has only this to go by.
      place = f"from {result.checkpoint}" if result.checkpoint else "from the start"
      say(f"stopped at step {result.step}; the same command goes on {place}")
    elif first:
      say("\n".join(result.summary))
      say(f"checkpoint: {result.checkpoint}")
      say(f"TensorBoard: tensorboard --logdir {args.workdir}/tensorboard")
      for name, path in result.pictures.items():
        say(f"{name} picture: {path}")
  return 0
