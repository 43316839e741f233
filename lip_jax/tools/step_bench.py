"""How large the state of a configured training is, and how fast its steps are, without any data."""

import dataclasses
import math
import time
from collections.abc import Callable

import jax
import numpy as np
import optax

from lip_jax.distributed import sharding
from lip_jax.training import task as task_lib
from lip_jax.training.config import Config
from lip_jax.training.train_step import Program, initializer

_CLASSES = 1000  # of the classifier, whose part of the work is small
_STEPS_PER_EPOCH = 1e6  # of data that is not looked at
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
  """Bytes of a train state, which a checkpoint holds; nothing is computed, and no device asked.

  Those of this machine may hang, and are only a part of the devices of a run on several hosts.
  """
  task = task_lib.make(config, num_classes=_CLASSES)
  _, init = initializer(task, optax.constant_schedule(0.0))
  leaves = jax.tree.leaves(jax.eval_shape(init))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def measure(
  config: Config,
  *,
  num_hosts: int = 1,
  seconds: float = 5.0,
  progress: Callable[[str], None] = lambda _: None,
) -> StepRate:
  """Makes real training steps with noise as images: initialised weights, forward, backward, update.

  On CPUs with a small batch, so that it ends within about a minute.

  Args:
    num_hosts: that share a batch; this one makes its part.
  """
  devices = jax.local_devices()
  # The hosts of a TPU slice know of each other without being told.
  per_device = config.global_batch_size // max(num_hosts, jax.process_count()) // len(devices)
  if jax.default_backend() == "cpu":
    per_device = min(per_device, _CPU_BATCH)
  batch_size = max(1, per_device) * len(devices)
  model = dict(config.model)
  if (model.get("bn_group_size") or 0) > batch_size:
    model["bn_group_size"] = batch_size
  config = dataclasses.replace(
    config,
    model=model,
    global_batch_size=batch_size,
    eval_batch_size=batch_size,
    fsdp=math.gcd(config.fsdp, len(devices)),
    accumulation_steps=math.gcd(config.accumulation_steps, batch_size // len(devices)),
  )
  task = task_lib.make(config, num_classes=_CLASSES)
  program = Program(task, steps_per_epoch=_STEPS_PER_EPOCH, devices=devices)
  state, stop = program.init(), sharding.StopFlags(program.mesh)(False)
  rng = np.random.default_rng(0)
  noise = {
    name: rng.integers(0, 256 if one.dtype == np.uint8 else 1, one.shape).astype(one.dtype)
    for name, one in task.batch_shapes(batch_size, task.buckets[0]).items()
  }
  batch = sharding.put_batch(noise, program.mesh)
  progress(f"compiling the training step of {config.model['name']}, batch {batch_size}")
  start = time.perf_counter()
  state, metrics = program.update(state, batch, stop)
  jax.block_until_ready(metrics)
  compiled = time.perf_counter() - start
  start, count = time.perf_counter(), 0
  while count < 2 or time.perf_counter() - start < seconds:
    state, metrics = program.update(state, batch, stop)
    jax.block_until_ready(metrics)
    count += 1
    progress(f"training step {count}")
  rate = count * batch_size / (time.perf_counter() - start)
  return StepRate(rate, batch_size, len(devices), compiled)
