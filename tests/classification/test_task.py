"""Classification through the trainer: what a run's identity is, and other shapes of images."""

import dataclasses

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


@pytest.mark.parametrize(
  ("rename", "message"),
  [
    (("bee", "zebra"), r"class 1 was 'bee' and is 'cow'"),
    (("cow", "bull"), r"class 2 was 'cow' and is 'bull'|class 1 was 'bee' and is 'bull'"),
    (None, r"class 3 was none of 3 and is 'dog'"),
  ],
)
def test_a_run_whose_classes_are_others_now_is_refused_and_stays(
  tmp_path, rename, message, files_of
):
  """A restart would exchange the labels, or leave a run that nothing can load any more."""
  images, workdir = tmp_path / "images", tmp_path / "run"
  write_images(images)
  write_run(workdir, images, {4: None})
  before = files_of(workdir)
  for split in ("train", "validation"):
    if rename:
      (images / split / rename[0]).rename(images / split / rename[1])
    else:
      (images / split / "dog").mkdir()
      for image in (images / split / CLASSES[0]).iterdir():
        (images / split / "dog" / image.name).write_bytes(image.read_bytes())
  with pytest.raises(UsageError, match=message):
    trainer.train(config_lib.load(workdir), workdir)
  after = files_of(workdir)
  after.pop(next(path for path in after if path.name == ".lock"))
  assert after == before


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
