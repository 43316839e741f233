"""What a network looks at, and how steady it is: maps, figures and numbers.

The functions on arrays need jax, flax and numpy only; those that draw import matplotlib when they
are called.
"""

from lip_jax.visualize.attribution import (
  ClassActivation,
  Regions,
  attend,
  class_activation_maps,
  effective_receptive_fields,
)
from lip_jax.visualize.boxes import Boxes, Picture, draw_boxes
from lip_jax.visualize.figures import (
  Column,
  Curve,
  Plot,
  boxes_figure,
  comparison_figure,
  curves_figure,
  draw_importance,
  figure_to_array,
  importance_figure,
  save_figure,
)
from lip_jax.visualize.grids import Grid, feature_grids, layer_grids, to_input
from lip_jax.visualize.importance import importance_maps, pixel_importance, window_importance
from lip_jax.visualize.robustness import (
  DeletionCurve,
  deletion_curve,
  predictor,
  random_scores,
  shift_consistency,
)

__all__ = [
  "Boxes",
  "ClassActivation",
  "Column",
  "Curve",
  "DeletionCurve",
  "Grid",
  "Picture",
  "Plot",
  "Regions",
  "attend",
  "boxes_figure",
  "class_activation_maps",
  "comparison_figure",
  "curves_figure",
  "deletion_curve",
  "draw_boxes",
  "draw_importance",
  "effective_receptive_fields",
  "feature_grids",
  "figure_to_array",
  "importance_figure",
  "importance_maps",
  "layer_grids",
  "pixel_importance",
  "predictor",
  "random_scores",
  "save_figure",
  "shift_consistency",
  "to_input",
  "window_importance",
]
