"""The seam between what every training has and what one task adds.

Loop, step, optimizer, checkpoints and metrics are written once, in this room, and know a `Task`
only: no label, no class, no name of a metric. A new task is a subclass, a configuration, and a line
in `lip_jax.training.config.TASKS`.
"""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from lip_jax.errors import UsageError
from lip_jax.training.config import TASKS, Config, find
from lip_jax.training.train_state import TrainState, Tree
from lip_jax.training.workdir import read_text

Batch = Mapping[str, jax.Array]
Scalars = dict[str, jax.Array]


class Loader(Protocol):
  """Endless training batches of this process, as `lip_jax.data.pipeline.TrainLoader` gives them."""

  def __next__(self) -> Mapping[str, np.ndarray]: ...
  def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]: ...
  def position(self) -> Any: ...  # behind the batch that was taken last
  def get_state(self, position: Any = None) -> dict[str, Any]: ...  # JSON
  def set_state(self, state: dict[str, Any]) -> None: ...
  def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]: ...  # of all processes
  def note_skipped(self, state: dict[str, Any]) -> None: ...
  def num_skipped(self, position: Any) -> int: ...
  def __enter__(self) -> Self: ...
  def __exit__(self, *error: object) -> None: ...


class Evaluator(Protocol):
  """Validation of one run's networks; all processes call it together."""

  def __call__(
    self, params: Tree, batch_stats: Tree, stop: Callable[[], bool]
  ) -> dict[str, float] | None:
    """Metrics over the whole validation split; None once any process says `stop()`."""
    ...

  def figures(self, params: Tree, batch_stats: Tree) -> dict[str, np.ndarray]:
    """Pictures of what the network does, uint8 [H, W, 3] by name; empty on other processes."""
    ...


class Task(abc.ABC):
  """What is learned from which examples, and how well.

  Attributes:
    config: of the run.
    best_metric: by which the best checkpoint is kept: the largest is the best.
    trained: names in `loss` whose quotients are added up and minimized; the others are reported.
    shown: training metrics on the progress bar, beside the loss.
    buckets: names of the shapes that batches come in.
  """

  best_metric: ClassVar[str]
  trained: tuple[str, ...] = ("loss",)
  shown: tuple[str, ...] = ()
  buckets: tuple[str, ...] = ("all",)

  def __init__(self, config: Any):
    self.config = config

  @property
  def num_classes(self) -> int:
    """That the network tells apart; 0 where there are none."""
    return 0

  @property
  @abc.abstractmethod
  def num_train(self) -> int:
    """Examples of an epoch."""

  @abc.abstractmethod
  def train_loader(self) -> Loader:
    """This process's part of the training batches."""

  @abc.abstractmethod
  def batch_shapes(self, size: int, bucket: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a bucket's training batch of `size` examples, to compile it."""

  @abc.abstractmethod
  def create_model(self, rngs: nnx.Rngs, **options: Any) -> nnx.Module:
    """The network in training mode. `options`: "remat" and "bn_axis_name", from the trainer."""

  def prepare(self, batch: Batch, key: jax.Array) -> Any:
    """What `loss` takes, of a whole batch, on the devices: for example augmentation.

    Args:
      batch: of `train_loader`, all processes' rows together.

    Returns:
      A pytree of arrays whose first axis is that of the batch's examples.
    """
    return batch

  @abc.abstractmethod
  def loss(self, model: Any, batch: Any, key: jax.Array) -> tuple[Scalars, Scalars]:
    """(sums, weights) of some examples, by name: the step adds both up over all devices, then
    divides, once. So a loss per positive is right wherever the positives are; without any it is 0.
    Of arrays the quotients are averaged. The key is the same for all devices and parts of a step.

    Args:
      batch: some rows of what `prepare` gives.
    """

  @property
  def batch_norm_group(self) -> int:
    """Examples that a batch norm normalizes together; 0: no batch changes the statistics of the
    network, of which then all devices have the same.
    """
    model = self.config.model
    return (
      0 if model.get("bn_frozen") else model.get("bn_group_size") or self.config.global_batch_size
    )

  def trainable(self, path: tuple[str, ...]) -> bool:
    """Whether the parameter of that path, as in the network's state, is trained."""
    return True

  @abc.abstractmethod
  def evaluator(self, graph: nnx.GraphDef, mesh: Mesh) -> Evaluator:
    """What measures networks of that structure on the validation split."""

  @abc.abstractmethod
  def lower_evaluation(
    self, graph: nnx.GraphDef, mesh: Mesh, params: Tree, batch_stats: Tree, bucket: str
  ) -> jax.stages.Lowered:
    """The program of the evaluator's step for a bucket, to compile it without data or devices."""

  @abc.abstractmethod
  def summary(self, metrics: Mapping[str, float]) -> list[str]:
    """What the evaluator found, in lines for people."""

  def start_from(self, path: str | Path, state: TrainState) -> TrainState:
    """`state` with weights of the network at `path`, which `lip_jax.load` takes, to fine-tune it.

    Raises:
      UsageError: there is none, or it does not fit.
    """
    raise UsageError(f"weights={path}: {self.config.task} starts from fresh weights; leave it out")

  def files(self) -> dict[str, str]:
    """Texts by file name that are written beside the checkpoints: what a network of the run needs
    to be used, such as its classes' names.
    """
    return {}

  def check_same(self, workdir: epath.Path) -> None:
    """Raises UsageError if the run in `workdir` learned something else, by its `files`."""
    for name, text in self.files().items():
      before = read_text(workdir / name)
      if before is not None and before != text:
        raise UsageError(
          f"{workdir / name} is not what this run would write there; take another --workdir, or "
          "give the data that the run was started with"
        )


def make(config: Config, **options: Any) -> Task:
  """The task of a configuration. `options`: of its constructor."""
  return find(TASKS[config.task].task)(config, **options)


def trainable_mask(task: Task, params: Tree) -> Tree:
  """`Task.trainable` of each parameter."""

  def trained(path: Sequence[Any], _: Any) -> bool:
    return task.trainable(tuple(str(getattr(key, "key", key)) for key in path))

  return jax.tree_util.tree_map_with_path(trained, params)
