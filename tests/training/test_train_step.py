"""The training step: against the authors' implementation, and the same on any number of devices."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixture_weights import image, weight
from flax import nnx

import lip_jax
from lip_jax.classification.config import Config, Data
from lip_jax.classification.task import Classification
from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.models import abstract_model, layers
from lip_jax.models.torch_names import torch_names
from lip_jax.training import optim, train_state
from lip_jax.training.config import Optim
from lip_jax.training.train_step import Program, train_step

DATA = Path(__file__).parents[1] / "data"
REFERENCE = json.loads((DATA / "reference.json").read_text())["models"]

PLAIN = Optim(step_epochs=())


def data_config(**changes):
  values = {
    "dataset": "none",
    "image_size": 16,
    "crop_scale": None,
    "eval_resize": None,
    "flip": False,
    "mean": (128.0, 120.0, 110.0),
    "std": (60.0, 61.0, 62.0),
  }
  return Data(**{**values, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lip_resnet50", "lip_densenet121"])
def test_three_steps_equal_the_authors_in_float64(name, x64):
  """Losses, gradients, running statistics and parameters (reference.json)."""
  spec = REFERENCE[name]["train"]
  model = abstract_model(name, dtype=jnp.float64)
  lip_jax.load_torch_weights(
    model, {key: weight(key, tuple(shape)) for key, shape in REFERENCE[name]["state_dict"].items()}
  )
  assert (spec["momentum"], spec["weight_decay"], spec["nesterov"]) == (0.9, 1e-4, False)
  optimizer = optim.optimizer(PLAIN, optax.constant_schedule(spec["lr"]))
  graph = nnx.graphdef(model)
  params, batch_stats = train_state.split(model)
  state = train_state.TrainState(
    jnp.zeros((), jnp.int32),
    params,
    jax.tree.map(lambda stat: stat[None], batch_stats),
    optimizer.init(params),
  )
  labels = jnp.asarray(spec["labels"])
  mesh = sharding.make_mesh(jax.devices()[:1])
  # From the start where the step leaves it: placed otherwise, it would be compiled for twice.
  state = jax.device_put(state, sharding.replicated(mesh))

  # The fixture's images are normalized already: identity constants, and no uint8 on the way.
  identity = data_config(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
  config = Config(model={"name": name}, data=identity, optim=PLAIN)
  step = jax.jit(
    functools.partial(
      train_step,
      graph=graph,
      optimizer=optimizer,
      mesh=mesh,
      group_span=1,
      task=Classification(config, num_classes=1000),
    ),
    out_shardings=sharding.replicated(mesh),
  )
  losses = []
  for number, image_name in enumerate(spec["images"]):
    shape = (spec["batch"], 3, spec["size"], spec["size"])
    images = jnp.asarray(image(image_name, shape).transpose(0, 2, 3, 1), jnp.float64)
    state, metrics = step(state, {"image": images, "label": labels}, jnp.zeros(1, jnp.int32))
    losses.append(float(metrics["loss"]))
    if number == 0:
      after_first = state
  np.testing.assert_allclose(losses, spec["losses"], rtol=1e-6)

  def norms(params, batch_stats):
    model = train_state.merge(graph, params, batch_stats)
    return {
      name: float(np.linalg.norm(np.asarray(variable[...])))
      for name, variable in torch_names(model)
    }

  def compare(ours, expected, rtol):
    for name, norm in expected.items():
      np.testing.assert_allclose(ours[name], norm, rtol=rtol, err_msg=name)

  # The momentum after one step is the gradient plus the decayed weights.
  (momentum,) = [part.trace for part in after_first.opt_state if hasattr(part, "trace")]
  grads = jax.tree.map(
    lambda m, p: m - spec["weight_decay"] * p, jax.device_get(momentum), jax.device_get(params)
  )
  compare(norms(grads, batch_stats), spec["grad_norms_step0"], 1e-5)
  compare(
    norms(params, train_state.averaged(after_first.batch_stats)),
    spec["running_norms_after_step0"],
    1e-6,
  )
  compare(
    norms(state.params, train_state.averaged(state.batch_stats)), spec["param_norms_after"], 1e-6
  )


def tiny_config(dtype="float32", bn_group_size=4, global_batch_size=32, bn_frozen=False, **changes):
  """Of a tiny network on images of 32 px."""
  return Config(
    model={
      "name": "lip_resnet_small",
      "lip_stages": ("c4",),
      "logit": "projection",
      "width": 4,
      "bn_group_size": bn_group_size,
      "bn_frozen": bn_frozen,
    },
    data=data_config(flip=True, image_size=32),
    optim=dataclasses.replace(PLAIN, base_lr=0.4),
    seed=3,
    num_epochs=1,
    global_batch_size=global_batch_size,
    eval_batch_size=32,
    dtype=dtype,
    label_smoothing=0.1,
    **changes,
  )


def make_program(config, **options):
  return Program(Classification(config, num_classes=10), steps_per_epoch=99, **options)


@functools.cache
def run_steps(devices, steps=3, **changes):
  """Losses, last state and compiled program of the steps of a tiny network, 32 examples a step."""
  program = make_program(tiny_config(**changes), devices=jax.devices()[:devices])
  state = program.init()
  stop = sharding.StopFlags(program.mesh)
  compiled = program.update.lower(*program.arguments("all")).compile()
  rng = np.random.default_rng(0)
  losses = []
  for _ in range(steps):
    batch = {
      "image": rng.integers(0, 256, (32, 32, 32, 3), np.uint8),
      "label": rng.integers(0, 10, 32, np.int32),
    }
    before = state
    state, metrics = compiled(state, sharding.put_batch(batch, program.mesh), stop(False))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # given away, to save memory
    losses.append(float(metrics["loss"]))
  return losses, jax.device_get(state), compiled.as_text()


@pytest.mark.parametrize(
  ("devices", "changes"),
  [
    (8, {}),
    (8, {"fsdp": 4, "remat": True}),
    (4, {"fsdp": 2, "accumulation_steps": 2}),
    (8, {"bn_group_size": 8, "fsdp": 2}),  # a group on two devices, which share the state, too
    (4, {"bn_group_size": 0}),  # one group on all devices
    # Statistics that no batch changes are one, and bind the parts of a batch to nothing.
    (4, {"bn_frozen": True, "bn_group_size": None, "fsdp": 2, "accumulation_steps": 4}),
  ],
  ids=str,
)
def test_training_is_the_same_however_it_is_spread(devices, changes, x64):
  """Losses and the whole state after three steps; rounding has no room to hide a difference."""
  norm = {name: changes[name] for name in ("bn_group_size", "bn_frozen") if name in changes}
  expected, state_expected, _ = run_steps(1, dtype="float64", **norm)
  losses, state, program = run_steps(devices, dtype="float64", **changes)
  np.testing.assert_allclose(losses, expected, rtol=1e-9)
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9),
    state,
    state_expected,
  )
  assert "all-reduce" in program  # of the gradients
  assert ("all-gather" in program) == ("fsdp" in changes)
  group_size = 32 if "bn_frozen" in changes else changes.get("bn_group_size", 4) or 32
  assert {len(leaf) for leaf in jax.tree.leaves(state.batch_stats)} == {32 // group_size}


def test_fsdp_splits_parameters_and_optimizer_state():
  """All but small arrays: what a device holds is little more than its share."""
  config = tiny_config()
  config = dataclasses.replace(config, model={**config.model, "width": 64}, fsdp=4)
  program = make_program(config)
  for part in (program.state.params, program.state.opt_state):
    leaves = jax.tree.leaves(part)
    here = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves]
    whole = [math.prod(leaf.shape) for leaf in leaves]
    assert all(h == w / 4 for h, w in zip(here, whole, strict=True) if w >= 2**12)
    assert sum(here) < 0.26 * sum(whole)


def test_gradients_added_up_in_bfloat16_are_rounded(x64):
  exact = run_steps(8, dtype="float64")[0]
  rounded = run_steps(8, dtype="float64", gradient_dtype="bfloat16")[0]
  assert rounded[0] == exact[0]
  np.testing.assert_allclose(rounded, exact, rtol=1e-2)
  assert abs(rounded[1] - exact[1]) > 1e-7


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"global_batch_size": 36}, "36 is not divisible by the 8 devices; use 32 or 40"),
    ({"accumulation_steps": 3}, "accumulation_steps=3 does not divide the 4 images"),
    ({"accumulation_steps": 2}, "in 2 parts of 2; lower config.accumulation_steps"),
    ({"fsdp": 3}, "fsdp=3 does not divide the 8 devices"),
    ({"fsdp": 4, "bn_group_size": 8}, "spread over 2 devices, which config.fsdp=4 does not divide"),
    ({"bn_group_size": 6, "global_batch_size": 48}, None),
    ({"bn_group_size": 16, "global_batch_size": 80}, "one has to be a multiple of the other"),
  ],
)
def test_what_cannot_be_divided_is_refused(changes, message):
  config = tiny_config(**changes)
  if message is None:
    make_program(config)
    return
  with pytest.raises(UsageError, match=re.escape(message)):
    make_program(config)


def test_normalizing_within_groups_needs_no_traffic_between_devices():
  x = jax.device_put(jnp.ones((32, 8, 8, 4)), sharding.over_batch(sharding.make_mesh()))

  def program(group_size):
    normalize = jax.jit(lambda x: layers.BatchNorm(4, group_size=group_size)(x))
    return normalize.lower(x).compile().as_text()

  assert not any(name in program(4) for name in ("all-reduce", "all-gather", "permute"))
  assert "all-reduce" in program(None)


def test_groups_change_the_statistics():
  """The test above would pass without grouping if groups made no difference."""
  grouped, whole = run_steps(1)[0], run_steps(1, bn_group_size=None)[0]
  assert abs(grouped[0] - whole[0]) > 1e-3


def test_bfloat16_trains_with_float32_parameters_and_statistics():
  losses, state, _ = run_steps(1, dtype="bfloat16")
  assert np.isfinite(losses).all()
  dtypes = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.batch_stats))}
  assert dtypes == {np.dtype("float32")}
  exact = run_steps(1)[0]
  np.testing.assert_allclose(losses, exact, rtol=0.1)
  assert losses != exact
