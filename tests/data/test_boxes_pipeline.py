"""Batches of images with boxes: geometry, buckets, order, resuming, what is left out."""

import io
import json
import logging

import fixture_boxes
import numpy as np
import pytest
from fixture_batches import digest, join
from PIL import Image

from lip_jax.data import boxes_pipeline
from lip_jax.data.boxes import open_boxes
from lip_jax.data.pipeline import UnreadableImagesError
from lip_jax.errors import UsageError

COUNT = 23
RESIZE = {"short_side": 48, "long_side": 80}
BUCKETS = ("48x80", "80x48", "56x64")
OPTIONS = {
  **RESIZE, "buckets": BUCKETS, "max_boxes": 4, "flip": 0.5, "global_batch_size": 4, "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return open_boxes(fixture_boxes.write(tmp_path_factory.mktemp("boxes"), count=COUNT), "all")


def open_changed(folder, change):
  """Of annotations that `change` alters."""
  values = fixture_boxes.content(COUNT)
  change(values)
  return open_boxes(fixture_boxes.write(folder, values), "all")


def take(source, count, **options):
  with boxes_pipeline.train_loader(source, **{**OPTIONS, **options}) as loader:
    return [next(loader) for _ in range(count)]


def evaluate(source, **options):
  options = {**RESIZE, "buckets": BUCKETS, "global_batch_size": 4, "num_threads": 2, **options}
  return list(boxes_pipeline.eval_batches(source, **options))


def num_batches(source, **options):
  options = {**RESIZE, "buckets": BUCKETS, "max_boxes": 4, **options}
  return boxes_pipeline.train_images(source, **options).num_train(4) // 4


def ids(batches):
  return [int(number) for batch in batches for number in batch["image_id"]]


# Geometry.


def bright(image, size):
  """x1, y1, x2, y2 of what is bright, by half intensities at its borders."""
  grey = image[: size[0], : size[1]].astype(np.float64).mean(axis=2)
  inside = (grey - 20) / 210
  rows, columns = inside.max(axis=1).clip(0, 1), inside.max(axis=0).clip(0, 1)
  (y,), (x,) = (np.nonzero(line > 0.5)[:1] for line in (rows, columns))
  return np.array([x[0], y[0], x[-1] + 1, y[-1] + 1])


@pytest.mark.parametrize("flip", [0, 1])
def test_a_box_is_where_its_object_is(source, flip):
  for batch in take(source, num_batches(source), flip=flip):
    assert batch["image"].dtype == np.uint8
    for k, number in enumerate(batch["image_id"]):
      size = batch["size"][k]
      height, width = fixture_boxes.SIZES[number % 7]
      scale = min(80 / max(height, width), 48 / min(height, width))
      assert size.tolist() == [int(height * scale + 0.5), int(width * scale + 0.5)]
      assert batch["valid"][k].tolist() == [True, False, False, False]
      assert not batch["boxes"][k, 1:].any()
      # Half of a pixel is what the border of a bright pixel may be off.
      np.testing.assert_allclose(batch["boxes"][k, 0], bright(batch["image"][k], size), atol=0.8)
      x, y, w, h = fixture_boxes.picture(int(number), height, width)[1]
      x1, y1, x2, y2 = np.array([x, y, x + w, y + h]) * scale
      expected = [size[1] - x2, y1, size[1] - x1, y2] if flip else [x1, y1, x2, y2]
      np.testing.assert_allclose(batch["boxes"][k, 0], expected, rtol=1e-6)
      assert batch["labels"][k, 0] == (number % 2 == 0)
      assert not batch["image"][k, size[0] :].any()
      assert not batch["image"][k, :, size[1] :].any()


def test_half_of_the_images_are_flipped_and_each_differently_in_each_epoch(source):
  n = num_batches(source)
  plain = {number: box for b in take(source, n, flip=0) for number, box in rows(b)}
  batches = take(source, 3 * n)
  flipped = [box != plain[number] for batch in batches for number, box in rows(batch)]
  assert 0.3 < np.mean(flipped) < 0.7
  epochs = [dict(pair for b in batches[e * n : (e + 1) * n] for pair in rows(b)) for e in range(3)]
  assert epochs[0] != epochs[1] != epochs[2]


def rows(batch):
  return [
    (int(n), box.tolist()) for n, box in zip(batch["image_id"], batch["boxes"][:, 0], strict=True)
  ]


def test_sizes_are_those_of_the_formula():
  sizes = np.array([[480, 640], [640, 480], [427, 640], [1, 1], [1, 5000], [333, 500]])
  found, scales = boxes_pipeline.resized(sizes, 800, 1333)
  assert found.tolist() == [
    [800, 1067], [1067, 800], [800, 1199], [800, 800], [1, 1333], [800, 1201],
  ]  # fmt: skip
  assert scales[0] == 800 / 480


def test_boxes_are_cut_at_the_image(tmp_path):
  def change(values):
    for annotation in values["annotations"]:
      annotation["bbox"] = [-5, -6, 500, 500]

  for batch in take(open_changed(tmp_path, change), 4):
    height, width = batch["size"][:, 0], batch["size"][:, 1]
    zero = np.zeros_like(height)
    np.testing.assert_array_equal(batch["boxes"][:, 0], np.stack([zero, zero, width, height], 1))


# Buckets and order.


def test_an_image_goes_to_the_smallest_bucket_that_holds_it(source):
  bucket = boxes_pipeline.assign_buckets(source, (*BUCKETS, "80x80"), **RESIZE)
  shapes = np.array(boxes_pipeline.parse_buckets((*BUCKETS, "80x80")))
  sizes, _ = boxes_pipeline.resized(source.image_sizes(), **RESIZE)
  for size, chosen in zip(sizes, bucket, strict=True):
    fits = [k for k, shape in enumerate(shapes) if (size <= shape).all()]
    assert chosen == min(fits, key=lambda k: shapes[k].prod())
  assert len(set(bucket.tolist())) == 3


def test_an_image_that_fits_nowhere_is_named(source):
  with pytest.raises(UsageError, match=r"all image \d+ \(\d+.jpg\) has \d+x\d+ pixels.*buckets=\("):
    take(source, 1, buckets=("48x80", "56x64"))
  for buckets in ((), ("48",), ("48x80", "48x80"), ("0x3",), ("48X80",)):
    with pytest.raises(UsageError, match="expected different shapes HEIGHTxWIDTH"):
      evaluate(source, buckets=buckets)


def test_an_epoch_has_whole_batches_of_each_bucket(source):
  n = num_batches(source)
  assert n * 4 >= COUNT
  orders = []
  for epoch in range(3):
    batches = take(source, n * (epoch + 1))[n * epoch :]
    assert set(ids(batches)) == set(range(COUNT))
    orders.append(ids(batches))
  assert len(set(map(tuple, orders))) == 3
  # Repeated are the fewest that are needed.
  images = boxes_pipeline.train_images(source, **RESIZE, buckets=BUCKETS, max_boxes=4)
  assert sum(map(len, images.groups)) == COUNT
  assert images.num_train(4) == sum(-(-len(group) // 4) * 4 for group in images.groups)
  shapes = [batch["image"].shape for batch in take(source, n)]
  assert shapes != sorted(shapes)  # mixed
  assert {shape[1:3] for shape in shapes} == set(boxes_pipeline.parse_buckets(BUCKETS))


def test_a_bucket_with_fewer_images_than_a_batch_and_one_without(source):
  batches = take(source, 9, global_batch_size=32, buckets=(*BUCKETS, "200x200"))
  assert {batch["image"].shape[0] for batch in batches} == {32}
  assert {batch["image"].shape[1] for batch in batches} == {48, 80, 56}
  assert set(ids(batches[:3])) == set(range(COUNT))


@pytest.mark.parametrize("process_count", [2, 4])
def test_batches_do_not_depend_on_processes_or_threads(source, process_count):
  reference = take(source, 15)
  assert digest(take(source, 15, num_threads=3)) == digest(reference)
  assert digest(take(source, 15, num_threads=0)) == digest(reference)
  assert digest(take(source, 15, seed=1)) != digest(reference)
  parts = [
    take(source, 15, process_index=p, process_count=process_count) for p in range(process_count)
  ]
  assert digest(join(parts)) == digest(reference)


@pytest.mark.parametrize("step", [0, 3, 8, 13])
def test_resumes_exactly_on_any_number_of_processes(source, step):
  with boxes_pipeline.train_loader(source, **OPTIONS, num_threads=2) as loader:
    for _ in range(step):
      next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    expected = digest([next(loader) for _ in range(9)])
  for count in (1, 2, 4):
    parts = []
    for p in range(count):
      with boxes_pipeline.train_loader(
        source, **OPTIONS, process_index=p, process_count=count
      ) as loader:
        loader.set_state(state)
        parts.append([next(loader) for _ in range(9)])
    assert digest(join(parts)) == expected


def test_the_state_of_other_buckets_is_refused(source):
  with boxes_pipeline.train_loader(source, **OPTIONS) as loader:
    state = loader.get_state()
  options = {**OPTIONS, "buckets": ("80x80",)}
  with (
    boxes_pipeline.train_loader(source, **options) as loader,
    pytest.raises(UsageError, match="was saved with num_examples="),
  ):
    loader.set_state(state)


# What cannot be learned.


def test_what_is_left_out_is_counted(tmp_path, caplog):
  def change(values):
    boxes = values["annotations"]
    del boxes[0]  # image 0 has none
    boxes[0]["iscrowd"] = 1  # image 1 is all crowd
    boxes[1]["bbox"][2] = 0.5  # image 2 has a degenerate one only
    boxes[2]["area"] = 0
    boxes += [{**boxes[5], "id": 100 + k, "bbox": [k, 1, 5, 5]} for k in range(7)]  # image 6
    boxes.append({**boxes[6], "id": 200, "bbox": [1, 1, 9, 0.9]})  # image 7

  source = open_changed(tmp_path, change)
  with caplog.at_level(logging.INFO):
    batches = take(source, 12)
  assert set(ids(batches)) == set(range(4, COUNT))
  for message in (
    "4 images without a box to learn are left out",
    "1 boxes without an area, or outside their image, are left out",
    "1 images have more than max_boxes=4 boxes, up to 8; the rest is left out of them",
  ):
    assert sum(f"all: {message}" in record.getMessage() for record in caplog.records) == 1
  counts = {
    int(number): int(valid.sum())
    for batch in batches
    for number, valid in zip(batch["image_id"], batch["valid"], strict=True)
  }
  assert counts[6] == 4
  assert counts[7] == 1
  assert set(ids(evaluate(source))) - {-1} == set(range(COUNT))


def test_crowds_are_marked_and_the_first_to_be_left_out(tmp_path):
  def change(values):
    boxes = values["annotations"]
    boxes[6]["iscrowd"] = 1
    boxes += [{**boxes[6], "id": 100 + k, "bbox": [k, 1, 5, 5], "iscrowd": 0} for k in range(4)]
    boxes.append({**boxes[7], "id": 200, "iscrowd": 1})

  batches = take(open_changed(tmp_path, change), 12, flip=0)
  found = {
    int(number): (crowd.tolist(), valid.tolist())
    for batch in batches
    for number, crowd, valid in zip(batch["image_id"], batch["crowd"], batch["valid"], strict=True)
  }
  assert found[6] == ([False] * 4, [True] * 4)
  assert found[7] == ([False, True, False, False], [True, True, False, False])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda values: values["annotations"].clear(), "has no image to train on"),
    (lambda values: [box.update(iscrowd=1) for box in values["annotations"]], "has no image to"),
  ],
)
def test_nothing_to_train_on(tmp_path, change, message):
  source = open_changed(tmp_path, change)
  with pytest.raises(UsageError, match=message):
    take(source, 1)
  assert len(set(ids(evaluate(source)))) == COUNT + 1


def test_small_images_are_evaluated_but_not_trained(source):
  batches = take(source, 20, min_side=40)
  assert not set(ids(batches)) & {k for k in range(COUNT) if min(fixture_boxes.SIZES[k % 7]) < 40}


def test_strange_images(tmp_path):
  """1x1 pixels, grey, CMYK, turned by EXIF, with other sizes than is annotated, and damaged."""

  def change(values):
    values["images"][0] |= {"height": 1, "width": 1}
    values["images"][10] |= {"height": 64, "width": 33}  # turned
    values["images"][11] |= {"width": 63}

  source = open_changed(tmp_path, change)
  folder = tmp_path / "images"
  Image.new("RGB", (1, 1), (9, 9, 9)).save(folder / "0.jpg")
  for k, mode in ((1, "L"), (2, "CMYK")):
    height, width = fixture_boxes.SIZES[k]
    Image.new(mode, (width, height)).save(folder / f"{k}.jpg", "JPEG")
  exif = Image.Exif()
  exif[0x0112] = 6  # a quarter turn, which is ignored: boxes are of the stored pixels
  image = Image.open(io.BytesIO((folder / "3.jpg").read_bytes()))
  image.save(folder / "3.jpg", exif=exif, quality=98)
  (folder / "12.jpg").write_bytes(b"")
  (folder / "13.jpg").unlink()
  batches = take(source, 16)
  assert set(ids(batches)) == set(range(COUNT)) - {0, 10, 11, 12, 13}
  with pytest.raises(UnreadableImagesError, match="4 of 23 images") as caught:
    evaluate(source)
  text = " | ".join(caught.value.faults)
  assert (
    "(10.jpg): it has 64x33 pixels as stored, and its boxes are of 33x64 pixels, turned" in text
  )
  assert "(11.jpg): it has 33x64 pixels as stored, and its boxes are of 63x64 pixels" in text
  assert "(12.jpg): no data" in text
  assert "(13.jpg): No such file" in text


def test_an_unreadable_image_is_replaced_by_the_next_of_its_bucket(tmp_path):
  dataset = fixture_boxes.write(tmp_path, count=COUNT)
  for k in (3, 4, 9):
    (tmp_path / "images" / f"{k}.jpg").write_bytes(b"damaged")
  source = open_boxes(dataset, "all")
  images = boxes_pipeline.train_images(source, **RESIZE, buckets=BUCKETS, max_boxes=4)
  expected, broken = [], {3, 4, 9}
  for group in images.groups:
    numbers = source.table.image_ids[group].tolist()
    for k, number in enumerate(numbers):
      following = numbers[k:] + numbers[:k]
      expected.append((number, next(n for n in following if n not in broken)))
  replaced = {number: other for number, other in expected if number != other}
  assert set(replaced) == broken
  whole = open_boxes(fixture_boxes.write(tmp_path / "whole", count=COUNT), "all")
  pairs = zip(ids(take(whole, 9)), ids(take(source, 9)), strict=True)
  assert all(replaced.get(number, number) == other for number, other in pairs)
  with boxes_pipeline.train_loader(source, **OPTIONS) as loader:
    for _ in range(9):
      next(loader)
    assert loader.num_skipped() == 3


# Evaluation.


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("global_batch_size", [4, 20])
def test_every_image_is_evaluated_once(source, process_count, global_batch_size):
  parts = [
    evaluate(
      source,
      global_batch_size=global_batch_size,
      process_index=p,
      process_count=process_count,
    )
    for p in range(process_count)
  ]
  batches = join(parts)
  options = {**RESIZE, "buckets": BUCKETS, "global_batch_size": global_batch_size}
  assert boxes_pipeline.num_eval_batches(source, **options) == len(batches)
  numbers = np.array(ids(batches))
  assert sorted(numbers[numbers >= 0]) == list(range(COUNT))
  mask = np.concatenate([batch["mask"] for batch in batches])
  np.testing.assert_array_equal(numbers >= 0, mask)
  for batch in batches:
    assert batch["scale"].dtype == np.float32
    for k, number in enumerate(batch["image_id"]):
      if number < 0:
        assert not batch["image"][k].any()
        continue
      original = batch["original"][k]
      assert original.tolist() == list(fixture_boxes.SIZES[number % 7])
      expected = (original * np.float64(batch["scale"][k]) + 0.5).astype(int)
      np.testing.assert_array_equal(batch["size"][k], expected)
      height, width = batch["size"][k]
      assert batch["image"][k, :height, :width].min() > 0
      assert not batch["image"][k, height:].any()
      assert not batch["image"][k, :, width:].any()
  shapes = [batch["image"].shape for batch in batches]
  assert len(set(shapes)) == 3
  assert [shape for k, shape in enumerate(shapes) if shape not in shapes[:k]] == [
    (global_batch_size, *shape, 3) for shape in boxes_pipeline.parse_buckets(BUCKETS)
  ]
  assert len({tuple(b["image"].shape[1:] for b in part) for part in parts}) == 1


def test_train_images_say_what_an_epoch_has(source):
  images = boxes_pipeline.train_images(source, **RESIZE, buckets=BUCKETS, max_boxes=4)
  assert images[1:] == (0, 0, 0, 0, 1)
