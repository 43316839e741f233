"""Batches from files that are read in order: sharing, shuffling, resuming, damage, evaluation."""

import hashlib
import itertools
import json
import logging
import threading

import fixture_numbered
import numpy as np
import pytest

from lip_jax.data import pipeline, stream
from lip_jax.data.pipeline import eval_batches, train_loader
from lip_jax.data.source import Shard
from lip_jax.errors import UsageError

LENGTHS = (9, 1, 14, 3, 10)  # 37: uneven files, and a number that nothing divides
COUNT = sum(LENGTHS)
OPTIONS = {
  "image_size": 8, "crop_scale": (0.3, 1.0), "global_batch_size": 8, "seed": 0,
  "shuffle_window": 20, "num_threads": 2, "prefetch": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
  folder = tmp_path_factory.mktemp("numbered")
  fixture_numbered.write(folder, LENGTHS)
  return fixture_numbered.open_stream(folder)


def take(source, count, **options):
  with train_loader(source, **{**OPTIONS, **options}) as loader:
    return [next(loader) for _ in range(count)]


def labels(batches):
  return np.concatenate([batch["label"] for batch in batches])


def digest(batches):
  digests = hashlib.sha256()
  for batch in batches:
    for key in sorted(batch):
      digests.update(np.ascontiguousarray(batch[key]).tobytes())
  return digests.hexdigest()


def our_threads():
  names = ("lip-", "grain-")
  return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


def wait_for_threads_to_end():
  for thread in our_threads():
    thread.join(timeout=60)
  assert not our_threads()


# Which process reads which records.


@pytest.mark.parametrize("process_count", [1, 2, 3, 5, 16, 40])
def test_processes_share_the_records_equally_and_exactly(process_count):
  files = [Shard(f"file{k}", 100 * k, length) for k, length in enumerate(LENGTHS)]
  everything = [(s.path, s.skip + k) for s in files for k in range(s.take)]
  had = np.zeros(process_count, int)
  for epoch in range(7):
    parts = [stream.share(files, p, process_count, epoch) for p in range(process_count)]
    records = [[(s.path, s.skip + k) for s in part for k in range(s.take)] for part in parts]
    assert list(itertools.chain.from_iterable(records)) == everything
    had += [len(part) for part in records]
    assert had.max() - had.min() <= 1
    # Only the first and last file of a process are cut.
    assert all(part in files for shares in parts for part in shares[1:-1])


# Training.


def test_every_epoch_is_another_order_of_all_images(numbered):
  order = labels(take(numbered, 14))[: 3 * COUNT].reshape(3, COUNT)
  for epoch in order:
    assert sorted(epoch) == list(range(COUNT))
  assert len({tuple(epoch) for epoch in order}) == 3
  # Files in another order, and mixed with each other.
  assert (np.abs(np.diff(order[0])) != 1).mean() > 0.7


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_have_every_image_once_in_an_epoch(numbered, process_count):
  local = 8 // process_count
  parts = [
    labels(take(numbered, 14, process_index=p, process_count=process_count))
    for p in range(process_count)
  ]
  for epoch in range(2):
    ends = [((epoch + 1) * COUNT + p) // process_count for p in range(process_count)]
    starts = [(epoch * COUNT + p) // process_count for p in range(process_count)]
    assert max(ends) - min(ends) <= 1 < local
    seen = [part[a:b] for part, a, b in zip(parts, starts, ends, strict=True)]
    assert sorted(np.concatenate(seen)) == list(range(COUNT))


def test_batches_depend_on_the_seed_and_not_on_threads(numbered):
  reference = digest(take(numbered, 12))
  assert digest(take(numbered, 12, num_threads=0, prefetch=0)) == reference
  assert digest(take(numbered, 12, num_threads=5, prefetch=9)) == reference
  assert digest(take(numbered, 12, seed=1)) != reference
  assert digest(take(numbered, 12, shuffle_window=21)) != reference


def test_an_image_is_cropped_differently_in_every_epoch(numbered):
  batches = take(numbered, 10)
  order, images = labels(batches), np.concatenate([batch["image"] for batch in batches])
  first, second = (order == 0).nonzero()[0][:2]
  assert (images[first] != images[second]).any()


@pytest.mark.parametrize("process_count", [1, 2])
@pytest.mark.parametrize("shuffle_window", [20, 1000])
def test_resumes_with_the_batch_that_would_have_come(numbered, process_count, shuffle_window):
  options = {"process_count": process_count, "shuffle_window": shuffle_window}
  parts = [take(numbered, 8, process_index=p, **options) for p in range(process_count)]
  for step in (0, 4, 5):  # an epoch ends in the fifth batch
    loaders = [
      train_loader(numbered, **{**OPTIONS, **options}, process_index=p)
      for p in range(process_count)
    ]
    for loader in loaders:
      for _ in range(step):
        next(loader)
    state = pipeline.joined([loader.get_state() for loader in loaders])
    state = json.loads(json.dumps(state))
    for p, loader in enumerate(loaders):
      for _ in range(2):  # on the loader that went further, and on a new one
        next(loader)
        loader.set_state(state)
        assert digest([next(loader) for _ in range(3)]) == digest(parts[p][step : step + 3])
        loader.close()
        loader = train_loader(numbered, **{**OPTIONS, **options}, process_index=p)
      loader.close()


def test_a_state_fits_its_number_of_processes_only(numbered):
  with train_loader(numbered, **OPTIONS) as loader:
    state = loader.get_state()
  with train_loader(numbered, **OPTIONS, process_index=1, process_count=2) as loader:
    message = "process_count=1 and is now read with process_count=2.*use 1 processes, or convert"
    with pytest.raises(UsageError, match=message):
      loader.set_state(state)
    with pytest.raises(UsageError, match="holds 1 of 2 processes"):
      loader.set_state(loader.get_state())
  with (
    train_loader(numbered, **{**OPTIONS, "shuffle_window": 21}) as loader,
    pytest.raises(UsageError, match=r"shuffle_window=20 .* shuffle_window=21"),
  ):
    loader.set_state(state)


def test_more_processes_than_images(tmp_path):
  fixture_numbered.write(tmp_path, (2, 1))
  few = fixture_numbered.open_stream(tmp_path)
  parts = [labels(take(few, 3, process_index=p, process_count=4)) for p in range(4)]
  assert set(np.concatenate(parts)) == {0, 1, 2}


def test_closing_ends_the_threads(numbered):
  wait_for_threads_to_end()
  with train_loader(numbered, **OPTIONS) as loader:
    next(loader)
    assert our_threads()
  wait_for_threads_to_end()
  with pytest.raises(ValueError, match="closed"):
    next(loader)
  batches = eval_batches(numbered, image_size=8, global_batch_size=4, num_threads=2)
  next(batches)
  batches.close()
  wait_for_threads_to_end()


# Damage.


def test_unreadable_images_are_replaced_named_and_counted(tmp_path, caplog, messages):
  images = {k: fixture_numbered.jpeg(k)[:150] for k in (4, 9, 30)}
  fixture_numbered.write(tmp_path, LENGTHS, images)
  broken = fixture_numbered.open_stream(tmp_path)
  options = {**OPTIONS, "global_batch_size": COUNT, "shuffle_window": 100, "crop_scale": None}
  names = (
    "numbered.tfrecord-00000-9 record 4",
    "numbered.tfrecord-00001-1 record 0",
    "numbered.tfrecord-00004-10 record 3",
  )
  with caplog.at_level(logging.WARNING), train_loader(broken, **options) as loader:
    assert loader.num_skipped() == 0
    batches = [next(loader) for _ in range(2)]
    assert loader.skipped == names
    assert loader.num_skipped() == 3
    state = loader.get_state()
  for name in names:
    assert sum(name in record.getMessage() for record in caplog.records) == 1
  for batch in batches:
    assert set(batch["label"]) == set(range(COUNT)) - set(images)
    for label, image in zip(batch["label"], batch["image"], strict=True):
      np.testing.assert_array_equal(image, batches[0]["image"][batches[0]["label"] == label][0])
  # A restart remembers, and does not name them again.
  caplog.clear()
  with train_loader(broken, **options) as loader:
    loader.set_state(state)
    assert loader.num_skipped() == 3
    next(loader)
    assert loader.num_skipped() == 3
  assert not messages()


def test_a_batch_without_readable_images_is_an_error(tmp_path):
  fixture_numbered.write(tmp_path, (9,), dict.fromkeys(range(9), b""))
  ruined = fixture_numbered.open_stream(tmp_path)
  with pytest.raises(UsageError, match=f"all 8 images of a batch .* in {tmp_path} are damaged"):
    take(ruined, 1)
  wait_for_threads_to_end()


def test_a_damaged_file_is_named(tmp_path):
  fixture_numbered.write(tmp_path, LENGTHS)
  path = tmp_path / "numbered.tfrecord-00002-14"
  path.write_bytes(path.read_bytes()[:-100])
  damaged = fixture_numbered.open_stream(tmp_path)
  message = f"{path}, record 13: the file ends within it; the file is damaged"
  with pytest.raises(UsageError, match=message):
    take(damaged, 10)
  with pytest.raises(UsageError, match=message):
    list(eval_batches(damaged, image_size=8, global_batch_size=8))
  wait_for_threads_to_end()


# Evaluation.


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("global_batch_size", [4, 12, 40, 64])
def test_evaluation_counts_every_image_once(numbered, global_batch_size, process_count):
  options = {"image_size": 8, "global_batch_size": global_batch_size, "num_threads": 2}
  parts = [
    list(eval_batches(numbered, **options, process_index=p, process_count=process_count))
    for p in range(process_count)
  ]
  assert {len(part) for part in parts} == {-(-COUNT // global_batch_size)}
  for part in parts:
    for batch in part:
      assert batch["image"].shape == (global_batch_size // process_count, 8, 8, 3)
      assert not batch["image"][batch["mask"] == 0].any()
      assert (batch["label"].dtype, batch["mask"].dtype) == (np.int32, np.float32)
  seen = np.concatenate([batch["label"][batch["mask"] > 0] for part in parts for batch in part])
  np.testing.assert_array_equal(seen, np.arange(COUNT))  # in order, process by process


def test_evaluation_names_all_unreadable_images(tmp_path):
  fixture_numbered.write(tmp_path, LENGTHS, {3: b"", 30: fixture_numbered.jpeg(30)[:150]})
  broken = fixture_numbered.open_stream(tmp_path)
  batches = eval_batches(broken, image_size=8, global_batch_size=8)
  seen = [next(batches) for _ in range(5)]
  seen = np.concatenate([batch["label"][batch["mask"] > 0] for batch in seen])
  assert list(seen) == [k for k in range(COUNT) if k not in (3, 30)]
  with pytest.raises(pipeline.UnreadableImagesError) as caught:
    next(batches)
  assert "2 of 37 images of numbered train are unreadable" in str(caught.value)
  assert "numbered.tfrecord-00000-9 record 3 (3.JPEG): no data" in str(caught.value)
  assert "numbered.tfrecord-00004-10 record 3 (30.JPEG): " in str(caught.value)
  assert "\n" not in str(caught.value)
