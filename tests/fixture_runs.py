"""A run's directory and an image folder, as small as they can be, without training."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fixture_weights import weight
from PIL import Image

from lip_jax.distributed import sharding
from lip_jax.export import class_names
from lip_jax.models import abstract_model
from lip_jax.models.torch_names import torch_names
from lip_jax.training import config as config_lib
from lip_jax.training import optim, train_state
from lip_jax.training.checkpoint.checkpoints import Checkpoints
from lip_jax.training.train_state import TrainState

NAME = "lip_resnet_small"
OPTIONS = {"width": 2, "logit_width": 4, "bn_group_size": 4}
CLASSES = ["ant", "bee", "cow"]
SIZE = 32  # pixels
_CONFIG = Path(__file__).parents[1] / "configs" / "cluttered_digits.py"


def make_model(salt="", **options):
  """A network with arbitrary weights, without the time that initialisation takes."""
  return with_weights(abstract_model(NAME, num_classes=len(CLASSES), **OPTIONS | options), salt)


def with_weights(model, salt=""):
  """A network of shapes, with arbitrary weights in their place."""
  for key, variable in torch_names(model):
    value = weight(salt + key, variable.shape[::-1]).T  # PyTorch's kernels are O, I, H, W
    variable.set_value(jnp.asarray(value, variable.dtype))
  return model


def write_images(folder):
  """Ten validation images of three classes, and one for training."""
  rng = np.random.default_rng(0)
  for split, counts in (("train", (1, 1, 1)), ("validation", (5, 3, 2))):
    for name, count in zip(CLASSES, counts, strict=True):
      (folder / split / name).mkdir(parents=True)
      for index in range(count):
        pixels = rng.integers(0, 256, (SIZE, SIZE + 4, 3), np.uint8)
        Image.fromarray(pixels).save(folder / split / name / f"{index}.png")


def write_run(workdir, images, metrics, **options):
  """What training leaves behind, on all devices.

  Args:
    workdir: to create.
    images: folder of the data set.
    metrics: validation results by step, each of which becomes a checkpoint; None: not evaluated.
    options: of the network, other than `OPTIONS`.
  """
  values = runpy.run_path(str(_CONFIG))["get_config"]().to_dict()
  values["model"].update(name=NAME, **OPTIONS | options)
  values["data"].update(dataset=f"folder:{images}", image_size=SIZE)
  values["eval_batch_size"] = 8
  config = config_lib.from_dict(values)
  workdir.mkdir(parents=True)
  (workdir / class_names.FILE).write_text(class_names.to_json(CLASSES))
  models = {step: make_model(str(step), **options) for step in metrics}
  write_checkpoints(workdir, config, models, metrics, "top1")


def write_checkpoints(workdir, config, models, metrics, best_metric):
  """The configuration, and models and their validation results by step, of two groups."""
  (workdir / "config.json").write_text(config_lib.to_json(config))
  optimizer = optim.optimizer(config.optim, optax.constant_schedule(0.0))
  with Checkpoints(workdir, best_metric=best_metric) as checkpoints:
    for step, result in metrics.items():
      params, batch_stats = train_state.split(models[step])
      batch_stats = jax.tree.map(lambda stat: jnp.stack([stat, stat]), batch_stats)  # two groups
      state = TrainState(jnp.int32(step), params, batch_stats, optimizer.init(params))
      state = jax.device_put(state, sharding.replicated(sharding.make_mesh()))
      checkpoints.save(state, {"position": 0}, step=step, metrics=result)
