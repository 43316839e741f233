"""Checkpoints in a bucket, as an emulator of the service holds it; killed at any request."""

import contextlib
import logging
from unittest import mock

import fsspec
import pytest
from etils import epath
from test_checkpoint import LIKE, assert_is, assert_same, make_state, save

from lip_jax.errors import UsageError
from lip_jax.training.checkpoint import step_directories
from lip_jax.training.checkpoint.checkpoints import Checkpoints, has_checkpoints, restore_path

COMMIT, METADATA = "commit_success.txt", "metadata/data.json"


@pytest.fixture
def run(bucket, request):
  """The workdir of a run of this test."""
  return epath.Path(f"{bucket}/{request.node.name}")


def files(directory):
  """Contents of all objects below, by name."""
  client = fsspec.filesystem("gcs")
  root = str(directory).removeprefix("gs://") + "/"
  return {path.removeprefix(root): client.cat_file(path) for path in client.find(root)}


def write(directory, contents):
  for name, content in contents.items():
    # Not in one request, of which the emulator loses a last "\r".
    chunksize = max(1, len(content))
    fsspec.filesystem("gcs").pipe_file(f"{directory}/{name}", content, chunksize=chunksize)


def test_a_run_keeps_the_latest_and_the_best(run):
  assert not has_checkpoints(run)
  with pytest.raises(UsageError, match=f"no checkpoints under {run}"):
    Checkpoints(run, read_only=True)
  save(run, 1, 2, 3, 4, top1_1=0.9, top1_3=0.1)
  assert has_checkpoints(run)
  assert {name.partition("/")[0] for name in files(run / "checkpoints")} == {"1", "3", "4"}
  with Checkpoints(run) as checkpoints:
    checkpoints.check_room(LIKE)
    assert checkpoints.steps == [1, 3, 4]
    assert (checkpoints.best_step, checkpoints.resolve("latest")) == (1, 4)
    assert_is(checkpoints.restore_latest(LIKE), 4)
  # The same step again, in another process and now evaluated.
  with Checkpoints(run, best_metric="top1") as checkpoints:
    checkpoints.save(make_state(4), {}, step=4, metrics={"top1": 1.0})
  assert {name.partition("/")[0] for name in files(run / "checkpoints")} == {"3", "4"}
  with Checkpoints(run, read_only=True) as checkpoints:
    assert checkpoints.best_step == 4
    params, batch_stats = checkpoints.restore_weights(4)
    assert_same((params, batch_stats), (make_state(4).params, make_state(4).batch_stats))
  assert_is(restore_path(f"{run}/checkpoints/3", LIKE), 3)


def test_what_is_damaged_is_passed_over_and_set_aside(run, caplog):
  save(run, 2, 4)
  checkpoints_there = {step: files(run / "checkpoints" / step) for step in ("2", "4")}
  whole = checkpoints_there["4"]
  biggest = max(whole, key=lambda name: len(whole[name]))
  damages = [
    {METADATA: whole[METADATA][:-1]},
    {biggest: whole[biggest][: len(whole[biggest]) // 2]},
    {biggest: whole[biggest][:999] + bytes([whole[biggest][999] ^ 4]) + whole[biggest][1000:]},
    {name: None for name in whole if name.endswith("manifest.ocdbt")},
  ]
  for number, damage in enumerate(damages):
    workdir = run / str(number)
    for step, contents in checkpoints_there.items():
      write(workdir / "checkpoints" / step, contents)
    left = dict(whole)
    for name, content in damage.items():
      if content is None:
        del left[name]
        (workdir / "checkpoints" / "4" / name).unlink()
      else:
        left[name] = content
        write(workdir / "checkpoints" / "4", {name: content})
    with Checkpoints(workdir) as checkpoints:
      assert checkpoints.steps == [2, 4]
      assert_is(checkpoints.restore_latest(LIKE), 2)
      assert checkpoints.steps == [2]
      assert files(workdir / "damaged_checkpoints" / "4") == left
      assert f"step 4 is now {workdir}/damaged_checkpoints/4" in caplog.text
      caplog.clear()
    if number == 0:
      save(workdir, 4)
      with Checkpoints(workdir, read_only=True) as checkpoints:
        assert_is(checkpoints.restore(4, LIKE), 4)


def test_a_save_that_was_killed_is_no_checkpoint(run):
  save(run, 2)
  contents = files(run / "checkpoints" / "2")
  del contents[COMMIT]
  write(run / "first" / "checkpoints" / "2", contents)
  assert not has_checkpoints(run / "first")
  write(run / "checkpoints" / "4", contents)
  with Checkpoints(run, read_only=True) as checkpoints:
    assert checkpoints.steps == [2]
  assert (run / "checkpoints" / "4").exists()
  with Checkpoints(run) as checkpoints:
    assert_is(checkpoints.restore_latest(LIKE), 2)
    assert not (run / "checkpoints" / "4").exists()
  save(run, 4)
  with Checkpoints(run, read_only=True) as checkpoints:
    assert_is(checkpoints.restore_latest(LIKE), 4)


def failing(error, fails):
  """Context in which requests fail for which `fails` (method, what it is about) says so."""
  from gcsfs import GCSFileSystem

  call = GCSFileSystem._call

  async def fail(self, method, path, *names, **options):
    if fails(method, "/".join([path, *map(str, names)])):
      raise error
    return await call(self, method, path, *names, **options)

  return mock.patch.object(GCSFileSystem, "_call", fail)


def test_a_service_that_does_not_answer_costs_no_checkpoint(run, caplog):
  save(run, 2, 4)
  from gcsfs.retry import HttpError

  unavailable = HttpError({"code": 503, "message": "Backend Error"})
  with Checkpoints(run) as checkpoints:
    with (
      failing(unavailable, lambda _, path: METADATA in path),
      pytest.raises(UsageError, match="checkpoints/4, which may be whole: HttpError: Backend"),
    ):
      checkpoints.restore_latest(LIKE)
    with (
      failing(unavailable, lambda *_: True),
      pytest.raises(UsageError, match=rf"cannot read {run}/checkpoints: .*Backend Error"),
    ):
      checkpoints.restore_latest(LIKE)
    checkpoints.save(make_state(6), {}, step=6)
    with (
      failing(unavailable, lambda method, path: method == "DELETE" and "checkpoints/2/" in path),
      caplog.at_level(logging.WARNING, "lip_jax"),
    ):
      checkpoints.restore_latest(LIKE)
    assert "cannot delete an old checkpoint: HttpError: Backend Error" in caplog.text
    forbidden = OSError("Forbidden: o/x\nsomeone@example.com does not have access.")
    with failing(forbidden, lambda method, _: method == "POST"):
      checkpoints.save(make_state(8), {}, step=8)
      with pytest.raises(UsageError, match=rf"/8: .*Forbidden.*last good one is {run}/.*/6"):
        checkpoints.restore_latest(LIKE)
      with pytest.raises(UsageError, match=r"does not have access.*give this account the role"):
        Checkpoints(run)
  with Checkpoints(run) as checkpoints:
    assert checkpoints.steps == [2, 4, 6]
    assert_is(checkpoints.restore(4, LIKE), 4)


class KilledError(Exception):
  """A process ends before one of its requests."""


def killed_at_each_request(directory, contents, change):
  """Yields the directory after `change` was killed at its first request, its second, and so on."""
  count, left = 0, -1
  while left < 0:
    count, left = count + 1, count
    workdir = directory / str(count)
    write(workdir, contents)

    def kills(method, _):
      nonlocal left
      left -= method != "GET"
      return left < 0

    with failing(KilledError(), kills), contextlib.suppress(OSError, KilledError):
      change(workdir)
    yield workdir
  assert count > 3


def test_adding_metrics_can_be_killed(run):
  save(run, 2)
  before = files(run / "checkpoints" / "2")
  with (
    Checkpoints(run, best_metric="top1") as checkpoints,
    failing(KilledError(), lambda method, _: method != "GET"),
    pytest.raises(UsageError, match="cannot write the checkpoint"),
  ):
    checkpoints.save(make_state(2), {}, step=2, metrics={"top1": 1.0})
  assert files(run / "checkpoints" / "2") == before


OLD = {"a": b"old", "b/c": b"old", COMMIT: b"old"}
TWO = {f"2/{COMMIT}": b"", **{f"4/{name}": content for name, content in OLD.items()}}


def test_deleting_can_be_killed_at_any_request(run):
  for directory in killed_at_each_request(
    run, TWO, lambda directory: step_directories.delete(directory / "4")
  ):
    before = step_directories.steps_in(directory)
    step_directories.clear_unfinished(directory)
    assert step_directories.steps_in(directory) == before
    contents = files(directory)
    assert contents == (TWO if 4 in before else {f"2/{COMMIT}": b""})
  assert before == [2]


def test_moving_can_be_killed_at_any_request(run):
  def change(workdir):
    step_directories.move(workdir / "checkpoints" / "4", workdir / "damaged_checkpoints")

  contents = {f"checkpoints/{name}": content for name, content in TWO.items()}
  for workdir in killed_at_each_request(run, contents, change):
    step_directories.clear_unfinished(workdir / "checkpoints")
    if step_directories.steps_in(workdir / "checkpoints") == [2, 4]:  # the next start does it again
      assert files(workdir / "checkpoints" / "4") == OLD
      change(workdir)
    assert step_directories.steps_in(workdir / "checkpoints") == [2]
    assert OLD in [files(workdir / "damaged_checkpoints" / name) for name in ("4", "4-2")]
