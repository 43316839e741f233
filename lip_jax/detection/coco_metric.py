"""COCO's detection metric, by a library that keeps to its letter."""

import contextlib
import importlib
import importlib.metadata
import io
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lip_jax.data.annotations import COCO_AREA_LIMITS
from lip_jax.errors import UsageError

SIZES = ("small", "medium", "large")
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)

_MOST = (1, 10, 100)  # detections that count, of one class in one image
_LARGEST_AREA = 1e10
# Where several are there, the first is taken: it is the fastest. All give the same numbers.
_LIBRARIES = (
  ("hotcoco", "hotcoco", "hotcoco"),
  ("pycocotools", "pycocotools.coco", "pycocotools.cocoeval"),
)

NAMES = (
  "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
  "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip


class Results(NamedTuple):
  """D detections in any number of images; in an image, of equal scores the first counts first."""

  image_ids: np.ndarray  # int64 [D]
  category_ids: np.ndarray  # int64 [D]
  boxes: np.ndarray  # float64 [D, 4], x, y, width, height in pixels of the image as stored
  scores: np.ndarray  # float64 [D]

  @classmethod
  def joined(cls, parts: Sequence["Results"]) -> "Results":
    """Those of several batches, one after the other."""
    empty = cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
    return cls(*(np.concatenate(columns) for columns in zip(empty, *parts, strict=True)))


class Score(NamedTuple):
  """What detections are worth.

  Attributes:
    metrics: COCO's 12 numbers by `NAMES`, fractions; -1 where no object counts.
    by_class: AP by the category's name, with its id where others have that name; -1 likewise.
    precision: float64 [10 IoU thresholds, 101 recalls, classes, 4 ranges of area: all, small,
      medium, large], of 100 detections; -1 likewise.
    library: name and version of what computed it.
  """

  metrics: dict[str, float]
  by_class: dict[str, float]
  precision: np.ndarray
  library: str

  def curve(self, size: str | None = None, iou: float | None = None) -> np.ndarray:
    """Precision at `RECALLS`, averaged over classes that have objects: [101], -1 without any.

    Args:
      size: "small", "medium" or "large"; None: all.
      iou: a threshold; None: averaged over all ten.
    """
    area = 0 if size is None else 1 + SIZES.index(size)
    thresholds = slice(None) if iou is None else np.isclose(IOU_THRESHOLDS, iou)
    values = self.precision[thresholds, ..., area]
    return np.array([_mean(values[:, recall]) for recall in range(len(RECALLS))])


def score(
  ground_truth: Mapping[str, Any],
  results: Results,
  *,
  area_limits: tuple[float, float] | None = None,
) -> Score:
  """Average precision and recall as pycocotools defines them, over all images of `ground_truth`.

  Args:
    ground_truth: "images", "annotations" and "categories" as in COCO's files, and perhaps "info".
      Images without annotations count: what is found in them is wrong.
    results: in any order of images, whose ids are among them.
    area_limits: between small and medium, and medium and large objects, in pixels^2; None: those
      of the ground truth's "info", or COCO's.

  Raises:
    UsageError: no library is installed.
  """
  library, coco, coco_eval = _library()
  names = _names(ground_truth["categories"])
  truth = {
    "images": [{"id": image["id"]} for image in ground_truth["images"]],
    "categories": [{"id": number, "name": name} for number, name in names.items()],
    "annotations": [_annotation(*one) for one in enumerate(ground_truth["annotations"], start=1)],
  }
  info = ground_truth.get("info", {})
  bounds = [0.0, *(area_limits or info.get("area_limits", COCO_AREA_LIMITS)), _LARGEST_AREA]
  # They report on stdout, which belongs to the commands.
  with contextlib.redirect_stdout(io.StringIO()):
    expected, found = coco(truth), coco({**truth, "annotations": []})
    if len(results.scores):
      columns = (results.image_ids, results.boxes, results.scores, results.category_ids)
      found = expected.loadRes(np.column_stack([column.astype(np.float64) for column in columns]))
    evaluation = coco_eval(expected, found, "bbox")
    evaluation.params.areaRng = [[0.0, _LARGEST_AREA], *map(list, itertools.pairwise(bounds))]
    evaluation.params.maxDets = list(_MOST)
    evaluation.evaluate()
    evaluation.accumulate()
  precision = np.asarray(evaluation.eval["precision"])[..., -1]
  recall = np.asarray(evaluation.eval["recall"])  # [thresholds, classes, areas, most]
  return Score(
    _metrics(precision, recall),
    {
      names[int(key)]: _mean(precision[:, :, k, 0])
      for k, key in enumerate(evaluation.params.catIds)
    },
    precision,
    library,
  )


def _names(categories: Sequence[Mapping[str, Any]]) -> dict[int, str]:
  """Names by id; where several categories have one name, with the id, so that each keeps its AP."""
  names = {one["id"]: str(one.get("name", one["id"])) for one in categories}
  count = Counter(names.values())
  return {key: name if count[name] == 1 else f"{name} ({key})" for key, name in names.items()}


def _annotation(number: int, annotation: Mapping[str, Any]) -> dict[str, Any]:
  """An object as the libraries take it; they hold one whose id is 0 for not found."""
  box = annotation["bbox"]
  return {
    "id": number,
    "image_id": annotation["image_id"],
    "category_id": annotation["category_id"],
    "bbox": box,
    "area": annotation.get("area", box[2] * box[3]),
    "iscrowd": int(annotation.get("iscrowd", 0)),
  }


def _metrics(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
  at_50, at_75 = (int(np.argmin(abs(IOU_THRESHOLDS - iou))) for iou in (0.5, 0.75))
  everything = precision[..., 0]
  values = (
    *(everything, everything[at_50], everything[at_75]),
    *(precision[..., area] for area in (1, 2, 3)),
    *(recall[:, :, 0, most] for most in range(len(_MOST))),
    *(recall[:, :, area, -1] for area in (1, 2, 3)),
  )
  return {name: _mean(value) for name, value in zip(NAMES, values, strict=True)}


def _mean(values: np.ndarray) -> float:
  """Of those that are defined; -1 without any."""
  defined = values[values > -1]
  return float(defined.mean()) if defined.size else -1.0


def _library() -> tuple[str, Any, Any]:
  """Name and version, what makes a data set of a dict, and the evaluation, of a COCO library."""
  for name, module, evaluator in _LIBRARIES:
    try:
      data = importlib.import_module(module).COCO
      evaluation = importlib.import_module(evaluator).COCOeval
    except ImportError:
      continue
    return f"{name} {importlib.metadata.version(name)}", _maker(name, data), evaluation
  names = " or ".join(name for name, *_ in _LIBRARIES)
  raise UsageError(f"COCO's metric needs {names}; install lip-jax[train], or one of them")


def _maker(name: str, data: Any) -> Callable[[dict[str, Any]], Any]:
  """What makes a library's data set of a dict; pycocotools reads files otherwise."""
  if name != "pycocotools":
    return data

  def make(truth: dict[str, Any]) -> Any:
    made = data()
    made.dataset = truth
    made.createIndex()
    return made

  return make
