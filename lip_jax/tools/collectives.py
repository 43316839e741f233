"""What devices send each other in a compiled program, read from its text."""

import collections
import re
from collections.abc import Iterator
from typing import NamedTuple

from lip_jax.tools import hlo

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# For TPUs: one operation, in the background of several fusions, each of which names it.
_CHAIN = re.compile(r'\bchain_id="(\w+)"')


class Collective(NamedTuple):
  """All communication of one kind and one type of data in a program.

  So many operations a call of the program, of so many bytes in all. An operation's are those that
  the whole array has on one device: what goes into an all-reduce, a reduce-scatter or another, and
  what comes out of an all-gather.
  """

  kind: str
  dtype: str  # as XLA writes it, such as f32
  operations: int
  bytes: int


def collectives(program: hlo.Program) -> list[Collective]:
  """Collectives of a compiled program, most bytes first; an asynchronous operation counts once."""
  totals: collections.Counter[tuple[str, str]] = collections.Counter()
  counts: collections.Counter[tuple[str, str]] = collections.Counter()
  for times, kind, arrays in _executed(program):
    for dtype in {array.dtype for array in arrays}:
      counts[kind, dtype] += times
    for array in arrays:
      totals[kind, array.dtype] += times * array.bytes
  found = [Collective(*key, counts[key], totals[key]) for key in counts]
  return sorted(found, key=lambda one: (-one.bytes, one.kind, one.dtype))


def _executed(program: hlo.Program) -> Iterator[tuple[int, str, list[hlo.Array]]]:
  """Collectives of a program: how often each runs, its kind and its arrays."""
  chains: set[str] = set()
  for name, instructions in program.computations.items():
    for one in instructions.values():
      kind = one.operation.removesuffix("-start")
      chain = _CHAIN.search(one.text)
      if kind in KINDS and not (chain and chain[1] in chains):
        yield program.times[name], kind, _arrays(kind, one, instructions)
      if chain:
        chains.add(chain[1])


def _arrays(
  kind: str, one: hlo.Instruction, instructions: dict[str, hlo.Instruction]
) -> list[hlo.Array]:
  operands = [array for name in one.operands for array in instructions[name].results]
  if kind != "all-gather":
    return operands
  results = list(one.results)
  if one.operation.endswith("-start"):  # gives the operands, then the results
    results = results[len(operands) : 2 * len(operands)]
  return results
