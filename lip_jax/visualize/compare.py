"""Several loaded networks on the same images: what `lip-jax visualize` draws and measures.

What cannot be read, is not there or does not fit the networks is a `UsageError` everywhere here.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lip_jax
from lip_jax.errors import UsageError, printable
from lip_jax.export import class_names
from lip_jax.ops.images import normalize
from lip_jax.visualize import robustness
from lip_jax.visualize.attribution import attend, class_activation_maps
from lip_jax.visualize.figures import Column
from lip_jax.visualize.grids import Grid, even_grid, feature_grids, to_input
from lip_jax.visualize.importance import importance_maps, pixel_importance
from lip_jax.visualize.robustness import DeletionCurve, Predict

SHIFTS = tuple(range(1, 9))  # pixels
ORDERS = ("most important first", "random", "least important first")

_BATCH = 100  # images that are computed at once

Scores = Literal["importance", "cam"]
Watch = Callable[[Predict, str, int], Predict]  # a predictor that says how far it is


class Network(NamedTuple):
  """A loaded network and what belongs to it."""

  name: str  # in figures and tables
  path: str
  model: nnx.Module  # in eval mode
  config: Mapping[str, Any]  # as `lip_jax.load` gives it

  @property
  def preprocess(self) -> Mapping[str, Any]:
    """How its images are prepared: "image_size", "resize", "mean" and "std"."""
    return self.config["preprocess"]

  def normalize(self, pixels: np.ndarray) -> np.ndarray:
    """RGB images [..., H, W, 3], 0 to 255 -> float32, what the model takes."""
    mean, std = self.preprocess["mean"], self.preprocess["std"]
    return np.asarray(normalize(jnp.asarray(pixels), mean, std))

  def class_name(self, label: int) -> str:
    """Name of a class, or its number."""
    names = self.config.get("class_names")
    return printable(names[label]) if names and label < len(names) else str(label)


class Images(NamedTuple):
  """Images of one size, uint8 [N, H, W, 3], labels [N] or None, and their titles [N]."""

  pixels: np.ndarray
  labels: np.ndarray | None
  titles: list[str]
  class_names: Sequence[str] = ()  # of the labels
  source: str = ""  # name of the data set


class Data(NamedTuple):
  """Where images come from: as for `lip_jax.data.source.open_split`."""

  dataset: str
  split: str
  data_dir: str | None


def load_networks(paths: Sequence[str], names: Sequence[str] | None = None) -> list[Network]:
  """Networks of `lip_jax.load`, which prepare their images alike; else raises UsageError.

  Their names, in figures and tables, are the last parts of the paths if none are given.
  """
  if names is None:
    ends = [Path(path).name or path for path in paths]
    names = ends if len(set(ends)) == len(ends) else paths
  if len(names) != len(paths):
    raise UsageError(f"{len(names)} names for {len(paths)} networks; give one for each")
  networks = [
    Network(name, path, *lip_jax.load(path)) for name, path in zip(names, paths, strict=True)
  ]
  for network in networks:
    missing = {"image_size", "resize", "mean", "std"} - set(network.config.get("preprocess") or ())
    if missing:
      raise UsageError(
        f"{network.path} does not say how images are prepared: its config.json lacks "
        f"preprocess.{', preprocess.'.join(sorted(missing))}; add it there, or export it again"
      )
    size, colours = network.preprocess["image_size"], len(network.preprocess["mean"])
    if not isinstance(size, int) or colours != 3:
      raise UsageError(f"{network.path} takes other images than square ones in RGB; leave it out")
  sizes = {(n.preprocess["image_size"], n.preprocess["resize"]) for n in networks}
  if len(sizes) > 1:
    raise UsageError(
      "the networks take different images, (image_size, resize): "
      f"{', '.join(f'{size[0]}, {size[1]}' for size in sorted(sizes))}; compare those that take "
      "the same"
    )
  return networks


def read_images(
  networks: Sequence[Network], paths: Sequence[str], margin: int = 0, *, upright: bool = True
) -> Images:
  """Image files, prepared for the networks; `margin` pixels are left around the central square.

  They are turned as their EXIF orientation says, if `upright`.
  """
  from lip_jax.data.preprocess import CorruptImage, decode_center_crop

  preprocess, pixels = networks[0].preprocess, []
  size = preprocess["image_size"] + 2 * margin
  for path in paths:
    try:
      data = Path(path).read_bytes()
      pixels.append(decode_center_crop(data, size, preprocess["resize"], upright=upright))
    except (OSError, CorruptImage) as error:
      raise UsageError(f"cannot read the image {path}: {error}; give another") from error
  return Images(np.stack(pixels), None, [printable(Path(path).stem) for path in paths])


def first_images(
  networks: Sequence[Network],
  data: Data | None,
  count: int,
  margin: int = 0,
  *,
  upright: bool = True,
) -> Images:
  """The first `count` images of a split, or all if there are fewer, as `read_images` gives them.

  Without `data` it is the validation split that the first network's configuration names. Images of
  folders are turned as their EXIF orientation says, if `upright`.
  """
  from lip_jax.data import pipeline, transforms
  from lip_jax.data.source import open_split

  data = data or _own_data(networks)
  source = open_split(data.dataset, data.split, data.data_dir)
  preprocess = networks[0].preprocess
  crop = transforms.EvalCrop(
    preprocess["image_size"] + 2 * margin,
    preprocess["resize"],
    upright=upright and source.upright,
  )
  size = min(count, _BATCH)
  batches = pipeline.eval_batches(source, crop, global_batch_size=size, num_threads=2)
  pixels, labels = [], []
  with contextlib.closing(batches):
    for batch in itertools.islice(batches, math.ceil(count / size)):
      real = batch["mask"] > 0
      pixels.append(batch["image"][real])
      labels.append(batch["label"][real])
  every = np.concatenate(labels)[:count]
  if not len(every):
    raise UsageError(f"{source.name} has no readable images; give others with --data")
  return Images(
    np.concatenate(pixels)[:count],
    every,
    [printable(f"label: {source.class_names[n]}") for n in every],
    source.class_names,
    source.name,
  )


def column(
  network: Network,
  pixels: np.ndarray,
  *,
  label: int | None = None,
  locations: Sequence[tuple[int, int]] | None = None,
) -> Column:
  """Importance, class activation map and effective receptive fields, for `comparison_figure`.

  Args:
    pixels: [N, H, W, 3] uint8.
    label: class of the activation maps; None: what the network predicts.
    locations: (row, column) in the class activation map, for all images, of which receptive fields
      are to be shown; None: where each map is largest.
  """
  size = pixels.shape[1:3]
  images = jnp.asarray(network.normalize(pixels))
  chosen = None if locations is None else np.asarray(locations)
  (maps, classes, logits), places, fields = attend(network.model, images, label, chosen)
  grid = _activation_grid(network, maps, size)
  shares = robustness.probabilities(np.asarray(logits), np.asarray(classes))
  return Column(
    name=network.name,
    importance=_importance(network, images),
    activation=to_input(maps, grid, size),
    fields=np.asarray(fields),
    points=np.asarray([[grid.centre(place) for place in row] for row in places]),
    titles=[
      f"{network.class_name(int(n))} ({p:.0%})" for n, p in zip(classes, shares, strict=True)
    ],
  )


def shift_consistency(
  network: Network, images: Images, border: robustness.Border, watch: Watch
) -> dict[int, float]:
  """`robustness.shift_consistency` of a network, by `SHIFTS`."""
  batches = (1 + 8 * len(SHIFTS)) * len(images.pixels)
  predict = watch(robustness.predictor(network.model, _BATCH), f"{network.name}: shifts", batches)
  return robustness.shift_consistency(predict, network.normalize(images.pixels), SHIFTS, border)


def deletion_curves(
  network: Network,
  images: Images,
  *,
  scores: Scores | None = None,
  fill: Literal["dataset", "image"] = "dataset",
  watch: Watch,
) -> tuple[Scores, dict[str, DeletionCurve]]:
  """`deletion_curve` of a network, in each of three orders.

  Args:
    images: to occlude; without labels, what the network predicts for them stands in their place.
    scores: what says how important a pixel is: "importance", of LIP, or "cam", the class activation
      map of the predicted class. None: importance if the network has LIP, else the latter.

  Returns:
    The scores that were used, and a curve for each of `ORDERS`.
  """
  if images.labels is not None:
    config = network.config
    class_names.check(
      config["num_classes"], config.get("class_names"), images.class_names, images.source
    )
  normalized = network.normalize(images.pixels)
  parts = [
    _scores(network, normalized[start : start + _BATCH], scores)
    for start in range(0, len(normalized), _BATCH)
  ]
  used, values = parts[0][0], np.concatenate([part for _, part in parts])
  total = len(ORDERS) * (21 + (images.labels is None)) * len(normalized)
  predict = watch(robustness.predictor(network.model, _BATCH), f"{network.name}: deletion", total)
  colour = normalized.mean(axis=(1, 2), keepdims=True) if fill == "image" else 0.0
  curves = {
    order: robustness.deletion_curve(
      predict,
      normalized,
      robustness.random_scores(values.shape) if order == "random" else values,
      images.labels,
      fill=colour,
      most_first=order != ORDERS[-1],
    )
    for order in ORDERS
  }
  return used, curves


def room(networks: Sequence[Network]) -> int:
  """Pixels that preparing the images cuts off at each side, and that a shift can bring in."""
  preprocess = networks[0].preprocess
  return (preprocess["resize"] - preprocess["image_size"]) // 2


def find_class(network: Network, text: str) -> int:
  """Label of a class by its name, or by its number where no class has that name."""
  names = list(map(str, network.config.get("class_names") or ()))
  if text in names:
    return names.index(text)
  if text.isdecimal() and int(text) < network.config["num_classes"]:
    return int(text)
  some = f", such as {', '.join(names[:5])}" if names else ""
  raise UsageError(
    f"{network.path} has no class {text!r}; give a name{some}, or a number from 0 to "
    f"{network.config['num_classes'] - 1}"
  )


def _scores(
  network: Network, normalized: np.ndarray, scores: Scores | None
) -> tuple[Scores, np.ndarray]:
  images = jnp.asarray(normalized)
  if scores != "cam":
    values = _importance(network, images)
    if values is not None:
      return "importance", values
    if scores == "importance":
      raise UsageError(f"{network.path} has no LIP layer and so no importance; take --by=cam")
  maps, size = class_activation_maps(network.model, images).maps, normalized.shape[1:3]
  return "cam", to_input(maps, _activation_grid(network, maps, size), size)


def _importance(network: Network, images: jax.Array) -> np.ndarray | None:
  maps = importance_maps(network.model, images)
  return pixel_importance(maps, network.model, (images.shape[1], images.shape[2]))


def _activation_grid(network: Network, maps: Any, size: tuple[int, ...]) -> Grid:
  return feature_grids(network.model).get("c5") or even_grid(maps.shape[1:], size)


def _own_data(networks: Sequence[Network]) -> Data:
  """The validation split that the first network that has one was trained with."""
  for network in networks:
    data = network.config.get("data") or {}
    if "dataset" in data:
      split = data.get("validation_split", "validation")
      return Data(data["dataset"], split, data.get("data_dir"))
  raise UsageError(
    f"{networks[0].path} does not say what it was trained on; give image files, or a data set with "
    "--data, for example --data=cluttered_digits/classify"
  )
