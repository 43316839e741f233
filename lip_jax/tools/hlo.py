"""Compiled programs, read from their text in XLA's notation."""

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

# A computation's first line, and an instruction: %name = shape operation(%operands), attributes.
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)")
# Behind an instruction's shape, whose layout is T(8,128).
_OPERATION = re.compile(r" (?P<name>[a-z][\w-]*)\((?P<operands>[^)]*)\)")
_ARRAY = re.compile(r"\b(?P<dtype>pred|bf16|[suf]\d+(?:e\w+)?|c64|c128)\[(?P<sizes>[\d,]*)\]")
_CALLS = re.compile(
  r"\b(?P<how>calls|to_apply|body|condition|branch_computations|called_computations)="
  r"(?P<names>\{[^}]*\}|[^\s,]+)"
)
_COMMENT = re.compile(r"/\*.*?\*/")  # of positions in long tuples
_LIMIT = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")
_ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# What runs the instructions of the computations that it names, one by one.
_RUNS = ("while", "conditional", "call", "async-start")


class Array(NamedTuple):
  """One of the arrays of a shape."""

  dtype: str  # as XLA writes it, such as f32
  sizes: tuple[int, ...]

  @property
  def bytes(self) -> int:
    """On a device."""
    bits = re.search(r"\d+", self.dtype)  # none: pred
    return math.prod(self.sizes) * (int(bits[0]) if bits else 8) // 8


class Instruction(NamedTuple):
  """One operation of a computation."""

  name: str
  operation: str  # such as fusion
  results: tuple[Array, ...]
  operands: tuple[str, ...]  # their names
  text: str  # behind the equals sign

  @property
  def calls(self) -> dict[str, list[str]]:
    """Names of the computations that it calls, by how."""
    return {one["how"]: re.findall(r"[\w.-]+", one["names"]) for one in _CALLS.finditer(self.text)}


class Program(NamedTuple):
  """Computations by name, those that are called before those who call them."""

  computations: dict[str, dict[str, Instruction]]
  times: dict[str, int]  # how often each computation is run
  launched: set[str]  # computations whose instructions run one by one: not those of fusions

  def operations(self) -> Iterator[tuple[int, Instruction, dict[str, Instruction]]]:
    """All that runs on its own: how often, what, and the computation that it belongs to."""
    for name in self.launched:
      for one in self.computations[name].values():
        yield self.times[name], one, self.computations[name]


def read(text: str) -> Program:
  """A program from its text, `jax.stages.Compiled.as_text()`.

  What is in a loop runs as often as the loop does; once, where the compiler does not say how often
  that is.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  limits: dict[str, list[int]] = {}
  name = entry = ""
  for line in map(str.strip, _COMMENT.sub("", text).splitlines()):
    if heading := _COMPUTATION.fullmatch(line):
      name = heading["name"]
      entry = name if heading["entry"] else entry
      computations[name], limits[name] = {}, []
    elif name and (found := _INSTRUCTION.fullmatch(line)):
      instruction = _instruction(found["name"], found["rest"])
      computations[name][found["name"]] = instruction
      if limit := _LIMIT.match(found["rest"]):
        limits[name].append(int(limit[1]))
  times: collections.Counter[str] = collections.Counter({entry: 1})
  launched = {entry}
  for caller in reversed(computations):
    for one in computations[caller].values():
      for called, rounds in _called(one, limits):
        times[called] += rounds * times[caller]
        if caller in launched and one.operation in _RUNS:
          launched.add(called)
  return Program(computations, times, launched)


def _instruction(name: str, rest: str) -> Instruction:
  found = _OPERATION.search(rest)
  if found is None:
    return Instruction(name, "", _arrays(rest), (), rest)
  operands = [one.split()[-1].lstrip("%") for one in found["operands"].split(", ") if one.strip()]
  return Instruction(name, found["name"], _arrays(rest[: found.start()]), tuple(operands), rest)


def _arrays(shape: str) -> tuple[Array, ...]:
  """Those of a shape, which may be a tuple."""
  return tuple(
    Array(one["dtype"], tuple(int(size) for size in one["sizes"].split(",") if size))
    for one in _ARRAY.finditer(shape)
  )


def _called(one: Instruction, limits: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
  """Computations that an instruction calls, and how often."""
  if one.operation in ("async-update", "async-done"):  # names again what has been started
    return []
  names, rounds = one.calls, 1
  if stated := _ROUNDS.search(one.text):
    rounds = int(stated[1])
  elif "condition" in names:  # for TPUs: it compares a counter with the only number in it
    numbers = limits.get(names["condition"][0], ())
    rounds = numbers[0] if len(numbers) == 1 else 1
  return [(name, rounds if how == "body" else 1) for how in names for name in names[how]]
