"""What a detector finds in several forms of the same images, put together."""

from collections.abc import Sequence

import jax
import numpy as np

from lip_jax.detection.coco_metric import Results
from lip_jax.detection.postprocess import DETECTIONS, NMS_THRESHOLD
from lip_jax.ops.nms import nms


def merge(views: Sequence[Results]) -> Results:
  """The best of all that was found in each image, after suppression by class.

  Args:
    views: detections in the same images, flipped or of other sizes, in pixels of the images as
      stored.
  """
  found = Results.joined(views)
  order = np.argsort(found.image_ids, kind="stable")
  ids, counts = np.unique(found.image_ids, return_counts=True)
  most = int(counts.max(initial=0))
  parts = []
  for rows in np.split(order, np.cumsum(counts)[:-1]) if len(ids) else ():
    room = (0, most - len(rows))
    boxes = found.boxes[rows]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    index, valid = _best(
      np.pad(corners, (room, (0, 0))).astype(np.float32),
      np.pad(found.scores[rows], room).astype(np.float32),
      np.pad(found.category_ids[rows], room).astype(np.int32),
      np.arange(most) < len(rows),
    )
    kept = rows[np.asarray(index)[np.asarray(valid)]]
    parts.append(Results(*(column[kept] for column in found)))
  return Results.joined(parts)


@jax.jit
def _best(
  boxes: jax.Array, scores: jax.Array, labels: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return nms(boxes, scores, labels, threshold=NMS_THRESHOLD, limit=DETECTIONS, valid=valid)
