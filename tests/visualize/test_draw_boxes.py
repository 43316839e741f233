"""Pictures of boxes: drawn where the boxes are, readable at any size."""

import itertools

import numpy as np
import pytest
from PIL import Image

from lip_jax import visualize
from lip_jax.visualize import Boxes, Picture

GREY = np.full((60, 96, 3), 100, np.uint8)


def changed(picture, image):
  """Which pixels of a picture are not those of the image that it is of, enlarged."""
  plain = visualize.draw_boxes(image, np.zeros((0, 4)), np.zeros(0, int), size=max(picture.shape))
  return (picture != plain).any(axis=2)


def test_a_box_is_drawn_at_its_border_and_named_above_it():
  picture = visualize.draw_boxes(GREY, np.array([[20.0, 30, 60, 50]]), np.array([1]))
  assert picture.shape == (300, 480, 3)  # five times as large
  where = changed(picture, GREY)
  rows, columns = np.where(where[150:])  # without the name
  assert (columns.min(), columns.max()) == (100, 299)
  assert (rows.min() + 150, rows.max() + 150) == (150, 249)
  assert not where[156:244, 106:294].any()  # nothing is covered
  name = np.where(where[:150])
  assert 125 < name[0].min() < 140
  assert name[1].min() == 100


def test_names_and_scores_are_written():
  boxes = np.array([[20.0, 30, 60, 50]])
  pictures = [
    visualize.draw_boxes(GREY, boxes, np.array([1]), scores, names)
    for scores, names in (
      (None, None),
      (None, ["ant", "bee"]),
      (np.array([0.5]), ["ant", "bee"]),
      (np.array([0.9]), ["ant", "bee"]),
    )
  ]
  texts = [picture[:150] for picture in pictures]
  assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(texts))
  assert all(np.array_equal(picture[150:], pictures[0][150:]) for picture in pictures)


def test_classes_differ_in_colour_and_the_best_is_on_top():
  boxes = np.array([[20.0, 30, 60, 50], [20, 30, 60, 50]])
  first, second = (
    visualize.draw_boxes(GREY, boxes[:1], np.array([label]))[249 - 2, 200] for label in (0, 1)
  )
  assert not np.array_equal(first, second)
  for scores, expected in (((0.9, 0.2), first), ((0.2, 0.9), second)):
    picture = visualize.draw_boxes(GREY, boxes, np.array([0, 1]), np.array(scores))
    assert np.array_equal(picture[249 - 2, 200], expected)


@pytest.mark.parametrize(
  "box", [(0, 0, 96, 60), (95, 59, 96, 60), (-50, -50, 500, 500), (40, 40, 40, 40), (-9, 3, -5, 7)]
)
def test_boxes_at_and_over_the_border(box):
  picture = visualize.draw_boxes(GREY, np.array([box], float), np.array([0]), np.array([1.0]))
  assert picture.shape == (300, 480, 3)
  assert changed(picture, GREY).any()


@pytest.mark.parametrize(
  ("shape", "size", "expected"),
  [
    ((1, 1), None, (480, 480)),
    ((800, 1333), None, (800, 1333)),
    ((800, 1333), 400, (240, 400)),
    ((3, 2000), 400, (1, 400)),
  ],
)
def test_sizes(shape, size, expected):
  image = np.zeros((*shape, 3), np.uint8)
  picture = visualize.draw_boxes(image, np.array([[0.0, 0, 1, 1]]), np.array([3]), size=size)
  assert picture.shape == (*expected, 3)
  assert picture.dtype == np.uint8


def test_a_figure_has_a_panel_for_each_kind_of_boxes_and_for_importance(tmp_path):
  found = Boxes(np.array([[20.0, 30, 60, 50]]), np.array([1]), np.array([0.7]))
  importance = np.ones((6, 10))
  importance[:, :5] = 4
  kinds = {"truth": Boxes(found.boxes, found.labels), "found": found}
  pictures = [Picture("a$b$", GREY, kinds, importance), Picture("b", GREY[:, :40], kinds, None)]
  figure = visualize.boxes_figure(pictures, ["ant", "bee"])
  pixels = visualize.figure_to_array(figure)
  assert pixels.shape[0] > 600
  assert pixels.shape[1] > 1440
  titles = [axis.get_title() for axis in figure.axes]
  assert titles[:3] == ["truth", "found", "importance"]
  assert figure.axes[0].get_title(loc="left") == "a$b$\n"  # above the columns' titles
  left, right = (figure.axes[2].images[0].get_array()[150, x] for x in (50, 400))
  assert left[0] > left[2]  # yellow: four times the mean
  assert np.ptp(right) < 0.1  # grey: the mean
  visualize.save_figure(figure, tmp_path / "x.png")
  with Image.open(tmp_path / "x.png") as saved:
    assert saved.size[0] > 1440
  assert len(visualize.boxes_figure([Picture("a", GREY, {"found": found})]).axes) == 1


def test_what_is_written_beside_a_low_image_fits():
  found = Boxes(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
  image = np.zeros((20, 200, 3), np.uint8)
  figure = visualize.boxes_figure([Picture("", image, {"found": found}, np.ones((20, 200)))])
  visualize.figure_to_array(figure)  # which places everything
  label = figure.axes[-1].yaxis.label.get_window_extent()
  assert label.y0 >= 0
  assert label.y1 <= figure.bbox.y1
