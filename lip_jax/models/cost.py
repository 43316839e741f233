"""What a network costs: its parameters, and the multiply-adds of one image."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from lip_jax.errors import UsageError
from lip_jax.models import abstract_model, list_models
from lip_jax.tools import paper

RULE = (
  "one multiply-add = one multiplication and the addition that follows it, of convolutions and "
  "matrix products; normalizations, activations, additions, poolings, exp are not counted"
)

# Those whose parameters and multiply-adds the paper gives; table 2 has accuracies only.
_TABLES = (1, 3, 4)


class Cost(NamedTuple):
  """Cost of one network, beside what the paper says of it."""

  name: str  # of a model, or of a row of the paper's tables
  model: str  # argument of `create_model`
  options: Mapping[str, Any]  # further arguments
  parameters: int
  multiply_adds: int  # of one image
  row: paper.Row | None  # with the paper's figures


def count_parameters(model: nnx.Module) -> int:
  """Number of trained values in `model`; running statistics are not among them.

  Args:
    model: with arrays, or with the shapes that `nnx.eval_shape` puts in their place.
  """
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def multiply_adds(model: nnx.Module, image_size: int = 224) -> int:
  """Multiply-adds of one square image in evaluation mode; nothing is computed.

  The rule: one multiply-add = one multiplication and the addition that follows it, of convolutions
  and matrix products; normalizations, activations, additions, poolings, exp are not counted. A
  convolution has (elements of its output) * (height * width of its kernel) * (input channels /
  groups) of them, padding included; a matrix product (elements of its output) * (length of the
  sums).

  Args:
    model: of `create_model`, with arrays or with shapes in their place (`nnx.eval_shape`); it is
      left as it is.
    image_size: height and width in pixels.

  Raises:
    UsageError: an image that is too small for the network.
    ValueError: products in a loop whose number of rounds depends on the image.
  """
  graph, state = nnx.split(model)

  def forward(state: Any, image: jax.Array) -> jax.Array:
    network = nnx.merge(graph, state, copy=True)
    network.eval()
    return network(image)

  if image_size < 1:
    raise UsageError(f"image_size must be positive, got {image_size}")
  image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  try:
    jaxpr = jax.make_jaxpr(forward)(state, image)
  except (ValueError, TypeError) as error:
    reason = str(error).splitlines()[0]
    raise UsageError(f"the network cannot take images of {image_size} px: {reason}") from error
  return _count(jaxpr.jaxpr)


def costs(names: Sequence[str] = (), image_size: int = 224) -> Iterator[Cost]:
  """Cost of each network, one by one, for each is built for it (without its weights).

  Args:
    names: models and rows of the paper's tables; none: all models, and tables 1, 3 and 4.
    image_size: height and width in pixels.

  Raises:
    UsageError: an unknown name, before the first result; an image too small for the network.
  """
  names = names or default_names()
  rows = [_row(name) for name in names]
  return _costs(names, rows, image_size)


def default_names() -> list[str]:
  """What `costs` takes without names: all models, then the rows of tables 1, 3 and 4."""
  return list_models() + [row.name for row in paper.ROWS if row.table in _TABLES]


def _row(name: str) -> paper.Row | None:
  """The row of that name, or the row of table 4 that shows the model of that name."""
  for row in paper.ROWS:
    if name == row.name or (row.table == 4 and (row.model, row.options) == (name, {})):
      return row
  if name in list_models():
    return None
  raise UsageError(
    f"unknown network {name!r}; choose some of the models {', '.join(list_models())} or of the "
    f"paper's rows {', '.join(row.name for row in paper.ROWS)}"
  )


def _costs(
  names: Sequence[str], rows: Sequence[paper.Row | None], image_size: int
) -> Iterator[Cost]:
  for name, row in zip(names, rows, strict=True):
    model, options = (name, {}) if row is None else (row.model, dict(row.options))
    counts = _cost(model, tuple(options.items()), image_size)
    yield Cost(name, model, options, *counts, row)


@functools.cache
def _cost(name: str, options: tuple[tuple[str, Any], ...], image_size: int) -> tuple[int, int]:
  model = abstract_model(name, **dict(options))
  return count_parameters(model), multiply_adds(model, image_size)


def _count(jaxpr: core.Jaxpr) -> int:
  """Multiply-adds of a program."""
  return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn) -> int:
  kind, params = equation.primitive.name, equation.params
  if kind == "conv_general_dilated":
    kernel, output = _shape(equation.invars[1]), _shape(equation.outvars[0])
    # What a kernel has besides its output channels: height * width * (input channels / groups).
    per_output = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
    return math.prod(output) * per_output
  if kind == "dot_general":
    left, output = _shape(equation.invars[0]), _shape(equation.outvars[0])
    (contracted, _), _ = params["dimension_numbers"]
    return math.prod(output) * math.prod(left[axis] for axis in contracted)
  if kind == "pallas_call":
    return 0  # a kernel of ours, which pools
  if kind == "cond":
    # One branch runs: of `platform_dependent` always the same, which compute alike.
    return max(_count(branch) for branch in _programs(params["branches"]))
  inside = sum(_count(program) for value in params.values() for program in _programs(value))
  if kind == "while" and inside:
    raise ValueError("a loop without a fixed number of rounds has no number of multiply-adds")
  return inside * params["length"] if kind == "scan" else inside


def _shape(variable: Any) -> tuple[int, ...]:
  return variable.aval.shape


def _programs(value: Any) -> Iterator[core.Jaxpr]:
  """The programs in a parameter of an equation."""
  if isinstance(value, core.ClosedJaxpr):
    yield value.jaxpr
  elif isinstance(value, core.Jaxpr):
    yield value
  elif isinstance(value, tuple | list):
    for item in value:
      yield from _programs(item)
