"""ONNX graphs that are being written: nodes, constants, and in which order axes are stored."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from lip_jax.errors import UsageError
from lip_jax.ops.whole import Operation

# What is known already, or the name of a tensor of the graph.
Value = np.ndarray | str
# A `JaxprEqn`; its variables' `aval` have shape and dtype, [N, H, W, C] for activations.
Equation = Any

TO_NCHW = (0, 3, 1, 2)
TO_NHWC = (0, 2, 3, 1)


class Graph:
  """Nodes and constants so far.

  Args:
    images: name of the input whose first size is the number of images.
    batch: the symbol that stands for it.
    operations: that ONNX has as a whole, by the names of their calls.
  """

  def __init__(self, images: str, batch: Any, operations: Mapping[str, Operation]):
    self._images, self._batch = images, batch
    self.operations = operations
    self._nodes: dict[tuple[Any, ...], onnx.NodeProto] = {}
    self._constants: dict[tuple[Any, ...], onnx.TensorProto] = {}
    self._numbers = itertools.count()

  def add(self, operation: str, *inputs: Value, **attributes: Any) -> str:
    """Adds a node, unless there is the same already, and returns the name of its output."""
    return self.add_several(1, operation, *inputs, **attributes)[0]

  def add_several(
    self, count: int, operation: str, *inputs: Value, **attributes: Any
  ) -> Sequence[str]:
    """As `add`, of so many outputs."""
    names = [self.name_of(value) for value in inputs]
    key = (operation, *names, *sorted((name, str(value)) for name, value in attributes.items()))
    if key not in self._nodes:
      outputs = [f"{operation.lower()}_{next(self._numbers)}" for _ in range(count)]
      node = helper.make_node(operation, names, outputs, name=outputs[0], **attributes)
      self._nodes[key] = node
    return list(self._nodes[key].output)

  def name_of(self, value: Value) -> str:
    """The tensor's name; an array becomes a constant of the graph."""
    if isinstance(value, str):
      return value
    return self.constant(value.transpose(TO_NCHW) if value.ndim == 4 else value)

  def integers(self, values: Sequence[Any]) -> str:
    """Numbers that ONNX takes as an input: axes, sizes, positions."""
    return self.constant(np.asarray([int(v) for v in values], np.int64))

  def sizes(self, sizes: Sequence[Any]) -> str:
    """Sizes as stored, of which some may be multiples of the number of images."""
    return self.add("Concat", *map(self._size, sizes), axis=0)

  def expand(self, name: Value, sizes: Sequence[Any]) -> str:
    """Repeats a tensor to these sizes, as stored."""
    return self.add("Expand", name, self.sizes(sizes))

  def reshape(self, name: Value, sizes: Sequence[Any]) -> str:
    """Gives a tensor these sizes, as stored; one may depend on the number of images."""
    return self.add("Reshape", name, self.integers([s if is_fixed([s]) else -1 for s in sizes]))

  def cast(self, name: Value, dtype: Any) -> str:
    """A tensor in another dtype."""
    return self.add("Cast", name, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

  def constant(self, array: np.ndarray) -> str:
    """The name of a constant that is stored as it is."""
    array = np.asarray(array, order="C")
    key = (array.dtype.str, array.shape, array.tobytes())
    if key not in self._constants:
      name = f"constant_{len(self._constants)}"
      self._constants[key] = numpy_helper.from_array(array, name)
    return self._constants[key].name

  def needed(self, outputs: Sequence[str]) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The nodes and the constants that the outputs depend on, in order."""
    names, nodes = set(outputs), []
    for node in reversed(self._nodes.values()):
      if names & set(node.output):
        names |= set(node.input)
        nodes.append(node)
    return nodes[::-1], [tensor for tensor in self._constants.values() if tensor.name in names]

  def _size(self, size: Any) -> str:
    if is_fixed([size]):
      return self.integers([size])
    shape = self.add("Shape", self._images)
    images = self.add("Slice", shape, self.integers([0]), self.integers([1]))
    times = size // self._batch
    return images if times == 1 else self.add("Mul", images, self.integers([times]))


def place(rank: int, axis: int) -> int:
  """Where an axis is stored."""
  return TO_NCHW.index(axis) if rank == 4 else axis


def arrange(values: Sequence[Any]) -> list[Any]:
  """Values for each axis in the order in which the axes are stored."""
  return [values[axis] for axis in TO_NCHW] if len(values) == 4 else list(values)


def pads(pairs: Sequence[Sequence[int]]) -> list[int]:
  """ONNX has all beginnings first, then all ends."""
  return [int(low) for low, _ in pairs] + [int(high) for _, high in pairs]


def is_fixed(sizes: Sequence[Any]) -> bool:
  """Whether no size depends on the number of images."""
  return all(isinstance(size, int | np.integer) for size in sizes)


def unsupported(equation: Equation, reason: str) -> UsageError:
  """What is said of an operation that cannot be written."""
  return UsageError(
    f"the network cannot be written as ONNX: {equation.primitive.name} of "
    f"{', '.join(str(atom.aval) for atom in equation.invars)}: {reason}; export it as StableHLO"
  )
