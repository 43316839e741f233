"""How large the state of a configured training is, and how fast its steps are, without any data."""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import numpy as np
import optax

from lip_jax import optim, sharding, train_state, trainer
from lip_jax.config import Config

_CLASSES = 1000  # of the classifier, whose part of the work is small
_CPU_BATCH = 4  # images for each device, where a whole batch would take minutes


@dataclasses.dataclass(frozen=True)
class StepRate:
  """Speed of training steps on the devices of this process."""

  rate: float  # images/s
  batch_size: int
  num_devices: int
  compile_seconds: float

  def __str__(self) -> str:
    return (
      f"{self.rate:,.{0 if self.rate >= 10 else 1}f} images/s (batch {self.batch_size} on "
      f"{self.num_devices} device(s), compiled in {self.compile_seconds:.0f} s)"
    )


def state_bytes(config: Config) -> int:
  """Bytes of a train state, which a checkpoint holds; nothing is computed."""
  leaves = jax.tree.leaves(jax.eval_shape(_init(config)))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def measure(
  config: Config, *, seconds: float = 5.0, progress: Callable[[str], None] = lambda _: None
) -> StepRate:
  """Makes real training steps with noise as images: initialised weights, forward, backward, update.

  On CPUs with a small batch, so that it ends within about a minute.

  Args:
    config: of the training.
    seconds: to measure for, after the compilation.
    progress: is told what is being done.
  """
  mesh = sharding.make_mesh(jax.local_devices())
  batch_size = config.global_batch_size // jax.process_count()
  if jax.default_backend() == "cpu":
    batch_size = min(batch_size, _CPU_BATCH * mesh.size)
  batch_size -= batch_size % mesh.size
  model = dict(config.model)
  if (model.get("bn_group_size") or 0) > batch_size:
    model["bn_group_size"] = batch_size
  config = dataclasses.replace(config, model=model)
  optimizer = optim.sgd(config.optim, optax.constant_schedule(1e-6))
  init = jax.jit(_init(config), out_shardings=sharding.replicated(mesh))
  step = jax.jit(
    functools.partial(
      trainer.train_step,
      graph=train_state.graph_of(**train_state.model_options(config, _CLASSES)),
      optimizer=optimizer,
      data=config.data,
      label_smoothing=config.label_smoothing,
      seed=config.seed,
    ),
    donate_argnums=0,
    out_shardings=sharding.replicated(mesh),
  )
  rng = np.random.default_rng(0)
  side = config.data.image_size
  batch = sharding.put_batch(
    {
      "image": rng.integers(0, 256, (batch_size, side, side, 3), np.uint8),
      "label": rng.integers(0, _CLASSES, batch_size),
    },
    mesh,
  )
  progress(f"compiling the training step of {config.model['name']}, batch {batch_size}")
  start = time.perf_counter()
  state, metrics = step(init(), batch)
  jax.block_until_ready(metrics)
  compiled = time.perf_counter() - start
  start, count = time.perf_counter(), 0
  while count < 2 or time.perf_counter() - start < seconds:
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    count += 1
    progress(f"training step {count}")
  rate = count * batch_size / (time.perf_counter() - start)
  return StepRate(rate, batch_size, mesh.size, compiled)


def _init(config: Config) -> Callable[[], train_state.TrainState]:
  optimizer = optim.sgd(config.optim, optax.constant_schedule(1e-6))
  options = train_state.model_options(config, _CLASSES)
  return functools.partial(train_state.init, optimizer, config.seed, **options)
