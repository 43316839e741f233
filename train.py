"""Trains or evaluates a network: flags and dispatch only.

  python train.py --config=configs/cluttered_digits.py --workdir=runs/cluttered_digits
  python train.py --mode=eval --workdir=runs/cluttered_digits

Any value of the configuration can be set: --config.optim.base_lr=0.2 --config.model.pool=average

On several hosts start the same command on each. On Cloud TPU, under SLURM, Open MPI and Kubernetes
the processes find each other; elsewhere say where the first one is and which one this is:

  --coordinator_address=HOST:PORT --num_processes=4 --process_id=0

Exit status:
  0    finished; or stopped by SIGTERM or SIGINT, with the state saved: the same command goes on
  1    an error, here or in another process, that starting again does not mend by itself
  2    flags that cannot be read
  75   another process was lost, or did not come in time: the same command, on all hosts, goes on
  130  interrupted before there was anything to save
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from absl import app, flags
from ml_collections.config_flags import config_flags

if TYPE_CHECKING:
  from lip_jax.distributed import startup

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration file, for example configs/cluttered_digits.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run: checkpoints, metrics, TensorBoard files, pictures."
)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "eval"],
  "train: train, or go on where the run in --workdir stopped. eval: evaluate a checkpoint of the "
  "run in --workdir on its validation split; --config is then taken from there.",
)
_START_FROM = flags.DEFINE_string(
  "start_from",
  None,
  "Checkpoint of another run, RUN/checkpoints/STEP, that a new run goes on from.",
)
_WEIGHTS = flags.DEFINE_string(
  "weights",
  None,
  "Network that a new run starts from, to fine-tune it: a run, an exported folder or "
  "hf://ORGANISATION/NAME. Its classifier is replaced if the data have other classes.",
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "For --mode=eval: TFDS directory, if it is not the one that was trained from."
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "best", "For --mode=eval: best, latest or a step number."
)
_DISTRIBUTED = flags.DEFINE_enum(
  "distributed",
  "auto",
  ["auto", "on", "off"],
  "auto: one process of several if a cluster (Cloud TPU, SLURM, Open MPI, Kubernetes) or the flags "
  "below say so. on: an error if they do not. off: this process is on its own, whatever they say.",
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address",
  None,
  "HOST:PORT of process 0, the same for all processes: any free port that they can reach.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run, on all hosts.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
_LOCAL_DEVICE_IDS = flags.DEFINE_list(
  "local_device_ids",
  None,
  "GPUs of this host that this process uses, such as 0,1; default: all, or one each where a "
  "launcher has started several processes on the host.",
)
_CONNECT_TIMEOUT = flags.DEFINE_float(
  "connect_timeout", 300, "Seconds that the processes wait for each other at the start."
)
_LIVENESS_TIMEOUT = flags.DEFINE_float(
  "liveness_timeout",
  45,
  "Seconds without a sign of life (killed, frozen, unreachable) after which a process counts as "
  "lost and the others end with status 75.",
)


def main(argv: Sequence[str]) -> None:
  """Runs the chosen mode; errors that the user can mend are one line."""
  # Imported here, so that --help and misspelt flags are answered at once.
  import jax

  from lip_jax.distributed import startup
  from lip_jax.distributed.service_log import EXIT_ERROR
  from lip_jax.errors import UsageError
  from lip_jax.training.metrics import log_to_stdout
  from lip_jax.training.trainer import NonFiniteLossError

  if len(argv) > 1:
    _fail(f"unexpected argument {argv[1]!r}; flags are written --name=value (see --help)")
  if not _WORKDIR.value:
    _fail("--workdir is missing; name the directory of the run, for example --workdir=runs/first")
  log_to_stdout()
  try:
    with startup.join(_hosts_options()):
      if jax.process_index() > 0:
        log_to_stdout(logging.WARNING)  # the rest is the same as process 0 says
      if _MODE.value == "eval":
        _evaluate(_WORKDIR.value)
      else:
        _train(_WORKDIR.value)
  except (UsageError, NonFiniteLossError) as error:
    _fail(str(error), status=EXIT_ERROR)


def _hosts_options() -> "startup.Options":
  from lip_jax.distributed import startup
  from lip_jax.errors import UsageError

  devices = _LOCAL_DEVICE_IDS.value
  if devices and not all(k.isdecimal() for k in devices):
    raise UsageError(f"--local_device_ids={','.join(devices)}: give numbers, such as 0,1")
  return startup.Options(
    distributed=_DISTRIBUTED.value,
    coordinator_address=_COORDINATOR_ADDRESS.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
    local_device_ids=[int(k) for k in devices] if devices else None,
    connect_timeout=_CONNECT_TIMEOUT.value,
    liveness_timeout=_LIVENESS_TIMEOUT.value,
  )


def _train(workdir: str) -> None:
  import jax

  from lip_jax.errors import UsageError
  from lip_jax.training import config, trainer

  if _CONFIG.value is None:
    raise UsageError("--config is missing; for example --config=configs/cluttered_digits.py")
  run = config.from_dict(_CONFIG.value.to_dict())
  result = trainer.train(run, workdir, start_from=_START_FROM.value, weights=_WEIGHTS.value)
  if not result.finished:
    # On every process: what keeps the run running on a host has only this to go by.
    place = f"from {result.checkpoint}" if result.checkpoint else "from the start"
    print(f"stopped at step {result.step}; the same command goes on {place}")
    return
  if jax.process_index() > 0:
    return
  _report(result.metrics)
  print(f"checkpoint: {result.checkpoint}")
  print(f"TensorBoard: tensorboard --logdir {workdir}/tensorboard")
  if result.importance_picture:
    print(f"importance picture: {result.importance_picture}")


def _evaluate(workdir: str) -> None:
  import jax

  from lip_jax.classification import evaluation
  from lip_jax.training import config

  overridden = _CONFIG.value
  run = config.from_dict(overridden.to_dict()) if overridden else config.load(workdir)
  if _DATA_DIR.value:
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, data_dir=_DATA_DIR.value))
  step, metrics = evaluation.evaluate_checkpoint(run, workdir, _CHECKPOINT.value)
  if jax.process_index() > 0:
    return
  _report(metrics)
  print(f"checkpoint: step {step} ({_CHECKPOINT.value})")


def _report(metrics: dict[str, float]) -> None:
  print(f"top-1: {100 * metrics['top1']:.2f}%")
  print(f"top-5: {100 * metrics['top5']:.2f}%")
  print(f"loss: {metrics['loss']:.4f} over {metrics['count']} images")


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """Absl's flag parser, with one-line errors for a configuration that cannot be read or set."""
  try:
    remaining = flags.FLAGS(list(argv))
    if _CONFIG.value is not None:
      _CONFIG.value.to_dict()  # a file that could not be read raises only when it is used
    return remaining
  except flags.Error as error:
    reason = str(error).strip().splitlines()[-1]
    _fail(f"{reason.removeprefix('lip_jax.errors.UsageError: ')} (see --help)")
  except Exception as error:  # a configuration file is code, which can raise anything
    _fail(_config_error(argv, error))


def _config_error(argv: Sequence[str], error: Exception) -> str:
  """What is wrong: a key that the configuration does not have, with those it has, or its file."""
  from lip_jax.cli import configuration
  from lip_jax.errors import UsageError

  files = [a.partition("=")[2] for a in argv if a.startswith("--config=")]
  if not files:
    return "write --config=FILE, before any --config.KEY=VALUE"
  path = files[-1].split(":", 1)[0]
  if not Path(path).is_file():
    return f"there is no configuration file {path!r}; see configs/"
  try:
    config = config_flags.ConfigFileFlagParser("config").parse(files[-1])
  except Exception as cause:
    reason = str(cause).strip().splitlines()[-1]
    return f"cannot read the configuration {files[-1]!r}: {type(cause).__name__}: {reason}"
  for argument in argv:
    if not argument.startswith("--config."):
      continue
    flag = argument.split("=", 1)[0]
    try:
      configuration.check_key(config, flag.removeprefix("--config."))
    except UsageError as wrong:
      return f"{flag}: {wrong}"
  return f"cannot read the configuration {files[-1]!r}: {str(error).strip().splitlines()[-1]}"


def _fail(message: str, status: int = 2) -> NoReturn:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(status)


if __name__ == "__main__":
  try:
    app.run(main, flags_parser=_parse_flags)
  except KeyboardInterrupt:
    _fail("interrupted", status=130)
