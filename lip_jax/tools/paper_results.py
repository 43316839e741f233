"""Our results beside the paper's: what the runs of its rows have come to."""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lip_jax.errors import UsageError
from lip_jax.tools import paper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """What a run of a row has come to.

  status: "not yet run"; "running", which is also said of a run that has been interrupted; "other":
  a run that is not this row's; or "finished", and only then there are figures, in percent.
  """

  status: Literal["not yet run", "running", "other", "finished"]
  step: int | None = None
  epochs: float | None = None  # that the run was to take
  why: str | None = None  # a run that does not count

  def __str__(self) -> str:
    if self.status == "finished":
      return f"{self.epochs:g} epochs"
    if self.status == "running":
      return f"running, step {self.step}"
    return f"not counted: {self.why}" if self.status == "other" else self.status


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classified(Result):
  """Of a classifier."""

  top1: float | None = None
  top5: float | None = None

  def __str__(self) -> str:
    text = super().__str__()
    return f"{self.top1:.2f} / {self.top5:.2f} ({text})" if self.top1 is not None else text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detected(Result):
  """Of a detector: `paper.COLUMNS`, on COCO's validation images, table 6's too."""

  ap: float | None = None
  ap50: float | None = None
  ap75: float | None = None
  ap_s: float | None = None
  ap_m: float | None = None
  ap_l: float | None = None


# Of a run's evaluations, and how they are called here.
_CLASSIFIER = {"top1": "top1", "top5": "top5"}
_DETECTOR = {
  **{"AP": "ap", "AP50": "ap50", "AP75": "ap75"},
  **{"AP_small": "ap_s", "AP_medium": "ap_m", "AP_large": "ap_l"},
}


def command(row: paper.Row, runs: str | Path = "runs") -> str | None:
  """What trains a row's network into `<runs>/<row>`; None where there is none here.

  A detector starts from the run of table 4 with its backbone, or where there is none, RUN, from
  that of any classifier with it.
  """
  config, weights = f"configs/imagenet.py:{row.name}", ""
  if row.name in paper.DETECTORS:
    argument, _, backbone = paper.DETECTORS[row.name]
    table4 = f"table4_{backbone}"
    config = f"configs/coco.py:{argument}"
    weights = f" --weights={Path(runs) / table4 if table4 in paper.NETWORKS else 'RUN'}"
  elif row.name not in paper.NETWORKS:
    return None
  return f"python train.py --config={config}{weights} --workdir={Path(runs) / row.name}"


def result(row: paper.Row, runs: str | Path) -> Classified | Detected | None:
  """What the run in `<runs>/<row>` has come to: the last evaluation of a finished run.

  Only the network and the data set must be the row's; the recipe is the run's own, which the
  number of epochs hints at. None for a row that is no network here.
  """
  from lip_jax.training import config as config_lib
  from lip_jax.training import metrics

  detector = row.name in paper.DETECTORS
  if not detector and row.name not in paper.NETWORKS:
    return None
  kind, figures = (Detected, _DETECTOR) if detector else (Classified, _CLASSIFIER)
  directory = Path(runs) / row.name
  if not (directory / "config.json").exists():
    return kind(status="not yet run")
  try:
    run = config_lib.load(directory)
  except UsageError as error:
    return kind(status="other", why=str(error))
  why = _other_data(run.data, detector)
  if why is None and not _same_network(row, run.model):
    why = f"a run of another model: {_describe(run.model)}"
  if why is not None:
    return kind(status="other", why=why)
  lines = metrics.read_lines(directory / metrics.FILE)
  step = max((line["step"] for line in lines), default=0)
  last = _last_step(lines, run.num_epochs)
  first = f"validation/{next(iter(figures))}"
  for line in reversed(lines):
    if line["step"] == last and first in line:
      values = {ours: 100 * line[f"validation/{name}"] for name, ours in figures.items()}
      return kind(status="finished", step=step, epochs=run.num_epochs, **values)
  return kind(status="running", step=step, epochs=run.num_epochs)


# COCO of 2017 from TFDS, or its own annotation file of the validation images.
_COCO = re.compile(r"coco/2017(:.*)?|coco:.*instances_(\{split\}|val)2017\.json@.*")


def _other_data(data: Any, detector: bool) -> str | None:
  """Why a run on these data is none of the paper's, if it is not."""
  name = paper.DETECTION_DATASET if detector else paper.DATASET
  same = _COCO.fullmatch(data.dataset) if detector else data.dataset.partition(":")[0] == name
  if not same:
    return f"a run on {data.dataset}, not on {name}"
  if detector and "[" in data.validation_split:
    return f"evaluated on {data.validation_split} alone"
  return None


# Part of the recipe: they change no function that the network can compute.
_RECIPE = ("bn_group_size", "zero_init_residual")


def _same_network(row: paper.Row, model: Mapping[str, Any]) -> bool:
  """Whether a configuration's model section builds the row's network, however it is spelt."""
  given = {key: value for key, value in model.items() if key not in _RECIPE}
  expected = {"name": row.model, **row.options}
  if row.name in paper.DETECTORS:
    _, name, backbone = paper.DETECTORS[row.name]
    expected = {"name": name, "backbone": backbone}
  try:
    return given["name"] == expected["name"] and _structure(given) == _structure(expected)
  except (UsageError, TypeError):  # options of another version
    return False


def _structure(model: Mapping[str, Any]) -> Any:
  from flax import nnx

  from lip_jax.detection.registry import abstract_detector
  from lip_jax.models import abstract_model

  if "backbone" in model:
    network = abstract_detector(**model, num_classes=80)
  else:
    network = abstract_model(**model)
  graph, state = nnx.split(network)
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
