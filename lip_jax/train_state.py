"""What training changes from step to step, and how to get a model out of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh

from lip_jax import sharding
from lip_jax.config import Config
from lip_jax.models import abstract_model, create_model

Tree = dict[Any, Any]


@struct.dataclass
class TrainState:
  """Pytree of arrays; `step` counts the updates made."""

  step: jax.Array
  params: Tree
  batch_stats: Tree
  opt_state: optax.OptState


def graph_of(name: str, **options: Any) -> nnx.GraphDef:
  """Static structure of `create_model(name, **options)`, without allocating its weights."""
  return nnx.graphdef(abstract_model(name, **options))


def init(optimizer: optax.GradientTransformation, seed: int, name: str, **options) -> TrainState:
  """State before the first step, of `create_model(name, **options)`. Meant for `jax.jit`."""
  model = create_model(name, rngs=nnx.Rngs(seed), **options)
  params, batch_stats = split(model)
  return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))


def abstract(init: Callable[[], TrainState], mesh: Mesh) -> TrainState:
  """Shapes, dtypes and shardings of the replicated train state that `init` makes."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh)),
    jax.eval_shape(init),
  )


def model_options(config: Config, num_classes: int) -> dict[str, Any]:
  """Arguments of `create_model` for a run on data of `num_classes`."""
  return {**config.model, "num_classes": num_classes, "dtype": jnp.dtype(config.dtype)}


def split(model: nnx.Module) -> tuple[Tree, Tree]:
  """(parameters, batch statistics) of a model as nested dicts of arrays."""
  params, batch_stats = nnx.state(model, nnx.Param, nnx.BatchStat)
  return nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def merge(graph: nnx.GraphDef, params: Tree, batch_stats: Tree) -> Any:
  """The model in training mode, with these arrays."""
  # Without a copy, batch norm would write into the caller's tree.
  return nnx.merge(graph, params, batch_stats, copy=True)
