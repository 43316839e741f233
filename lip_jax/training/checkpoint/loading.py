"""Reading one checkpoint: on all processes or none, and only what was saved."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from etils import epath

from lip_jax.distributed import sharding
from lip_jax.errors import UsageError
from lip_jax.training.checkpoint import arrays, step_directories
from lip_jax.training.checkpoint import metadata as metadata_lib
from lip_jax.training.checkpoint.faults import DamagedError, is_damage, reason
from lip_jax.training.checkpoint.fingerprint import fingerprint
from lip_jax.training.checkpoint.metadata import Metadata

_T = TypeVar("_T")


def read_metadata(path: epath.Path) -> Metadata:
  """What a checkpoint `<step>` says about itself.

  Raises:
    DamagedError: it is lost, or not what was saved.
    Exception: as `metadata.from_json`, or as the storage layers do.
  """
  try:
    stored = (path / arrays.METADATA_FILE).read_bytes()
  except FileNotFoundError:
    fault = f"it has no {arrays.METADATA_FILE}: lost, or of an earlier version of lip_jax"
    raise DamagedError(fault) from None
  return metadata_lib.from_json(stored, int(path.name))


def load(
  path: epath.Path, like_of: Callable[[Metadata], dict[str, Any]]
) -> tuple[Metadata, dict[str, Any]]:
  """Metadata of a checkpoint, and the parts of its train state that `like_of` wants of it.

  All processes have to call this together. Raises as `together`.
  """

  def read() -> tuple[Metadata, dict[str, Any]]:
    metadata = read_metadata(path)
    return metadata, arrays.read(path, like_of(metadata))

  metadata, loaded = together(path, read)
  for part, tree in loaded.items():
    if jax.tree.leaves(tree) and fingerprint(tree) != metadata.fingerprints.get(part):
      raise _damaged(path, f"its {part} is not what was saved")
  return metadata, loaded


def together(path: epath.Path, read: Callable[[], _T]) -> _T:
  """What `read` gives, if it gives something on all processes, which have to call this together.

  Raises:
    DamagedError: the checkpoint is damaged, as one of them has seen.
    UsageError: it is whole, as far as known, but of no use; or it cannot be read at present.
  """
  result: Any = None
  fault: tuple[bool, str] | None = None  # damage?
  try:
    result = read()
  except Exception as error:
    fault = (is_damage(error), reason(error))
    if not fault[0] and not isinstance(error, UsageError):
      text = f"cannot read the checkpoint {path}, which may be whole: {fault[1]}"
      fault = (False, f"{text}; mend that and give the same command again")
  # One process that cannot read its part must not leave the others waiting for it.
  for damage, text in sorted(each for each in sharding.gather(fault) if each):
    raise _damaged(path, text) if damage else UsageError(text)
  return result


def _damaged(path: epath.Path, fault: str) -> DamagedError:
  there = ", ".join(map(str, step_directories.steps_in(path.parent)))
  text = f"the checkpoint {path} is damaged ({fault})"
  return DamagedError(fault, f"{text}; take another one, there are: {there}")
