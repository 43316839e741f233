"""What training changes from step to step, and how to get a model out of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh

from lip_jax.distributed import sharding

Tree = dict[Any, Any]


@struct.dataclass
class TrainState:
  """Pytree of arrays.

  `step` counts the updates made. Each array of `batch_stats` has an axis of batch-norm groups in
  front: each group of a step keeps its own, so that no traffic is needed and the state is the same
  on any number of devices. `averaged` gives those of the network. `ema` is the exponential moving
  average of the parameters, None where the run has none.
  """

  step: jax.Array
  params: Tree
  batch_stats: Tree
  opt_state: optax.OptState
  ema: Tree | None = None


def init(
  optimizer: optax.GradientTransformation,
  seed: int,
  num_groups: int,
  create: Callable[[nnx.Rngs], nnx.Module],
  ema: bool = False,
) -> TrainState:
  """State before the first step. Meant for `jax.jit`."""
  params, batch_stats = split(create(nnx.Rngs(seed)))
  batch_stats = jax.tree.map(
    lambda stat: jnp.broadcast_to(stat, (num_groups, *stat.shape)), batch_stats
  )
  return TrainState(
    jnp.zeros((), jnp.int32),
    params,
    batch_stats,
    optimizer.init(params),
    jax.tree.map(jnp.copy, params) if ema else None,
  )


def placed(state: TrainState, mesh: Mesh, group_span: int) -> TrainState:
  """Shapes and dtypes of a state, with how its arrays lie on a mesh.

  Args:
    state: arrays, or what `jax.eval_shape` gives.
    mesh: from `sharding.make_mesh`.
    group_span: devices over which a batch-norm group is spread; 0: there are none.
  """

  def place(leaf, placement) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)

  def split_evenly(leaf) -> Any:
    return place(leaf, sharding.over_fsdp(leaf.shape, mesh))

  return TrainState(
    place(state.step, sharding.replicated(mesh)),
    jax.tree.map(split_evenly, state.params),
    jax.tree.map(
      lambda leaf: place(leaf, sharding.over_groups(mesh, group_span)), state.batch_stats
    ),
    jax.tree.map(split_evenly, state.opt_state),
    jax.tree.map(split_evenly, state.ema),
  )


def averaged(batch_stats: Tree) -> Tree:
  """Batch statistics of the network: the average over the groups of a train state's.

  Counts (`LIP.steps`) are the same for all groups.
  """

  def over_groups(stat):
    return stat.mean(axis=0) if jnp.issubdtype(stat.dtype, jnp.floating) else stat[0]

  return jax.tree.map(over_groups, batch_stats)


def split(model: nnx.Module) -> tuple[Tree, Tree]:
  """(parameters, batch statistics) of a model as nested dicts of arrays."""
  params, batch_stats = nnx.state(model, nnx.Param, nnx.BatchStat)
  return nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def merge(graph: nnx.GraphDef, params: Tree, batch_stats: Tree) -> Any:
  """The model in training mode, with these arrays."""
  # Without a copy, batch norm would write into the caller's tree.
  return nnx.merge(graph, params, batch_stats, copy=True)
