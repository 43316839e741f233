"""Classification through the trainer: what a run's identity is, and other shapes of images."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from fixture_runs import CLASSES, write_images, write_run

from lip_jax.classification.config import Config, Data
from lip_jax.classification.task import Classification
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.training import config as config_lib
from lip_jax.training import trainer
from lip_jax.training.train_step import Program


def rename(old, new):
  def change(images, workdir):
    for split in ("train", "validation"):
      (images / split / old).rename(images / split / new)

  return change


def add_class(images, workdir):
  for split in ("train", "validation"):
    shutil.copytree(images / split / CLASSES[0], images / split / "dog")


def damage_and_add_an_image(images, workdir):
  """The newest checkpoint is damaged, and the one before it refused."""
  array = max((workdir / "checkpoints/8/state").rglob("d/*"), key=lambda path: path.stat().st_size)
  array.write_bytes(b"")
  (workdir / "checkpoints/9.orbax-checkpoint-tmp").mkdir()
  (workdir / "checkpoints/9.orbax-checkpoint-tmp/part").write_text("of a killed process")


def gone(images, workdir):
  shutil.rmtree(images)


def write(name, text):
  return lambda images, workdir: (workdir / name).write_text(text)


def stay(images, workdir): ...


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A folder with images, a run on them, and one of a wider network."""
  folder = tmp_path_factory.mktemp("written")
  write_images(folder / "images")
  write_run(folder / "run", folder / "images", {4: None, 8: None})
  write_run(folder / "other", folder / "images", {4: None}, width=4)
  return folder


@pytest.fixture
def started(written, tmp_path):
  """A copy: images, the run on them, and its configuration."""
  shutil.copytree(written, tmp_path, dirs_exist_ok=True)
  images, workdir = tmp_path / "images", tmp_path / "run"
  config = config_lib.load(workdir)
  data = dataclasses.replace(config.data, dataset=f"folder:{images}")
  config = dataclasses.replace(config, data=data, global_batch_size=8, num_epochs=100.0)
  (workdir / "config.json").write_text(config_lib.to_json(config))
  return images, workdir, config


@pytest.mark.parametrize(
  ("change", "values", "message"),
  [
    (rename("bee", "zebra"), {}, r"class 1 was 'bee' and is 'cow'"),
    (rename("cow", "bull"), {}, r"class 2 was 'cow' and is 'bull'"),
    (add_class, {}, r"class 3 was none of 3 and is 'dog'"),
    (damage_and_add_an_image, {}, "cannot continue the training data: it was saved with source="),
    (rename("bee/0.png", "bee/0.txt"), {}, "is not an image: train/bee/0.txt"),
    (gone, {}, "there is no folder"),
    (write("config.json", "{"), {}, "config.json is damaged"),
    (write("classes.json", "{"), {}, "classes.json is damaged"),
    (stay, {"seed": 7}, r"seed: 7 \(was"),
    (stay, {"num_epochs": 0.1}, r"num_epochs: 0.1 \(was"),
    (stay, {"global_batch_size": 12}, "global_batch_size"),
    (stay, {"fsdp": 3}, "fsdp"),
    (stay, {"eval_batch_size": 3}, "eval_batch_size|3"),
  ],
)
def test_a_refused_start_changes_no_byte_of_the_run(started, change, values, message, files_of):
  images, workdir, config = started
  config = dataclasses.replace(config, **values)
  change(images, workdir)
  before = files_of(workdir)
  with pytest.raises(UsageError, match=message):
    trainer.train(config, workdir)
  assert files_of(workdir) == before


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"weights": "none"}, "none"),
    ({"start_from": "none/checkpoints/4"}, "none/checkpoints/4"),
    ({"weights": "other"}, "other"),
    ({"start_from": "other/checkpoints/4"}, "other/checkpoints/4"),
    ({"start_from": "other/checkpoints/4", "weights": "other"}, "leave one of them"),
  ],
)
def test_refused_weights_change_no_byte_of_the_run(
  started, arguments, message, files_of, monkeypatch
):
  _, workdir, config = started
  shutil.rmtree(workdir / "checkpoints")
  before = files_of(workdir)
  monkeypatch.chdir(workdir.parent)
  with pytest.raises(UsageError, match=message):
    trainer.train(config, workdir, **arguments)
  assert files_of(workdir) == before


def test_a_full_disk_refuses_the_start_and_changes_nothing(started, files_of, monkeypatch):
  _, workdir, config = started
  before = files_of(workdir)
  usage = shutil.disk_usage(workdir)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
  with pytest.raises(UsageError, match="make room"):
    trainer.train(config, workdir)
  assert files_of(workdir) == before


@pytest.mark.parametrize(("size", "mean"), [((24, 40), None), (24, (128.0,))])
def test_images_that_are_not_square_and_grey_ones_train_and_are_evaluated(size, mean):
  mean = mean or (100.0, 110.0, 120.0)
  model = {"name": "lip_resnet_small", "width": 2, "logit_width": 2, "lip_stages": ("c4",)}
  config = Config(
    model={**model, "bn_group_size": 4, "in_channels": len(mean)},
    data=Data(
      dataset="fake:8",
      image_size=size,
      eval_resize=None,
      mean=mean,
      std=(60.0,) * len(mean),
      num_threads=1,
    ),
    global_batch_size=4,
    eval_batch_size=4,
  )
  config.check()
  task = Classification(config)
  program = Program(task, steps_per_epoch=2, devices=jax.devices()[:1])
  with task.train_loader() as loader:
    batch = next(loader)
  height, width = (size, size) if isinstance(size, int) else size
  assert batch["image"].shape == (4, height, width, len(mean))
  put = sharding.put_batch(batch, program.mesh)
  state, metrics = program.update(program.init(), put, sharding.StopFlags(program.mesh)(False))
  assert np.isfinite(float(metrics["loss"]))
  results = task.evaluator(program.graph, program.mesh)(*program.weights(state))
  assert results["count"] == len(task.validation)


def test_channels_of_network_and_images_have_to_agree():
  data = Data(dataset="fake:8", mean=(128.0,), std=(60.0,))
  config = Config(model={"name": "resnet50"}, data=data)
  with pytest.raises(UsageError, match="in_channels=3, but images have 1 channel"):
    config.check()
  grey = dataclasses.replace(config, model={"name": "resnet50", "in_channels": 1})
  grey.check()
