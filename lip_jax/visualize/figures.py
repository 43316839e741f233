"""Figures of what `lip_jax.visualize` computes; colours that the colour-blind can tell apart.

matplotlib is imported when something is drawn, without pyplot, which would choose a window system
and keep every figure.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from flax import nnx

from lip_jax.errors import UsageError
from lip_jax.visualize.boxes import LEAST, Picture, draw_boxes
from lip_jax.visualize.grids import layer_grids, to_input
from lip_jax.visualize.importance import importance_maps, main_layers

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")

_DPI = 110
_MOST = 960  # pixels of a single image's longer side
_BAR_LABEL = 3.4  # inches: as long as what is written beside the colours of importance
_IMPORTANCE, _ACTIVATION, _FIELD = "cividis", "viridis", "magma"
_TICKS: dict[str, dict[float, str]] = {
  _IMPORTANCE: {-2: "1/4", -1: "1/2", 0: "mean", 1: "2", 2: "4"},
  _ACTIVATION: {0: "0", 1: "largest"},
  _FIELD: {0: "0", 0.5: "1/4", 1: "largest"},
}
# What most systems have for scripts that the first lacks: Chinese, Japanese, Korean, Arabic, Hindi.
_FONTS = (
  "DejaVu Sans",
  "Noto Sans CJK SC",
  "Noto Sans CJK JP",
  "WenQuanYi Micro Hei",
  "PingFang SC",
  "Hiragino Sans",
  "Apple SD Gothic Neo",
  "Microsoft YaHei",
  "Malgun Gothic",
  "Noto Sans Arabic",
  "Noto Sans Devanagari",
  "Arial Unicode MS",
)
_TITLE: dict[str, Any] = {"fontsize": 9, "parse_math": False}  # a dollar sign is no formula
# Blue, orange, green, ... of Okabe and Ito, and a line style for print in grey.
_LINES: tuple[tuple[str, Any], ...] = (
  ("#0072B2", "-"),
  ("#D55E00", "--"),
  ("#009E73", "-."),
  ("#CC79A7", ":"),
  ("#E69F00", (0, (5, 1, 1, 1, 1, 1))),
  ("#56B4E9", (0, (1, 1))),
)


class Column(NamedTuple):
  """What one network makes of N images of H x W pixels: a column of `comparison_figure`."""

  name: str
  importance: np.ndarray | None  # [N, H, W], a mean of one; None for a network without LIP
  activation: np.ndarray  # [N, H, W]: class activation map, at the resolution of the images
  fields: np.ndarray  # [N, L, H, W]: effective receptive fields
  points: np.ndarray  # [N, L, 2]: (row, column) in the image, in pixels, that they are of
  titles: Sequence[str]  # [N]: what the network says the image is


class Curve(NamedTuple):
  """A line of `curves_figure`; those of one network share a colour, those of one kind a style."""

  network: str
  kind: str
  x: Sequence[float] | np.ndarray
  y: Sequence[float] | np.ndarray


class Plot(NamedTuple):
  """An axis of `curves_figure`."""

  title: str
  x_label: str
  y_label: str
  curves: Sequence[Curve]


def importance_figure(
  model: nnx.Module, images: np.ndarray, normalize: Callable[[np.ndarray], Any]
) -> "Figure | None":
  """Each image above the importance maps of the network's LIP layers; None if it has none.

  Of the two layers in a transition the one in the residual branch is shown; the other's maps look
  alike where both share a trunk.

  Args:
    images: [N, H, W, 3] uint8.
  """
  maps = main_layers(importance_maps(model, normalize(images)))
  if not maps:
    return None
  size = images.shape[1:3]
  grids = layer_grids(model)
  rows = len(maps) + 1
  figure = _figure(1.25 * len(images) + 1.7, 1.27 * rows)
  axes = figure.subplots(rows, len(images), squeeze=False)
  _label(axes[0, 0], f"input\n{size[0]}x{size[1]}")
  for axis, image in zip(axes[0], images, strict=True):
    axis.imshow(image)
  for row, (name, values) in enumerate(maps.items(), start=1):
    placed = to_input(values, grids.get(name), size, "nearest")
    short = name.split(".")[0] if "." in name else "stem"  # layer2.0.pool: "layer2"
    _label(axes[row, 0], f"{short}\n{values.shape[1]}x{values.shape[2]}")
    for axis, image, one in zip(axes[row], images, placed, strict=True):
      _draw_importance(axis, image, one)
  for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
  bar = _colour_bar(figure, _IMPORTANCE, ax=axes[1:], shrink=0.6 if rows > 3 else 0.9)
  bar.set_label("importance, relative to the image's mean")
  return figure


def draw_importance(
  model: nnx.Module,
  images: np.ndarray,
  normalize: Callable[[np.ndarray], Any],
  path: str | os.PathLike[str],
) -> bool:
  """Writes `importance_figure` to a file; False if there is none."""
  figure = importance_figure(model, images, normalize)
  if figure is not None:
    save_figure(figure, path)
  return figure is not None


def comparison_figure(
  images: np.ndarray, columns: Sequence[Column], image_titles: Sequence[str]
) -> "Figure":
  """Figure 5 of the paper: networks side by side, for each of the images [N, H, W, 3] uint8.

  A column for each network; rows: the image with the places that the receptive fields are of, the
  importance over all LIP layers (where a network has any), the class activation map, and the
  effective receptive field of each place.
  """
  has_importance = any(column.importance is not None for column in columns)
  fields = columns[0].fields.shape[1]
  labels = ["image", *["importance"] * has_importance, "class\nactivation"]
  labels += ["receptive\nfield" + (f" {n + 1}" if fields > 1 else "") for n in range(fields)]
  bars = [_IMPORTANCE] * has_importance + [_ACTIVATION] + [_FIELD] * fields
  across = max(1, min(len(images), 6 // len(columns)))
  down = -(-len(images) // across)
  figure = _figure(
    1.45 * (len(columns) * across + 0.25 * (across - 1)) + 1.0, down * (1.48 * len(labels) + 0.65)
  )
  # One grid for all, so that panels are of one size; images are set apart by a narrow column.
  grid = figure.add_gridspec(
    down * len(labels),
    across * (len(columns) + 1),
    width_ratios=([1.0] * len(columns) + [0.12]) * (across - 1) + [1.0] * len(columns) + [0.07],
  )
  for number, (image, title) in enumerate(zip(images, image_titles, strict=True)):
    top, left = number // across * len(labels), number % across * (len(columns) + 1)
    rows, places = range(top, top + len(labels)), range(left, left + len(columns))
    axes = np.array([[figure.add_subplot(grid[row, place]) for place in places] for row in rows])
    for index, column in enumerate(columns):
      _draw_column(axes[:, index], column, number, image)
    if number % across == 0:
      for axis, label in zip(axes[:, 0], labels, strict=True):
        _label(axis, label)
      for row, bar in zip(rows[1:], bars, strict=True):
        _colour_bar(figure, bar, cax=figure.add_subplot(grid[row, -1]))
    above: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes[0, 0].annotate(title, (0, 1), (0, 30), fontweight="bold", **above, **_TITLE)
    for axis in axes.flat:
      axis.set(xticks=[], yticks=[])
  return figure


def _draw_column(axes: np.ndarray, column: Column, number: int, image: np.ndarray) -> None:
  """What one network makes of an image, from top to bottom."""
  points, fields = column.points[number], column.fields[number]
  (first, *importance, activation), receptive = np.split(axes, [len(axes) - len(fields)])
  first.set_title(f"{column.name}\n{column.titles[number]}", **_TITLE)
  first.imshow(image)
  for axis in importance:  # none, or one
    if column.importance is None:
      axis.imshow(np.full((*image.shape[:2], 3), 0.94))
      middle = {"transform": axis.transAxes, "ha": "center", "va": "center"}
      axis.text(0.5, 0.5, "no LIP\nlayer", fontsize=9, **middle)
    else:
      _draw_importance(axis, image, column.importance[number])
  maps = np.maximum(column.activation[number], 0)
  _overlay(activation, image, maps / max(maps.max(), 1e-30), _ACTIVATION)
  for axis in (first, activation):
    _mark(axis, points)
  for axis, field, point in zip(receptive, fields, points, strict=True):
    # The root, so that more than the few largest gradients is seen.
    axis.imshow(np.sqrt(field / max(field.max(), 1e-30)), cmap=_FIELD, vmin=0, vmax=1)
    _mark(axis, point[None])


def boxes_figure(pictures: Sequence[Picture], class_names: Sequence[str] | None = None) -> "Figure":
  """Images one below the other: their boxes, and what the network finds important, side by side.

  All have boxes of the same titles; importance is shown where any has it.
  """
  titles = list(pictures[0].boxes)
  has_importance = any(picture.importance is not None for picture in pictures)
  sides = np.array([picture.image.shape[:2] for picture in pictures])
  size = min(max(int(sides.max()), LEAST), _MOST) if len(pictures) == 1 else LEAST
  rows, columns = len(pictures), len(titles) + has_importance
  heights, widths = (sides / sides.max(axis=1, keepdims=True) * size / _DPI).T
  height = max(heights.sum() + 0.3 * (rows + 1), _BAR_LABEL * has_importance)
  figure = _figure(columns * widths.max() + 0.8 * has_importance, height)
  axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
  for row, picture in zip(axes, pictures, strict=True):
    for axis, title in zip(row, titles, strict=False):
      axis.imshow(draw_boxes(picture.image, *picture.boxes[title], class_names, size=size))
    if picture.importance is not None:
      image = draw_boxes(picture.image, np.zeros((0, 4)), np.zeros(0), size=size)
      placed = to_input(picture.importance, None, image.shape[:2])
      _draw_importance(row[-1], image, placed)
    # In the first row a line above the columns' titles, with which a name could collide.
    below = "\n" if picture.title and picture is pictures[0] else ""
    row[0].set_title(picture.title + below, loc="left", **_TITLE)
  for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
  for axis, title in zip(axes[0], [*titles, "importance"], strict=False):
    axis.set_title(title, fontsize=9)
  if has_importance:
    shrink = min(1, 6 / heights.sum())
    # panchor: the images it is taken from stay in the middle of their column.
    bar = _colour_bar(figure, _IMPORTANCE, ax=axes[:, -1], shrink=shrink, panchor=False)
    bar.set_label("importance, relative to the image's mean")
  return figure


def curves_figure(plots: Sequence[Plot]) -> "Figure":
  """Lines in one plot for each quantity, side by side; the legend stands below them."""
  from matplotlib.lines import Line2D

  figure = _figure(4.6 * len(plots), 3.9)
  networks = list(dict.fromkeys(curve.network for plot in plots for curve in plot.curves))
  for axis, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
    kinds = list(dict.fromkeys(curve.kind for curve in plot.curves))
    present = list(dict.fromkeys(curve.network for curve in plot.curves))

    def line(name: str, kind: str, present=present, kinds=kinds) -> dict[str, Any]:
      # Styles tell kinds apart, where there are several, else networks.
      own = networks.index(name)
      style = kinds.index(kind) if len(kinds) > 1 else own if len(present) > 1 else 0
      colour = _LINES[own % len(_LINES)][0]
      return {"color": colour, "linestyle": _LINES[style % len(_LINES)][1], "linewidth": 1.8}

    for curve in plot.curves:
      axis.plot(curve.x, curve.y, **line(curve.network, curve.kind))
    handles = [Line2D([], [], label=name, **line(name, kinds[0])) for name in present]
    if len(kinds) > 1:
      for kind in kinds:
        handles.append(Line2D([], [], label=kind, **line(present[0], kind)))
        handles[-1].set(color="0.3", linewidth=1.4)
    axis.set_title(plot.title, fontsize=11)
    axis.set(xlabel=plot.x_label, ylabel=plot.y_label)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17)}
    columns = 2 if len(kinds) > 1 else 3
    legend = axis.legend(handles=handles, fontsize=8, frameon=False, ncols=columns, **below)
    for text in legend.get_texts():
      text.set_parse_math(False)
  return figure


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> None:
  """Writes a figure as PNG, SVG or PDF, by the suffix of the path.

  Raises:
    UsageError: another suffix, or the file cannot be written.
  """
  from etils import epath

  check_format(path)
  # Matplotlib writes to disks only, and the path may be in a bucket.
  picture = io.BytesIO()
  with _any_script(figure):
    figure.savefig(picture, format=Path(path).suffix.lower()[1:], dpi=_DPI)
  try:
    epath.Path(path).write_bytes(picture.getvalue())
  except OSError as error:
    raise UsageError(f"cannot write {path} ({error}); choose another file") from error


@contextlib.contextmanager
def _any_script(figure: "Figure") -> Iterator[None]:
  """While it is drawn, texts take letters from all fonts that are there.

  A letter that none has is an empty box, as everywhere; matplotlib would warn of each.
  """
  from matplotlib import font_manager, text

  there = set(font_manager.get_font_names())
  for one in figure.findobj(text.Text):
    one.set_fontfamily([font for font in _FONTS if font in there])
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph .* missing from")
    yield


def check_format(path: str | os.PathLike[str]) -> None:
  """Raises UsageError unless a figure can be written to a file of this name."""
  if Path(path).suffix.lower() not in FORMATS:
    raise UsageError(f"cannot draw {path}: its name must end in {', '.join(FORMATS)}")
  folder = Path(path).parent
  if "://" not in str(path) and not folder.is_dir():
    raise UsageError(f"cannot write {path}: there is no folder {folder}; create it first")


def figure_to_array(figure: "Figure") -> np.ndarray:
  """The figure's pixels, uint8 [H, W, 3], for example for TensorBoard."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  figure.set_dpi(_DPI)
  canvas = FigureCanvasAgg(figure)
  with _any_script(figure):
    canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _figure(width: float, height: float) -> "Figure":
  """An empty figure, in inches."""
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout="constrained")


def _draw_importance(axis: "Axes", image: np.ndarray, importance: np.ndarray) -> None:
  # Logarithmic: half as important is as far below the average as twice is above.
  _overlay(axis, image, np.log2(np.maximum(importance, 1e-30)) / 4 + 0.5, _IMPORTANCE)


def _overlay(axis: "Axes", image: np.ndarray, values: np.ndarray, colours: str) -> None:
  """Values, 0 to 1, in colours over the image in grey."""
  from matplotlib import colormaps

  colour = colormaps[colours](np.clip(values, 0, 1))[..., :3]
  luminance = image @ np.array([0.299, 0.587, 0.114])
  low, high = luminance.min(), luminance.max()
  grey = ((luminance - low) / max(high - low, 1))[..., None]  # stretched to 0 to 1
  axis.imshow(0.65 * colour + 0.35 * grey, interpolation="nearest")


def _mark(axis: "Axes", points: np.ndarray) -> None:
  """Rings, white on black, so that they are seen on any ground."""
  for row, column in points:
    for colour, width in (("black", 2.6), ("white", 1.2)):
      edge: dict[str, Any] = {"markeredgecolor": colour, "markeredgewidth": width}
      axis.plot([column], [row], "o", markersize=5, markerfacecolor="none", clip_on=False, **edge)


def _label(axis: "Axes", text: str) -> None:
  axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)


def _colour_bar(figure: Any, colours: str, **where: Any) -> Any:
  from matplotlib.cm import ScalarMappable
  from matplotlib.colors import Normalize

  ticks = _TICKS[colours]
  shades = ScalarMappable(Normalize(min(ticks), max(ticks)), colours)
  bar = figure.colorbar(shades, ticks=list(ticks), **where)
  bar.ax.set_yticklabels(ticks.values(), fontsize=8)
  return bar
