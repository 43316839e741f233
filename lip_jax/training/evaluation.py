"""A whole split through a network, once for all tasks: what becomes of a batch is the task's."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import TypeVar

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from lip_jax.data import pipeline
from lip_jax.data.source import Source
from lip_jax.distributed import sharding
from lip_jax.training.train_state import Tree

_T = TypeVar("_T")
_Rows = Mapping[str, np.ndarray]  # this process's, of a batch


def run(
  step: Callable[..., Mapping[str, jax.Array]],
  params: Tree,
  batch_stats: Tree,
  batches: Iterable[_Rows],
  mesh: Mesh,
  stop: Callable[[], bool],
  take: Callable[[Mapping[str, jax.Array]], None],
) -> bool:
  """Calls `step` for each batch, and `take` with what it gives, while the next one runs.

  Args:
    step: of (params, batch_stats, batch, flags of `sharding.StopFlags`); gives "stop", the greatest
      of the flags, and what `take` wants.
    stop: asked before each batch; once any process says yes, all stop.

  Returns:
    Whether all batches were taken.
  """
  flags = sharding.StopFlags(mesh)
  pending = None
  with sharding.Prefetch(batches, mesh) as feed:
    for batch in feed:
      current = step(params, batch_stats, batch, flags(stop()))
      if pending is not None:
        take(pending)
        if pending["stop"]:
          return False
      pending = current
  if pending is not None:
    take(pending)
  return pending is None or not pending["stop"]


def over_split(
  compute: Callable[[Iterator[_Rows]], _T],
  batches: Generator[_Rows, None, None],
  source: Source,
  num_batches: int,
) -> _T | None:
  """`compute` of a split's batches, with a progress bar; all processes call it together.

  Args:
    batches: of `pipeline.eval_batches`; closed at the end.
    num_batches: how many they are.

  Raises:
    UnreadableImagesError: images of the split cannot be read; names those of all processes.
  """
  progress = tqdm.tqdm(
    desc="validation",
    total=num_batches,
    leave=False,
    disable=jax.process_index() != 0 or not sys.stderr.isatty(),
  )
  results, faults = None, []
  with progress, contextlib.closing(batches):

    def counted() -> Iterator[_Rows]:
      for batch in batches:
        progress.update()
        yield batch

    try:
      results = compute(counted())
    except pipeline.UnreadableImagesError as error:
      faults = error.faults
  # All processes have done all steps: those that met no fault stop with those that did.
  faults = list(itertools.chain.from_iterable(sharding.gather(faults)))
  if faults:
    raise pipeline.UnreadableImagesError(source, faults)
  return results
