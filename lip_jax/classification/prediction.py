"""What a network sees in image files."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lip_jax.errors import UsageError
from lip_jax.models import description
from lip_jax.models.folding import fold_batch_norm
from lip_jax.ops import images

_BATCH = 16  # images at once


class Prediction(NamedTuple):
  """A class and its probability."""

  label: int
  name: str  # the label in digits, where names are not known
  probability: float


class Image(NamedTuple):
  """A file, and what became of it."""

  path: str
  pixels: np.ndarray | None  # uint8 [S, S, 3], as the network sees it; None: unreadable
  error: str | None  # why it is unreadable


def read(
  paths: Sequence[str | Path], config: Mapping[str, Any], *, upright: bool = True
) -> Iterator[Image]:
  """Decodes image files and cuts out what the network sees.

  Args:
    config: from `lip_jax.load`.
    upright: whether to turn them as their EXIF orientation says.

  Raises:
    UsageError: the network does not say how images are prepared, or nothing here can decode them.
  """
  prepared = config["preprocess"]
  if prepared is None:
    raise UsageError(
      f"{config['source']['path']} does not say how images are prepared: its config.json lacks "
      "preprocess; export or convert it again"
    )
  try:
    from lip_jax.data import preprocess, transforms
  except ImportError as error:
    raise UsageError(f"images cannot be decoded here ({error}); install lip-jax[train]") from error
  for path in paths:
    try:
      pixels = preprocess.decode_center_crop(
        Path(path).read_bytes(), prepared["image_size"], prepared["resize"], upright=upright
      )
      yield Image(str(path), transforms.in_channels(pixels, len(prepared["mean"])), None)
    except OSError as error:
      yield Image(str(path), None, error.strerror or str(error))
    except preprocess.CorruptImage as error:
      yield Image(str(path), None, str(error))


def normalize(pixels: np.ndarray, config: Mapping[str, Any]) -> jax.Array:
  """Pixels [N, S, S, 3] uint8 -> what the network takes, float32.

  Args:
    config: from `lip_jax.load`.
  """
  preprocess = config["preprocess"]
  return images.normalize(jnp.asarray(pixels), preprocess["mean"], preprocess["std"])


def predict(
  model: nnx.Module, config: Mapping[str, Any], pixels: np.ndarray, top: int = 5
) -> list[list[Prediction]]:
  """The most probable classes of each image, the first one first.

  Args:
    config: from `lip_jax.load`.
    pixels: uint8 [N, S, S, 3], as `read` gives them.
    top: classes for each image; no more than there are.

  Raises:
    UsageError: the network has weights that are not finite.
  """
  description.check_finite(model, config["source"]["path"])
  graph, state = nnx.split(fold_batch_norm(model))
  top = min(top, config["num_classes"])
  names = config["class_names"] or [str(label) for label in range(config["num_classes"])]

  @jax.jit
  def best(state, images):
    logits = nnx.merge(graph, state, copy=True)(images)
    return jax.lax.top_k(jax.nn.softmax(logits), top)

  size = min(_BATCH, max(len(pixels), 1))
  predictions = []
  for start in range(0, len(pixels), size):
    part = pixels[start : start + size]
    padding = [(0, size - len(part)), (0, 0), (0, 0), (0, 0)]  # one size: compiled once
    probabilities, labels = best(state, normalize(np.pad(part, padding), config))
    for row in range(len(part)):
      predictions.append(
        [
          Prediction(int(label), names[int(label)], float(probability))
          for label, probability in zip(labels[row], probabilities[row], strict=True)
        ]
      )
  return predictions
