"""What a machine lacks for training: one verdict for each check, and what to do.

No check can end the others: what one of them raises is its own verdict.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lip_jax.distributed import service_log, startup
from lip_jax.errors import UsageError
from lip_jax.tools import machine
from lip_jax.tools.machine import Status, Verdict
from lip_jax.training import workdir as workdir_lib
from lip_jax.training.config import Config

_GIB = 2**30
_LITTLE_SPACE = 5 * _GIB  # on a disk, where the size of a checkpoint is not known


@dataclasses.dataclass(frozen=True)
class Finding:
  """The verdict of one check."""

  check: str  # its name
  status: Status
  text: str  # what was found
  remedy: str = ""  # what to do about it

  def __str__(self) -> str:
    remedy = f"; {self.remedy}" if self.remedy else ""
    return f"{self.check:<9} {self.status:<8} {self.text}{remedy}"


@dataclasses.dataclass
class _Company:
  """Who takes part in the run, as far as it is known."""

  hosts: int = 1
  processes_here: int = 1  # on this host


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is examined.

  Attributes:
    workdir: of the run to be; None: not checked.
    data_dir: of the data sets; None: the config's, or else TFDS's default.
    dataset: None: the config's.
    config: of the run to be; None: that of the run in `workdir`, if there is one.
    processes: how this one finds the others of the run.
    bench_seconds: how long to measure each of the two, beside compilation.
    device_timeout: seconds until devices that do not answer count as hanging.
    bench: whether to measure input against training step, which takes about a minute; needs a
      configuration.
  """

  workdir: str | None = None
  data_dir: str | None = None
  dataset: str | None = None
  config: Config | None = None
  processes: startup.Options = dataclasses.field(default_factory=startup.Options)
  bench_seconds: float = 5.0
  device_timeout: float = 120.0
  bench: bool = True


def examine(
  subject: Subject, progress: Callable[[str], None] = lambda _: None
) -> Iterator[Finding]:
  """Runs all checks that apply; gives each verdict as soon as it is there, and never raises.

  Args:
    progress: is told what is being done, and finally "".
  """
  subject, faults = _with_config(subject)
  yield from faults
  company = _Company()
  checks: dict[str, Callable[[Subject], Iterator[Verdict]]] = {
    "versions": lambda _: machine.versions(),
    # First: the devices of several TPU hosts answer together.
    "hosts": lambda subject: _hosts(subject, company),
    "devices": lambda subject: machine.devices(subject.device_timeout),
    "memory": lambda _: machine.memory(),
    "workdir": _workdir,
    "data dir": _data_dir,
    "data set": _dataset,
    "speed": lambda subject: _speed(subject, company, progress),
  }
  for name, check in checks.items():
    progress(f"checking: {name}")
    try:
      for verdict in check(subject):
        progress("")
        yield Finding(name, *verdict)
        if name == "devices" and verdict[0] == "problem":
          # Nor would they be faster, or answer at all, where the steps are measured.
          checks["speed"] = lambda _: iter(())
    except UsageError as error:
      progress("")
      yield Finding(name, "problem", str(error))
    except (Exception, SystemExit) as error:  # whatever the libraries raise on a broken machine
      progress("")
      said = (str(error).strip() or "no message").splitlines()[0][:300]
      yield Finding(name, "problem", f"the check failed: {type(error).__name__}: {said}")
  progress("")


def _with_config(subject: Subject) -> tuple[Subject, list[Finding]]:
  """With the configuration of the run in the workdir, where none is given."""
  if subject.config is not None or subject.workdir is None:
    return subject, []
  from lip_jax.training import config as config_lib

  try:
    path = workdir_lib.absolute(subject.workdir) / "config.json"
    if workdir_lib.read_text(path) is None:
      return subject, []
    return dataclasses.replace(subject, config=config_lib.load(subject.workdir)), []
  except Exception as error:  # as for the checks
    return subject, [Finding("config", "problem", f"that of {subject.workdir}: {error}")]


# In a process of its own, which ends when others do not come. Prints the names in its last line.
_JOIN = """
import json, sys
from lip_jax.distributed import startup
from lip_jax.errors import UsageError
try:
  with startup.join(startup.Options(**json.loads(sys.argv[1]))) as names:
    print(json.dumps(names))
except UsageError as error:
  sys.exit(f"error: {error}")
"""


def _hosts(subject: Subject, company: _Company) -> Iterator[Verdict]:
  """Connects with the others as a run does."""
  place = startup.locate(subject.processes)
  if place is None:
    yield "ok", "one process; see --coordinator_address for several"
    return
  company.hosts = place.num_processes or 1
  options = json.dumps(dataclasses.asdict(subject.processes))
  joined = subprocess.run(
    [sys.executable, "-c", _JOIN, options],
    env={**os.environ, **service_log.ENVIRONMENT},
    capture_output=True,
    text=True,
    check=False,
  )
  if joined.returncode:
    said = (joined.stderr.strip() or f"exit status {joined.returncode}").splitlines()[-1]
    remedy = "--distributed=off checks this host alone"
    yield "problem", said.removeprefix("error: "), remedy
    return
  names = json.loads(joined.stdout.splitlines()[-1])
  company.hosts, company.processes_here = len(set(names)), names.count(socket.gethostname())
  where = f"process 0 at {place.coordinator_address or names[0]}"
  yield "ok", f"all {len(names)} processes have connected ({where}): {', '.join(names)}"


def _workdir(subject: Subject) -> Iterator[Verdict]:
  if subject.workdir is None:
    return
  path = workdir_lib.check_access(subject.workdir)
  free = workdir_lib.free_space(path)
  room = "in a bucket" if free is None else f"{free / _GIB:.1f} GiB free"
  need = 0
  if subject.config is not None:
    from lip_jax.tools import step_bench
    from lip_jax.training import config as config_lib
    from lip_jax.training.checkpoint.checkpoints import most_at_a_time

    if workdir_lib.read_text(path / "config.json") is not None:
      different = config_lib.differences(subject.config, config_lib.load(path))
      if different:
        yield (
          "problem",
          f"{path} holds a run with another configuration: {'; '.join(different)}",
          "take another --workdir",
        )
    one = step_bench.state_bytes(subject.config)
    need = one * most_at_a_time(subject.config.keep_checkpoints)
    room += f"; checkpoints take {need / _GIB:.2g} GiB ({one / _GIB:.2g} each)"
  if free is not None and free < max(need, 1):
    yield "problem", f"{path}: {room}", "make room, or take another --workdir"
  elif free is not None and free < max(2 * need, _LITTLE_SPACE if not need else 0):
    yield "warning", f"{path}: {room}", "this is little"
  else:
    yield "ok", f"{path}: written and read; {room}"


def _data_dir(subject: Subject) -> Iterator[Verdict]:
  from tensorflow_datasets.core import constants

  configured = subject.config.data.data_dir if subject.config else None
  directory = os.path.expanduser(subject.data_dir or configured or constants.DATA_DIR)
  if workdir_lib.in_bucket(directory):
    path = workdir_lib.absolute(directory)
    yield "ok", f"{path}: {len(list(path.iterdir()))} entries; in a bucket, which is read only here"
    return
  if not os.path.isdir(directory):
    if subject.data_dir or configured:
      raise UsageError(f"there is no directory {directory}; name the one that holds the data sets")
    yield "ok", f"{directory} does not exist yet; it is made with the first data set"
    return
  try:
    names = sorted(os.listdir(directory))
  except OSError as error:
    raise UsageError(
      f"cannot read {directory}: {error.strerror}; change its permissions"
    ) from error
  there = f"{directory}: {', '.join(names[:5]) or 'empty'}{', ...' if names[5:] else ''}"
  try:
    workdir_lib.check_access(directory)
  except UsageError as error:
    reason = str(error).partition(": ")[2].partition(";")[0]
    yield "warning", f"{there}; not writable ({reason})", "enough to train, not to prepare data"
    return
  free = workdir_lib.free_space(Path(directory)) or 0
  yield "ok", f"{there}; written and read, {free / _GIB:.1f} GiB free"


def _dataset(subject: Subject) -> Iterator[Verdict]:
  from lip_jax.data.prepare.cluttered_digits import ClutteredDigits
  from lip_jax.data.source import open_split

  data = subject.config.data if subject.config else None
  dataset = subject.dataset or (data.dataset if data else None)
  if dataset is None:
    return
  splits = (data.train_split, data.validation_split) if data else ("train", "validation")
  data_dir = subject.data_dir or (data.data_dir if data else None)
  try:
    sources = [open_split(dataset, split, data_dir, prepare=False) for split in splits]
  except UsageError:
    if dataset.partition("/")[0] != ClutteredDigits.name:
      raise
    yield "ok", f"{dataset} is not there yet; training makes it, in about half a minute"
    return
  counts = ", ".join(
    f"{len(one):,} images to {purpose}"
    for one, purpose in zip(sources, ("train", "validate"), strict=True)
  )
  yield "ok", f"{dataset}: {counts}, {sources[0].num_classes:,} classes"


def _speed(
  subject: Subject, company: _Company, progress: Callable[[str], None]
) -> Iterator[Verdict]:
  if not subject.bench or subject.config is None:
    return
  if company.processes_here > 1:
    yield (
      "warning",
      f"not measured, as {company.processes_here} processes of the run would measure on this host "
      "at once",
      "start the command with --distributed=off, once on a host",
    )
    return
  from lip_jax.data import bench
  from lip_jax.tools import step_bench

  data: Any = subject.config.data
  dataset = subject.dataset or data.dataset
  progress(f"reading {dataset}, {subject.bench_seconds:g} s")
  crops = {} if data.crop_scale is None else {"crop_scale": data.crop_scale}
  try:
    read = bench.bench(
      dataset,
      data_dir=subject.data_dir or data.data_dir,
      split=data.train_split,
      image_size=data.image_size,
      num_threads=data.num_threads,
      seconds=subject.bench_seconds,
      **crops,
    )
  except UsageError:  # the verdict on the data set has it
    yield "warning", "not measured, because the data set cannot be read"
    return
  input_rate = f"input {read.pipeline_rate:,.0f} images/s with {read.num_threads} thread(s)"
  step = step_bench.measure(
    subject.config, num_hosts=company.hosts, seconds=subject.bench_seconds, progress=progress
  )
  text = f"{input_rate}, training steps {step}"
  if read.pipeline_rate >= step.rate:
    yield "ok", f"{text}: the devices set the pace, as they should"
  else:
    yield (
      "warning",
      f"{text}: the input is the bottleneck, devices wait "
      f"{100 * (1 - read.pipeline_rate / step.rate):.0f} % of the time",
      f"about {read.cores(step.rate)} cores would feed them (here {read.num_cores}, with "
      f"config.data.num_threads={read.num_threads}); or scale the images down (docs/data.md)",
    )
