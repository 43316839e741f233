"""Checkpoints: whole or refused, on any mesh; whatever happens to the files, never other values."""

import dataclasses
import errno
import os
import resource
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from fixture_ports import free_port
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.training.checkpoint.checkpoints import Checkpoints, has_checkpoints, restore_path
from lip_jax.training.checkpoint.fingerprint import fingerprint
from lip_jax.training.train_state import TrainState


def make_state(step):
  """A train state with 24 kB of noise, which no compression hides a changed byte of."""
  rng = np.random.default_rng(step)
  params = {
    "conv": {"kernel": jnp.asarray(rng.normal(size=(8, 256)), jnp.float32)},
    "blocks": {0: {"scale": jnp.asarray(rng.normal(size=(16, 8)), jnp.bfloat16)}},
  }
  batch_stats = {"norm": {"mean": jnp.asarray(rng.normal(size=(16,)), jnp.float32)}}
  opt_state = optax.sgd(0.1, momentum=0.9).init(params)
  opt_state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), opt_state)
  return TrainState(jnp.int32(step), params, batch_stats, opt_state)


def abstract(state, place=lambda leaf: leaf.sharding):
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)), state
  )


def sharded(mesh):
  """First axis over the mesh where it can be divided, as fsdp does."""

  def place(leaf):
    divides = leaf.ndim and leaf.shape[0] % mesh.size == 0
    return NamedSharding(mesh, PartitionSpec("data") if divides else PartitionSpec())

  return place


def save(workdir, *steps, keep=2, divide=lambda leaf: leaf, **metrics):
  with Checkpoints(workdir, keep=keep, best_metric="top1") as checkpoints:
    for step in steps:
      score = metrics.get(f"top1_{step}")
      checkpoints.save(
        jax.tree.map(divide, make_state(step)),
        {"position": step, "order": [0.1, 1e-300]},
        step=step,
        metrics=None if score is None else {"top1": score, "count": 10},
      )


def assert_same(state, other):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(other))


def assert_is(restored, step):
  assert_same(restored.state, make_state(step))
  assert restored.iterator == {"position": step, "order": [0.1, 1e-300]}


LIKE = abstract(make_state(0))


def damages(size):
  """Ways to damage a file of `size` bytes: (name, function of its content)."""
  yield "deleted", None
  if not size:
    return
  yield "empty", lambda data: b""
  yield "half", lambda data: data[: size // 2]
  rng = np.random.default_rng(size)
  places = {0, size // 3, size - 1, *rng.integers(0, size, 6 if size > 4096 else 1).tolist()}
  for place in sorted(places):
    bit = 1 << int(rng.integers(8))
    yield (
      f"bit of byte {place}",
      lambda data, place=place, bit=bit: (
        data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
      ),
    )


def save_by_two_processes(workdir):
  address = f"127.0.0.1:{free_port()}"
  script = Path(__file__).with_name("save_on_hosts.py")
  processes = [
    subprocess.Popen(
      [sys.executable, script, workdir, address, str(process), "2"],
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    for process in range(2)
  ]
  assert [process.wait(timeout=120) for process in processes] == [0, 0]


@pytest.mark.parametrize("processes", [1, 2])
def test_damage_to_any_file_is_passed_over_or_harmless(tmp_path, caplog, processes):
  if processes == 1:
    save(tmp_path / "whole", 2, 4, top1_2=0.5, top1_4=0.75)
  else:
    save_by_two_processes(tmp_path / "whole")
  latest = tmp_path / "whole" / "checkpoints" / "4"
  files = sorted(path.relative_to(latest) for path in latest.rglob("*") if path.is_file())
  assert len(files) >= 8
  assert len([file for file in files if "process_1" in str(file)]) >= 2 * (processes - 1)
  ends = Counter()
  for file in files:
    for name, change in damages((latest / file).stat().st_size):
      workdir = tmp_path / "damaged"
      shutil.copytree(tmp_path / "whole", workdir)
      target = workdir / "checkpoints" / "4" / file
      data = target.read_bytes()
      target.unlink() if change is None else target.write_bytes(change(data))
      caplog.clear()
      with Checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore_latest(LIKE)
        step = int(restored.state.step)
        assert_is(restored, step), (file, name)
        assert restored.metrics["top1"] == {2: 0.5, 4: 0.75}[step]
        if step == 2:
          assert f"{workdir}/checkpoints/4 is damaged (" in caplog.text, (file, name)
          assert checkpoints.steps == [2]
          assert checkpoints.best_step == 2
          moved = workdir / "damaged_checkpoints" / "4" / file
          assert moved.exists() == (change is not None)
      by_fingerprint = "is not what was saved" in caplog.text
      ends[(step, by_fingerprint)] += 1
      shutil.rmtree(workdir)
  assert ends[(2, False)] > 10
  assert ends[(2, True)] > 3  # which neither Orbax nor TensorStore has noticed


def test_what_can_be_said_of_damage(tmp_path, caplog):
  workdir = tmp_path / "run"
  save(workdir, 2, 4, 6, keep=3)
  for step in (4, 6):
    for file in (workdir / "checkpoints" / str(step)).rglob("*.ocdbt"):
      file.write_bytes(b"")
  with Checkpoints(workdir, read_only=True) as checkpoints:
    assert_is(checkpoints.restore_latest(LIKE), 2)
    assert checkpoints.steps == [2, 4, 6]  # reading moves nothing
    with pytest.raises(UsageError, match=r"checkpoints/6 is damaged .* there are: 2, 4, 6"):
      checkpoints.restore(6, LIKE)
    with pytest.raises(UsageError, match="checkpoints/6"):
      checkpoints.restore_weights(6)
  with pytest.raises(UsageError, match="checkpoints/4 is damaged"):
    restore_path(workdir / "checkpoints" / "4", LIKE)
  shutil.copytree(workdir / "checkpoints" / "4", workdir / "damaged_checkpoints" / "4")
  with Checkpoints(workdir, keep=1) as checkpoints:
    assert_is(checkpoints.restore_latest(LIKE), 2)
    assert (workdir / "damaged_checkpoints" / "4-2").is_dir()
    # A later record that cannot be read takes no good one's place, and is not deleted.
    (workdir / "checkpoints" / "3").mkdir()
    checkpoints.save(make_state(4), {}, step=4)
  with Checkpoints(workdir) as checkpoints:
    assert checkpoints.steps == [3, 4]


def test_no_whole_checkpoint_is_no_reason_to_start_from_zero(tmp_path):
  save(tmp_path, 2, 4)
  for file in tmp_path.rglob("*.ocdbt"):
    file.write_bytes(b"")
  for _ in range(2):
    with (
      Checkpoints(tmp_path) as checkpoints,
      pytest.raises(UsageError, match=r"no checkpoint in .* is whole \(4: .*; 2: "),
    ):
      checkpoints.restore_latest(LIKE)


def test_errors_that_may_pass_give_up_no_checkpoint(tmp_path, monkeypatch):
  save(tmp_path, 2, 4)
  open_array = tensorstore.open
  for error in (
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
    MemoryError(),
    ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"),
  ):

    def fail(spec, error=error, **rest):
      if "/4/" in spec["kvstore"]["base"]["path"]:
        raise error
      return open_array(spec, **rest)

    monkeypatch.setattr(tensorstore, "open", fail)
    with (
      Checkpoints(tmp_path) as checkpoints,
      pytest.raises(UsageError, match="checkpoints/4, which may be whole"),
    ):
      checkpoints.restore_latest(LIKE)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps == [2, 4]


def test_other_models_and_formats_are_refused_and_stay(tmp_path):
  save(tmp_path / "run", 2)
  other = LIKE.replace(params={"conv": LIKE.params["conv"]})
  with (
    Checkpoints(tmp_path / "run") as checkpoints,
    pytest.raises(
      UsageError, match=r"another model.*params.blocks.0.scale is bfloat16\[16, 8\] in it.*absent"
    ),
  ):
    checkpoints.restore_latest(other)
  # As versions before this format have written it.
  with ocp.training.Checkpointer(tmp_path / "old" / "checkpoints") as checkpointer:
    checkpointer.save_checkpointables(
      4, {"state": make_state(4)}, custom_metadata={"iterator": {"position": 4}}
    )
  with (
    Checkpoints(tmp_path / "old") as checkpoints,
    pytest.raises(UsageError, match=r"is whole \(4: .*an earlier version of lip_jax"),
  ):
    checkpoints.restore_latest(LIKE)
  assert (tmp_path / "old" / "checkpoints" / "4").is_dir()


@pytest.mark.parametrize("spread", [False, True])
def test_restored_on_other_topologies(tmp_path, spread):
  """8 devices -> 1 -> 4, with whole and with divided arrays."""
  state = make_state(1)
  step = 1
  for count in (8, 1, 4, 2):
    mesh = sharding.make_mesh(jax.devices()[:count])
    place = sharded(mesh) if spread else (lambda _, mesh=mesh: sharding.replicated(mesh))
    if step == 1:
      state = jax.device_put(state, jax.tree.map(place, state))
    else:
      with Checkpoints(tmp_path) as checkpoints:
        state = checkpoints.restore_latest(abstract(LIKE, place)).state
    assert_same(state, make_state(1))
    for leaf in jax.tree.leaves(state):
      assert leaf.sharding == place(leaf)
    step += 1
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(state, {}, step=step)


def test_weights_alone_need_no_optimizer(tmp_path):
  save(tmp_path, 2)
  state = make_state(2)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    for placement in (None, sharding.replicated(sharding.make_mesh())):
      params, batch_stats = checkpoints.restore_weights(2, placement)
      assert_same(params, state.params)
      assert_same(batch_stats, state.batch_stats)
      kernel = params["conv"]["kernel"]
      assert isinstance(kernel, np.ndarray) if placement is None else kernel.sharding == placement


def test_the_latest_and_the_best_are_kept_and_a_better_one_replaces_the_best(tmp_path):
  save(tmp_path, 1, 2, 3, 4, 5, top1_2=0.9, top1_3=0.1)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps == [2, 4, 5]
    assert (checkpoints.best_step, checkpoints.latest_step) == (2, 5)
    assert checkpoints.metrics(2)["count"] == 10
    assert checkpoints.metrics(5) is None
  save(tmp_path, 5, top1_5=0.9)  # the same step again, now evaluated
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.steps == [4, 5]
    assert checkpoints.best_step == 5
    assert_is(checkpoints.restore_latest(LIKE), 5)
  assert not list((tmp_path / "checkpoints").glob("*.*"))


def test_what_is_best_is_said_by_the_run_and_known_to_its_readers(tmp_path):
  losses = {1: 2.0, 2: 0.5, 3: 0.5, 4: 3.0, 5: None}
  with Checkpoints(tmp_path, keep=1, best_metric="loss", best_mode="min") as checkpoints:
    for step, loss in losses.items():
      metrics = None if loss is None else {"loss": loss, "top1": 1 / step}
      checkpoints.save(make_state(step), {}, step=step, metrics=metrics)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.steps == [3, 5]
    assert checkpoints.resolve("best") == 3
  with Checkpoints(tmp_path / "uncompared") as checkpoints:
    checkpoints.save(make_state(1), {}, step=1, metrics={"top1": 1.0})
    checkpoints.save(make_state(2), {}, step=2)
    assert checkpoints.best_step is None
    with pytest.raises(UsageError, match=r"no checkpoint 'best' in .* there are: 1"):
      checkpoints.resolve("best")


def test_another_state_replaces_no_checkpoint(tmp_path):
  save(tmp_path, 2)
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(UsageError, match=r"checkpoints/2: there is another state of this step"),
  ):
    checkpoints.save(make_state(3), {}, step=2)
  with Checkpoints(tmp_path) as checkpoints:
    assert_is(checkpoints.restore_latest(LIKE), 2)


def averaging(step, *, average):
  ema = make_state(step + 1).params if average else None
  return dataclasses.replace(make_state(step), ema=ema)


@pytest.mark.parametrize("average", [True, False])
def test_a_train_state_may_have_an_average(tmp_path, average):
  workdir = tmp_path / "with space & 100%"
  state = averaging(2, average=average)
  with Checkpoints(workdir) as checkpoints:
    checkpoints.save(state, {}, step=2)
  with Checkpoints(workdir, read_only=True) as checkpoints:
    restored = checkpoints.restore(2, abstract(state)).state
    assert_same(restored, state)
    params, _ = checkpoints.restore_weights(2)
    assert_same(params, state.ema if average else state.params)
    shapes, statistics = checkpoints.weight_shapes(2)
    assert shapes["blocks.0.scale"].shape == (16, 8)
    assert statistics["norm.mean"].dtype == np.float32
    with pytest.raises(UsageError, match=r"ema\..* is .*absent"):
      checkpoints.restore(2, abstract(averaging(2, average=not average)))


def test_remains_of_what_was_interrupted(tmp_path):
  save(tmp_path, 2, 4)
  directory = tmp_path / "checkpoints"
  shutil.copytree(directory / "4", directory / "6.orbax-checkpoint-tmp")
  (directory / "notes.txt").touch()
  assert has_checkpoints(tmp_path)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.steps == [2, 4]
    assert_is(checkpoints.restore_latest(LIKE), 4)
  assert len(list(directory.iterdir())) == 4
  with Checkpoints(tmp_path) as checkpoints:
    assert_is(checkpoints.restore_latest(LIKE), 4)
    assert {path.name for path in directory.iterdir()} == {"2", "4", "notes.txt"}


@pytest.fixture
def full_disk():
  """No file may grow beyond some size, which stops a save about where a full disk would."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

  def fill(size=4096):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

  yield fill
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("step", "size"), [(4, 512), (6, 4096)])
def test_a_full_disk_costs_no_checkpoint(tmp_path, full_disk, step, size):
  """Neither the one before, nor the one of the same step whose metadata was to be replaced."""
  save(tmp_path, 2, 4)
  expected = rf"cannot write the checkpoint .*/{step}: .*last good one is {tmp_path}/checkpoints/4"
  checkpoints = Checkpoints(tmp_path, keep=1)
  full_disk(size)
  with pytest.raises(UsageError, match=expected), checkpoints:
    checkpoints.save(make_state(step), {}, step=step)
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert_is(checkpoints.restore_latest(LIKE), 4)


def test_a_failed_save_does_not_hide_what_ended_the_run(tmp_path, full_disk, caplog):
  def run():
    with Checkpoints(tmp_path) as checkpoints:
      full_disk()
      checkpoints.save(make_state(4), {}, step=4)
      raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    run()
  assert "checkpoints/4: " in caplog.text


def test_room_is_looked_for_before_the_start(tmp_path, monkeypatch, caplog):
  (tmp_path / "file").touch()
  with pytest.raises(UsageError, match=r"cannot use .*/file/checkpoints: Not a directory"):
    Checkpoints(tmp_path / "file")
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(LIKE))
  free = 0
  monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
  with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
    with pytest.raises(UsageError, match=r"0 GB free; a checkpoint of this run takes 1.7e-05 GB"):
      checkpoints.check_room(LIKE)
    free = 3 * size
    checkpoints.check_room(LIKE)
    assert "up to 4 of them" in caplog.text
    caplog.clear()
    free = 4 * size
    checkpoints.check_room(LIKE)
    assert not caplog.text


def trees():
  rng = np.random.default_rng(0)
  yield "float32", rng.normal(size=(8, 3, 5)).astype(np.float32)
  yield "float64", rng.normal(size=(8, 3)).astype(np.float64)
  yield "bfloat16", np.asarray(jnp.asarray(rng.normal(size=(8, 2)), jnp.bfloat16))
  yield "float8", np.asarray(jnp.asarray(rng.normal(size=(8, 2)), jnp.float8_e4m3fn))
  yield "int32", rng.integers(-9, 9, (8,), np.int32)
  yield "int64", rng.integers(-9, 9, (8, 1), np.int64)
  yield "bool", rng.integers(0, 2, (8, 4)).astype(bool)
  yield "scalar", np.float32(1.5).reshape(())
  yield "large", rng.normal(size=(8, 2**15 + 1)).astype(np.float32)


@pytest.mark.parametrize("array", [pytest.param(a, id=name) for name, a in trees()])
def test_fingerprints_do_not_depend_on_where_arrays_are(x64, array):
  expected = fingerprint({"a": array})
  for count in (1, 2, 8):
    mesh = sharding.make_mesh(jax.devices()[:count])
    places = [sharding.replicated(mesh)]
    places += [sharding.over_batch(mesh)] if array.ndim else []
    for place in places:
      assert fingerprint({"a": jax.device_put(array, place)}) == expected


def test_fingerprints_tell_apart():
  array = np.arange(24, dtype=np.float32).reshape(4, 6)
  flipped = array.copy()
  flipped[1, 1:3] *= -1  # two sign bits
  swapped = array[:, [1, 0, 2, 3, 4, 5]]
  trees = [
    {"a": array},
    {"b": array},
    {"a": array.reshape(6, 4)},
    {"a": array.view(np.int32)},
    {"a": flipped},
    {"a": swapped},
    {"a": np.nextafter(array, np.float32(99))},
    {"a": array, "b": np.zeros(3)},
    {"a": array, "b": np.zeros(3), "c": np.ones(3)},
    {"a": array, "b": np.ones(3), "c": np.zeros(3)},
    {"a": array, "b": -np.zeros(3)},
    {},
  ]
  assert len({fingerprint(tree) for tree in trees}) == len(trees)
  with pytest.raises(ValueError, match="two arrays of one path"):
    fingerprint({"a": {"b": array}, "a.b": array})
  nan = np.array([np.nan, 0.0], np.float32)
  assert fingerprint({"a": nan}) == fingerprint({"a": nan.copy()})
