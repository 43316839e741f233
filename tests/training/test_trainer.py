"""The loop, in the process, with a task that knows neither images nor classes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from fixture_toy import Numbers, Toy, make_config

from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.training import config as config_lib
from lip_jax.training import trainer
from lip_jax.training.checkpoint.checkpoints import Checkpoints
from lip_jax.training.train_step import Program

STEPS = 24


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run from start to end: (workdir, result)."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  return workdir, trainer.train(make_config(), workdir)


def metrics_of(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  for line in lines:
    line.pop("train/images_per_second", None)
    line.pop("train/data_stall", None)
  return lines


def weights_of(workdir, step=STEPS):
  with Checkpoints(workdir, read_only=True) as checkpoints:
    return checkpoints.restore_weights(step)[0]


def test_a_task_of_its_own_trains_through_the_same_loop(finished):
  workdir, result = finished
  assert (result.step, result.finished) == (STEPS, True)
  assert result.metrics["accuracy"] > 0.9
  assert (workdir / "toy.txt").read_text() == "a linear function\n"
  assert result.pictures["toy"].read_bytes().startswith(b"\x89PNG")
  assert config_lib.load(workdir) == make_config()
  lines = metrics_of(workdir)
  assert [line["step"] for line in lines if "validation/accuracy" in line] == [8, 16, 24]
  training = [line for line in lines if "train/loss" in line]
  assert [line["step"] for line in training] == list(range(1, STEPS + 1))
  assert training[-1]["train/loss"] < 0.1 * training[0]["train/loss"]
  with Checkpoints(workdir, read_only=True) as checkpoints:
    assert checkpoints.best_step == STEPS


class StopsAt(Toy):
  """Asks for the end once a step is dispatched, as a signal does."""

  at = 0
  trainer = None

  def train_loader(self):
    class Loader(Numbers):
      def __next__(self):
        if StopsAt.trainer is not None and StopsAt.trainer.step >= StopsAt.at:
          StopsAt.trainer.stop.requested = True
        return super().__next__()

    return Loader(self.config.global_batch_size)


@pytest.mark.parametrize("at", [3, 8])
def test_stopped_and_resumed_it_is_the_same_run(finished, tmp_path, at, monkeypatch):
  """Through the methods of the trainer, which are those that `train` calls."""
  workdir = trainer.check_access(tmp_path / "run")
  first = trainer.Trainer(StopsAt(make_config()), workdir)
  monkeypatch.setattr(StopsAt, "at", at)
  with first.open():
    first.restore()
    monkeypatch.setattr(StopsAt, "trainer", first)
    result = first.run()
  assert not result.finished
  assert at <= result.step < STEPS
  assert result.checkpoint == workdir / "checkpoints" / str(result.step)
  again = trainer.train(make_config(), tmp_path / "run")
  assert again.finished
  assert metrics_of(tmp_path / "run") == metrics_of(finished[0])
  jax.tree.map(np.testing.assert_array_equal, weights_of(workdir), weights_of(finished[0]))


def test_another_run_is_refused_and_the_first_one_stays_as_it_was(finished, files_of):
  workdir, _ = finished
  before = files_of(workdir)
  with pytest.raises(UsageError, match=r"optim.base_lr: 0.5 \(was 1.6\)"):
    trainer.train(make_config(optim=config_lib.Optim(base_lr=0.5)), workdir)
  last = workdir / "checkpoints" / "24"
  with pytest.raises(UsageError, match="ends at step 4"):
    trainer.train(make_config(num_epochs=1), workdir.parent / "short", start_from=last)
  assert files_of(workdir) == before


def test_what_a_run_learned_belongs_to_it(finished, monkeypatch, files_of):
  workdir, _ = finished
  before = files_of(workdir)
  monkeypatch.setattr(Toy, "files", lambda self: {"toy.txt": "another function\n"})
  with pytest.raises(UsageError, match=r"toy.txt is not what this run would write"):
    trainer.train(make_config(), workdir)
  assert files_of(workdir) == before


def test_a_loss_that_is_not_finite_names_the_step_and_the_way_back(tmp_path):
  config = make_config(optim=config_lib.Optim(base_lr=1e30, step_epochs=()))
  with pytest.raises(trainer.NonFiniteLossError, match=r"step \d+ is not finite: loss .*base_lr"):
    trainer.train(config, tmp_path / "run")


def test_an_average_of_the_parameters_is_evaluated_and_saved(finished, tmp_path):
  trainer.train(make_config(ema_decay=0.9), tmp_path / "run")
  with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
    task = Toy(make_config(ema_decay=0.9))
    state = checkpoints.restore(STEPS, Program(task, steps_per_epoch=4).state).state
  jax.tree.map(np.testing.assert_array_equal, state.params, weights_of(finished[0]))
  jax.tree.map(np.testing.assert_array_equal, state.ema, weights_of(tmp_path / "run"))
  assert abs(state.ema["slope"] - state.params["slope"]).max() > 1e-4
  # By hand: from the parameters after each step.
  program = Program(task, steps_per_epoch=4)
  now, loader = program.init(), task.train_loader()
  average = jax.device_get(now.params)
  for _ in range(STEPS):
    batch = sharding.put_batch(next(loader), program.mesh)
    now, _ = program.update(now, batch, sharding.StopFlags(program.mesh)(False))
    average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * np.asarray(p), average, now.params)
  jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5), average, state.ema)
  accuracy = metrics_of(tmp_path / "run")[-1]["validation/accuracy"]
  assert accuracy != metrics_of(finished[0])[-1]["validation/accuracy"]


def test_an_average_starts_from_the_weights_that_the_run_starts_from(tmp_path, monkeypatch):
  def start_from(self, path, state):
    return dataclasses.replace(state, params=jax.tree.map(lambda p: p + 7, state.params))

  monkeypatch.setattr(Toy, "start_from", start_from)
  run = trainer.Trainer(Toy(make_config(ema_decay=0.9)), trainer.check_access(tmp_path / "run"))
  with run.open():
    run.restore(weights="some network")
    jax.tree.map(np.testing.assert_array_equal, run.state.ema, run.state.params)
    assert run.state.ema["bias"] == 8


def test_parameters_that_are_not_trained_stay(tmp_path):
  trainer.train(make_config(frozen=("bias",), num_epochs=3), tmp_path / "run")
  again = trainer.train(make_config(frozen=("bias",), num_epochs=3), tmp_path / "run")
  assert again.finished  # its configuration was read from the run, and compared
  weights = weights_of(tmp_path / "run", 12)
  assert weights["bias"] == 1.0
  assert abs(weights["slope"]).max() > 1


def one_step(devices, **changes):
  """(metrics, parameters) of a step on 24 numbers, a third of which weigh nothing."""
  task = Toy(make_config(global_batch_size=24, eval_batch_size=24, **changes))
  program = Program(task, steps_per_epoch=4, devices=jax.devices()[:devices])
  batch = sharding.put_batch(next(task.train_loader()), program.mesh)
  stop = sharding.StopFlags(program.mesh)(False)
  state, metrics = program.update(program.init(), batch, stop)
  return jax.device_get((metrics, state.params))


@pytest.mark.parametrize(
  ("devices", "changes"), [(8, {}), (4, {"accumulation_steps": 3}), (1, {"accumulation_steps": 4})]
)
def test_sums_are_divided_once_by_the_weights_of_all_devices_and_parts(devices, changes):
  """Means of means would differ: a device or a part has 3, 2 or 6 numbers, some of no weight."""
  metrics, params = one_step(devices, **changes)
  expected_metrics, expected = one_step(1)
  batch = next(Toy(make_config(global_batch_size=24)).train_loader())
  error = (1 - batch["y"]) ** 2
  loss = (error * batch["known"]).sum() / batch["known"].sum()
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics["mean_x"], batch["x"].mean(), rtol=1e-4, atol=1e-6)
  for name in expected:
    np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)
  for name in expected_metrics:
    np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-4, atol=1e-6)


def test_a_batch_without_weight_counts_as_nothing(monkeypatch):
  take = Numbers.__next__
  monkeypatch.setattr(Numbers, "__next__", lambda self: {**take(self), "known": np.zeros(24, "f")})
  metrics, params = one_step(4)
  assert metrics["loss"] == metrics["grad_norm"] == 0
  assert params["bias"] == 1


def test_start_from_and_weights_exclude_each_other(tmp_path):
  with pytest.raises(UsageError, match="leave one of them out"):
    trainer.train(make_config(), tmp_path, start_from="a", weights="b")
  with pytest.raises(UsageError, match=r"weights=b: toy"):
    trainer.train(dataclasses.replace(make_config()), tmp_path / "run", weights="b")


def test_a_validation_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
  monkeypatch.setattr(
    "fixture_toy.Evaluator.__call__", lambda self, params, batch_stats, stop: {"loss": float("nan")}
  )
  with pytest.raises(trainer.NonFiniteLossError, match=r"validation after step 8 is not finite"):
    trainer.train(make_config(), tmp_path / "run")
  for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
    json.loads(line, parse_constant=pytest.fail)


@pytest.mark.parametrize(
  ("dataset", "located", "moved"),
  [
    ("folder:pets", "folder:{}/pets", "folder:/elsewhere"),
    (
      "coco:pets/{split}.json@pets/images",
      "coco:{}/pets/{{split}}.json@{}/pets/images",
      "coco:/elsewhere.json@/images",
    ),
  ],
)
def test_a_run_is_used_from_any_directory_and_goes_on_where_its_folder_has_moved(
  tmp_path, monkeypatch, dataset, located, moved
):
  monkeypatch.chdir(tmp_path)
  data = config_lib.Data(dataset=dataset, data_dir="sets")
  trainer.train(make_config(data=data, num_epochs=1), "run")
  found = config_lib.load("run").data
  expected = located.format(*[tmp_path] * 2)
  assert (found.dataset, found.data_dir) == (expected, f"{tmp_path}/sets")
  other = make_config(data=config_lib.Data(dataset=moved), num_epochs=1)
  assert trainer.train(other, "run").finished
  assert config_lib.load("run").data.dataset == moved
  with pytest.raises(UsageError, match=r"data.dataset: 'fake'"):
    trainer.train(make_config(data=config_lib.Data(dataset="fake"), num_epochs=1), "run")
