"""What devices send each other in a compiled program, read from its text."""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# A computation's first line, and an instruction: %name = shape operation(%operands), attributes.
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)")
_COLLECTIVE = re.compile(
  rf"(?P<result>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?P<operands>[^)]*)\)"
)
# Behind an instruction's shape, whose layout is T(8,128).
_OPERATION = re.compile(r" [a-z][\w-]*\(")
_ARRAY = re.compile(r"\b(?P<dtype>pred|bf16|[suf]\d+(?:e\w+)?|c64|c128)\[(?P<sizes>[\d,]*)\]")
_CALLS = re.compile(
  r"\b(?P<how>calls|to_apply|body|condition|branch_computations|called_computations)="
  r"(?P<names>\{[^}]*\}|[^\s,]+)"
)
_COMMENT = re.compile(r"/\*.*?\*/")  # of positions in long tuples
_ENDS = re.compile(r" async-(?:update|done)\(")  # names again what has been started
# For TPUs: one operation, in the background of several fusions, each of which names it.
_CHAIN = re.compile(r'\bchain_id="(\w+)"')
_LIMIT = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")
_Arrays = list[tuple[str, int]]  # dtype and bytes of each
_ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


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


def collectives(text: str) -> list[Collective]:
  """Collectives of a compiled program, most bytes first.

  An asynchronous operation counts once, and one in a loop as often as the loop runs; once, where
  the compiler does not say how often that is.

  Args:
    text: of a compiled module, `jax.stages.Compiled.as_text()`.
  """
  totals: collections.Counter[tuple[str, str]] = collections.Counter()
  counts: collections.Counter[tuple[str, str]] = collections.Counter()
  for times, kind, arrays in _executed(text):
    for dtype in {dtype for dtype, _ in arrays}:
      counts[kind, dtype] += times
    for dtype, size in arrays:
      totals[kind, dtype] += times * size
  found = [Collective(*key, counts[key], totals[key]) for key in counts]
  return sorted(found, key=lambda one: (-one.bytes, one.kind, one.dtype))


def _executed(text: str) -> list[tuple[int, str, _Arrays]]:
  """Collectives of a program: how often each runs, its kind and its arrays."""
  found: dict[str, list[tuple[str, _Arrays]]] = {}
  calls: dict[str, list[tuple[str, int]]] = {}
  limits: dict[str, list[int]] = {}
  times: collections.Counter[str] = collections.Counter()
  chains: set[str] = set()
  name = ""
  shapes: dict[str, str] = {}
  for line in map(str.strip, _COMMENT.sub("", text).splitlines()):
    if heading := _COMPUTATION.fullmatch(line):
      name, shapes = heading["name"], {}
      found[name], calls[name], limits[name] = [], [], []
      times[name] = 1 if heading["entry"] else 0
    elif name and (instruction := _INSTRUCTION.fullmatch(line)):
      rest = instruction["rest"]
      operation = _OPERATION.search(rest)
      shapes[instruction["name"]] = rest[: operation.start()] if operation else rest
      chain = _CHAIN.search(rest)
      if (collective := _COLLECTIVE.match(rest)) and not (chain and chain[1] in chains):
        found[name].append((collective["kind"], _read(collective, shapes)))
      if chain:
        chains.add(chain[1])
      if limit := _LIMIT.match(rest):
        limits[name].append(int(limit[1]))
      if not _ENDS.search(rest):
        calls[name] += _called(rest, limits)
  # Those who call stand behind those who are called.
  for caller in reversed(found):
    for called, rounds in calls[caller]:
      times[called] += rounds * times[caller]
  return [(times[name], *collective) for name in found for collective in found[name]]


def _read(collective: re.Match[str], shapes: dict[str, str]) -> _Arrays:
  names = [operand.split()[-1].lstrip("%") for operand in collective["operands"].split(", ")]
  operands = [array for name in names for array in _arrays(shapes[name])]
  if collective["kind"] != "all-gather":
    return operands
  results = _arrays(collective["result"])
  if collective["start"]:  # gives the operands, then the results
    results = results[len(operands) : 2 * len(operands)]
  return results


def _arrays(shape: str) -> _Arrays:
  """Those of a shape, which may be a tuple."""
  arrays = []
  for array in _ARRAY.finditer(shape):
    sizes = [int(size) for size in array["sizes"].split(",") if size]
    bits = re.search(r"\d+", array["dtype"])  # none: pred
    arrays.append((array["dtype"], math.prod(sizes) * (int(bits[0]) if bits else 8) // 8))
  return arrays


def _called(rest: str, limits: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
  """Computations that an instruction calls, and how often."""
  names = {match["how"]: re.findall(r"[\w.-]+", match["names"]) for match in _CALLS.finditer(rest)}
  rounds = 1
  if stated := _ROUNDS.search(rest):
    rounds = int(stated[1])
  elif "condition" in names:  # for TPUs: it compares a counter with the only number in it
    numbers = limits.get(names["condition"][0], ())
    rounds = numbers[0] if len(numbers) == 1 else 1
  return [(name, rounds if how == "body" else 1) for how in names for name in names[how]]
