"""JAX programs as ONNX graphs, for the operations that the networks of this library have.

Activations [N, H, W, C] are stored as [N, C, H, W] in the whole graph, as ONNX's convolutions and
poolings want them; other ranks are as in JAX. What does not depend on the images, batch
normalization's factors for example, is computed while the graph is written.

This exists because jax2onnx, the converter for JAX that there is, cannot be installed beside the
Orbax that training needs (0.17.1 wants a version below 0.11.37), and does not know
`jax.lax.platform_dependent`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend import core
from onnx import helper

from lip_jax.export import onnx_operations
from lip_jax.export.onnx_nodes import (
  TO_NCHW,
  TO_NHWC,
  Equation,
  Graph,
  Value,
  arrange,
  is_fixed,
  pads,
  place,
  unsupported,
)
from lip_jax.ops import whole

# Of 2023, the first with deformable convolutions, and read by every runtime in use.
OPSET = 19
_IR_VERSION = 9


def to_onnx(
  function: Callable[..., Any],
  *arguments: jax.ShapeDtypeStruct,
  inputs: Sequence[str] = ("images",),
  outputs: Sequence[str] = ("logits",),
) -> onnx.ModelProto:
  """The ONNX model that computes what `function` does.

  Args:
    function: of images [N, H, W, C], and perhaps of more; the arrays that it closes over become the
      weights.
    arguments: shapes and dtypes, with a first size of `jax.export.symbolic_shape`.
    inputs: their names.
    outputs: names of the results, N of each.

  Raises:
    UsageError: the function has an operation that is not known here.
  """
  with whole.kept() as operations:
    closed = jax.make_jaxpr(function)(*arguments)
  graph = Graph(inputs[0], arguments[0].shape[0], operations)
  stored: list[Value] = [graph.add("Transpose", inputs[0], perm=TO_NCHW), *inputs[1:]]
  found = _run(graph, closed.jaxpr, closed.consts, stored)
  ends = [
    helper.make_node("Identity", [graph.name_of(value)], [name])
    for value, name in zip(found, outputs, strict=True)
  ]
  nodes, constants = graph.needed([node.input[0] for node in ends])
  before, after = (
    [_tensor_info(name, array) for name, array in zip(names, arrays, strict=True)]
    for names, arrays in ((inputs, arguments), (outputs, closed.out_avals))
  )
  model = helper.make_model(
    helper.make_graph([*nodes, *ends], "network", before, after, constants),
    opset_imports=[helper.make_opsetid("", OPSET)],
    ir_version=_IR_VERSION,
    producer_name="lip_jax",
  )
  onnx.checker.check_model(model, full_check=True)
  return model


def _run(
  graph: Graph, jaxpr: core.Jaxpr, constants: Sequence[Any], arguments: Sequence[Value]
) -> list[Value]:
  """Adds a program to the graph; returns its results."""
  values: dict[core.Var, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
  values |= zip(jaxpr.constvars, map(np.asarray, constants), strict=True)

  def read(atom: Any) -> Value:
    if isinstance(atom, core.Var):
      return values[atom]
    return np.asarray(atom.val, atom.aval.dtype)  # of a literal

  for equation in jaxpr.eqns:
    results = _convert(graph, equation, [read(atom) for atom in equation.invars])
    values.update(zip(equation.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _convert(graph: Graph, equation: Equation, inputs: list[Value]) -> Sequence[Value]:
  name, params = equation.primitive.name, equation.params
  if name == "jit" and params["name"] in graph.operations:
    operation = graph.operations[params["name"]]
    return onnx_operations.WHOLE[operation.kind](graph, equation, operation.constants, *inputs)
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
  if name in ("stop_gradient", "copy", "optimization_barrier"):
    return inputs
  known = all(isinstance(value, np.ndarray) for value in inputs)
  if known and all(is_fixed(out.aval.shape) for out in equation.outvars):
    results = equation.primitive.bind(*map(jnp.asarray, inputs), **params)
    return list(map(np.asarray, results if equation.primitive.multiple_results else [results]))
  if name not in _RULES:
    raise unsupported(equation, "it is not among those that can be written")
  rule = _RULES[name]
  found = graph.add(rule, *inputs) if isinstance(rule, str) else rule(graph, equation, *inputs)
  return found if isinstance(found, list) else [found]


def _sub(graph: Graph, equation: Equation, x: Value, y: Value) -> str:
  # Runtimes fuse a convolution with an addition, and not with a subtraction.
  return graph.add("Sub", x, y) if isinstance(y, str) else graph.add("Add", x, -y)


def _max(graph: Graph, equation: Equation, x: Value, y: Value) -> str:
  floating = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
  if floating and not isinstance(y, str) and y.ndim == 0 and y == 0:
    return graph.add("Relu", x)
  return graph.add("Max", x, y)


def _integer_pow(graph: Graph, equation: Equation, x: Value) -> str:
  return graph.add("Pow", x, np.asarray(equation.params["y"], equation.invars[0].aval.dtype))


def _cast(graph: Graph, equation: Equation, x: str) -> str:
  source, target = equation.invars[0].aval.dtype, equation.params["new_dtype"]
  return x if source == target else graph.cast(x, target)


def _select(graph: Graph, equation: Equation, which: Value, *cases: Value) -> Value:
  if not isinstance(which, str) and which.ndim == 0:
    return cases[int(which)]
  if len(cases) != 2:
    raise unsupported(equation, f"it chooses among {len(cases)}")
  return graph.add("Where", which, cases[1], cases[0])


def _conv(graph: Graph, equation: Equation, x: Value, kernel: Value) -> str:
  params = equation.params
  numbers = params["dimension_numbers"]
  if numbers.lhs_spec != TO_NCHW or numbers.out_spec != TO_NCHW or isinstance(kernel, str):
    raise unsupported(equation, "its layout is unusual, or its kernel depends on the images")
  if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
    raise unsupported(equation, "it is dilated or grouped in an unusual way")
  weights = graph.constant(kernel.transpose(numbers.rhs_spec))
  return graph.add(
    "Conv",
    x,
    weights,
    kernel_shape=[kernel.shape[axis] for axis in numbers.rhs_spec[2:]],
    strides=params["window_strides"],
    pads=pads(params["padding"]),
    dilations=params["rhs_dilation"],
    group=params["feature_group_count"],
  )


def _window(equation: Equation) -> dict[str, Any]:
  """Attributes of a pooling over H and W."""
  params = equation.params
  for name in ("window_dimensions", "window_strides", "base_dilation", "window_dilation"):
    values = params[name]
    spatial = name in ("window_dimensions", "window_strides")
    if len(values) != 4 or any(v != 1 for v in (values[:1] + values[3:] if spatial else values)):
      raise unsupported(equation, f"{name} is {values}")
  return {
    "kernel_shape": params["window_dimensions"][1:3],
    "strides": params["window_strides"][1:3],
    "pads": pads(params["padding"][1:3]),
  }


def _window_sum(graph: Graph, equation: Equation, x: Value) -> str:
  window = _window(equation)
  size = np.asarray(math.prod(window["kernel_shape"]), equation.invars[0].aval.dtype)
  return graph.add("Mul", graph.add("AveragePool", x, count_include_pad=1, **window), size)


def _reduce(graph: Graph, equation: Equation, x: Value) -> str:
  axes, rank = equation.params["axes"], len(equation.invars[0].aval.shape)
  left = [place(rank, axis) for axis in range(rank) if axis not in axes]
  if left != sorted(left):
    raise unsupported(equation, f"over the axes {axes} the rest changes its order")
  kind = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax"}[equation.primitive.name]
  places = sorted(place(rank, axis) for axis in axes)
  return graph.add(kind, x, graph.integers(places), keepdims=0)


def _matmul(graph: Graph, equation: Equation, x: Value, y: Value) -> str:
  ranks = [len(atom.aval.shape) for atom in equation.invars]
  if ranks != [2, 2] or equation.params["dimension_numbers"] != (((1,), (0,)), ((), ())):
    raise unsupported(equation, "it is no product of two matrices")
  return graph.add("MatMul", x, y)


def _pad(graph: Graph, equation: Equation, x: Value, value: Value) -> str:
  config = arrange(equation.params["padding_config"])
  if any(low < 0 or high < 0 or inside for low, high, inside in config):
    raise unsupported(equation, "it crops or dilates")
  return graph.add("Pad", x, graph.integers(pads([part[:2] for part in config])), value)


def _slice(graph: Graph, equation: Equation, x: Value) -> Value:
  params, sizes = equation.params, equation.invars[0].aval.shape
  rank = len(sizes)
  steps = params["strides"] or (1,) * rank
  bounds = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
  parts = [
    (start, stop, place(rank, axis), step)
    for axis, (start, stop, step) in enumerate(bounds)
    if (start, stop, step) != (0, sizes[axis], 1)
  ]
  if any(not is_fixed(part[:2]) for part in parts):
    raise unsupported(equation, "it takes a part of the batch")
  return graph.add("Slice", x, *map(graph.integers, zip(*parts, strict=True))) if parts else x


def _concatenate(graph: Graph, equation: Equation, *inputs: Value) -> str:
  rank = len(equation.outvars[0].aval.shape)
  return graph.add("Concat", *inputs, axis=place(rank, equation.params["dimension"]))


def _broadcast(graph: Graph, equation: Equation, x: Value, *sizes: Value) -> str:
  """New axes and repetition; `broadcast_dimensions` says where the old axes are."""
  shape, to = equation.outvars[0].aval.shape, equation.params["broadcast_dimensions"]
  old = equation.invars[0].aval.shape
  aligned, wanted = _aligned(old, to, len(shape)), arrange(shape)
  if isinstance(x, str):
    result = _with_axes(graph, x, old, to, len(shape))
  else:
    result = graph.name_of(x.reshape(aligned))
  return result if arrange(aligned) == wanted else graph.expand(result, wanted)


def _aligned(sizes: Sequence[Any], to: Sequence[int], rank: int) -> list[Any]:
  """Sizes at other axes, among ones."""
  aligned: list[Any] = [1] * rank
  for size, axis in zip(sizes, to, strict=True):
    aligned[axis] = size
  return aligned


def _with_axes(graph: Graph, x: str, old: Sequence[Any], to: Sequence[int], rank: int) -> str:
  """The tensor of sizes `old` with its axes at `to`, among others of size one."""
  if len(old) == rank:
    return x
  if len(old) == 4:
    x = graph.add("Transpose", x, perm=TO_NHWC)
  order = sorted(range(len(to)), key=lambda k: place(rank, to[k]))
  if order != sorted(order):
    x = graph.add("Transpose", x, perm=order)
  return graph.reshape(x, arrange(_aligned(old, to, rank)))


def _stack(graph: Graph, equation: Equation, *inputs: Value) -> str:
  """Arrays along a new axis."""
  old, rank = equation.invars[0].aval.shape, len(equation.outvars[0].aval.shape)
  axis = equation.params["axis"]
  to = [other for other in range(rank) if other != axis]
  parts = [_with_axes(graph, graph.name_of(x), old, to, rank) for x in inputs]
  return graph.add("Concat", *parts, axis=place(rank, axis))


def _split(graph: Graph, equation: Equation, x: Value) -> list[Value]:
  sizes, axis = equation.params["sizes"], equation.params["axis"]
  rank = len(equation.invars[0].aval.shape)
  lengths = graph.integers(sizes)
  return list(graph.add_several(len(sizes), "Split", x, lengths, axis=place(rank, axis)))


def _transpose(graph: Graph, equation: Equation, x: Value) -> str:
  permutation = equation.params["permutation"]
  rank = len(permutation)
  return graph.add("Transpose", x, perm=arrange([place(rank, axis) for axis in permutation]))


def _reshape(graph: Graph, equation: Equation, x: str, *sizes: Value) -> str:
  old, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
  if len(old) == 4:
    x = graph.add("Transpose", x, perm=TO_NHWC)
  x = graph.reshape(x, new)
  return graph.add("Transpose", x, perm=TO_NCHW) if len(new) == 4 else x


# A word is an operation of ONNX on each element. JAX has given all operands one rank, or they are
# single numbers: ONNX broadcasts both.
_RULES: dict[str, str | Callable[..., Value | list[Value]]] = {
  **{name: name.capitalize() for name in ("abs", "add", "and", "div", "exp", "log", "min", "mul")},
  **{name: name.capitalize() for name in ("neg", "not", "or", "pow", "sqrt", "tanh")},
  **{"eq": "Equal", "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "lt": "Less"},
  "logistic": "Sigmoid",
  **{"ne": lambda graph, eqn, *xs: graph.add("Not", graph.add("Equal", *xs)), "sign": "Sign"},
  "broadcast_in_dim": _broadcast,
  "concatenate": _concatenate,
  "conv_general_dilated": _conv,
  "convert_element_type": _cast,
  "dot_general": _matmul,
  "gather": onnx_operations.gather,
  "integer_pow": _integer_pow,
  "max": _max,
  "pad": _pad,
  "reduce_max": _reduce,
  "reduce_sum": _reduce,
  "reduce_window_max": lambda graph, eqn, x: graph.add("MaxPool", x, **_window(eqn)),
  "reduce_window_sum": _window_sum,
  "rem": lambda graph, eqn, x, y: graph.add("Mod", x, y, fmod=1),
  "reshape": _reshape,
  "rsqrt": lambda graph, eqn, x: graph.add("Reciprocal", graph.add("Sqrt", x)),
  "select_n": _select,
  "slice": _slice,
  "split": _split,
  "square": lambda graph, eqn, x: graph.add("Mul", x, x),
  "squeeze": _reshape,
  "stack": _stack,
  "sub": _sub,
  "top_k": onnx_operations.top_k,
  "transpose": _transpose,
}


def _tensor_info(name: str, array: Any) -> onnx.ValueInfoProto:
  kind = helper.np_dtype_to_tensor_dtype(np.dtype(array.dtype))
  return helper.make_tensor_value_info(name, kind, ["batch", *map(int, array.shape[1:])])
