"""Tables 1 to 6 of the paper as printed, and the network of each row.

Gao, Wang and Wu, "LIP: Local Importance-based Pooling", ICCV 2019, sections 4.2 to 4.4.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

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
  4: "ResNet-152 was not trained for the paper: it is tensorpack's result with a similar recipe.",
  5: "With ResNets and ResNeXt-101 (64x4d): detectors that mmdetection released, evaluated for the "
  "paper. Two-fold training schedule, one scale in testing.",
  6: "The first seven are others' detectors. MD: with more deformable convolutions. One scale in "
  "testing.",
}

# Accuracies of one central crop of the ImageNet validation split, average precisions: percent.
# Parameters in millions, FLOPs in thousands of millions by the rule of `lip_jax.models.cost`.
_CLASSIFICATION = ("top1", "top5", "parameters_m", "flops_g")
_DETECTION = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")
COLUMNS: dict[int, tuple[str, ...]] = {
  1: _CLASSIFICATION,
  2: ("top1", "top5"),
  3: _CLASSIFICATION,
  4: _CLASSIFICATION,
  5: _DETECTION,
  6: _DETECTION,
}

DATASET = "imagenet2012"


@dataclasses.dataclass(frozen=True)
class Row:
  """One row: what the paper prints of it, and the network that it is here."""

  name: str  # such as "table1_average": argument of configs/imagenet.py
  table: int | None  # None: not the paper's
  label: str  # what the row is about, in words
  printed: Mapping[str, float | None] = dataclasses.field(default_factory=dict, hash=False)
  model: str | None = None  # argument of `create_model`; None: not built here
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # further ones


def _row(
  table: int,
  name: str,
  label: str,
  printed: tuple[float | None, ...],
  model: str | None = None,
  options: Mapping[str, Any] | None = None,
) -> Row:
  """A row of the paper, with its printed figures in the order of the table's columns."""
  figures = dict(zip(COLUMNS[table], printed, strict=True))
  return Row(f"table{table}_{name}", table, label, figures, model, options or {})


ROWS: tuple[Row, ...] = (
  _row(1, "strided", "strided convolution", (76.40, 93.15, 25.6, 4.12), "resnet50"),
  _row(
    1, "average", "average pooling", (76.96, 93.35, 22.8, 3.82), "resnet50", {"pool": "average"}
  ),
  _row(
    1,
    "dpp",
    "DPP, our baseline structure",
    (76.87, 93.30, 22.8, 3.83),
    "resnet50",
    {"pool": "dpp_lite_sym"},
  ),
  _row(
    1,
    "dpp_original",
    "DPP, original structure",
    (77.22, 93.64, 25.6, 6.59),
    "resnet50",
    {"pool": "dpp_lite_sym", "structure": "dense"},
  ),
  _row(
    1,
    "lip_projection",
    "LIP w Projection",
    (77.49, 93.86, 24.7, 4.78),
    "lip_resnet50",
    {"logit": "projection"},
  ),
  _row(
    1,
    "lip_bottleneck64",
    "LIP w Bottleneck-64",
    (77.92, 93.97, 23.2, 4.65),
    "lip_resnet50",
    {"logit_width": 64},
  ),
  _row(
    1,
    "lip_bottleneck128",
    "LIP w Bottleneck-128",
    (78.19, 93.96, 23.9, 5.33),
    "lip_resnet50",
    {"logit_width": 128},
  ),
  _row(
    1,
    "lip_bottleneck256",
    "LIP w Bottleneck-256",
    (78.15, 94.02, 25.8, 7.61),
    "lip_resnet50",
    {"logit_width": 256},
  ),
  _row(
    2,
    "a",
    "A: affine instance norm and amplified sigmoid",
    (78.19, 93.96),
    "lip_resnet50",
    {"logit_top": "norm_gate"},
  ),
  _row(2, "b", "B: affine instance norm", (None, None), "lip_resnet50", {"logit_top": "norm"}),
  _row(2, "c", "C: amplified sigmoid", (77.81, 93.86), "lip_resnet50", {"logit_top": "gate"}),
  _row(
    2,
    "d",
    "D: neither",
    (77.89, 93.86),
    "lip_resnet50",
    {"logit_top": "none", "average_steps": 2000},
  ),
  _row(3, "a", "A: max pooling, Res3, Res4, Res5", (78.19, 93.96, 23.9, 5.33), "lip_resnet50"),
  _row(
    3,
    "b",
    "B: Res3, Res4, Res5",
    (77.87, 93.94, 23.8, 4.87),
    "lip_resnet50",
    {"lip_stages": ("c3", "c4", "c5")},
  ),
  _row(
    3,
    "c",
    "C: Res4, Res5",
    (77.78, 93.81, 23.7, 4.26),
    "lip_resnet50",
    {"lip_stages": ("c4", "c5")},
  ),
  _row(3, "d", "D: Res5", (76.92, 93.37, 23.9, 4.11), "lip_resnet50", {"lip_stages": ("c5",)}),
  _row(3, "e", "E: nowhere, the plain ResNet-50", (76.40, 93.15, 25.6, 4.12), "resnet50"),
  _row(4, "resnet50", "ResNet-50", (76.40, 93.15, 25.6, 4.12), "resnet50"),
  _row(4, "lip_resnet50", "LIP-ResNet-50", (78.19, 93.96, 23.9, 5.33), "lip_resnet50"),
  _row(4, "resnet101", "ResNet-101", (77.98, 93.98, 44.5, 7.85), "resnet101"),
  _row(4, "lip_resnet101", "LIP-ResNet-101", (79.33, 94.60, 42.9, 9.06), "lip_resnet101"),
  _row(4, "resnet152", "ResNet-152", (78.49, 94.22, 60.2, 11.58), "resnet152"),
  _row(4, "densenet121", "DenseNet-BC-121", (75.62, 92.56, 8.0, 2.88), "densenet121"),
  _row(4, "lip_densenet121", "LIP-DenseNet-BC-121", (76.64, 93.16, 8.7, 4.13), "lip_densenet121"),
  _row(
    5, "faster_rcnn_resnet50", "Faster R-CNN w FPN, ResNet-50", (37.7, 59.3, 41.1, 21.9, 41.5, 48.7)
  ),
  _row(
    5,
    "faster_rcnn_lip_resnet50",
    "Faster R-CNN w FPN, LIP-ResNet-50",
    (39.2, 61.2, 42.5, 24.0, 43.1, 50.3),
  ),
  _row(
    5,
    "faster_rcnn_resnet101",
    "Faster R-CNN w FPN, ResNet-101",
    (39.4, 60.7, 43.0, 22.1, 43.6, 52.1),
  ),
  _row(
    5,
    "faster_rcnn_lip_resnet101",
    "Faster R-CNN w FPN, LIP-ResNet-101",
    (41.7, 63.6, 45.6, 25.2, 45.8, 54.0),
  ),
  _row(
    5,
    "faster_rcnn_resnext101",
    "Faster R-CNN w FPN, ResNeXt-101",
    (40.7, 62.1, 44.5, 23.0, 44.5, 53.6),
  ),
  _row(5, "retinanet_resnet50", "RetinaNet, ResNet-50", (36.6, 56.6, 38.9, 19.6, 40.3, 48.9)),
  _row(
    5, "retinanet_lip_resnet50", "RetinaNet, LIP-ResNet-50", (38.0, 58.8, 40.5, 22.6, 41.5, 49.9)
  ),
  _row(5, "retinanet_resnet101", "RetinaNet, ResNet-101", (38.1, 58.1, 40.6, 20.2, 41.8, 50.8)),
  _row(6, "faster_rcnn", "Faster R-CNN w FPN, ResNet-101", (36.2, 59.1, 39.0, 18.2, 39.0, 48.2)),
  _row(6, "mask_rcnn", "Mask R-CNN, ResNet-101 w FPN", (38.2, 60.3, 41.7, 20.1, 41.1, 50.2)),
  _row(6, "sod_mtgan", "SOD-MTGAN, ResNet-101 w FPN", (41.4, 63.2, 45.4, 24.7, 44.2, 52.6)),
  _row(6, "grid_rcnn", "Grid R-CNN, ResNet-101 w FPN", (41.5, 60.9, 44.5, 23.3, 44.9, 53.1)),
  _row(6, "dcr", "DCR, ResNet-101-Deformable w FPN", (41.7, 64.0, 45.9, 23.7, 44.7, 53.4)),
  _row(6, "tridentnet", "TridentNet, ResNet-101", (42.7, 63.6, 46.5, 23.9, 46.6, 56.6)),
  _row(6, "cascade_rcnn", "Cascade R-CNN, ResNet-101", (42.8, 62.1, 46.3, 23.7, 45.5, 55.2)),
  _row(
    6,
    "lip_resnet101",
    "Faster R-CNN w FPN & LIP, LIP-ResNet-101",
    (42.0, 64.3, 45.8, 24.7, 45.2, 52.3),
  ),
  _row(
    6,
    "lip_resnet101_md",
    "Faster R-CNN w FPN & LIP, LIP-ResNet-101-MD",
    (43.9, 65.7, 48.1, 25.4, 46.7, 56.3),
  ),
)

# Our other poolings in the place of table 1's: no rows of the paper.
FURTHER: tuple[Row, ...] = tuple(
  Row(f"further_{name}", None, label, model="resnet50", options={"pool": pool})
  for name, label, pool in (
    ("max", "max pooling", "max"),
    ("dpp_lite_asym", "DPP, lite, asymmetric", "dpp_lite_asym"),
    ("dpp_full_sym", "DPP, full, symmetric", "dpp_full_sym"),
    ("dpp_full_asym", "DPP, full, asymmetric", "dpp_full_asym"),
    ("soft", "SoftPool", "soft"),
    ("lp", "power mean, p = 2", "lp"),
    ("exp", "exp(beta x) with a learned beta", "exp"),
  )
)

# Those that are networks of ours, by name.
NETWORKS: dict[str, Row] = {row.name: row for row in (*ROWS, *FURTHER) if row.model}
