"""Batches: their order, their independence of processes, resuming, damaged images, evaluation."""

import dataclasses
import io
import json
import logging
import math
import subprocess
import sys
import threading
from typing import ClassVar

import fixture_numbered
import grain
import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds
from fixture_batches import digest, join
from PIL import Image

from lip_jax.data import pipeline
from lip_jax.data.pipeline import eval_batches, train_loader
from lip_jax.data.prepare.cluttered_digits import ClutteredDigits
from lip_jax.data.records import ImageLabelParser, ParsedRecords
from lip_jax.data.source import Source, open_split
from lip_jax.data.transforms import EvalCrop, TrainCrop
from lip_jax.errors import UsageError

COUNT = 37
BROKEN = {5: b"", 6: "half", 36: b"not an image"}


@dataclasses.dataclass(eq=False, kw_only=True)
class NumberedConfig(tfds.core.BuilderConfig):
  count: int = COUNT
  broken: dict = dataclasses.field(default_factory=dict)
  labelled: bool = True


class NumberedImages(tfds.core.GeneratorBasedBuilder):
  """Image k has label k, so that a label says which image it is; some are cut short."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS: ClassVar[list[NumberedConfig]] = [
    NumberedConfig(name="whole"),
    NumberedConfig(name="broken", broken=BROKEN),
    NumberedConfig(name="ruined", count=9, broken=dict.fromkeys(range(9), "half")),
    NumberedConfig(name="unlabelled", count=2, labelled=False),
    NumberedConfig(name="other_format", count=2),
  ]

  def _info(self):
    features = {
      "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
      "file_name": tfds.features.Text(),
    }
    if self.builder_config.labelled:
      features["label"] = tfds.features.ClassLabel(num_classes=COUNT)
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(), "validation": self._generate_examples()}

  def _generate_examples(self):
    for k in range(self.builder_config.count):
      data = encoded_image(k)
      broken = self.builder_config.broken.get(k, data)
      example = {"image": data[:150] if broken == "half" else broken, "file_name": f"{k}.JPEG"}
      if self.builder_config.labelled:
        example["label"] = k
      yield k, example


def encoded_image(k):
  pixels = np.random.default_rng(k).integers(0, 256, (20 + k % 5, 26 - k % 3, 3), np.uint8)
  return simplejpeg.encode_jpeg(pixels)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  for config in NumberedImages.BUILDER_CONFIGS:
    file_format = "parquet" if config.name == "other_format" else "array_record"
    builder = NumberedImages(config=config.name, data_dir=root)
    builder.download_and_prepare(file_format=file_format)
  return str(root)


@pytest.fixture(scope="module")
def whole(data_dir):
  return open_split("numbered_images/whole", "train", data_dir)


@pytest.fixture(scope="module")
def broken(data_dir):
  return open_split("numbered_images/broken", "train", data_dir)


def take(source, count, *, start=0, **options):
  """Batches start to start + count of a training stream."""
  options = {"transform": TrainCrop(16, (0.3, 1.0)), "global_batch_size": 8, "seed": 0, **options}
  with train_loader(source, **options) as loader:
    for _ in range(start):
      next(loader)
    return [next(loader) for _ in range(count)]


def labels(batches):
  return np.concatenate([batch["label"] for batch in batches])


def grain_threads():
  return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]


def wait_for_threads_to_end():
  for thread in grain_threads():
    thread.join(timeout=60)
  assert not grain_threads()


# The source.


def test_source_gives_encoded_images_and_labels(whole):
  assert len(whole) == COUNT
  assert whole.num_classes == COUNT
  assert whole.class_names == [str(k) for k in range(COUNT)]
  assert whole.name == "numbered_images/whole train"
  assert whole[3] == {"image": encoded_image(3), "label": 3, "id": "3.JPEG"}
  assert [example["label"] for example in whole] == list(range(COUNT))
  with pytest.raises(IndexError):
    whole[COUNT]


def test_source_of_part_of_a_split(data_dir):
  part = open_split("numbered_images/whole", "train[10:20]", data_dir)
  assert [example["label"] for example in part] == list(range(10, 20))


# Training.


def test_train_batches_have_the_promised_types(whole):
  for crop_scale in (None, (0.3, 1.0)):
    (batch,) = take(whole, 1, transform=TrainCrop(16, crop_scale))
    assert batch["image"].shape == (8, 16, 16, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].shape == (8,)
    assert batch["label"].dtype == np.int32


def test_batches_depend_on_the_seed_alone(whole):
  reference = digest(take(whole, 6))
  assert digest(take(whole, 6)) == reference
  assert digest(take(whole, 6, num_threads=1, prefetch=1)) == reference
  assert digest(take(whole, 6, num_threads=0, prefetch=0)) == reference
  assert digest(take(whole, 6, num_threads=7, prefetch=9)) == reference
  assert digest(take(whole, 6, seed=1)) != reference


def test_seeds_give_other_orders_and_other_crops(whole):
  first, second = take(whole, 5), take(whole, 5, seed=1)
  assert (labels(first) != labels(second)).mean() > 0.8
  # Grain's shuffle adds the epoch to its seed: seeds 0 and 1 must not share epochs.
  epochs = [labels(take(whole, 20, seed=seed))[: 4 * COUNT].reshape(4, COUNT) for seed in (0, 1)]
  assert (epochs[0][1:] != epochs[1][:-1]).any(axis=1).all()


def test_every_epoch_is_another_order_of_all_images(whole):
  order = labels(take(whole, math.ceil(3 * COUNT / 8)))
  epochs = order[: 3 * COUNT].reshape(3, COUNT)
  for epoch in epochs:
    assert sorted(epoch) == list(range(COUNT))
  assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**40])
def test_the_order_of_many_images_is_that_of_grain(seed):
  source = open_split("fake:20000", "train", None)
  order = labels(take(source, 4, seed=seed))
  reference = grain.MapDataset.range(20000).seed(seed).shuffle().repeat()
  expected = [source[reference[position] % 20000]["label"] for position in range(4 * 8)]
  assert list(order) == expected


def test_crops_do_not_depend_on_the_size_of_batches(whole):
  small, large = take(whole, 15, global_batch_size=4), take(whole, 6, global_batch_size=10)
  for key in ("image", "label"):
    np.testing.assert_array_equal(
      np.concatenate([batch[key] for batch in small]),
      np.concatenate([batch[key] for batch in large]),
    )


def test_every_position_has_crops_of_its_own(data_dir):
  # One image over and over: what differs is the crop.
  one = open_split("numbered_images/whole", "train[:1]", data_dir)
  images = np.concatenate(
    [batch["image"] for batch in take(one, 8, transform=TrainCrop(16, (0.1, 0.5)))]
  )
  assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
  (other,) = take(one, 1, transform=TrainCrop(16, (0.1, 0.5)), seed=1)
  assert not (other["image"][:, None] == images).all(axis=(2, 3, 4)).any()


def test_an_image_is_cropped_differently_in_every_epoch(whole):
  batches = take(whole, math.ceil(2 * COUNT / 8))
  order, images = labels(batches), np.concatenate([batch["image"] for batch in batches])
  first, second = (order == 0).nonzero()[0][:2]
  assert (images[first] != images[second]).any()


@pytest.mark.parametrize("process_count", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(whole, process_count):
  # 13 batches cross two epoch boundaries, and 37 is divisible by none of this.
  parts = [
    take(whole, 13, process_index=p, process_count=process_count) for p in range(process_count)
  ]
  assert all(len(batch["label"]) == 8 // process_count for part in parts for batch in part)
  assert digest(join(parts)) == digest(take(whole, 13))


def test_batch_larger_than_the_data_set(data_dir):
  few = open_split("numbered_images/whole", "train[:3]", data_dir)
  order = labels(take(few, 2))
  assert len(order) == 16
  for epoch in order[:15].reshape(5, 3):
    assert sorted(epoch) == [0, 1, 2]


@pytest.mark.parametrize("step", [0, 1, 4, 7, 12])
def test_resumes_with_the_batch_that_would_have_come(whole, step):
  options = {"transform": TrainCrop(16, (0.3, 1.0)), "global_batch_size": 8, "seed": 0}
  with train_loader(whole, **options, num_threads=3, prefetch=5) as loader:
    for _ in range(step):
      next(loader)
    # Batches made ahead, which nobody has seen, are not part of the state.
    state = json.loads(json.dumps(loader.get_state()))
    expected = digest([next(loader) for _ in range(6)])
    # Back on the same loader.
    loader.set_state(state)
    assert loader.get_state() == state
    assert digest([next(loader) for _ in range(6)]) == expected
  # And on a new one, read by another number of processes.
  parts = []
  for p in range(2):
    with train_loader(whole, **options, process_index=p, process_count=2) as loader:
      loader.set_state(state)
      parts.append([next(loader) for _ in range(6)])
  assert digest(join(parts)) == expected


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"seed": 1}, "saved with seed=0 and is now read with seed=1"),
    ({"global_batch_size": 16}, "saved with global_batch_size=8 .* global_batch_size=16"),
  ],
)
def test_state_of_another_stream_is_refused(whole, change, message):
  options = {"transform": TrainCrop(16), "global_batch_size": 8, "seed": 0}
  with train_loader(whole, **options) as loader:
    state = loader.get_state()
  with (
    train_loader(whole, **{**options, **change}) as loader,
    pytest.raises(UsageError, match=message),
  ):
    loader.set_state(state)


def test_memory_is_used_again_but_never_while_somebody_has_it(whole):
  options = {"transform": TrainCrop(16, (0.3, 1.0)), "global_batch_size": 8, "seed": 0}
  with train_loader(whole, **options, num_threads=2, prefetch=2) as loader:
    # Of some batches all is kept, of some a view of a view, of some nothing.
    whole_batches = [next(loader)["image"] for _ in range(3)]
    views = [next(loader)["image"][1:][0] for _ in range(3)]
    kept = [image.copy() for image in (*whole_batches, *views)]
    addresses = [next(loader)["image"].ctypes.data for _ in range(60)]
    for image, before in zip((*whole_batches, *views), kept, strict=True):
      np.testing.assert_array_equal(image, before)
  assert len(set(addresses)) < 20
  taken = {image.ctypes.data for image in whole_batches}
  assert not taken & set(addresses)
  # Also when the loader is gone.
  np.testing.assert_array_equal(views[0], kept[3])


def test_closing_ends_the_threads(whole):
  with train_loader(whole, TrainCrop(16), global_batch_size=8, seed=0, num_threads=2) as loader:
    next(loader)
    assert grain_threads()
  wait_for_threads_to_end()


# Damaged images in training.


def test_unreadable_images_are_replaced_by_the_next_ones(broken, caplog):
  names = [f"numbered_images/broken train image {k} ({k}.JPEG)" for k in BROKEN]
  with (
    caplog.at_level(logging.WARNING),
    train_loader(broken, TrainCrop(16), global_batch_size=COUNT, seed=0) as loader,
  ):
    assert loader.skipped == ()
    epochs = [next(loader) for _ in range(2)]
    assert loader.skipped == tuple(names)
  expected = sorted([*(set(range(COUNT)) - set(BROKEN)), 7, 7, 0])
  for epoch in epochs:
    assert sorted(epoch["label"]) == expected
  # Each is named once, however often it was met.
  messages = [record.getMessage() for record in caplog.records]
  for name in names:
    assert sum(name in message for message in messages) == 1


def test_the_number_of_skipped_images_belongs_to_the_batches_that_were_seen(
  broken, caplog, messages
):
  options = {
    "transform": TrainCrop(16),
    "global_batch_size": 2,
    "seed": 0,
    "num_threads": 3,
    "prefetch": 30,
  }
  positions, counts = [], []
  with train_loader(broken, **options) as loader:
    for _ in range(20):
      positions.append(loader.position())
      counts.append(loader.num_skipped())
      next(loader)
    # Though threads have met all of them long before.
    assert (counts[0], counts[-1]) == (0, 3)
    assert counts == sorted(counts)
    assert [loader.num_skipped(position) for position in positions] == counts
    states = [json.loads(json.dumps(loader.get_state(position))) for position in positions]
  assert states[-1]["skipped"] == [5, 6, 36]
  # Restored, on one of two processes, which does not name them again.
  caplog.clear()
  with train_loader(broken, **options, process_index=1, process_count=2) as loader:
    loader.set_state(states[-1])
    for _ in range(20):
      next(loader)
    assert loader.num_skipped() == 3
    assert loader.get_state()["skipped"] == [5, 6, 36]
  assert not messages()


def test_processes_join_what_they_skipped(broken):
  options = {"transform": TrainCrop(16), "global_batch_size": 40, "seed": 0}
  loaders = [train_loader(broken, **options, process_index=p, process_count=4) for p in range(4)]
  for loader in loaders:
    next(loader)
  states = [loader.get_state() for loader in loaders]
  for loader in loaders:
    loader.close()
  assert [state["num_skipped"] for state in states] != [3, 3, 3, 3]
  together = pipeline.joined(states)
  assert (together["num_skipped"], together["skipped"]) == (3, [5, 6, 36])
  with train_loader(broken, **options) as loader:
    next(loader)
    assert together == loader.get_state()


def test_a_state_names_a_bounded_number_of_skipped_images(whole):
  options = {"transform": TrainCrop(16), "global_batch_size": 8, "seed": 0}
  with train_loader(whole, **options) as loader:
    state = {**loader.get_state(), "num_skipped": 7000, "skipped": list(range(1500))}
    loader.set_state(state)
    assert loader.num_skipped() == 7000
    assert len(loader.get_state()["skipped"]) == 1000
    assert loader.get_state()["num_skipped"] == 7000


def test_skipping_is_deterministic(broken):
  reference = take(broken, 10)
  assert digest(take(broken, 10, num_threads=5, prefetch=6)) == digest(reference)
  parts = [take(broken, 10, process_index=p, process_count=2) for p in range(2)]
  assert digest(join(parts)) == digest(reference)


def test_a_replacement_shows_the_image_of_its_label(broken, whole):
  # Without crops an image is a function of its label.
  options = {"transform": TrainCrop(16), "global_batch_size": COUNT}
  (reference,), (batch,) = take(whole, 1, **options), take(broken, 1, **options)
  images = dict(zip(reference["label"], reference["image"], strict=True))
  for label, image in zip(batch["label"], batch["image"], strict=True):
    np.testing.assert_array_equal(image, images[label])


def test_a_data_set_without_readable_images_is_an_error(data_dir):
  ruined = open_split("numbered_images/ruined", "train", data_dir)
  loader = train_loader(ruined, TrainCrop(16), global_batch_size=8, seed=0)
  with pytest.raises(
    UsageError, match=r"9 images in a row are unreadable.* in .*/ruined/1\.0\.0 are"
  ):
    next(loader)
  # The loader does not go on behind the batch that failed.
  with pytest.raises(ValueError, match="closed"):
    next(loader)


class UnpluggedDisk:
  """Records that cannot be read from the third on."""

  def __init__(self, records):
    self._records = records

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    if index >= 3:
      raise OSError("disk unplugged")
    return self._records[index]


def test_errors_of_the_threads_reach_the_consumer(data_dir):
  builder = NumberedImages(config="whole", data_dir=data_dir)
  records = builder.as_data_source(
    "train", deserialize_method=tfds.core.decode.DeserializeMethod.RAW_BYTES
  )
  parse = ImageLabelParser(dict(builder.info.features), "unplugged")
  examples = ParsedRecords(UnpluggedDisk(records), parse, data_dir)
  source = Source("unplugged", data_dir, examples, parse.class_names)
  with pytest.raises(OSError, match="disk unplugged"):
    take(source, 10)
  with pytest.raises(OSError, match="disk unplugged"):
    list(eval_batches(source, EvalCrop(16), global_batch_size=8))


def strange_images():
  """Encoded images by number: those that can be read, and those that cannot."""
  photograph = encoded_image(0)

  def jpeg(mode, width, height):
    data = io.BytesIO()
    Image.new(mode, (width, height), 77).save(data, "JPEG")
    return data.getvalue()

  readable = {
    1: jpeg("CMYK", 30, 20),
    2: jpeg("L", 20, 30),
    3: jpeg("RGB", 1, 1),
    4: jpeg("RGB", 10000, 10),
    5: jpeg("RGB", 10, 10000),
    6: photograph + bytes(100),
  }
  unreadable = {
    7: photograph[: len(photograph) // 2],
    8: photograph[: len(photograph) // 2] + bytes(len(photograph) // 2),
    9: b"",
    10: bytes(500),
    11: photograph[:1],
  }
  return readable, unreadable


@pytest.mark.parametrize("kind", ["memory", "tfrecord"])
def test_strange_images(tmp_path, caplog, kind):
  """Training goes on, and names and counts what it skipped; evaluation stops with the ids."""
  readable, unreadable = strange_images()
  fixture_numbered.write(tmp_path, (20, 20), {**readable, **unreadable})
  source = getattr(fixture_numbered, f"open_{kind}")(tmp_path)
  for crop_scale in (None, (0.08, 1.0)):
    caplog.clear()
    transform = TrainCrop(16, crop_scale)
    with train_loader(source, transform, global_batch_size=40, seed=0) as loader:
      seen = {int(label) for _ in range(2) for label in next(loader)["label"]}
      assert seen == set(range(40)) - set(unreadable)
      assert loader.num_skipped() == len(unreadable)
      assert len(loader.skipped) == len(unreadable)
    for name in loader.skipped:
      assert sum(name in record.getMessage() for record in caplog.records) == 1
  with pytest.raises(UsageError, match="5 of 40 images") as caught:
    list(eval_batches(source, EvalCrop(16, 18), global_batch_size=8))
  for k in range(40):
    assert (f"({k}.JPEG)" in str(caught.value)) == (k in unreadable)


# Evaluation.


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("global_batch_size", [4, 8, 36, 40, 64])
def test_evaluation_counts_every_image_once(whole, global_batch_size, process_count):
  parts = [
    list(
      eval_batches(
        whole,
        EvalCrop(16),
        global_batch_size=global_batch_size,
        process_index=p,
        process_count=process_count,
      )
    )
    for p in range(process_count)
  ]
  assert {len(part) for part in parts} == {math.ceil(COUNT / global_batch_size)}
  batches = join(parts)
  for batch in batches:
    assert batch["image"].shape == (global_batch_size, 16, 16, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    assert batch["mask"].dtype == np.float32
    assert not batch["image"][batch["mask"] == 0].any()
  mask = np.concatenate([batch["mask"] for batch in batches])
  np.testing.assert_array_equal(mask, np.arange(len(mask)) < COUNT)
  np.testing.assert_array_equal(labels(batches)[:COUNT], np.arange(COUNT))


def test_evaluation_images_do_not_depend_on_the_number_of_processes(whole):
  options = {"transform": EvalCrop(16, 18), "global_batch_size": 8}
  parts = [list(eval_batches(whole, **options, process_index=p, process_count=4)) for p in range(4)]
  assert digest(join(parts)) == digest(eval_batches(whole, **options))


def test_evaluation_names_all_unreadable_images_and_stops(broken):
  batches = eval_batches(broken, EvalCrop(16), global_batch_size=4)
  seen = [next(batches) for _ in range(10)]
  counted = labels(seen)[np.concatenate([batch["mask"] for batch in seen]) > 0]
  assert list(counted) == [k for k in range(COUNT) if k not in BROKEN]
  message = (
    r"3 of 37 images of .*broken train are unreadable, .*: .*broken train image 5 \(5.JPEG\): no "
    r"data \(0 bytes\); .*image 6 \(6.JPEG\): .*; .*image 36 .* prepare them again"
  )
  with pytest.raises(UsageError, match=message):
    next(batches)


def test_the_list_of_unreadable_images_is_bounded(whole):
  error = pipeline.UnreadableImagesError(whole, [f"image {k}: bad" for k in range(1234)])
  assert "image 99: bad; and 1134 more. The files" in str(error)


def test_five_crops_are_the_centre_and_the_corners(whole):
  (one,), (five,), (square,) = (
    list(eval_batches(whole, transform, global_batch_size=40))
    for transform in (EvalCrop(12, 16), EvalCrop(12, 16, crops=5), EvalCrop(16))
  )
  assert five["image"].shape == (40, 5, 12, 12, 3)
  np.testing.assert_array_equal(five["image"][:, 0], one["image"])
  for crop, (top, left) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)], 1):
    part = square["image"][:, top : top + 12, left : left + 12]
    np.testing.assert_array_equal(five["image"][:, crop], part)
  np.testing.assert_array_equal(five["label"], one["label"])
  assert five["mask"].sum() == COUNT


@pytest.mark.parametrize("channels", [1, 3])
def test_images_may_be_of_any_shape_and_grey(whole, channels):
  transform = TrainCrop((12, 20), (0.3, 1.0), channels=channels)
  (train,) = take(whole, 1, transform=transform)
  assert train["image"].shape == (8, 12, 20, channels)
  for crops in (1, 5):
    transform = EvalCrop((12, 20), (16, 24), crops=crops, channels=channels)
    (batch,) = eval_batches(whole, transform, global_batch_size=40)
    assert batch["image"].shape == (40, *(5,) * (crops == 5), 12, 20, channels)
  if channels == 1:
    (colours,) = take(whole, 1, transform=TrainCrop((12, 20), (0.3, 1.0)))
    luma = colours["image"] @ np.array([0.299, 0.587, 0.114])
    assert np.abs(luma - train["image"][..., 0]).max() <= 1


def test_parts_have_about_the_shape_of_the_result(tmp_path):
  """A circle stays one, more or less, however wide the result is."""
  grid = np.hypot(*np.mgrid[-100:100, -200:200])
  circles = np.repeat(((grid < 60) * 255).astype(np.uint8)[..., None], 3, -1)
  fixture_numbered.write(tmp_path, (1,), {0: simplejpeg.encode_jpeg(circles)})
  (batch,) = take(
    fixture_numbered.open_memory(tmp_path), 1, transform=TrainCrop((40, 80), (0.9, 1.0))
  )
  for image in batch["image"][..., 0] > 127:
    assert 0.7 < image.any(0).sum() / image.any(1).sum() < 1.4


def test_evaluation_can_be_left_early(whole):
  batches = eval_batches(whole, EvalCrop(16), global_batch_size=4)
  next(batches)
  batches.close()
  wait_for_threads_to_end()


# What the user may get wrong.


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"global_batch_size": 9, "process_count": 2}, "global_batch_size=9 .* multiple of 2"),
    ({"global_batch_size": 0}, "global_batch_size=0 .* positive"),
    ({"process_index": 2, "process_count": 2}, "process_index=2, expected 0 to 1"),
  ],
)
def test_batch_sizes_that_cannot_be(whole, options, message):
  options = {"global_batch_size": 8, **options}
  with pytest.raises(UsageError, match=message):
    train_loader(whole, TrainCrop(16), seed=0, **options)
  with pytest.raises(UsageError, match=message):
    eval_batches(whole, EvalCrop(16), **options)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: EvalCrop(16, 12), "resize=12 is below image_size=16"),
    (lambda: EvalCrop((16, 8), (20, 4)), r"resize=\(20, 4\) is below image_size=\(16, 8\)"),
    (lambda: EvalCrop(16, crops=4), "crops=4; expected 1 or 5"),
    (lambda: TrainCrop(16, channels=2), "channels=2; expected 3, or 1"),
  ],
)
def test_transforms_that_cannot_be(make, message):
  with pytest.raises(UsageError, match=message):
    make()


@pytest.mark.parametrize(
  ("dataset", "split", "message"),
  [
    ("imagenet2012", "train", "not prepared: looked in ROOT/imagenet2012; prepare it with `tfds"),
    ("imagenet2012", "train", "--file_format=array_record --data_dir=ROOT`"),
    ("imagenet2012", "train", "--config.data.data_dir=DIR"),
    ("imagenet2013", "train", "unknown data set 'imagenet2013'.*did you mean imagenet2012"),
    ("my data", "train", "unknown data set 'my data'.*not in ROOT"),
    ("cluttered_digits/sort", "train", "cluttered_digits/classify or cluttered_digits/detect"),
    ("numbered_images/hole", "train", "'numbered_images/hole' is not prepared"),
    ("numbered_images/whole", "test", "no split 'test'.*; it has train, validation"),
    ("numbered_images/whole", "train[", "no split 'train\\['.*; it has train, validation"),
    ("numbered_images/whole", "train[99:]", "no split 'train\\[99:\\]'.*37 examples"),
    ("numbered_images/whole", "train[:0]", "'train\\[:0\\]' .* is empty"),
    ("numbered_images/unlabelled", "train", "the features file_name, image; .*'label'"),
    ("numbered_images/other_format", "train", "prepared as parquet.*tfds convert_format"),
  ],
)
def test_data_sets_that_cannot_be_opened(data_dir, dataset, split, message):
  with pytest.raises(UsageError, match=message.replace("ROOT", data_dir)) as caught:
    open_split(dataset, split, data_dir)
  assert "\n" not in str(caught.value)


def test_embedded_data_set_is_not_made_unasked(tmp_path):
  with pytest.raises(UsageError, match=f"not in {tmp_path}; .*prepare=True"):
    open_split("cluttered_digits", "train", str(tmp_path), prepare=False)
  assert not any(tmp_path.iterdir())


def test_embedded_data_set_in_a_place_that_cannot_be_written(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UsageError, match=r"cannot write data set cluttered_digits/classify.*DIR"):
    open_split("cluttered_digits", "train", str(tmp_path / "file"))


def test_embedded_data_set_of_which_only_part_is_there(tmp_path):
  # A rename on a bucket copies file after file and may be cut off; a rename on a disk cannot.
  folder = tmp_path / "cluttered_digits" / "classify" / "1.0.0"
  folder.mkdir(parents=True)
  (folder / "cluttered_digits-train.array_record-00000-of-00001").touch()
  with pytest.raises(UsageError, match=f"{folder} holds no whole data set: delete it"):
    open_split("cluttered_digits", "train", str(tmp_path))


# The embedded data set, smaller than it is, but else as in life.

OPEN_EMBEDDED = """
import hashlib, pathlib, sys, time
from lip_jax.data.prepare.cluttered_digits import ClutteredDigits
from lip_jax.data.source import open_split
ClutteredDigits.BUILDER_CONFIGS[0].num_train = 300
ClutteredDigits.BUILDER_CONFIGS[0].num_validation = 10
root, me, other = sys.argv[1:]
pathlib.Path(root, me).touch()
while not pathlib.Path(root, other).exists():
  time.sleep(0.01)
source = open_split("cluttered_digits/classify", "train", root + "/tfds")
assert len(source) == 300
assert "tensorflow" not in sys.modules
print(hashlib.sha256(b"".join(example["image"] for example in source)).hexdigest())
"""


def test_embedded_data_set_is_made_once_by_processes_that_start_together(tmp_path):
  processes = [
    subprocess.Popen(
      [sys.executable, "-W", "error", "-c", OPEN_EMBEDDED, str(tmp_path), *names],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for names in (("one", "two"), ("two", "one"))
  ]
  outputs = [process.communicate() for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  # stdout holds what the program printed and nothing else.
  (first, messages), (second, _) = outputs
  assert len(first.split()) == 1
  assert first == second
  assert "making cluttered_digits/classify/1.0.0 in" in messages
  folder = tmp_path / "tfds" / "cluttered_digits" / "classify"
  assert [path.name for path in folder.iterdir()] == ["1.0.0"]


def test_embedded_data_set_is_made_on_first_use(tmp_path, monkeypatch, capsys):
  config = ClutteredDigits.builder_configs["detect"]
  monkeypatch.setattr(config, "num_train", 6)
  monkeypatch.setattr(config, "num_validation", 4)
  source = open_split("cluttered_digits/detect", "validation", str(tmp_path))
  assert capsys.readouterr().out == ""
  assert len(source) == 4
  assert source.num_classes == 10
  assert source[2]["id"] == "validation/000002"
  (batch,) = eval_batches(source, EvalCrop(128), global_batch_size=4)
  assert batch["image"].shape == (4, 128, 128, 3)
  # The second time nothing is said, for nothing is done.
  capsys.readouterr()
  assert len(open_split("cluttered_digits/detect", "train", str(tmp_path))) == 6
  assert capsys.readouterr().err == ""
