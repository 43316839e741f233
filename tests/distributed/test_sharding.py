"""Batches on their way to the devices."""

import threading

import jax
import numpy as np
import pytest

from lip_jax.distributed import sharding


def numbered(count):
  for k in range(count):
    yield {"image": np.full((8, 2), k, np.uint8), "label": np.full(8, k, np.int32)}


def feed_threads():
  return [
    thread for thread in threading.enumerate() if thread.name.startswith(("lip-feed", "lip-watch"))
  ]


def test_batches_come_in_order_and_lie_on_all_devices():
  mesh = sharding.make_mesh()
  with sharding.Prefetch(numbered(5), mesh) as feed:
    batches = list(feed)
  assert [int(batch["label"][0]) for batch in batches] == [0, 1, 2, 3, 4]
  for batch in batches:
    assert batch["image"].sharding == sharding.over_batch(mesh)
    assert {shard.data.shape for shard in batch["image"].addressable_shards} == {(1, 2)}
  assert not feed_threads()


def test_two_batches_are_put_ahead_of_the_one_in_use():
  taken, third = [], threading.Event()

  def batches():
    for k, batch in enumerate(numbered(9)):
      taken.append(k)
      if k == 2:
        third.set()
      yield batch

  with sharding.Prefetch(batches(), sharding.make_mesh(), position=lambda: len(taken)) as feed:
    assert feed.position == 0
    next(feed)
    assert third.wait(20)  # unasked
    for k in range(3):
      # What is saved belongs to the batches that were handed out.
      assert feed.position == 1 + k
      next(feed)
    assert len(taken) <= 6
  assert not feed_threads()


def test_an_error_comes_in_the_place_of_its_batch():
  def batches():
    yield from numbered(3)
    raise OSError("disk unplugged")

  with sharding.Prefetch(batches(), sharding.make_mesh()) as feed:
    for _ in range(3):
      next(feed)
    with pytest.raises(OSError, match="disk unplugged"):
      next(feed)


def test_waiting_counts_only_while_the_devices_have_nothing_to_do(monkeypatch):
  now = [0.0]
  monkeypatch.setattr("lip_jax.distributed.sharding.time.perf_counter", lambda: now[0])
  step_done, data_there = threading.Event(), threading.Event()

  def batches():
    yield from numbered(1)
    assert data_there.wait(20)
    now[0] += 3.0  # of waiting for data
    yield from numbered(2)

  def step_of_seven_seconds(arrays):
    if not isinstance(arrays, str):  # a batch on its way to the devices
      return arrays
    now[0] += 7.0
    data_there.set()
    step_done.set()

  monkeypatch.setattr(jax, "block_until_ready", step_of_seven_seconds)
  with sharding.Prefetch(batches(), sharding.make_mesh(), size=1) as feed:
    assert feed.wait() == 0.0
    next(feed)
    waited = feed.wait(running="what a step computes")
    assert step_done.is_set()
    assert waited <= 3.0  # not the seven in which the step ran
    next(feed)
    assert feed.wait() == 0.0


def test_one_process_gathers_from_itself():
  assert sharding.gather({"a": [1]}) == [{"a": [1]}]
