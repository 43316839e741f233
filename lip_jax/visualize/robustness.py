"""How steady predictions are: under shifts, and as pixels are occluded."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Predict = Callable[[np.ndarray], np.ndarray]  # images [N, H, W, 3] -> logits [N, K]
Border = Literal["crop", "reflect", "zero", "wrap"]

_PAD_MODES: dict[str, Any] = {"reflect": "reflect", "zero": "constant", "wrap": "wrap"}
# Right, down, left, up and the four diagonals: (rows, columns).
_DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))


class DeletionCurve(NamedTuple):
  """What is left of the predictions as pixels are occluded."""

  fractions: np.ndarray  # [F]: occluded part of each image's pixels
  probability: np.ndarray  # [F]: of the label, mean over the images
  accuracy: np.ndarray  # [F]: fraction of images whose prediction is the label

  @property
  def area(self) -> float:
    """Under the curve of the probability, over the range of the fractions."""
    return float(np.trapezoid(self.probability, self.fractions))

  @property
  def accuracy_area(self) -> float:
    """Under the curve of the accuracy, over the range of the fractions."""
    return float(np.trapezoid(self.accuracy, self.fractions))


def predictor(model: nnx.Module, batch_size: int = 100) -> Predict:
  """Compiled function from any number of normalized images [N, H, W, 3] to logits [N, K].

  The model is in eval mode; `batch_size` images are computed at once.
  """
  graph, state = nnx.split(model)

  @jax.jit
  def run(state: Any, images: jax.Array) -> jax.Array:
    return nnx.merge(graph, state, copy=True)(images)

  def predict(images: np.ndarray) -> np.ndarray:
    size = min(batch_size, len(images))
    outputs = []
    for start in range(0, len(images), size):
      batch = images[start : start + size]
      rows = len(batch)
      # Filled up, so that there is one program to compile.
      batch = np.concatenate([batch, np.zeros((size - rows, *batch.shape[1:]), batch.dtype)])
      outputs.append(np.asarray(run(state, jnp.asarray(batch)))[:rows])
    return np.concatenate(outputs)

  return predict


def shift_consistency(
  predict: Predict,
  images: np.ndarray,
  shifts: Sequence[int] = tuple(range(1, 9)),
  border: Border = "reflect",
) -> dict[int, float]:
  """How often the prediction survives a shift.

  For a shift of d pixels: the fraction of (image, direction) whose prediction is the one of the
  image that is not shifted, over all images and eight directions: d pixels along the rows, along
  the columns, and along both. Zhang 2019 ("Making convolutional networks shift-invariant again")
  compares two random shifts of an image in place of a shift and none.

  Args:
    predict: from normalized images to logits; the largest one is the prediction.
    images: [N, H, W, 3], normalized.
    shifts: in pixels, each at least 1 and, for "reflect", below H and W.
    border: what comes in at the border: "crop", what the images hold there: `predict` gets their
      central [H - 2 m, W - 2 m] for m = max(shifts), moved; "reflect", the image mirrored at its
      outermost pixels; "zero", zeros; "wrap", what has gone out on the other side.

  Returns:
    From each shift to a fraction.

  Raises:
    ValueError: a shift or border that there is not, or no images.
  """
  most = max(shifts, default=0)
  if min(shifts, default=0) < 1 or not len(images):
    raise ValueError(f"expected images and shifts of at least 1, got {len(images)}, {shifts}")
  height, width = images.shape[1:3]
  if border == "crop":
    height, width = height - 2 * most, width - 2 * most
  elif border not in _PAD_MODES:
    raise ValueError(f"unknown border {border!r}; choose one of crop, {', '.join(_PAD_MODES)}")
  if min(height, width) < (most + 1 if border == "reflect" else 1):
    raise ValueError(f"images of {images.shape[1:3]} are too small for a shift of {most} pixels")
  if border != "crop":
    margins = ((0, 0), (most, most), (most, most), (0, 0))
    images = np.pad(images, margins, mode=_PAD_MODES[border])

  def predictions(rows: int, columns: int) -> np.ndarray:
    top, left = most - rows, most - columns
    return predict(images[:, top : top + height, left : left + width]).argmax(axis=1)

  unshifted = predictions(0, 0)

  def consistency(shift: int) -> float:
    moved = [predictions(shift * down, shift * right) for down, right in _DIRECTIONS]
    return float(np.mean(np.stack(moved) == unshifted[None]))

  return {shift: consistency(shift) for shift in shifts}


def deletion_curve(
  predict: Predict,
  images: np.ndarray,
  scores: np.ndarray,
  labels: np.ndarray | None = None,
  *,
  fractions: Sequence[float] = tuple(np.linspace(0, 1, 21)),
  fill: np.ndarray | float = 0.0,
  most_first: bool = True,
) -> DeletionCurve:
  """Occludes more and more of each image's pixels, in the order of their scores.

  The deletion metric of Petsiuk et al. 2018 ("RISE"). Where scores are equal, the pixel that comes
  first row by row goes first.

  Args:
    images: [N, H, W, 3], normalized.
    scores: [N, H, W], for example `pixel_importance`.
    labels: [N]; None: what the network predicts for the whole images.
    fractions: increasing, 0 to 1, of the pixels to occlude, rounded to whole pixels.

  Raises:
    ValueError: scores of another shape than the images.
  """
  if scores.shape != images.shape[:3]:
    raise ValueError(f"scores must be {images.shape[:3]} as the images, got {scores.shape}")
  ordered = scores.reshape(len(images), -1)
  order = np.argsort(-ordered if most_first else ordered, axis=1, kind="stable")
  rank = np.empty_like(order)
  np.put_along_axis(rank, order, np.arange(order.shape[1])[None], axis=1)
  rank = rank.reshape(scores.shape)
  if labels is None:
    labels = predict(images).argmax(axis=1)

  def points() -> Iterator[tuple[float, float]]:
    for fraction in fractions:
      occluded = (rank < round(fraction * order.shape[1]))[..., None]
      logits = predict(np.where(occluded, fill, images).astype(images.dtype))
      accuracy = float((logits.argmax(axis=1) == labels).mean())
      yield float(probabilities(logits, labels).mean()), accuracy

  probability, accuracy = zip(*points(), strict=True)
  return DeletionCurve(np.asarray(fractions), np.asarray(probability), np.asarray(accuracy))


def probabilities(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Softmax of logits [N, K] at labels [N], float64 [N]."""
  powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
  return powers[np.arange(len(labels)), labels] / powers.sum(axis=1)


def random_scores(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
  """Scores [N, H, W] that put the pixels into random order: what importance is to be held to."""
  return np.random.default_rng(seed).random(shape)
