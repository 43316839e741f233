"""A task of twenty lines: a linear model learns a linear function, through the same loop as all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lip_jax.training import config as base
from lip_jax.training import task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(base.Config):
  task: str = "toy"
  frozen: tuple[str, ...] = ()


class Numbers:
  """Endless batches of x [N, 4] and y [N]; every third y is missing (weight zero)."""

  def __init__(self, size, start=0):
    self.size, self.step = size, start

  def __iter__(self):
    return self

  def __next__(self):
    rng = np.random.default_rng(self.step)
    self.step += 1
    x = rng.standard_normal((self.size, 4)).astype(np.float32)
    known = (np.arange(self.size) % 3 > 0).astype(np.float32)
    return {"x": x, "y": x @ np.arange(4, dtype=np.float32), "known": known}

  def position(self):
    return self.step

  def get_state(self, position=None):
    return {"next_batch": position}

  def set_state(self, state):
    self.step = state["next_batch"]

  def joined(self, states):
    return states[0]

  def note_skipped(self, state): ...

  def num_skipped(self, position):
    return 0

  def __enter__(self):
    return self

  def __exit__(self, *_): ...


class Linear(nnx.Module):
  def __init__(self, rngs):
    self.slope = nnx.Param(jnp.zeros(4))
    self.bias = nnx.Param(jnp.ones(()))

  def __call__(self, x):
    return x @ self.slope[...] + self.bias[...]


class Evaluator:
  def __call__(self, params, batch_stats, stop):
    if stop():
      return None
    error = np.abs(np.asarray(params["slope"]) - np.arange(4)).max()
    return {"accuracy": float(1 / (1 + error))}

  def figures(self, params, batch_stats):
    return {"toy": np.zeros((2, 3, 3), np.uint8)}


class Toy(task.Task):
  best_metric = "accuracy"
  shown = ("bias",)
  num_train = 64
  batch_norm_group = 0

  def train_loader(self):
    return Numbers(self.config.global_batch_size)

  def batch_shapes(self, size, bucket):
    shapes = {"x": (size, 4), "y": (size,), "known": (size,)}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

  def create_model(self, rngs, **options):
    return Linear(rngs)

  def loss(self, model, batch, key):
    error = (model(batch["x"]) - batch["y"]) ** 2
    count = batch["known"].sum()
    return (
      {"loss": (error * batch["known"]).sum(), "mean_x": batch["x"].sum()},
      {"loss": count, "mean_x": jnp.float32(batch["x"].size)},
    )

  def trainable(self, path):
    return path[0] not in self.config.frozen

  def evaluator(self, graph, mesh):
    return Evaluator()

  def lower_evaluation(self, graph, mesh, params, batch_stats, bucket):
    raise NotImplementedError

  def summary(self, metrics):
    return [f"accuracy: {metrics['accuracy']:.3f}"]

  def files(self):
    return {"toy.txt": "a linear function\n"}


base.TASKS["toy"] = base.TaskPlace("fixture_toy:Config", "fixture_toy:Toy")


def make_config(**changes):
  """24 steps of 16 numbers each, a checkpoint every 5, validation every 8."""
  values = {
    "model": {"name": "linear"},
    "data": base.Data(dataset="none"),
    "optim": base.Optim(base_lr=1.6, momentum=0.5, step_epochs=(), weight_decay=0.0),
    "num_epochs": 6,
    "global_batch_size": 16,
    "eval_every_epochs": 2,
    "checkpoint_every_steps": 5,
    "log_every_steps": 1,
  }
  return Config(**{**values, **changes})
