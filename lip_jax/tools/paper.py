"""Tables 1 to 6 of the paper as printed, and the network of each row.

Gao, Wang and Wu, "LIP: Local Importance-based Pooling", ICCV 2019, sections 4.2 to 4.4.
"""

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

TITLES = {
  1: "down-sampling methods, ResNet-50",
  2: "top layers of the logit modules, LIP-ResNet-50 (Bottleneck-128)",
  3: "places of LIP, ResNet-50 (Bottleneck-128)",
  4: "architectures",
  5: "detectors, COCO 2017 val",
  6: "detectors, COCO test-dev",
}

# What the paper says beside the numbers.
NOTES = {
  2: "B failed to train, whatever was tried against numerical problems. D pools by averages for "
  "the first 2,000 iterations, so that noisy early gradients do not make exp overflow.",
  3: "C is recommended for practice: fewer parameters than ResNet-50, and 3 % more FLOPs.",
  4: "ResNet-152 (with a * in the paper) was not trained for it: the result is tensorpack's, of a "
  "similar recipe (https://github.com/tensorpack/tensorpack/tree/master/examples/ResNet).",
  5: "With ResNets and ResNeXt-101 (64x4d): detectors that mmdetection released, evaluated for the "
  "paper, some slightly better than mmdetection says. Two-fold training schedule, one scale in "
  "testing.",
  6: "The first seven are others' detectors. Deformable: with deformable convolutions (Dai et al. "
  "2017); MD: with more of them. One scale in testing.",
}

# Accuracies of one crop of each ImageNet validation image, average precisions: percent.
# Parameters in millions, FLOPs in thousands of millions by the rule of `lip_jax.models.cost`.
_CLASSIFICATION = ("top1", "top5", "parameters_m", "flops_g")
_DETECTION = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")
COLUMNS = {
  **dict.fromkeys((1, 3, 4), _CLASSIFICATION),
  2: _CLASSIFICATION[:2],
  **dict.fromkeys((5, 6), _DETECTION),
}

DATASET = "imagenet2012"
DETECTION_DATASET = "coco/2017"


@dataclasses.dataclass(frozen=True)
class Row:
  """One row: what the paper prints of it, and the network that it is here."""

  name: str  # such as "table1_average"; argument of configs/imagenet.py if `model` is given
  table: int | None  # None: not the paper's
  label: str  # what the row is about, in words
  printed: Mapping[str, float | None] = dataclasses.field(hash=False)
  model: str | None  # argument of `create_model`; None: not built here
  options: Mapping[str, Any] = dataclasses.field(hash=False)  # further ones


def _rows(table: int | None, prefix: str, text: str) -> Iterator[Row]:
  """Rows of lines: name | printed figures | label | model and its options, if it is built here."""
  for line in text.strip().splitlines():
    name, figures, label, network = (part.strip() for part in line.split("|"))
    printed = [None if figure == "N/A" else float(figure) for figure in figures.split()]
    model, _, options = network.partition(" ")
    pairs = (option.split("=") for option in options.split())
    yield Row(
      f"{prefix}_{name}",
      table,
      label,
      dict(zip(COLUMNS[table] if table else (), printed, strict=True)),
      model or None,
      {key: ast.literal_eval(value) for key, value in pairs},
    )


# Figures in the order of `COLUMNS`.
_TABLES = {
  1: """
    strided           | 76.40 93.15 25.6 4.12 | strided convolution | resnet50
    average           | 76.96 93.35 22.8 3.82 | average pooling | resnet50 pool='average'
    dpp               | 76.87 93.30 22.8 3.83 | DPP, our baseline structure | \
      resnet50 pool='dpp_lite_sym'
    dpp_original      | 77.22 93.64 25.6 6.59 | DPP, original structure | \
      resnet50 pool='dpp_lite_sym' structure='dense'
    lip_projection    | 77.49 93.86 24.7 4.78 | LIP w Projection | lip_resnet50 logit='projection'
    lip_bottleneck64  | 77.92 93.97 23.2 4.65 | LIP w Bottleneck-64 | lip_resnet50 logit_width=64
    lip_bottleneck128 | 78.19 93.96 23.9 5.33 | LIP w Bottleneck-128 | lip_resnet50 logit_width=128
    lip_bottleneck256 | 78.15 94.02 25.8 7.61 | LIP w Bottleneck-256 | lip_resnet50 logit_width=256
  """,
  2: """
    a | 78.19 93.96 | A: affine instance norm and amplified sigmoid | \
      lip_resnet50 logit_top='norm_gate'
    b | N/A   N/A   | B: affine instance norm | lip_resnet50 logit_top='norm'
    c | 77.81 93.86 | C: amplified sigmoid | lip_resnet50 logit_top='gate'
    d | 77.89 93.86 | D: neither | lip_resnet50 logit_top='none' average_steps=2000
  """,
  3: """
    a | 78.19 93.96 23.9 5.33 | A: max pooling, Res3, Res4, Res5 | lip_resnet50
    b | 77.87 93.94 23.8 4.87 | B: Res3, Res4, Res5 | lip_resnet50 lip_stages=('c3','c4','c5')
    c | 77.78 93.81 23.7 4.26 | C: Res4, Res5 | lip_resnet50 lip_stages=('c4','c5')
    d | 76.92 93.37 23.9 4.11 | D: Res5 | lip_resnet50 lip_stages=('c5',)
    e | 76.40 93.15 25.6 4.12 | E: nowhere, the plain ResNet-50 | resnet50
  """,
  4: """
    resnet50        | 76.40 93.15 25.6 4.12  | ResNet-50 | resnet50
    lip_resnet50    | 78.19 93.96 23.9 5.33  | LIP-ResNet-50 | lip_resnet50
    resnet101       | 77.98 93.98 44.5 7.85  | ResNet-101 | resnet101
    lip_resnet101   | 79.33 94.60 42.9 9.06  | LIP-ResNet-101 | lip_resnet101
    resnet152       | 78.49 94.22 60.2 11.58 | ResNet-152 | resnet152
    densenet121     | 75.62 92.56 8.0 2.88   | DenseNet-BC-121 | densenet121
    lip_densenet121 | 76.64 93.16 8.7 4.13   | LIP-DenseNet-BC-121 | lip_densenet121
  """,
  5: """
    faster_rcnn_resnet50      | 37.7 59.3 41.1 21.9 41.5 48.7 | Faster R-CNN w FPN, ResNet-50 |
    faster_rcnn_lip_resnet50  | 39.2 61.2 42.5 24.0 43.1 50.3 | Faster R-CNN w FPN, LIP-ResNet-50 |
    faster_rcnn_resnet101     | 39.4 60.7 43.0 22.1 43.6 52.1 | Faster R-CNN w FPN, ResNet-101 |
    faster_rcnn_lip_resnet101 | 41.7 63.6 45.6 25.2 45.8 54.0 | Faster R-CNN w FPN, LIP-ResNet-101 |
    faster_rcnn_resnext101    | 40.7 62.1 44.5 23.0 44.5 53.6 | Faster R-CNN w FPN, ResNeXt-101 |
    retinanet_resnet50        | 36.6 56.6 38.9 19.6 40.3 48.9 | RetinaNet, ResNet-50 |
    retinanet_lip_resnet50    | 38.0 58.8 40.5 22.6 41.5 49.9 | RetinaNet, LIP-ResNet-50 |
    retinanet_resnet101       | 38.1 58.1 40.6 20.2 41.8 50.8 | RetinaNet, ResNet-101 |
  """,
  6: """
    faster_rcnn      | 36.2 59.1 39.0 18.2 39.0 48.2 | Faster R-CNN w FPN, ResNet-101 w FPN |
    mask_rcnn        | 38.2 60.3 41.7 20.1 41.1 50.2 | Mask R-CNN, ResNet-101 w FPN |
    sod_mtgan        | 41.4 63.2 45.4 24.7 44.2 52.6 | SOD-MTGAN, ResNet-101 w FPN |
    grid_rcnn        | 41.5 60.9 44.5 23.3 44.9 53.1 | Grid R-CNN, ResNet-101 w FPN |
    dcr              | 41.7 64.0 45.9 23.7 44.7 53.4 | DCR, ResNet-101-Deformable w FPN |
    tridentnet       | 42.7 63.6 46.5 23.9 46.6 56.6 | TridentNet, ResNet-101 |
    cascade_rcnn     | 42.8 62.1 46.3 23.7 45.5 55.2 | Cascade R-CNN, ResNet-101 w FPN |
    lip_resnet101    | 42.0 64.3 45.8 24.7 45.2 52.3 | \
      Faster R-CNN w FPN & LIP, LIP-ResNet-101 w FPN |
    lip_resnet101_md | 43.9 65.7 48.1 25.4 46.7 56.3 | \
      Faster R-CNN w FPN & LIP, LIP-ResNet-101-MD w FPN |
  """,
}
ROWS = tuple(row for table in _TABLES for row in _rows(table, f"table{table}", _TABLES[table]))


class Detector(NamedTuple):
  """What configs/coco.py has for a row."""

  argument: str
  name: str
  backbone: str


def _detectors() -> Iterator[tuple[str, Detector]]:
  for name, backbones in (
    (
      "faster_rcnn",
      ("resnet50", "lip_resnet50", "resnet101", "lip_resnet101", "resnext101_64x4d"),
    ),
    ("retinanet", ("resnet50", "lip_resnet50", "resnet101")),
  ):
    for backbone in backbones:
      argument = f"{name}_{backbone.removesuffix('_64x4d')}"
      yield f"table5_{argument}", Detector(argument, name, backbone)
  for backbone in ("lip_resnet101", "lip_resnet101_md"):
    yield f"table6_{backbone}", Detector(f"faster_rcnn_{backbone}", "faster_rcnn", backbone)


# By row.
DETECTORS = dict(_detectors())

# Our other poolings in the place of table 1's: no rows of the paper.
_FURTHER = """
  max           |  | max pooling | resnet50 pool='max'
  dpp_lite_asym |  | DPP, lite, asymmetric | resnet50 pool='dpp_lite_asym'
  dpp_full_sym  |  | DPP, full, symmetric | resnet50 pool='dpp_full_sym'
  dpp_full_asym |  | DPP, full, asymmetric | resnet50 pool='dpp_full_asym'
  soft          |  | SoftPool | resnet50 pool='soft'
  lp            |  | power mean, p = 2 | resnet50 pool='lp'
  exp           |  | exp(beta x) with a learned beta | resnet50 pool='exp'
"""
FURTHER = tuple(_rows(None, "further", _FURTHER))

# Those that are networks of ours, by name.
NETWORKS: dict[str, Row] = {row.name: row for row in (*ROWS, *FURTHER) if row.model}
