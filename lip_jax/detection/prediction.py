"""What a detector finds in image files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lip_jax.data import boxes_pipeline, preprocess
from lip_jax.detection import categories
from lip_jax.detection.anchors import DIVISOR
from lip_jax.detection.detector import Detector
from lip_jax.detection.inputs import normalize
from lip_jax.models import description
from lip_jax.models.folding import fold_batch_norm
from lip_jax.visualize import Boxes, pixel_importance, with_importance

# Images [N, H, W, 3], normalized and padded, and their sizes [N, 2] -> `Detections`, and the
# importance of each image's pixels [h, w], a mean of one, without the padding; None without LIP.
Look = Callable[[jax.Array, np.ndarray], tuple[Any, list[np.ndarray] | None]]


class Found(NamedTuple):
  """A file, and what was found in it."""

  path: str
  error: str | None  # why it is unreadable; then nothing else is known
  pixels: np.ndarray | None = None  # uint8 [H, W, 3]
  boxes: Boxes | None = None  # in these pixels, by decreasing score; labels are the data set's
  importance: np.ndarray | None = None  # [H', W'], from border to border, a mean of one


def looker(detector: Detector) -> Look:
  """`detector.detect` and what its LIP layers find important, compiled for each shape of images.

  Args:
    detector: in eval mode.
  """
  folded = fold_batch_norm(detector)
  run = with_importance(folded, lambda copy, images, sizes: copy.detect(images, sizes))
  prefix = "backbone."

  def look(images: jax.Array, sizes: np.ndarray) -> tuple[Any, list[np.ndarray] | None]:
    found, maps = run(images, sizes)
    maps = {name.removeprefix(prefix): values for name, values in maps.items()}
    height, width = images.shape[1:3]
    importance = pixel_importance(maps, detector.backbone, (height, width))
    if importance is None:
      return jax.device_get(found), None
    parts = [one[:rows, :columns] for one, (rows, columns) in zip(importance, sizes, strict=True)]
    return jax.device_get(found), [part / part.mean() for part in parts]

  return look


def predict(
  detector: Detector,
  config: Mapping[str, Any],
  paths: Sequence[str | Path],
  *,
  threshold: float = 0.5,
  upright: bool = True,
) -> Iterator[Found]:
  """What is found in each image, of any size, with a score of at least `threshold`.

  Images are resized as in training and padded to multiples of 32; each shape is compiled once.

  Args:
    config: from `lip_jax.load`.
    upright: whether to turn images as their EXIF orientation says.

  Raises:
    UsageError: the detector has weights that are not finite.
  """
  description.check_finite(detector, config["source"]["path"])
  prepared = config["preprocess"]
  look = looker(detector)
  ids = config["category_ids"] or list(range(1, config["num_classes"] + 1))
  classes = categories.classes(ids, detector.preset, detector.num_labels)
  for path in paths:
    try:
      pixels = preprocess.decode_jpeg(Path(path).read_bytes(), upright=upright)
    except OSError as error:
      yield Found(str(path), error.strerror or str(error))
      continue
    except preprocess.CorruptImage as error:
      yield Found(str(path), str(error))
      continue
    image, scale = boxes_pipeline.resize(pixels, prepared["short_side"], prepared["long_side"])
    sizes = np.array([image.shape[:2]], np.int32)
    bottom, right = -sizes[0] % DIVISOR
    batch = np.pad(image, ((0, bottom), (0, right), (0, 0)))[None]
    found, importance = look(_normalized(batch, sizes, prepared), sizes)
    labels = classes[found.labels[0]]
    keep = found.valid[0] & (found.scores[0] >= threshold) & (labels >= 0)
    limits = np.tile(np.asarray(pixels.shape[1::-1], np.float64), 2)[None]
    boxes = np.clip(found.boxes[0][keep].astype(np.float64) / scale, 0, limits)
    yield Found(
      str(path),
      None,
      pixels,
      Boxes(boxes, labels[keep], found.scores[0][keep]),
      None if importance is None else importance[0],
    )


def _normalized(batch: np.ndarray, sizes: np.ndarray, prepared: Mapping[str, Any]) -> jax.Array:
  return normalize(jnp.asarray(batch), jnp.asarray(sizes), prepared["mean"], prepared["std"])
