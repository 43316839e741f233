"""What operations of a compiled program read, write and compute, counted from its text.

For GPUs, whose compiler tells no costs.
"""

import collections
import math
import re
from typing import NamedTuple

from lip_jax.tools import hlo
from lip_jax.tools.collectives import KINDS as COLLECTIVES

# Kinds of operations, in the order in which the contents of a fusion are looked at.
_CONVOLUTION = "convolutions"
_PRODUCT = "matrix products"
_KERNEL = "custom kernels"
_COMMUNICATION = "communication"
_REDUCTION = "reductions, and what is fused with them"
_MOVE = "copies and transpositions"
_OTHER = "element by element, and others"

_FREE = {  # which move nothing
  *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", ""),
  *("while", "conditional", "call", "async-start", "async-done", "partition-id", "replica-id"),
  *("copy-done", *(f"{kind}-done" for kind in COLLECTIVES)),
}
_REDUCING = {"reduce", "reduce-window", "select-and-scatter", "scatter", "sort"}
_MOVING = {
  *("copy", "copy-start", "transpose", "reshape", "slice", "dynamic-slice", "concatenate", "pad"),
  *("dynamic-update-slice", "reverse", "broadcast"),
}
_SLICES = {"slice", "dynamic-slice", "gather"}
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_LABELS = re.compile(r"dim_labels=\w+_(?P<filter>\w+)->(?P<result>\w+)")
_CONTRACTED = re.compile(
  r'lhs_contracting_dim(?:s=\{|ensions":\[)(?P<dimensions>[\d,"]*)'  # of a dot, of cuBLAS
)


class Traffic(NamedTuple):
  """What all operations of one kind move and compute, a call of the program."""

  kind: str
  operations: int
  bytes: int  # operands and results
  flops: int  # of convolutions and products, multiplication and addition separately


def traffic(program: hlo.Program) -> list[Traffic]:
  """Operations of a program by kind, most bytes first.

  Each operation reads its operands and writes its results once; of operands that a fusion slices,
  the slices. What stays in a cache between two of them is counted, too.
  """
  counts: collections.Counter[str] = collections.Counter()
  moved: collections.Counter[str] = collections.Counter()
  computed: collections.Counter[str] = collections.Counter()
  for times, one, others in program.operations():
    if one.operation in _FREE:
      continue
    inner = _contents(one, program)
    kind = _kind(one, {other.operation for other in inner.values()})
    counts[kind] += times
    moved[kind] += times * (_bytes(one.results) + _read(one, others, inner))
    computed[kind] += times * _flops(one, others, inner)
  found = [Traffic(kind, counts[kind], moved[kind], computed[kind]) for kind in counts]
  return sorted(found, key=lambda one: (-one.bytes, one.kind))


def kernels_of(text: str) -> list[str]:
  """PTX of the kernels that a program for GPUs has been given, each once."""
  found = re.findall(r' kernel_data = "((?:[^"\\]|\\.)*)"', text)
  return [
    re.sub(r"\\([0-9A-F]{2}|.)", lambda one: chr(int(one[1], 16)) if one[1][1:] else one[1], quoted)
    for quoted in dict.fromkeys(found)
  ]


def _contents(one: hlo.Instruction, program: hlo.Program) -> dict[str, hlo.Instruction]:
  """Of a fusion; of anything else itself."""
  if one.operation != "fusion":
    return {one.name: one}
  return program.computations[one.calls["calls"][0]]


def _kind(one: hlo.Instruction, inner: set[str]) -> str:
  target = _TARGET.search(one.text)
  if one.operation.removesuffix("-start") in COLLECTIVES:
    return _COMMUNICATION
  if "convolution" in inner or (target and target[1].startswith("__cudnn$conv")):
    return _CONVOLUTION
  if "dot" in inner or (target and target[1].startswith("__cublas$")):
    return _PRODUCT
  if target and re.search("gpu.ptx|triton|mosaic|tpu_custom_call", target[1]):
    return _KERNEL
  if inner & _REDUCING:
    return _REDUCTION
  return _MOVE if inner - _FREE <= _MOVING and inner & _MOVING else _OTHER


def _read(
  one: hlo.Instruction, others: dict[str, hlo.Instruction], inner: dict[str, hlo.Instruction]
) -> int:
  """Bytes of the operands, of those that are only sliced the slices."""
  whole = [_bytes(others[name].results) for name in one.operands]
  if one.operation in _SLICES:  # the others are indices
    return _bytes(one.results)
  if one.operation != "fusion":
    return sum(whole)
  users: dict[str, list[hlo.Instruction]] = {}
  for user in inner.values():
    for name in user.operands:
      users.setdefault(name, []).append(user)
  for parameter in inner.values():
    if parameter.operation == "parameter":
      number, its_users = int(parameter.operands[0]), users.get(parameter.name, [])
      if its_users and all(
        user.operation in _SLICES and user.operands[0] == parameter.name for user in its_users
      ):
        sliced = sum(_bytes(user.results) for user in its_users)
        whole[number] = min(whole[number], sliced)
  return sum(whole)


def _bytes(arrays: tuple[hlo.Array, ...]) -> int:
  return sum(array.bytes for array in arrays)


def _flops(
  one: hlo.Instruction, others: dict[str, hlo.Instruction], inner: dict[str, hlo.Instruction]
) -> int:
  if one.operation == "fusion":
    return sum(_flops(each, inner, {}) for each in inner.values() if each.operation != "fusion")
  target = _TARGET.search(one.text)
  name = target[1] if target else one.operation
  if name == "dot" or name.startswith("__cublas$"):
    contracted, sizes = _CONTRACTED.search(one.text), others[one.operands[0]].results[0].sizes
    dimensions = re.findall(r"\d+", contracted["dimensions"]) if contracted else []
    return 2 * math.prod(one.results[0].sizes) * math.prod(sizes[int(axis)] for axis in dimensions)
  if name != "convolution" and not name.startswith("__cudnn$conv"):
    return 0
  # Labels are those of the forward convolution, of which the two gradients are rearrangements.
  left, right = (others[name].results[0] for name in one.operands[:2])
  result = one.results[0]
  output, kernel = {
    "__cudnn$convBackwardInput": (left, right),
    "__cudnn$convBackwardFilter": (right, result),
  }.get(name, (result, right))
  labels = _LABELS.search(one.text)
  assert labels is not None, "every convolution has labels"
  features = kernel.sizes[labels["filter"].index("o")]
  return 2 * math.prod(output.sizes) * math.prod(kernel.sizes) // features
