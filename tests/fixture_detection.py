"""Reference values of detection's operators, and how their inputs are made (NumPy only)."""

import json
from pathlib import Path

import numpy as np
from fixture_weights import image, normal
from scipy.optimize import linear_sum_assignment

DATA = Path(__file__).parent / "data" / "detection"
OPERATIONS = json.loads((DATA / "operations.json").read_text())
PRESETS = ("torchvision", "mmdet1")


def reference(name: str):
  """Arrays of one operation, by their names."""
  return np.load(DATA / f"{name}.npz")


def nhwc(array: np.ndarray) -> np.ndarray:
  return np.asarray(array, np.float64).transpose(0, 2, 3, 1)


def noise(name: str, shape) -> np.ndarray:
  """Float64 [N, H, W, C] of `fixture_weights.image`, whose shape is N, C, H, W."""
  return nhwc(image(name, tuple(shape)))


def priority(name: str, count: int) -> np.ndarray:
  """Priorities of a sampler: of the candidates, those with the smallest values are taken."""
  return normal("priority/" + name, (count,))


def random_boxes(seed: int, count: int, extent: float = 100.0) -> np.ndarray:
  """Boxes on a grid of half pixels, so that overlaps tie, some of them equal."""
  rng = np.random.default_rng(seed)
  start = rng.uniform(-0.2 * extent, extent, (count, 2))
  boxes = np.concatenate([start, start + rng.uniform(0, 0.5 * extent, (count, 2))], axis=1)
  boxes = np.round(2 * boxes) / 2
  boxes[count // 2 :: 3] = boxes[: len(boxes[count // 2 :: 3])]
  return boxes


def assert_same_detections(found, expected):
  """Arrays of two `Detections`; in any order, as scores may be equal but for rounding."""
  for ours, theirs in zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True):
    (boxes, scores, labels), (others, their_scores, their_labels) = (
      [a[one[3]] for a in one[:3]] for one in (ours, theirs)
    )
    same = (np.abs(boxes[:, None] - others).max(axis=2) < 1e-2) & (labels[:, None] == their_labels)
    same &= np.abs(scores[:, None] - their_scores) < 1e-4
    assert len(boxes) == len(others)
    assert same[linear_sum_assignment(~same)].all()  # one to one; some may be the same


def loop_iou(a: np.ndarray, b: np.ndarray, inclusive: bool) -> np.ndarray:
  """IoU of all pairs, one at a time, in the dtype of a; 0 / 0 is 0."""
  pixel = a.dtype.type(inclusive)
  out = np.zeros((len(a), len(b)), a.dtype)
  for i, p in enumerate(a):
    for j, q in enumerate(b):
      width = max(min(p[2], q[2]) - max(p[0], q[0]) + pixel, 0)
      height = max(min(p[3], q[3]) - max(p[1], q[1]) + pixel, 0)
      areas = [(one[2] - one[0] + pixel) * (one[3] - one[1] + pixel) for one in (p, q)]
      if width * height > 0:
        out[i, j] = width * height / (areas[0] + areas[1] - width * height)
  return out
