"""The networks' cost beside what the paper says of it."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lip_jax.errors import UsageError
from lip_jax.models import abstract_model, list_models
from lip_jax.models.cost import count_parameters, counts
from lip_jax.tools import paper


class Cost(NamedTuple):
  """Cost of one network, beside what the paper says of it."""

  name: str  # of a model, or of a row of the paper's tables
  model: str  # argument of `create_model`
  options: Mapping[str, Any]  # further arguments
  parameters: int
  multiply_adds: int  # of one image
  flops: int  # of one image, by `lip_jax.models.cost.RULE`
  row: paper.Row | None  # with the paper's figures


def costs(names: Sequence[str] = (), image_size: int = 224) -> Iterator[Cost]:
  """Cost of each network, one by one, for each is built for it (without its weights).

  Args:
    names: models, and names of `paper.NETWORKS`; none: all models, and tables 1, 3 and 4.

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
  return count_parameters(model), *counts(model, image_size)
