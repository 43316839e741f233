"""Our results beside the paper's: what the runs of its rows have come to."""

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lip_jax.errors import UsageError
from lip_jax.tools import paper


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run of a row has come to.

  status: "not yet run"; "running", which is also said of a run that has been interrupted; "other":
  a run that is not this row's; or "finished", and only then there are top-1 and top-5.
  """

  status: Literal["not yet run", "running", "other", "finished"]
  step: int | None = None
  epochs: float | None = None  # that the run was to take
  top1: float | None = None  # percent
  top5: float | None = None
  why: str | None = None  # a run that does not count

  def __str__(self) -> str:
    if self.status == "finished":
      return f"{self.top1:.2f} / {self.top5:.2f} ({self.epochs:g} epochs)"
    if self.status == "running":
      return f"running, step {self.step}"
    return f"not counted: {self.why}" if self.status == "other" else self.status


def command(row: paper.Row, runs: str | Path = "runs") -> str | None:
  """What trains a row's network into `<runs>/<row>`; None where there is none here.

  A detector starts from the run of table 4 with its backbone.
  """
  config, weights = f"configs/imagenet.py:{row.name}", ""
  if row.name in paper.DETECTORS:
    name, backbone = paper.DETECTORS[row.name]
    config, weights = f"configs/coco.py:{name}", f" --weights={Path(runs) / f'table4_{backbone}'}"
  elif row.name not in paper.NETWORKS:
    return None
  return f"python train.py --config={config}{weights} --workdir={Path(runs) / row.name}"


def result(row: paper.Row, runs: str | Path) -> Result:
  """What the run in `<runs>/<row>` has come to: the last evaluation of a finished run.

  Only the network and the data set must be the row's; the recipe is the run's own, which the
  number of epochs hints at.

  Args:
    row: one of `paper.NETWORKS`.
  """
  from lip_jax.training import config as config_lib
  from lip_jax.training import metrics

  directory = Path(runs) / row.name
  if not (directory / "config.json").exists():
    return Result("not yet run")
  try:
    run = config_lib.load(directory)
  except UsageError as error:
    return Result("other", why=str(error))
  if run.data.dataset.partition(":")[0] != paper.DATASET:
    return Result("other", why=f"a run on {run.data.dataset}, not on {paper.DATASET}")
  if not _same_network(row, run.model):
    return Result("other", why=f"a run of another model: {_describe(run.model)}")
  lines = metrics.read_lines(directory / metrics.FILE)
  step = max((line["step"] for line in lines), default=0)
  last = _last_step(lines, run.num_epochs)
  for line in reversed(lines):
    if line["step"] == last and "validation/top1" in line:
      top1, top5 = (100 * line[f"validation/{name}"] for name in ("top1", "top5"))
      return Result("finished", step, run.num_epochs, top1, top5)
  return Result("running", step, run.num_epochs)


# Part of the recipe: they change no function that the network can compute.
_RECIPE = ("bn_group_size", "zero_init_residual")


def _same_network(row: paper.Row, model: Mapping[str, Any]) -> bool:
  """Whether a configuration's model section builds the row's network, however it is spelt."""
  given = {key: value for key, value in model.items() if key not in ("name", *_RECIPE)}
  try:
    name = model["name"]
    return name == row.model and _structure(name, given) == _structure(name, row.options)
  except (UsageError, TypeError):  # options of another version
    return False


def _structure(name: str, options: Mapping[str, Any]) -> Any:
  from flax import nnx

  from lip_jax.models import abstract_model

  graph, state = nnx.split(abstract_model(name, **options))
  return graph, {path: leaf.shape for path, leaf in nnx.to_flat_state(state)}


def _describe(model: Mapping[str, Any]) -> str:
  """The name and what is not as it usually is."""
  from lip_jax.models.downsample import make_downsamples

  usual = {name: p.default for name, p in inspect.signature(make_downsamples).parameters.items()}
  shown = [
    f"{key}={value}"
    for key, value in model.items()
    if key not in ("name", *_RECIPE) and value != usual.get(key)
  ]
  return ", ".join([model["name"], *shown])


def _last_step(lines: list[dict[str, Any]], num_epochs: float) -> int | None:
  """The step that a run ends with, from a logged step and its epoch; None if none is logged."""
  for line in lines:
    if line.get("train/epoch"):
      return max(1, round(num_epochs * line["step"] / line["train/epoch"]))
  return None
