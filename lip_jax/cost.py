"""What a network costs: its parameters, and the multiply-adds and FLOPs of one image."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from lip_jax import layers, paper
from lip_jax.errors import UsageError
from lip_jax.models import abstract_model, list_models

RULE = (
  "FLOPs as the paper's tables count them: one for each multiplication of convolutions and matrix "
  "products with the addition that follows it, two for each value of a batch norm, one for each "
  "value of a ReLU, one for each that a max or average pooling takes; none for instance norms, "
  "gates and LIP"
)

_Count = Callable[[core.JaxprEqn], int]  # what an equation counts, besides the programs in it


class Cost(NamedTuple):
  """Cost of one network, beside what the paper says of it."""

  name: str  # of a model, or of a row of the paper's tables
  model: str  # argument of `create_model`
  options: Mapping[str, Any]  # further arguments
  parameters: int
  multiply_adds: int  # of one image
  flops: int  # of one image, by `RULE`
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
  return _count(_program(model, image_size), _products)


def flops(model: nnx.Module, image_size: int = 224) -> int:
  """FLOPs of one square image in evaluation mode as the paper's tables count them; as `RULE` says.

  They are the multiply-adds, and what common counters for PyTorch add for the modules that they
  know.

  Args:
    model: as for `multiply_adds`.
    image_size: height and width in pixels.

  Raises:
    UsageError: as `multiply_adds`.
    ValueError: as `multiply_adds`.
  """
  return sum(_counts(model, image_size))


def _counts(model: nnx.Module, image_size: int) -> tuple[int, int]:
  """Multiply-adds, and what `RULE` counts besides them."""
  program = _program(model, image_size)
  return _count(program, _products), _count(program, _elements, kernels=False)


def _program(model: nnx.Module, image_size: int) -> core.Jaxpr:
  """What the network computes of one image in evaluation mode."""
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
  return jaxpr.jaxpr


def costs(names: Sequence[str] = (), image_size: int = 224) -> Iterator[Cost]:
  """Cost of each network, one by one, for each is built for it (without its weights).

  Args:
    names: models, and names of `paper.NETWORKS`; none: all models, and tables 1, 3 and 4.
    image_size: height and width in pixels.

  Raises:
    UsageError: an unknown name, before the first result; an image too small for the network.
  """
  names = names or default_names()
  rows = [_row(name) for name in names]
  return _costs(names, rows, image_size)


def default_names() -> list[str]:
  """What `costs` takes without names: all models, then the rows of tables 1, 3 and 4."""
  return list_models() + [name for name, row in paper.NETWORKS.items() if "flops_g" in row.printed]


def _row(name: str) -> paper.Row | None:
  """The row of that name, or the row of table 4 that shows the model of that name."""
  for row in paper.NETWORKS.values():
    if name == row.name or (row.table == 4 and name == row.model):
      return row
  if name in list_models():
    return None
  raise UsageError(
    f"unknown network {name!r}; choose some of the models {', '.join(list_models())} or of the "
    f"paper's rows {', '.join(paper.NETWORKS)}"
  )


def _costs(
  names: Sequence[str], rows: Sequence[paper.Row | None], image_size: int
) -> Iterator[Cost]:
  for name, row in zip(names, rows, strict=True):
    model = row.model if row and row.model else name
    options = dict(row.options) if row else {}
    counts = _cost(model, tuple(options.items()), image_size)
    yield Cost(name, model, options, *counts, row)


@functools.cache
def _cost(name: str, options: tuple[tuple[str, Any], ...], image_size: int) -> tuple[int, int, int]:
  model = abstract_model(name, **dict(options))
  products, others = _counts(model, image_size)
  return count_parameters(model), products, products + others


def _count(program: core.Jaxpr, own: _Count, kernels: bool = True) -> int:
  """What the equations of a program count, and of the programs in them.

  Args:
    program: whose equations to count.
    own: what an equation itself counts.
    kernels: whether to look into functions with a gradient of their own: LIP, instance norm.
  """
  return sum(_count_equation(equation, own, kernels) for equation in program.eqns)


def _count_equation(equation: core.JaxprEqn, own: _Count, kernels: bool) -> int:
  kind, params = equation.primitive.name, equation.params
  if kind == "pallas_call" or (kind == "custom_vjp_call" and not kernels):
    return 0
  if kind == "cond":
    # One branch runs: of `platform_dependent` always the same, which compute alike.
    return max(_count(branch, own, kernels) for branch in _programs(params["branches"]))
  inside = sum(
    _count(program, own, kernels) for value in params.values() for program in _programs(value)
  )
  if kind == "while" and inside:
    raise ValueError("a loop without a fixed number of rounds has no number of multiply-adds")
  return own(equation) + (inside * params["length"] if kind == "scan" else inside)


def _products(equation: core.JaxprEqn) -> int:
  """Multiply-adds of a convolution or matrix product."""
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
  return 0


def _elements(equation: core.JaxprEqn) -> int:
  """What `RULE` counts besides products."""
  kind = equation.primitive.name
  if equation.params.get("name") == "relu":  # `jax.nn.relu` is a compiled function of its own
    return math.prod(_shape(equation.outvars[0]))
  if layers.BATCH_NORM in str(equation.source_info.name_stack):
    output = _shape(equation.outvars[0])
    return math.prod(output) if kind in ("mul", "add") and len(output) == 4 else 0
  windows = kind in ("reduce_window_max", "reduce_window_sum")
  if windows or (kind == "reduce_sum" and equation.params["axes"] == (1, 2)):
    pooled = _shape(equation.invars[0])
    one_map = len(pooled) != 4 or pooled[3] == 1  # such as the number of pixels in each window
    return 0 if one_map else math.prod(pooled)
  return 0


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
