"""The embedded data set: what is in the pictures, and that TFDS writes and reads them."""

import dataclasses

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn import datasets as sklearn_datasets

from lip_jax.data.prepare import cluttered_digits
from lip_jax.data.prepare.cluttered_digits import ClutteredDigits
from lip_jax.data.prepare.cluttered_scene import SOURCES, Box, cut_piece, draw_scene, load_digits
from lip_jax.data.preprocess import decode_jpeg

CLASSIFY, DETECT, DETECT_SMALL, SIZES, SIZES_LARGE = ClutteredDigits.BUILDER_CONFIGS
TINY = {
  "tiny_classify": dataclasses.replace(
    CLASSIFY, name="tiny_classify", num_train=24, num_validation=9
  ),
  "tiny_detect": dataclasses.replace(DETECT, name="tiny_detect", num_train=6, num_validation=4),
}


def prepare(config, data_dir):
  builder = ClutteredDigits(config=config, data_dir=data_dir)
  builder.download_and_prepare(file_format="array_record")
  return builder


def read(builder, split):
  return list(builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}))


@pytest.fixture(scope="module")
def builders(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp("tfds")
  return {name: prepare(config, data_dir) for name, config in TINY.items()}


def overlap(one, other):
  height = min(one.bottom, other.bottom) - max(one.top, other.top)
  width = min(one.right, other.right) - max(one.left, other.left)
  return max(height, 0) * max(width, 0)


def test_published_configurations():
  assert ClutteredDigits.name == "cluttered_digits"
  assert ClutteredDigits.default_builder_config is CLASSIFY
  assert (CLASSIFY.name, CLASSIFY.canvas) == ("classify", 48)
  assert (CLASSIFY.num_train, CLASSIFY.num_validation) == (20_000, 2_000)
  assert (DETECT.name, DETECT.canvas) == ("detect", 128)
  assert (DETECT.num_train, DETECT.num_validation) == (2_000, 500)
  assert (DETECT_SMALL.name, DETECT_SMALL.canvas) == ("detect_small", 96)
  assert (DETECT_SMALL.num_train, DETECT_SMALL.num_validation) == (8_000, 1_000)


def test_splits_use_digits_of_different_writers():
  labels = sklearn_datasets.load_digits().target
  assert [*SOURCES["train"], *SOURCES["validation"]] == list(range(len(labels)))
  # Each writer's digits begin with 0 to 9, twice.
  first = SOURCES["validation"].start
  np.testing.assert_array_equal(labels[first : first + 20], [*range(10), *range(10)])


@pytest.mark.parametrize("config", [CLASSIFY, DETECT], ids=lambda config: config.name)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_pictures_use_the_digits_of_their_split(config, split):
  used = {source for k in range(40) for source in draw_scene(config, split, k).sources}
  assert len(used) > 100
  assert used <= set(SOURCES[split])


@pytest.mark.parametrize("config", [CLASSIFY, DETECT], ids=lambda config: config.name)
def test_a_picture_depends_on_configuration_split_and_number_alone(config):
  scene = draw_scene(config, "train", 3)
  again = draw_scene(config, "train", 3)
  np.testing.assert_array_equal(scene.image, again.image)
  assert scene[1:] == again[1:]
  others = [draw_scene(config, "train", 4), draw_scene(config, "validation", 3)]
  for other in others:
    assert (scene.image != other.image).mean() > 0.5


def test_all_classes_occur_about_equally_often():
  labels = [draw_scene(CLASSIFY, "train", k).labels[0] for k in range(600)]
  counts = np.bincount(labels, minlength=10)
  assert counts.min() > 30
  assert counts.max() < 100


@pytest.mark.parametrize("config", [CLASSIFY, DETECT], ids=lambda config: config.name)
def test_digits_lie_inside_the_picture_and_beside_each_other(config):
  counts = set()
  for k in range(60):
    scene = draw_scene(config, "train", k)
    assert scene.image.shape == (config.canvas, config.canvas, 3)
    assert scene.image.dtype == np.uint8
    assert len(scene.boxes) == len(scene.labels)
    counts.add(len(scene.boxes))
    areas = [box.area for box in scene.boxes]
    assert areas == sorted(areas, reverse=True)
    for box in scene.boxes:
      assert 0 <= box.top < box.bottom <= config.canvas
      assert 0 <= box.left < box.right <= config.canvas
      assert config.digit_height[0] <= box.height <= config.digit_height[1]
    for i, box in enumerate(scene.boxes):
      taken = sum(overlap(box, other) for other in scene.boxes[:i])
      assert taken <= 0.1 * box.area
  assert counts <= set(range(config.digits[0], config.digits[1] + 1))
  assert len(counts) == config.digits[1] - config.digits[0] + 1


def ink_box(image):
  """Box of the one digit in a picture without clutter, found in the pixels."""
  grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), 0.7)
  distance = np.abs(grey - np.median(grey))
  is_ink = distance > 0.5 * np.quantile(distance, 0.98)
  _, names, parts, _ = cv2.connectedComponentsWithStats(is_ink.astype(np.uint8))
  # A thin stroke may be broken into two pieces; specks are noise.
  pieces = [name for name, part in enumerate(parts) if name > 0 and part[cv2.CC_STAT_AREA] > 8]
  rows, columns = np.isin(names, pieces).nonzero()
  return Box(int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1)


def test_boxes_are_tight_around_the_ink():
  config = dataclasses.replace(CLASSIFY, name="no_clutter", fragments=(0, 0))
  misfits = []
  for k in range(100):
    scene = draw_scene(config, "train", k)
    found, (box,) = ink_box(scene.image), scene.boxes
    misfits.append(max(abs(a - b) for a, b in zip(found, box, strict=True)))
  # Where the ground is uneven and the ink faint, the search above takes ground for ink.
  assert np.mean(np.array(misfits) <= 1) >= 0.95


def test_clutter_is_small_pieces_of_digits():
  rng = np.random.default_rng(0)
  masks = load_digits().masks
  for mask in masks[::20]:
    piece = cut_piece(rng, mask)
    assert piece.sum() < 0.5 * mask.sum()
    assert len(piece) <= 0.55 * len(mask)


def test_records_say_what_the_picture_holds(builders):
  for name, config in TINY.items():
    for split, count in [("train", config.num_train), ("validation", config.num_validation)]:
      records = read(builders[name], split)
      assert len(records) == count
      assert [record["id"].decode() for record in records] == [
        f"{split}/{k:06d}" for k in range(count)
      ]
      for k, record in enumerate(records):
        scene = draw_scene(config, split, k)
        assert record["label"] == scene.labels[0]
        assert list(record["objects"]["label"]) == scene.labels
        boxes = np.array(record["objects"]["bbox"])
        assert boxes.min() >= 0
        assert boxes.max() <= 1
        np.testing.assert_allclose(boxes * config.canvas, np.array(scene.boxes), atol=1e-4)
        image = decode_jpeg(record["image"])
        assert image.shape == scene.image.shape
        assert np.abs(image.astype(int) - scene.image).mean() < 8


def test_preparing_again_writes_the_same_records(builders, tmp_path):
  again = prepare(TINY["tiny_classify"], tmp_path)
  for split in ("train", "validation"):
    first = read(builders["tiny_classify"], split)
    assert [r["image"] for r in read(again, split)] == [r["image"] for r in first]


def test_preparing_twice_does_nothing(builders):
  files = sorted(builders["tiny_classify"].data_path.iterdir())
  before = [(path.name, path.stat().mtime) for path in files]
  again = prepare(TINY["tiny_classify"], builders["tiny_classify"].data_dir_root)
  assert [(path.name, path.stat().mtime) for path in sorted(again.data_path.iterdir())] == before


def test_interrupted_preparation_is_redone(monkeypatch, tmp_path):
  def interrupted(config, split, k):
    if k == 5:
      raise KeyboardInterrupt
    return draw_scene(config, split, k)

  with monkeypatch.context() as patch:
    patch.setattr(cluttered_digits, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
      prepare(TINY["tiny_classify"], tmp_path)
  # A process that is killed leaves its files behind.
  left = tmp_path / "cluttered_digits" / "tiny_classify" / "incomplete.ABCDEF_1.0.0"
  left.mkdir(parents=True)
  (left / "cluttered_digits-train.array_record-00000-of-00001").write_bytes(b"half a record")

  builder = prepare(TINY["tiny_classify"], tmp_path)
  assert len(read(builder, "train")) == TINY["tiny_classify"].num_train
  assert len(read(builder, "validation")) == TINY["tiny_classify"].num_validation
