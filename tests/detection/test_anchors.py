import dataclasses

import jax
import numpy as np
import pytest
from fixture_detection import OPERATIONS, PRESETS, reference

from lip_jax.detection.anchors import ANCHORS
from lip_jax.errors import UsageError

FIGURES = OPERATIONS["anchors"]
PADDED, SIZE = tuple(FIGURES["padded"]), FIGURES["size"]
GRIDS = {case["kind"]: [tuple(grid) for grid in case["grids"]] for case in FIGURES["cases"]}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", GRIDS)
def test_equal_the_reference(kind, preset):
  arrays, anchors = reference("anchors"), ANCHORS[kind, preset]
  cells = [anchors.cell(level) for level in range(5)]
  np.testing.assert_array_equal(cells, arrays[f"{kind}/{preset}/base"])
  boxes = anchors.boxes(PADDED, GRIDS[kind])
  assert boxes.dtype == np.float32
  np.testing.assert_array_equal(boxes, arrays[f"{kind}/{preset}/anchors"])
  usable = anchors.usable(SIZE, PADDED, GRIDS[kind])
  expected = arrays[f"{kind}/mmdet1/usable"] if preset == "mmdet1" else np.ones(len(boxes), bool)
  np.testing.assert_array_equal(usable, expected)


def test_order_by_a_loop():
  grids = [(2, 3), (1, 2), (1, 1), (1, 1), (1, 1)]
  anchors = ANCHORS["retinanet", "mmdet1"]
  expected = []
  for stride, (rows, columns) in zip(anchors.strides, grids, strict=True):
    for row, column in np.ndindex(rows, columns):
      for ratio in (0.5, 1, 2):
        for third in range(3):
          size = 4 * stride * 2 ** (third / 3)
          width, height, middle = size / ratio**0.5, size * ratio**0.5, (stride - 1) / 2
          sides = np.array([1 - width, 1 - height, width - 1, height - 1]) / 2
          expected.append(np.round(sides + middle) + stride * np.array([column, row] * 2))
  np.testing.assert_array_equal(anchors.boxes((16, 24), grids), expected)


@pytest.mark.parametrize("kind", GRIDS)
def test_used_anchors_do_not_depend_on_the_batch(kind):
  anchors, small = ANCHORS[kind, "mmdet1"], GRIDS[kind]
  # Twice as wide as it needs to be.
  wide, large = (PADDED[0], 2 * PADDED[1]), [(rows, 2 * columns) for rows, columns in small]
  size = np.array([150, 224])  # its own padding is PADDED
  found = [
    anchors.boxes(padded, grids)[anchors.usable(size, padded, grids)]
    for padded, grids in ((PADDED, small), (wide, large))
  ]
  np.testing.assert_array_equal(*found)


def test_vmap_over_sizes():
  anchors = ANCHORS["rpn", "mmdet1"]
  sizes = np.array([SIZE, [160, 224], [1, 1], [0, 0]])

  @jax.jit
  @jax.vmap
  def usable(size):
    return anchors.usable(size, PADDED, GRIDS["rpn"])

  found = np.asarray(usable(sizes))
  np.testing.assert_array_equal(found[0], reference("anchors")["rpn/mmdet1/usable"])
  assert not found[2:].any()  # no anchor lies in an image of one pixel
  cells = dataclasses.replace(anchors, whole=False).usable(sizes[2], PADDED, GRIDS["rpn"])
  assert cells.sum() == 3 * (8 * 8 + 4 * 4 + 2 * 2 + 1 + 1)  # of 32 x 32 pixels


def test_a_grid_for_each_level():
  with pytest.raises(UsageError, match="2 grids for anchors of 5 levels"):
    ANCHORS["rpn", "mmdet1"].boxes(PADDED, GRIDS["rpn"][:2])
