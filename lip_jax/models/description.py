"""Networks described by data, {"name": ..., **options}, and weights by their shapes.

Nothing in a description is trusted: what it says is bounded before a network is built from it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from lip_jax.errors import UsageError, one_line, shown
from lip_jax.models.registry import abstract_model

CLASSIFIERS = ("fc", "classifier")  # the last linear layer of a network, here and in PyTorch

# Far above any network's. What they keep away takes hours or all memory, not seconds.
_MAX_NUMBER = 10**7
_MAX_BLOCKS = 150  # densenet201 has 98; building takes a quarter of a second for each
_MAX_CLASSES = 2**20
# Parameters and statistics are in one of these, as safetensors and NumPy call them.
_FLOATS = ("f16", "bf16", "f32", "f64", "float16", "bfloat16", "float32", "float64")


def check_model(model: Any, where: str) -> None:
  """Checks that `model` is {"name": ..., **options}, as in a training configuration.

  Raises:
    UsageError: it is something else, or has numbers that no network has; `where` it stands.
  """
  if not isinstance(model, Mapping) or not isinstance(model.get("name"), str):
    raise UsageError(f"{where} lacks the model's name; copy or export the folder again")
  for key, value in model.items():
    values = value if isinstance(value, list | tuple) else [value]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    plain = all(isinstance(v, str | int | float | bool | None) for v in values)
    if not plain or len(values) > _MAX_BLOCKS or any(abs(v) > _MAX_NUMBER for v in numbers):
      raise UsageError(
        f"{where}: the model's option {shown(key)} is {shown(value)}, expected a name, a number "
        f"up to {_MAX_NUMBER:,}, or a few of them"
      )
    if len(values) > 1 and sum(map(abs, numbers)) > _MAX_BLOCKS:
      raise UsageError(
        f"{where}: the model's option {shown(key)} is {shown(value)}, expected at most "
        f"{_MAX_BLOCKS} blocks in all"
      )


def check_num_classes(number: Any, where: str) -> int:
  """`number`, if a network can have so many classes; else raises UsageError."""
  if type(number) is not int or not 1 <= number <= _MAX_CLASSES:
    raise UsageError(
      f"{where} lacks num_classes, or it is out of range: {shown(number)}, expected 1 to "
      f"{_MAX_CLASSES:,}; copy or export the folder again"
    )
  return number


def count_classes(shapes: Mapping[str, tuple[int, ...]], where: str) -> int:
  """Number of logits of a network, by the shapes of its weights under their paths."""
  biases = (shapes.get(f"{name}.bias") for name in CLASSIFIERS)
  return check_num_classes(next((bias[-1] for bias in biases if bias), None), where)


def build(
  model: Mapping[str, Any],
  num_classes: int,
  where: str,
  dtype: Dtype = jnp.float32,
  make: Callable[..., Any] = abstract_model,
) -> nnx.Module:
  """The network of a description that was checked, with shapes in place of arrays.

  Args:
    make: what makes it, of its name, num_classes, dtype and options.

  Raises:
    UsageError: there is no such network; `where` its description stands.
  """
  options = dict(model)
  name = options.pop("name")
  reserved = sorted({"num_classes", "dtype", "rngs"} & set(options))
  if reserved:
    raise UsageError(
      f"{where}: {', '.join(reserved)} is not among the options of a model; leave it out"
    )
  try:
    return make(name, num_classes=num_classes, dtype=dtype, **options)
  except UsageError:
    raise
  except Exception as error:  # options of a wrong type can raise anything
    raise UsageError(
      f"{where}: no network {name} can be built with the options {shown(options)} "
      f"({type(error).__name__}: {one_line(error, 80)})"
    ) from error


def flat_variables(model: nnx.Module) -> dict[str, nnx.Variable]:
  """Parameters and batch statistics under their paths, dots between the parts."""
  state = nnx.state(model, (nnx.Param, nnx.BatchStat))
  return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def check_finite(model: nnx.Module, path: str) -> None:
  """Raises UsageError where weights of `path` are not finite, which XLA's CPU programs may hide."""
  faults = [
    key for key, variable in flat_variables(model).items() if not jnp.isfinite(variable[...]).all()
  ]
  if faults:
    raise UsageError(
      f"{path} has diverged, or is damaged: {len(faults)} arrays hold numbers that are not finite, "
      f"such as {faults[0]}; take another checkpoint"
    )


def check_weights(
  found: Mapping[str, tuple[tuple[int, ...], str]],
  variables: Mapping[str, Any],
  what: str,
  faults: Sequence[str] = (),
  most: int | None = 20,
) -> None:
  """Compares what a file announces with what a network has, before any of it is read.

  Args:
    found: shape and name of the dtype of each array.
    variables: of the network, from `flat_variables`, or anything else with a shape.
    faults: that are known already.
    most: faults that are named; None: all.

  Raises:
    UsageError: `what`, and which arrays are missing, left over, of another shape or no
      floating-point numbers.
  """
  faults = [*faults]
  faults += [f"missing {key}" for key in variables if key not in found]
  faults += [
    f"shape of {key} is {found[key][0]}, expected {variable.shape}"
    for key, variable in variables.items()
    if key in found and found[key][0] != variable.shape
  ]
  faults += [f"unexpected {key}" for key in found if key not in variables]
  faults += [
    f"{key} is of {dtype}, expected floating point"
    for key, (_, dtype) in found.items()
    if dtype.lower() not in _FLOATS
  ]
  if faults:
    named = "; ".join(faults[:most])
    more = f"; and {len(faults) - most} more" if most and len(faults) > most else ""
    raise UsageError(f"{what} ({len(faults)} faults): {named}{more}")
