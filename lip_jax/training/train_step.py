"""One update, and everything that a run computes on a mesh of devices.

Each device computes the gradients of its own images, in `jax.shard_map`, so that what travels
between devices is written here and nowhere else: the gradients, once, in a dtype of choice; with an
"fsdp" axis the parameters before them; and batch statistics only where a group does not fit on a
device.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from lip_jax.classification import augment
from lip_jax.distributed import sharding
from lip_jax.training import optim, train_state
from lip_jax.training.config import Config, Data
from lip_jax.training.train_state import TrainState, Tree

# The mesh axes over which a batch-norm group is spread, where it is.
_GROUP_AXES = ("group", "fsdp")


class _Rows(NamedTuple):
  """What a device needs of its images."""

  images: jax.Array  # [N, H, W, 3], normalized
  targets: jax.Array  # [N, classes], probabilities
  dominant: jax.Array  # int [N], the label that counts for top-1


class Program:
  """What a training run computes, for a mesh; compiled when it is first called.

  Attributes:
    mesh: over the devices.
    schedule: learning rate of a step.
    graph: static structure of the network, for evaluation.
    state: shapes, dtypes and placement of the train state.
    init: () -> `TrainState` before the first step.
    update: (state, batch, votes) -> (state, metrics), jitted `train_step`; `state` is given away.

  Args:
    config: of the run.
    num_classes: of its data.
    steps_per_epoch: may be a fraction.
    devices: default: all, of all processes.

  Raises:
    UsageError: a batch that cannot be divided among the devices, or unknown model options.
  """

  def __init__(
    self,
    config: Config,
    *,
    num_classes: int,
    steps_per_epoch: float,
    devices: Sequence[jax.Device] | None = None,
  ):
    devices = jax.devices() if devices is None else devices
    sharding.check_batch_size("global_batch_size", config.global_batch_size, len(devices))
    sharding.check_batch_size("eval_batch_size", config.eval_batch_size, len(devices))
    self.group_span = sharding.group_span(
      config.global_batch_size,
      config.accumulation_steps,
      config.model.get("bn_group_size"),
      len(devices),
    )
    self.mesh = sharding.make_mesh(devices, fsdp=config.fsdp, group_span=self.group_span)
    self._config = config

    options = train_state.model_options(config, num_classes)
    training_options = {
      **options,
      "bn_axis_name": _GROUP_AXES if self.group_span > 1 else None,
      "remat": config.remat,
    }
    self.graph = train_state.graph_of(**options)
    self.schedule = optim.learning_rate(
      config.optim,
      global_batch_size=config.global_batch_size,
      steps_per_epoch=steps_per_epoch,
      num_epochs=config.num_epochs,
    )
    optimizer = optim.sgd(config.optim, self.schedule)
    init = initializer(config, optimizer, num_classes)
    self.state = train_state.placed(jax.eval_shape(init), self.mesh, self.group_span)
    placement = jax.tree.map(lambda leaf: leaf.sharding, self.state)
    self.init: Callable[[], TrainState] = jax.jit(init, out_shardings=placement)
    self.update = jax.jit(
      functools.partial(
        train_step,
        graph=train_state.graph_of(**training_options),
        optimizer=optimizer,
        mesh=self.mesh,
        group_span=self.group_span,
        num_classes=num_classes,
        data=config.data,
        label_smoothing=config.label_smoothing,
        seed=config.seed,
        accumulation_steps=config.accumulation_steps,
        gradient_dtype=jnp.bfloat16 if config.gradient_dtype == "bfloat16" else None,
      ),
      donate_argnums=0,
      out_shardings=(placement, sharding.replicated(self.mesh)),
    )

  def arguments(self) -> tuple[TrainState, dict[str, Any], Any]:
    """Shapes, dtypes and placement of the arguments of `update`, to compile it without data."""
    rows, size = self._config.global_batch_size, self._config.data.image_size
    place = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.over_batch(self.mesh))
    batch = {
      "image": place((rows, size, size, 3), jnp.uint8),
      "label": place((rows,), jnp.int32),
    }
    return self.state, batch, place((self.mesh.size,), jnp.int32)


def initializer(
  config: Config, optimizer: optax.GradientTransformation, num_classes: int
) -> Callable[[], TrainState]:
  """What makes the train state of a run before its first step; it asks no device."""
  group_size = config.model.get("bn_group_size") or config.global_batch_size
  return functools.partial(
    train_state.init,
    optimizer,
    config.seed,
    config.global_batch_size // group_size,
    **train_state.model_options(config, num_classes),
  )


def train_step(
  state: TrainState,
  batch: Mapping[str, jax.Array],
  votes: jax.Array,
  *,
  graph: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  group_span: int,
  num_classes: int,
  data: Data,
  label_smoothing: float,
  seed: int,
  accumulation_steps: int = 1,
  gradient_dtype: Any = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update.

  Args:
    state: before the update.
    batch: "image" [N, H, W, 3] uint8 and "label" [N] int.
    votes: int [devices], from `sharding.Votes`; passed through as the greatest of them.
    graph: of the model in training.
    optimizer: whose state `state.opt_state` is.
    mesh: that all of it lies on.
    group_span: devices over which a batch-norm group is spread.
    num_classes: of the data.
    data: how images are normalized and augmented.
    label_smoothing: share of the target that is spread over all classes.
    seed: of the augmentation, which depends on it and the step alone.
    accumulation_steps: parts of each device's images that are computed one after the other.
    gradient_dtype: in which gradients are added up over devices; None is their own.

  Returns:
    State after the update and the scalars "loss" (mean), "top1" (fraction; of mixed images against
    the label of the greater part) and "grad_norm" of the batch before it, "param_norm" after it,
    and "vote".
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  images = augment.training_images(batch["image"], key, data)
  images, labels = augment.mix(images, batch["label"], jax.random.fold_in(key, 4), data.augment)
  rows = _Rows(images, labels.targets(num_classes), labels.dominant)

  axes = jax.tree.map(lambda leaf: sharding.fsdp_axis(leaf.shape, mesh), state.params)
  params_spec = jax.tree.map(lambda leaf: sharding.over_fsdp(leaf.shape, mesh).spec, state.params)
  stats_spec = sharding.over_groups(mesh, group_span).spec
  gradients = jax.shard_map(
    functools.partial(
      _gradients,
      graph=graph,
      axes=axes,
      label_smoothing=label_smoothing,
      num_parts=accumulation_steps,
      dtype=gradient_dtype,
    ),
    mesh=mesh,
    in_specs=(params_spec, stats_spec, PartitionSpec(sharding.AXES)),
    out_specs=(params_spec, stats_spec, PartitionSpec()),
    check_vma=False,  # gradients are added up below, once, and not wherever parameters are used
  )
  grads, batch_stats, metrics = gradients(state.params, state.batch_stats, rows)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  new = TrainState(
    state.step + 1, optax.apply_updates(state.params, updates), batch_stats, opt_state
  )
  return new, {
    **metrics,
    "grad_norm": optax.tree.norm(grads),
    "param_norm": optax.tree.norm(new.params),
    "vote": votes.max(),
  }


def _gradients(
  params: Tree,
  batch_stats: Tree,
  rows: _Rows,
  *,
  graph: nnx.GraphDef,
  axes: Tree,
  label_smoothing: float,
  num_parts: int,
  dtype: Any,
) -> tuple[Tree, Tree, dict[str, jax.Array]]:
  """On one device of many: (gradients, batch statistics, metrics) of its part of the batch.

  Gradients and metrics are averaged over all devices.
  """

  def loss_of(params, batch_stats, rows: _Rows):
    model = train_state.merge(graph, params, batch_stats)
    logits = model(rows.images)
    targets = optax.smooth_labels(rows.targets.astype(logits.dtype), label_smoothing)
    loss = optax.softmax_cross_entropy(logits, targets).mean()
    top1 = (logits.argmax(axis=-1) == rows.dominant).mean()
    return loss, ({"loss": loss, "top1": top1}, train_state.split(model)[1])

  def whole(param: jax.Array, axis: int) -> jax.Array:
    return param if axis < 0 else jax.lax.all_gather(param, "fsdp", axis=axis, tiled=True)

  params = jax.tree.map(whole, params, axes)
  gradient = jax.grad(loss_of, has_aux=True)
  if num_parts == 1:
    grads, (metrics, batch_stats) = gradient(params, batch_stats, rows)
  else:

    def add_part(total, part):
      grads, (metrics, stats) = gradient(params, *part)
      return jax.tree.map(jnp.add, total, (grads, metrics)), stats

    parts = jax.tree.map(
      lambda a: a.reshape(num_parts, len(a) // num_parts, *a.shape[1:]), (batch_stats, rows)
    )
    zero = jax.tree.map(
      lambda a: jnp.zeros(a.shape, a.dtype),
      jax.eval_shape(lambda: gradient(params, *jax.tree.map(lambda a: a[0], parts))),
    )
    (grads, metrics), stats = jax.lax.scan(add_part, (zero[0], zero[1][0]), parts)
    batch_stats = jax.tree.map(lambda a, like: a.reshape(like.shape), stats, batch_stats)

  def average(value: jax.Array, axis: int = -1) -> jax.Array:
    total = value.astype(dtype or value.dtype)
    if axis >= 0:
      total = jax.lax.psum_scatter(total, "fsdp", scatter_dimension=axis, tiled=True)
    total = jax.lax.psum(total, sharding.AXES if axis < 0 else ("data", "group"))
    return total.astype(value.dtype) / (num_parts * jax.lax.axis_size(sharding.AXES))

  metrics = jax.tree.map(lambda value: jax.lax.pmean(value, sharding.AXES) / num_parts, metrics)
  return jax.tree.map(average, grads, axes), batch_stats, metrics
