"""`lip-jax doctor`: what this machine lacks for a training, and what to do."""

import argparse
import dataclasses
import json
from typing import Any

from lip_jax.cli import distributed
from lip_jax.cli.arguments import add, add_command, select
from lip_jax.cli.output import progress
from lip_jax.errors import printable


def add_commands(commands: Any) -> None:
  """Adds `doctor` to the subparsers `commands`."""
  text = (
    "check this machine for training, one verdict per line; exit status 1 if there is a problem"
  )
  more = (
    ". Without arguments: versions, devices, memory and the data directory. With --config it also "
    "measures whether the input keeps up with the training steps."
  )
  doctor = add_command(commands, "doctor", _doctor, text, more)
  arguments = {
    "--workdir DIR": "of the run to be, or gs://BUCKET/DIR",
    "--data-dir DIR": "of the data sets (default: the config's, or TFDS's)",
    "--dataset NAME": "to look for (default: the config's)",
    "--config FILE": "of the run to be, such as configs/imagenet.py:lip_resnet50 (default: that "
    "of the run in --workdir)",
    "--no-bench": "measure no speed",
    "--json": "for machines",
  }
  add(doctor, arguments)
  distributed.add_flags(doctor, connect_timeout=60)


def _doctor(args: argparse.Namespace) -> int:
  from lip_jax.cli import configuration
  from lip_jax.tools import doctor

  subject = doctor.Subject(
    **select(args, "workdir", "data_dir", "dataset"),
    config=configuration.load(args.config) if args.config else None,
    processes=distributed.options(args),
    bench=not args.no_bench,
  )
  findings = []
  for finding in doctor.examine(subject, progress):
    findings.append(finding)
    if not args.json:
      print(printable(str(finding)), flush=True)
  problems = sum(finding.status == "problem" for finding in findings)
  if args.json:
    values = [dataclasses.asdict(finding) for finding in findings]
    print(json.dumps({"ok": not problems, "findings": values}, indent=2))
  else:
    print(f"{problems} problem(s)" if problems else "no problem")
  return 1 if problems else 0
