"""Precision over recall, as a picture."""

import os

from lip_jax.detection.coco_metric import RECALLS, SIZES, Score
from lip_jax.errors import UsageError
from lip_jax.visualize import Curve, Plot, curves_figure, save_figure

_IOUS = (0.5, 0.6, 0.7, 0.8, 0.9)


def draw_curves(score: Score, path: str | os.PathLike[str]) -> None:
  """Writes precision over recall, for thresholds of the IoU and for sizes of objects, averaged over
  classes; the legend has the areas below, which are average precisions.

  Args:
    path: .png, .svg or .pdf.

  Raises:
    UsageError: there are no objects, or the file cannot be written.
  """
  if score.metrics["AP"] < 0:
    raise UsageError(f"cannot draw {path}: there are no objects; give annotations that have some")
  sizes = [size for size in SIZES if score.metrics[f"AP_{size}"] >= 0]
  thresholds = {f"IoU {iou}": score.curve(iou=iou) for iou in _IOUS}
  means = {"all": score.curve(), **{size: score.curve(size) for size in sizes}}
  plots = [
    Plot(
      title,
      "recall",
      "precision",
      [
        Curve(f"{name}: {100 * float(values.mean()):.1f}", "", RECALLS, values)
        for name, values in curves.items()
      ],
    )
    for title, curves in (
      ("all objects, by IoU", thresholds),
      ("by size, mean of IoU 0.5 to 0.95", means),
    )
  ]
  save_figure(curves_figure(plots), path)
