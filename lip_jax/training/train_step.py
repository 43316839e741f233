"""One update, and everything that a run computes on a mesh of devices.

Each device computes the gradients of its own examples, in `jax.shard_map`, so that what travels
between devices is written here and nowhere else: the gradients, once, in a dtype of choice; with an
"fsdp" axis the parameters before them; and batch statistics only where a group does not fit on a
device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from lip_jax.distributed import sharding
from lip_jax.models.registry import abstract
from lip_jax.training import optim, train_state
from lip_jax.training import task as task_lib
from lip_jax.training.task import Batch, Scalars, Task
from lip_jax.training.train_state import TrainState, Tree

# The mesh axes over which a batch-norm group is spread, where it is.
_GROUP_AXES = ("group", "fsdp")
# What is folded into the key of a step for the loss, beside what the preparation folds in.
_LOSS_KEY = 1000


class Program:
  """What a training run computes, for a mesh; compiled when it is first called.

  Attributes:
    mesh: over the devices.
    schedule: learning rate of a step.
    graph: static structure of the network, for evaluation.
    state: shapes, dtypes and placement of the train state.
    init: () -> `TrainState` before the first step.
    update: (state, batch, stop) -> (state, metrics), jitted `train_step`; `state` is given away.
    weights: state -> (parameters, batch statistics) to evaluate, whole on every device: those of
      the average where the run has one.

  Args:
    steps_per_epoch: may be a fraction.
    devices: default: all, of all processes.

  Raises:
    UsageError: a batch that cannot be divided among the devices, or unknown model options.
  """

  def __init__(
    self,
    task: Task,
    *,
    steps_per_epoch: float,
    devices: Sequence[jax.Device] | None = None,
  ):
    config = task.config
    devices = jax.devices() if devices is None else devices
    sharding.check_batch_size("global_batch_size", config.global_batch_size, len(devices))
    sharding.check_batch_size("eval_batch_size", config.eval_batch_size, len(devices))
    self.group_span = sharding.group_span(
      config.global_batch_size,
      config.accumulation_steps,
      task.batch_norm_group,
      len(devices),
    )
    self.mesh = sharding.make_mesh(devices, fsdp=config.fsdp, group_span=self.group_span)
    self._task = task

    self.graph = _graph(task)
    axis_name = _GROUP_AXES if self.group_span > 1 else None
    training_graph = _graph(task, bn_axis_name=axis_name, remat=config.remat)
    self.schedule = optim.learning_rate(
      config.optim,
      global_batch_size=config.global_batch_size,
      steps_per_epoch=steps_per_epoch,
      num_epochs=config.num_epochs,
    )
    optimizer, init = initializer(task, self.schedule)
    self.state = train_state.placed(jax.eval_shape(init), self.mesh, self.group_span)
    placement = jax.tree.map(lambda leaf: leaf.sharding, self.state)
    whole = sharding.replicated(self.mesh)
    self.init: Callable[[], TrainState] = jax.jit(init, out_shardings=placement)
    self.update = jax.jit(
      functools.partial(
        train_step,
        graph=training_graph,
        optimizer=optimizer,
        mesh=self.mesh,
        group_span=self.group_span,
        task=task,
      ),
      donate_argnums=0,
      out_shardings=(placement, whole),
    )

    def weights(state: TrainState) -> tuple[Tree, Tree]:
      # Gathered before they are averaged: in the same order on any number of devices.
      batch_stats = jax.lax.with_sharding_constraint(state.batch_stats, whole)
      params = state.params if state.ema is None else state.ema
      return params, train_state.averaged(batch_stats)

    self.weights = jax.jit(weights, out_shardings=whole)

  def arguments(self, bucket: str) -> tuple[TrainState, dict[str, Any], Any]:
    """Shapes, dtypes and placement of the arguments of `update`, to compile it without data."""
    place = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.over_batch(self.mesh))
    shapes = self._task.batch_shapes(self._task.config.global_batch_size, bucket)
    batch = {name: place(one.shape, one.dtype) for name, one in shapes.items()}
    return self.state, batch, place((self.mesh.size,), jnp.int32)


def _graph(task: Task, **options: Any) -> nnx.GraphDef:
  return nnx.graphdef(abstract(lambda rngs: task.create_model(rngs, **options)))


def initializer(
  task: Task, schedule: optax.Schedule
) -> tuple[optax.GradientTransformation, Callable[[], TrainState]]:
  """(optimizer, what makes the train state of a run before its first step); asks no device."""
  config = task.config
  model = abstract(task.create_model)
  trained = task_lib.trainable_mask(task, train_state.split(model)[0])
  optimizer = optim.optimizer(config.optim, schedule, None if jax.tree.all(trained) else trained)
  group_size = task.batch_norm_group or config.global_batch_size
  init = functools.partial(
    train_state.init,
    optimizer,
    config.seed,
    config.global_batch_size // group_size,
    task.create_model,
    ema=config.ema_decay is not None,
  )
  return optimizer, init


def train_step(
  state: TrainState,
  batch: Batch,
  stop: jax.Array,
  *,
  graph: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  group_span: int,
  task: Task,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update.

  Args:
    stop: int [devices], from `sharding.StopFlags`; passed through as the greatest of them.
    optimizer: whose state `state.opt_state` is.
    group_span: devices over which a batch-norm group is spread; 0: there are none.
    task: what is trained; its randomness depends on the run's seed and the step alone.

  Returns:
    State after the update and the scalars "loss", the task's others and "grad_norm" of the batch
    before it, "param_norm" after it, and "stop".
  """
  config = task.config
  key = jax.random.fold_in(jax.random.key(config.seed), state.step)
  rows = task.prepare(batch, key)

  axes = jax.tree.map(lambda leaf: sharding.fsdp_axis(leaf.shape, mesh), state.params)
  params_spec = jax.tree.map(lambda leaf: sharding.over_fsdp(leaf.shape, mesh).spec, state.params)
  stats_spec = sharding.over_groups(mesh, group_span).spec
  gradients = jax.shard_map(
    functools.partial(_gradients, graph=graph, axes=axes, task=task, one_group=group_span == 0),
    mesh=mesh,
    in_specs=(params_spec, stats_spec, PartitionSpec(sharding.AXES), PartitionSpec()),
    out_specs=(params_spec, stats_spec, PartitionSpec()),
    check_vma=False,  # gradients are added up below, once, and not wherever parameters are used
  )
  loss_key = jax.random.fold_in(key, _LOSS_KEY)
  grads, batch_stats, metrics = gradients(state.params, state.batch_stats, rows, loss_key)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = state.ema
  if ema is not None:
    ema = optax.incremental_update(params, ema, 1 - config.ema_decay)
  return TrainState(state.step + 1, params, batch_stats, opt_state, ema), {
    **metrics,
    "grad_norm": optax.tree.norm(grads),
    "param_norm": optax.tree.norm(params),
    "stop": stop.max(),
  }


def _gradients(
  params: Tree,
  batch_stats: Tree,
  rows: Any,
  key: jax.Array,
  *,
  graph: nnx.GraphDef,
  axes: Tree,
  task: Task,
  one_group: bool,
) -> tuple[Tree, Tree, Scalars]:
  """On one device of many: (gradients, batch statistics, metrics) of its part of the batch.

  Gradients and metrics are those of all devices' examples. `one_group`: all examples share the
  statistics, which the batch does not change.
  """
  num_parts = task.config.accumulation_steps
  rounded = task.config.gradient_dtype == "bfloat16"
  shares = num_parts * jax.lax.axis_size(sharding.AXES)
  trained = task_lib.trainable_mask(task, params)

  def loss_of(params, batch_stats, rows, totals: Scalars | None):
    params = jax.tree.map(
      lambda param, train: param if train else jax.lax.stop_gradient(param), params, trained
    )
    model = train_state.merge(graph, params, batch_stats)
    sums, weights = task.loss(model, rows, key)
    if totals is None:
      totals = _nonzero(jax.lax.psum(jax.lax.stop_gradient(weights), sharding.AXES))
    # Of the size of the whole batch's, as are the gradients, on any number of devices and parts.
    loss = sum((sums[name] * (shares / totals[name])).mean() for name in task.trained)
    return loss, ((sums, totals), train_state.split(model)[1])

  def whole(param: jax.Array, axis: int) -> jax.Array:
    return param if axis < 0 else jax.lax.all_gather(param, "fsdp", axis=axis, tiled=True)

  params = jax.tree.map(whole, params, axes)
  gradient = jax.grad(loss_of, has_aux=True)
  if num_parts == 1:
    grads, ((sums, totals), batch_stats) = gradient(params, batch_stats, rows, None)
  else:
    grads, sums, totals, batch_stats = _in_parts(
      functools.partial(gradient, params),
      # What of the network the weights do not depend on, and that is mostly all, XLA leaves out.
      lambda stats, rows: task.loss(train_state.merge(graph, params, stats), rows, key)[1],
      batch_stats,
      rows,
      num_parts,
      one_group=one_group,
    )

  def add_up(value: jax.Array, axis: int) -> jax.Array:
    total = value.astype(jnp.bfloat16 if rounded else value.dtype)
    if axis >= 0:
      total = jax.lax.psum_scatter(total, "fsdp", scatter_dimension=axis, tiled=True)
    total = jax.lax.psum(total, sharding.AXES if axis < 0 else ("data", "group"))
    return total.astype(value.dtype) / shares

  sums = jax.lax.psum(sums, sharding.AXES)
  means = {name: (value / totals[name]).mean() for name, value in sums.items()}
  return (
    jax.tree.map(add_up, grads, axes),
    batch_stats,
    {
      **means,
      "loss": sum(means[name] for name in task.trained),
    },
  )


def _in_parts(
  gradient: Callable[..., Any],
  weights_of: Callable[[Tree, Any], Scalars],
  batch_stats: Tree,
  rows: Any,
  num_parts: int,
  *,
  one_group: bool,
) -> tuple[Tree, Scalars, Scalars, Tree]:
  """(gradients, sums, weights of all devices, batch statistics) of examples, part after part.

  Args:
    gradient: (batch statistics, rows, weights of all) -> (gradients, ((sums, weights), statistics))
      of a part.
    weights_of: of a part.
    one_group: all parts share the statistics.
  """

  def cut(a: jax.Array) -> jax.Array:
    return a.reshape(num_parts, len(a) // num_parts, *a.shape[1:])

  def repeat(a: jax.Array) -> jax.Array:
    return jnp.broadcast_to(a, (num_parts, *a.shape))

  parts = jax.tree.map(repeat if one_group else cut, batch_stats), jax.tree.map(cut, rows)
  # Of all parts, before the first one is differentiated.
  weights = jax.lax.map(lambda part: weights_of(*part), parts)
  totals = jax.lax.psum(jax.tree.map(lambda w: w.sum(axis=0), weights), sharding.AXES)
  totals = _nonzero(totals)

  def add_part(total, part):
    grads, ((sums, _), stats) = gradient(*part, totals)
    return jax.tree.map(jnp.add, total, (grads, sums)), stats

  zero = jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype),
    jax.eval_shape(lambda: gradient(*jax.tree.map(lambda a: a[0], parts), totals)),
  )
  (grads, sums), stats = jax.lax.scan(add_part, (zero[0], zero[1][0][0]), parts)
  batch_stats = jax.tree.map(
    lambda a, like: a[-1] if one_group else a.reshape(like.shape), stats, batch_stats
  )
  return grads, sums, totals, batch_stats


def _nonzero(totals: Scalars) -> Scalars:
  """What sums are divided by: where nothing has weight, a sum of nothing counts as 0."""
  return {name: jnp.where(total == 0, 1, total) for name, total in totals.items()}
