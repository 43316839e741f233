"""What a machine lacks for training: one verdict for each check, and what to do.

No check can end the others: what one of them raises is its own verdict.
"""

import dataclasses
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lip_jax.data import disk
from lip_jax.distributed import service_log, startup
from lip_jax.errors import UsageError
from lip_jax.tools import machine
from lip_jax.tools.machine import Status, Verdict
from lip_jax.training import config as config_lib
from lip_jax.training import workdir as workdir_lib

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
  """What is examined."""

  workdir: str | None = None  # of the run to be; None: not checked
  data_dir: str | None = None  # of the data sets; None: the config's, or else TFDS's default
  dataset: str | None = None  # None: the config's
  config: config_lib.Config | None = None  # of the run to be; None: that in `workdir`, if any
  processes: startup.Options = dataclasses.field(default_factory=startup.Options)
  bench_seconds: float = 5.0  # to measure each of the two, beside compilation
  device_timeout: float = 120.0  # seconds until devices that do not answer count as hanging
  bench: bool = True  # measure input against training step, about a minute; needs a configuration


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
  checks = {
    "versions": machine.versions(),
    # First: the devices of several TPU hosts answer together.
    "hosts": _hosts(subject, company),
    "devices": machine.devices(subject.device_timeout),
    "memory": machine.memory(),
    "workdir": _workdir(subject),
    "data dir": _data_dir(subject),
    "data set": _dataset(subject),
    "speed": _speed(subject, company, progress),
  }
  for name, verdicts in checks.items():  # which run as they are asked for
    progress(f"checking: {name}")
    try:
      for verdict in verdicts:
        progress("")
        yield Finding(name, *verdict)
        if name == "devices" and verdict[0] == "problem":
          # Nor would they be faster, or answer at all, where the steps are measured.
          checks["speed"] = iter(())
    except (Exception, SystemExit) as error:  # whatever the libraries raise on a broken machine
      progress("")
      said = str(error)
      if not isinstance(error, UsageError):
        first = (said.strip() or "no message").splitlines()[0][:300]
        said = f"the check failed: {type(error).__name__}: {first}"
      yield Finding(name, "problem", said)
  progress("")


def _with_config(subject: Subject) -> tuple[Subject, list[Finding]]:
  """With what the configuration says, by default that of the run in the workdir."""
  config = subject.config
  try:
    if config is None and subject.workdir is not None:
      path = workdir_lib.absolute(subject.workdir) / "config.json"
      if workdir_lib.read_text(path) is not None:
        config = config_lib.load(subject.workdir)
  except Exception as error:  # as for the checks
    return subject, [Finding("config", "problem", f"that of {subject.workdir}: {error}")]
  if config is None:
    return subject, []
  data_dir = subject.data_dir or config.data.data_dir
  dataset = subject.dataset or config.data.dataset
  return dataclasses.replace(subject, config=config, data_dir=data_dir, dataset=dataset), []


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
  try:
    names = machine.ask(_JOIN, options, env={**os.environ, **service_log.ENVIRONMENT})
  except UsageError as error:
    yield "problem", str(error), "--distributed=off checks this host alone"
    return
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

  directory = disk.absolute(subject.data_dir or constants.DATA_DIR)
  if workdir_lib.in_bucket(directory):
    path = workdir_lib.absolute(directory)
    yield "ok", f"{path}: {len(list(path.iterdir()))} entries; in a bucket, which is read only here"
    return
  if not os.path.isdir(directory):
    if subject.data_dir:
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

  dataset = subject.dataset
  if dataset is None:
    return
  data = subject.config.data if subject.config else None
  splits = (data.train_split, data.validation_split) if data else ("train", "validation")
  try:
    sources = [open_split(dataset, split, subject.data_dir, prepare=False) for split in splits]
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
  progress(f"reading {subject.dataset}, {subject.bench_seconds:g} s")
  try:
    read = bench.bench(
      subject.dataset or data.dataset,
      data_dir=subject.data_dir,
      split=data.train_split,
      num_threads=data.num_threads,
      seconds=subject.bench_seconds,
      **data.bench_options(),
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
