"""What a network costs: its parameters, and the multiply-adds and FLOPs of one image."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from lip_jax.errors import UsageError
from lip_jax.models import layers

RULE = (
  "FLOPs as the paper's tables count them: one for each multiplication of convolutions and matrix "
  "products with the addition that follows it, two for each value of a batch norm, one for each "
  "value of a ReLU, one for each that a max or average pooling takes; none for instance norms, "
  "gates and LIP"
)

_Count = Callable[[core.JaxprEqn], int]  # what an equation counts, besides the programs in it


def count_parameters(model: nnx.Module) -> int:
  """Number of trained values in `model`; running statistics are not among them.

  The model may have shapes in place of arrays (`nnx.eval_shape`).
  """
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def multiply_adds(model: nnx.Module, image_size: int | Sequence[int] = 224) -> int:
  """Multiply-adds of one image in evaluation mode; nothing is computed.

  The rule: one multiply-add = one multiplication and the addition that follows it, of convolutions
  and matrix products; normalizations, activations, additions, poolings, exp are not counted. A
  convolution has (elements of its output) * (height * width of its kernel) * (input channels /
  groups) of them, padding included; a matrix product (elements of its output) * (length of the
  sums).

  Args:
    model: of `create_model`, with arrays or with shapes in their place (`nnx.eval_shape`); it is
      left as it is.

  Raises:
    UsageError: an image that is too small for the network.
    ValueError: products in a loop whose number of rounds depends on the image.
  """
  return _count(_program(model, image_size), _products)


def flops(model: nnx.Module, image_size: int | Sequence[int] = 224) -> int:
  """FLOPs of one image in evaluation mode as the paper's tables count them; as `RULE` says.

  They are the multiply-adds, and what common counters for PyTorch add for the modules that they
  know. Model and errors as for `multiply_adds`.
  """
  return counts(model, image_size)[1]


def counts(model: nnx.Module, image_size: int | Sequence[int] = 224) -> tuple[int, int]:
  """(`multiply_adds`, `flops`) of one square image: the network is traced once for both."""
  program = _program(model, image_size)
  products = _count(program, _products)
  return products, products + _count(program, _elements, kernels=False)


def _program(model: Any, image_size: int | Sequence[int]) -> core.Jaxpr:
  """What the network computes of one image in evaluation mode."""
  graph, state = nnx.split(model)

  def forward(state: Any, image: jax.Array) -> jax.Array:
    network = nnx.merge(graph, state, copy=True)
    network.eval()
    return network(image)

  size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
  if min(size) < 1:
    raise UsageError(f"image_size must be positive, got {image_size}")
  image = jax.ShapeDtypeStruct((1, *size, getattr(model, "in_channels", 3)), jnp.float32)
  try:
    jaxpr = jax.make_jaxpr(forward)(state, image)
  except (ValueError, TypeError) as error:
    reason = str(error).splitlines()[0]
    raise UsageError(f"the network cannot take images of {image_size} px: {reason}") from error
  return jaxpr.jaxpr


def _count(program: core.Jaxpr, own: _Count, kernels: bool = True) -> int:
  """What the equations of a program count, and of the programs in them."""
  return sum(_count_equation(equation, own, kernels) for equation in program.eqns)


def _count_equation(equation: core.JaxprEqn, own: _Count, kernels: bool) -> int:
  kind, params = equation.primitive.name, equation.params
  if kind == "pallas_call" or (kind == "custom_vjp_call" and not kernels):
    return 0
  if kind == "cond":
    branches = list(_programs(params["branches"]))  # of which one runs
    if "branches_platforms" in params:
      branches = branches[-1:]  # the formula; those of platforms may have products by zeros
    return max(_count(branch, own, kernels) for branch in branches)
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
