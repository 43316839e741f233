"""Tables 1 to 4 of the paper, row by row: the network, the paper's figures, and our results.

The bodies of the paper's tables could not be read where this was written. The figures come from the
authors' published README and the few other places that each row's `source` names; those that are in
neither are None. That table 3's letters stand for these places, in this order, is our reading.
"""

import dataclasses
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lip_jax.errors import UsageError

TITLES = {
  1: "pooling layers and logit modules, ResNet-50",
  2: "top layers of the logit module, LIP-ResNet-50 (Bottleneck-128)",
  3: "places of LIP, LIP-ResNet-50 (Bottleneck-128)",
  4: "architectures",
}

DATASET = "imagenet2012"

_README = "authors' README"
_SAME_NETWORK = "authors' README, which lists this network; the row itself could not be read"
_UNREAD = "could not be read"


@dataclasses.dataclass(frozen=True)
class Row:
  """One row: a network and what the paper says of it, None where that could not be obtained.

  Top-1 and top-5 are accuracies on the ImageNet validation split in percent, one crop of 224 px.
  """

  name: str  # such as "table1_average": argument of configs/imagenet.py
  table: int
  label: str  # what the row is about, in words
  model: str  # argument of `create_model`
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # further ones
  top1: float | None = None
  top5: float | None = None
  parameters_m: float | None = None  # millions
  multiply_adds_g: float | None = None  # thousands of millions
  source: str = _UNREAD  # of the figures


_RESNET50: dict[str, Any] = {
  "top1": 76.40,
  "top5": 93.15,
  "parameters_m": 25.6,
  "multiply_adds_g": 4.12,
}
_LIP_RESNET50: dict[str, Any] = {
  "top1": 78.19,
  "top5": 93.96,
  "parameters_m": 23.9,
  "multiply_adds_g": 5.33,
}

ROWS: tuple[Row, ...] = (
  Row(
    "table1_strided", 1, "strided convolution", "resnet50", {}, **_RESNET50, source=_SAME_NETWORK
  ),
  Row("table1_average", 1, "average pooling", "resnet50", {"pool": "average"}),
  Row("table1_max", 1, "max pooling", "resnet50", {"pool": "max"}),
  Row("table1_dpp_full_sym", 1, "DPP, full, symmetric", "resnet50", {"pool": "dpp_full_sym"}),
  Row("table1_dpp_full_asym", 1, "DPP, full, asymmetric", "resnet50", {"pool": "dpp_full_asym"}),
  Row("table1_dpp_lite_sym", 1, "DPP, lite, symmetric", "resnet50", {"pool": "dpp_lite_sym"}),
  Row("table1_dpp_lite_asym", 1, "DPP, lite, asymmetric", "resnet50", {"pool": "dpp_lite_asym"}),
  Row(
    "table1_dpp_original",
    1,
    "DPP, lite, symmetric, in its original structure",
    "resnet50",
    {"pool": "dpp_lite_sym", "structure": "dense"},
    multiply_adds_g=6.59,
    source="the LIP author's count in a discussion of the DPP repository, by a rule that gives the "
    "plain ResNet-50 4.14 G; the row itself could not be read",
  ),
  Row("table1_lip_projection", 1, "LIP, Projection", "lip_resnet50", {"logit": "projection"}),
  Row("table1_lip_bottleneck64", 1, "LIP, Bottleneck-64", "lip_resnet50", {"logit_width": 64}),
  Row(
    "table1_lip_bottleneck128",
    1,
    "LIP, Bottleneck-128",
    "lip_resnet50",
    {"logit_width": 128},
    **_LIP_RESNET50,
    source=_SAME_NETWORK,
  ),
  Row(
    "table1_lip_bottleneck256",
    1,
    "LIP, Bottleneck-256",
    "lip_resnet50",
    {"logit_width": 256},
    top1=78.15,
    source="a public listing of the paper's results; the row itself could not be read",
  ),
  Row(
    "table2_a",
    2,
    "A: instance norm and gate",
    "lip_resnet50",
    {"logit_top": "norm_gate"},
    **_LIP_RESNET50,
    source=_SAME_NETWORK,
  ),
  Row("table2_b", 2, "B: instance norm only", "lip_resnet50", {"logit_top": "norm"}),
  Row("table2_c", 2, "C: gate only", "lip_resnet50", {"logit_top": "gate"}),
  Row(
    "table2_d",
    2,
    "D: neither, average pooling for the first 2,000 steps",
    "lip_resnet50",
    {"logit_top": "none", "average_steps": 2000},
  ),
  Row("table3_a", 3, "A: stem only", "lip_resnet50", {"lip_stages": ("stem",)}),
  Row("table3_b", 3, "B: c3 only, to stride 8", "lip_resnet50", {"lip_stages": ("c3",)}),
  Row("table3_c", 3, "C: c4 only, to stride 16", "lip_resnet50", {"lip_stages": ("c4",)}),
  Row("table3_d", 3, "D: c5 only, to stride 32", "lip_resnet50", {"lip_stages": ("c5",)}),
  Row(
    "table3_e",
    3,
    "E: all four places",
    "lip_resnet50",
    {"lip_stages": ("stem", "c3", "c4", "c5")},
    **_LIP_RESNET50,
    source=_SAME_NETWORK,
  ),
  Row("table4_resnet50", 4, "ResNet-50", "resnet50", {}, **_RESNET50, source=_README),
  Row(
    "table4_lip_resnet50", 4, "LIP-ResNet-50", "lip_resnet50", {}, **_LIP_RESNET50, source=_README
  ),
  Row(
    "table4_resnet101",
    4,
    "ResNet-101",
    "resnet101",
    {},
    top1=77.98,
    top5=93.98,
    parameters_m=44.5,
    multiply_adds_g=7.85,
    source=_README,
  ),
  Row(
    "table4_lip_resnet101",
    4,
    "LIP-ResNet-101",
    "lip_resnet101",
    {},
    top1=79.33,
    top5=94.60,
    parameters_m=42.9,
    multiply_adds_g=9.06,
    source=_README,
  ),
  Row(
    "table4_densenet121",
    4,
    "DenseNet-121",
    "densenet121",
    {},
    top1=75.62,
    top5=92.56,
    parameters_m=8.0,
    multiply_adds_g=2.88,
    source=_README,
  ),
  Row(
    "table4_lip_densenet121",
    4,
    "LIP-DenseNet-121",
    "lip_densenet121",
    {},
    top1=76.64,
    top5=93.16,
    parameters_m=8.7,
    multiply_adds_g=4.13,
    source=_README,
  ),
)


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


def command(row: Row, runs: str | Path = "runs") -> str:
  """What trains a row's network into `<runs>/<row>`."""
  return (
    f"python train.py --config=configs/imagenet.py:{row.name} --workdir={Path(runs) / row.name}"
  )


def result(row: Row, runs: str | Path) -> Result:
  """What the run in `<runs>/<row>` has come to: the last evaluation of a finished run.

  Only the network and the data set must be the row's; the recipe is the run's own, which the
  number of epochs hints at.

  Args:
    row: one of `ROWS`.
    runs: directory of the runs.
  """
  from lip_jax.training import config as config_lib

  directory = Path(runs) / row.name
  if not (directory / "config.json").exists():
    return Result("not yet run")
  try:
    run = config_lib.load(directory)
  except UsageError as error:
    return Result("other", why=str(error))
  if run.data.dataset.partition(":")[0] != DATASET:
    return Result("other", why=f"a run on {run.data.dataset}, not on {DATASET}")
  if not _same_network(row, run.model):
    return Result("other", why=f"a run of another model: {_describe(run.model)}")
  lines = _read_lines(directory / "metrics.jsonl")
  step = max((line["step"] for line in lines), default=0)
  last = _last_step(lines, run.num_epochs)
  for line in reversed(lines):
    if line["step"] == last and "validation/top1" in line:
      top1, top5 = (100 * line[f"validation/{name}"] for name in ("top1", "top5"))
      return Result("finished", step, run.num_epochs, top1, top5)
  return Result("running", step, run.num_epochs)


# Part of the recipe: they change no function that the network can compute.
_RECIPE = ("bn_group_size", "zero_init_residual")


def _same_network(row: Row, model: Mapping[str, Any]) -> bool:
  """Whether a configuration's model section builds the row's network, however it is spelt."""
  given = {key: value for key, value in model.items() if key not in ("name", *_RECIPE)}
  try:
    return model["name"] == row.model and (
      _structure(row.model, given) == _structure(row.model, row.options)
    )
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


def _read_lines(path: Path) -> list[dict[str, Any]]:
  """The numbers of a run, but for a line that is being written."""
  if not path.exists():
    return []
  lines = []
  for text in path.read_text(encoding="utf-8").splitlines():
    try:
      lines.append(json.loads(text))
    except json.JSONDecodeError:
      continue
  return lines
