"""`lip-jax doctor`: what this machine lacks for a training, and what to do."""

import argparse
import dataclasses
import json
from typing import Any

from lip_jax.cli.arguments import positive
from lip_jax.cli.output import progress


def add_commands(commands: Any) -> None:
  """Adds `doctor` to the subparsers `commands`."""
  text = (
    "check this machine for training, one verdict per line; exit status 1 if there is a problem"
  )
  doctor = commands.add_parser(
    "doctor",
    help=text,
    description=f"{text}. Without arguments: versions, devices, memory and the data directory. "
    "With --config it also measures whether the input keeps up with the training steps.",
  )
  doctor.add_argument("--workdir", metavar="DIR", help="of the run to be, or gs://BUCKET/DIR")
  doctor.add_argument(
    "--data-dir", metavar="DIR", help="of the data sets (default: the config's, or TFDS's)"
  )
  doctor.add_argument("--dataset", metavar="NAME", help="to look for (default: the config's)")
  doctor.add_argument(
    "--config",
    metavar="FILE",
    help="of the run to be, such as configs/imagenet.py:lip_resnet50 (default: that of the run in "
    "--workdir)",
  )
  doctor.add_argument("--no-bench", action="store_true", help="measure no speed")
  doctor.add_argument("--json", action="store_true", help="for machines")
  # Spelt like the flags of train.py, which take the same values.
  doctor.add_argument(
    "--distributed",
    choices=("auto", "on", "off"),
    default="auto",
    help="auto: look for the other processes if a cluster (Cloud TPU, SLURM, Open MPI, Kubernetes) "
    "or the flags below say that there are some; start the same command for each. off: this host "
    "alone (default: auto)",
  )
  doctor.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0")
  doctor.add_argument("--num_processes", type=positive, metavar="N", help="of the run")
  doctor.add_argument("--process_id", type=int, metavar="K", help="which one this is, from 0")
  doctor.add_argument(
    "--connect_timeout",
    type=float,
    default=60.0,
    metavar="SECONDS",
    help="to wait for the others (default: 60)",
  )
  doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
  from lip_jax.cli import configuration
  from lip_jax.distributed import startup
  from lip_jax.tools import doctor

  subject = doctor.Subject(
    workdir=args.workdir,
    data_dir=args.data_dir,
    dataset=args.dataset,
    config=configuration.load(args.config) if args.config else None,
    processes=startup.Options(
      distributed=args.distributed,
      coordinator_address=args.coordinator_address,
      num_processes=args.num_processes,
      process_id=args.process_id,
      connect_timeout=args.connect_timeout,
    ),
    bench=not args.no_bench,
  )
  findings = []
  for finding in doctor.examine(subject, progress):
    findings.append(finding)
    if not args.json:
      print(finding, flush=True)
  problems = sum(finding.status == "problem" for finding in findings)
  if args.json:
    values = [dataclasses.asdict(finding) for finding in findings]
    print(json.dumps({"ok": not problems, "findings": values}, indent=2))
  else:
    print(f"{problems} problem(s)" if problems else "no problem")
  return 1 if problems else 0
