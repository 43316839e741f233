"""JAX programs as ONNX graphs, for the operations that the networks of this library have.

Activations [N, H, W, C] are stored as [N, C, H, W] in the whole graph, as ONNX's convolutions and
poolings want them; other ranks are as in JAX. What does not depend on the images, batch
normalization's factors for example, is computed while the graph is written.

This exists because jax2onnx, the converter for JAX that there is, cannot be installed beside the
Orbax that training needs (0.17.1 wants a version below 0.11.37), and does not know
`jax.lax.platform_dependent`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend import core
from onnx import helper, numpy_helper

from lip_jax.errors import UsageError

# Of 2022: read by every runtime in use, and what the newer ones add is not needed.
OPSET = 17
_IR_VERSION = 8
_INPUT, _OUTPUT = "images", "logits"

# What is known already, or the name of a tensor of the graph.
Value = np.ndarray | str

_TO_NCHW = (0, 3, 1, 2)
_TO_NHWC = (0, 2, 3, 1)


def to_onnx(
  function: Callable[[jax.Array], jax.Array], images: jax.ShapeDtypeStruct
) -> onnx.ModelProto:
  """The ONNX model, from `images` to `logits`, that computes what `function` does.

  Args:
    function: from [N, H, W, C] to [N, K]; the arrays that it closes over become the weights.
    images: shape and dtype of its argument; the first size is one of `jax.export.symbolic_shape`.

  Raises:
    UsageError: the function has an operation that is not known here.
  """
  closed = jax.make_jaxpr(function)(images)
  graph = _Graph(images.shape[0])
  stored = graph.add("Transpose", _INPUT, perm=_TO_NCHW)
  (result,) = _run(graph, closed.jaxpr, closed.consts, [stored])
  graph.nodes.append(helper.make_node("Identity", [graph.name_of(result)], [_OUTPUT]))
  (out,) = closed.out_avals
  model = helper.make_model(
    helper.make_graph(
      graph.needed_nodes(_OUTPUT),
      "network",
      [_tensor_info(_INPUT, images)],
      [_tensor_info(_OUTPUT, out)],
      graph.needed_constants(),
    ),
    opset_imports=[helper.make_opsetid("", OPSET)],
    ir_version=_IR_VERSION,
    producer_name="lip_jax",
  )
  onnx.checker.check_model(model, full_check=True)
  return model


class _Graph:
  """Nodes and constants so far; `batch` is the symbol that stands for the number of images."""

  def __init__(self, batch: Any):
    self.batch = batch
    self.nodes: list[onnx.NodeProto] = []
    self._constants: dict[tuple[Any, ...], onnx.TensorProto] = {}
    self._numbers = itertools.count()

  def add(self, operation: str, *inputs: Value, **attributes: Any) -> str:
    """Adds a node and returns the name of its output."""
    output = f"{operation.lower()}_{next(self._numbers)}"
    names = [self.name_of(value) for value in inputs]
    self.nodes.append(helper.make_node(operation, names, [output], name=output, **attributes))
    return output

  def name_of(self, value: Value) -> str:
    """The tensor's name; an array becomes a constant of the graph."""
    if isinstance(value, str):
      return value
    array = np.ascontiguousarray(_stored(value)).reshape(_stored(value).shape)
    return self._constant(array)

  def integers(self, values: Sequence[Any]) -> str:
    """Numbers that ONNX takes as an input: axes, sizes, positions."""
    return self._constant(np.asarray([int(v) for v in values], np.int64))

  def expand(self, name: str, sizes: Sequence[Any]) -> str:
    """Repeats a tensor to these sizes, as stored."""
    parts = [self._batch_size if size == self.batch else self.integers([size]) for size in sizes]
    return self.add("Expand", name, self.add("Concat", *parts, axis=0))

  def reshape(self, name: str, sizes: Sequence[Any]) -> str:
    """Gives a tensor these sizes, as stored."""
    return self.add("Reshape", name, self.integers([-1 if s == self.batch else s for s in sizes]))

  def needed_nodes(self, output: str) -> list[onnx.NodeProto]:
    """The nodes that the output depends on, in order; the others are forgotten."""
    needed, kept = {output}, []
    for node in reversed(self.nodes):
      if needed & set(node.output):
        needed |= set(node.input)
        kept.append(node)
    self.nodes = kept[::-1]
    return self.nodes

  def needed_constants(self) -> list[onnx.TensorProto]:
    used = {name for node in self.nodes for name in node.input}
    return [tensor for tensor in self._constants.values() if tensor.name in used]

  def _constant(self, array: np.ndarray) -> str:
    key = (array.dtype.str, array.shape, array.tobytes())
    if key not in self._constants:
      name = f"constant_{len(self._constants)}"
      self._constants[key] = numpy_helper.from_array(array, name)
    return self._constants[key].name

  @functools.cached_property
  def _batch_size(self) -> str:
    shape = self.add("Shape", _INPUT)
    return self.add("Slice", shape, self.integers([0]), self.integers([1]))


def _run(
  graph: _Graph, jaxpr: core.Jaxpr, constants: Sequence[Any], arguments: Sequence[Value]
) -> list[Value]:
  """Adds a program to the graph; returns its results."""
  values: dict[core.Var, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
  values |= zip(jaxpr.constvars, map(np.asarray, constants), strict=True)

  def read(atom: Any) -> Value:
    if isinstance(atom, core.Literal):
      return np.asarray(atom.val, _aval(atom).dtype)
    return values[atom]

  for equation in jaxpr.eqns:
    results = _convert(graph, equation, [read(atom) for atom in equation.invars])
    values.update(zip(equation.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _convert(graph: _Graph, equation: core.JaxprEqn, inputs: list[Value]) -> Sequence[Value]:
  name, params = equation.primitive.name, equation.params
  if name in ("jit", "custom_jvp_call", "custom_vjp_call"):
    inner = params["jaxpr" if name == "jit" else "call_jaxpr"]
    return _run(graph, inner.jaxpr, inner.consts, inputs)
  if name == "platform_index":
    # What is written for TPUs, sums over windows, is one pooling here; the default is many slices.
    platforms = params["platforms"]
    index = next((i for i, p in enumerate(platforms) if p and "tpu" in p), len(platforms) - 1)
    return [np.asarray(index)]
  if name == "cond" and not isinstance(inputs[0], str):
    branch = params["branches"][int(inputs[0])]
    return _run(graph, branch.jaxpr, branch.consts, inputs[1:])
  if name in ("stop_gradient", "copy"):
    return inputs
  known = all(isinstance(value, np.ndarray) for value in inputs)
  if known and all(_is_fixed(_aval(out).shape) for out in equation.outvars):
    results = equation.primitive.bind(*map(jnp.asarray, inputs), **params)
    return list(map(np.asarray, results if equation.primitive.multiple_results else [results]))
  if name not in _RULES:
    raise _unsupported(equation, "it is not among those that can be written")
  return [_RULES[name](graph, equation, *inputs)]


def _elementwise(operation: str) -> Callable[..., str]:
  # JAX has given all operands one rank, or they are single numbers: ONNX broadcasts both.
  return lambda graph, equation, *inputs: graph.add(operation, *inputs)


def _sub(graph: _Graph, equation: core.JaxprEqn, x: Value, y: Value) -> str:
  # Runtimes fuse a convolution with an addition, and not with a subtraction.
  return graph.add("Sub", x, y) if isinstance(y, str) else graph.add("Add", x, -y)


def _max(graph: _Graph, equation: core.JaxprEqn, x: Value, y: Value) -> str:
  if not isinstance(y, str) and y.ndim == 0 and y == 0:
    return graph.add("Relu", x)
  return graph.add("Max", x, y)


def _square(graph: _Graph, equation: core.JaxprEqn, x: Value) -> str:
  return graph.add("Mul", x, x)


def _integer_pow(graph: _Graph, equation: core.JaxprEqn, x: Value) -> str:
  return graph.add("Pow", x, np.asarray(equation.params["y"], _aval(equation.invars[0]).dtype))


def _rsqrt(graph: _Graph, equation: core.JaxprEqn, x: Value) -> str:
  return graph.add("Reciprocal", graph.add("Sqrt", x))


def _cast(graph: _Graph, equation: core.JaxprEqn, x: str) -> str:
  source, target = _aval(equation.invars[0]).dtype, equation.params["new_dtype"]
  if source == target:
    return x
  return graph.add("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(target)))


def _select(graph: _Graph, equation: core.JaxprEqn, which: Value, *cases: Value) -> Value:
  if not isinstance(which, str) and which.ndim == 0:
    return cases[int(which)]
  if len(cases) != 2:
    raise _unsupported(equation, f"it chooses among {len(cases)}")
  return graph.add("Where", which, cases[1], cases[0])


def _conv(graph: _Graph, equation: core.JaxprEqn, x: Value, kernel: Value) -> str:
  params = equation.params
  numbers = params["dimension_numbers"]
  if numbers.lhs_spec != _TO_NCHW or numbers.out_spec != _TO_NCHW or isinstance(kernel, str):
    raise _unsupported(equation, "its layout is unusual, or its kernel depends on the images")
  if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
    raise _unsupported(equation, "it is dilated or grouped in an unusual way")
  weights = graph._constant(np.ascontiguousarray(kernel.transpose(numbers.rhs_spec)))
  return graph.add(
    "Conv",
    x,
    weights,
    kernel_shape=[kernel.shape[axis] for axis in numbers.rhs_spec[2:]],
    strides=params["window_strides"],
    pads=_pads(params["padding"]),
    dilations=params["rhs_dilation"],
    group=params["feature_group_count"],
  )


def _window(equation: core.JaxprEqn) -> dict[str, Any]:
  """Attributes of a pooling over H and W."""
  params = equation.params
  for name in ("window_dimensions", "window_strides", "base_dilation", "window_dilation"):
    values = params[name]
    spatial = name in ("window_dimensions", "window_strides")
    if len(values) != 4 or any(v != 1 for v in (values[:1] + values[3:] if spatial else values)):
      raise _unsupported(equation, f"{name} is {values}")
  return {
    "kernel_shape": params["window_dimensions"][1:3],
    "strides": params["window_strides"][1:3],
    "pads": _pads(params["padding"][1:3]),
  }


def _window_max(graph: _Graph, equation: core.JaxprEqn, x: Value) -> str:
  return graph.add("MaxPool", x, **_window(equation))


def _window_sum(graph: _Graph, equation: core.JaxprEqn, x: Value) -> str:
  window = _window(equation)
  size = np.asarray(math.prod(window["kernel_shape"]), _aval(equation.invars[0]).dtype)
  return graph.add("Mul", graph.add("AveragePool", x, count_include_pad=1, **window), size)


def _reduce(graph: _Graph, equation: core.JaxprEqn, x: Value) -> str:
  axes, rank = equation.params["axes"], len(_aval(equation.invars[0]).shape)
  left = [_place(rank, axis) for axis in range(rank) if axis not in axes]
  if left != sorted(left):
    raise _unsupported(equation, f"over the axes {axes} the rest changes its order")
  places = sorted(_place(rank, axis) for axis in axes)
  if equation.primitive.name == "reduce_sum":
    return graph.add("ReduceSum", x, graph.integers(places), keepdims=0)
  return graph.add("ReduceMax", x, axes=places, keepdims=0)


def _matmul(graph: _Graph, equation: core.JaxprEqn, x: Value, y: Value) -> str:
  ranks = [len(_aval(atom).shape) for atom in equation.invars]
  if ranks != [2, 2] or equation.params["dimension_numbers"] != (((1,), (0,)), ((), ())):
    raise _unsupported(equation, "it is no product of two matrices")
  return graph.add("MatMul", x, y)


def _pad(graph: _Graph, equation: core.JaxprEqn, x: Value, value: Value) -> str:
  config = _arrange(equation.params["padding_config"])
  if any(low < 0 or high < 0 or inside for low, high, inside in config):
    raise _unsupported(equation, "it crops or dilates")
  return graph.add("Pad", x, graph.integers(_pads([part[:2] for part in config])), value)


def _slice(graph: _Graph, equation: core.JaxprEqn, x: Value) -> Value:
  params, sizes = equation.params, _aval(equation.invars[0]).shape
  rank = len(sizes)
  steps = params["strides"] or (1,) * rank
  bounds = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
  parts = [
    (start, stop, _place(rank, axis), step)
    for axis, (start, stop, step) in enumerate(bounds)
    if (start, stop, step) != (0, sizes[axis], 1)
  ]
  if any(not _is_fixed(part[:2]) for part in parts):
    raise _unsupported(equation, "it takes a part of the batch")
  return graph.add("Slice", x, *map(graph.integers, zip(*parts, strict=True))) if parts else x


def _concatenate(graph: _Graph, equation: core.JaxprEqn, *inputs: Value) -> str:
  rank = len(_aval(equation.outvars[0]).shape)
  return graph.add("Concat", *inputs, axis=_place(rank, equation.params["dimension"]))


def _broadcast(graph: _Graph, equation: core.JaxprEqn, x: Value, *sizes: Value) -> str:
  """New axes and repetition; `broadcast_dimensions` says where the old axes are."""
  shape, old = _aval(equation.outvars[0]).shape, _aval(equation.invars[0]).shape
  to = equation.params["broadcast_dimensions"]
  rank = len(shape)
  aligned: list[Any] = [1] * rank
  for size, axis in zip(old, to, strict=True):
    aligned[axis] = size
  wanted = _arrange(shape)
  if isinstance(x, str):
    places = [_place(rank, axis) for axis in to]
    if (len(old) == 4 and rank != 4) or (len(old) != 4 and places != sorted(places)):
      raise _unsupported(equation, "it changes the order of axes")
    result = x if len(old) == rank else graph.reshape(x, _arrange(aligned))
  else:
    result = graph.name_of(x.reshape(aligned))
  return result if _arrange(aligned) == wanted else graph.expand(result, wanted)


def _reshape(graph: _Graph, equation: core.JaxprEqn, x: str, *sizes: Value) -> str:
  old, new = _aval(equation.invars[0]).shape, _aval(equation.outvars[0]).shape
  if len(old) == 4:
    x = graph.add("Transpose", x, perm=_TO_NHWC)
  x = graph.reshape(x, new)
  return graph.add("Transpose", x, perm=_TO_NCHW) if len(new) == 4 else x


_ELEMENTWISE = {
  **{name: name.capitalize() for name in ("abs", "add", "and", "div", "exp", "log", "min", "mul")},
  **{name: name.capitalize() for name in ("neg", "not", "or", "pow", "sqrt", "tanh")},
  **{"eq": "Equal", "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "lt": "Less"},
  "logistic": "Sigmoid",
}
_RULES: dict[str, Callable[..., Value]] = {
  **{primitive: _elementwise(operation) for primitive, operation in _ELEMENTWISE.items()},
  "broadcast_in_dim": _broadcast,
  "concatenate": _concatenate,
  "conv_general_dilated": _conv,
  "convert_element_type": _cast,
  "dot_general": _matmul,
  "integer_pow": _integer_pow,
  "max": _max,
  "pad": _pad,
  "reduce_max": _reduce,
  "reduce_sum": _reduce,
  "reduce_window_max": _window_max,
  "reduce_window_sum": _window_sum,
  "reshape": _reshape,
  "rsqrt": _rsqrt,
  "select_n": _select,
  "slice": _slice,
  "square": _square,
  "squeeze": _reshape,
  "sub": _sub,
}


def _aval(atom: Any) -> Any:
  """Shape and dtype of a variable, [N, H, W, C] where it is an activation."""
  return atom.aval


def _place(rank: int, axis: int) -> int:
  """Where an axis is stored."""
  return _TO_NCHW.index(axis) if rank == 4 else axis


def _arrange(values: Sequence[Any]) -> list[Any]:
  """Values for each axis in the order in which the axes are stored."""
  return [values[axis] for axis in _TO_NCHW] if len(values) == 4 else list(values)


def _stored(array: np.ndarray) -> np.ndarray:
  return array.transpose(_TO_NCHW) if array.ndim == 4 else array


def _pads(pairs: Sequence[Sequence[int]]) -> list[int]:
  """ONNX has all beginnings first, then all ends."""
  return [int(low) for low, _ in pairs] + [int(high) for _, high in pairs]


def _is_fixed(sizes: Sequence[Any]) -> bool:
  return all(isinstance(size, int | np.integer) for size in sizes)


def _tensor_info(name: str, array: Any) -> onnx.ValueInfoProto:
  kind = helper.np_dtype_to_tensor_dtype(np.dtype(array.dtype))
  return helper.make_tensor_value_info(name, kind, ["batch", *map(int, array.shape[1:])])


def _unsupported(equation: core.JaxprEqn, reason: str) -> UsageError:
  return UsageError(
    f"the network cannot be written as ONNX: {equation.primitive.name} of "
    f"{', '.join(str(atom.aval) for atom in equation.invars)}: {reason}; export it as StableHLO"
  )
