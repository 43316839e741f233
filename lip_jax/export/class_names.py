"""What the classes of a network are called: kept beside a run, and compared with a data set's."""

import json
from collections.abc import Sequence

from etils import epath

from lip_jax.errors import UsageError
from lip_jax.export import validation
from lip_jax.training.config import Config
from lip_jax.training.json_files import parse_json
from lip_jax.training.workdir import read_text

FILE = "classes.json"
_KEY = "class_names"


def to_json(names: Sequence[str]) -> str:
  """What a run's `classes.json` holds, of the data set's classes in the order of the labels."""
  return json.dumps({_KEY: for_people(names)}, indent=0, ensure_ascii=False) + "\n"


def read(workdir: epath.Path) -> list[str] | None:
  """The names in a run's `classes.json`; None where there is no such file."""
  path = workdir / FILE
  text = read_text(path)
  return None if text is None else parse_json(text, str(path)).get(_KEY)


def of_run(workdir: epath.Path, config: Config, num_classes: int) -> list[str] | None:
  """Names of a run's classes: what `classes.json` says, else its data set's, if that is here."""
  names = read(workdir)
  if names is not None:
    return validation.check_class_names(names, num_classes, str(workdir / FILE))
  try:
    from lip_jax.data.source import open_split

    data = config.data
    source = open_split(
      data.dataset,
      data.validation_split,
      data.data_dir,
      prepare=False,
      train_split=data.train_split,
    )
  except (ImportError, UsageError):
    return None  # a run from another machine, most likely
  return for_people(source.class_names) if source.num_classes == num_classes else None


def check_same(workdir: epath.Path, class_names: Sequence[str], source: str) -> None:
  """Raises UsageError if the run in `workdir` learned other classes than those of the source."""
  before, names = read(workdir), for_people(class_names)
  if before is None or before == names:
    return
  pairs = enumerate(zip(before, names, strict=False))
  first = next((k for k, (old, new) in pairs if old != new), min(len(before), len(names)))
  old, new = (
    f"{one[first]!r}" if first < len(one) else f"none of {len(one)}" for one in (before, names)
  )
  raise UsageError(
    f"{workdir} holds a run that learned other classes: class {first} was {old} and is {new} in "
    f"{source}. Take another --workdir, or give the data that the run was started with"
  )


def for_people(names: Sequence[str]) -> list[str]:
  """`names`, or what ImageNet's classes are called if these are its synsets."""
  from lip_jax.data import imagenet

  return imagenet.readable(names)


def of_imagenet() -> list[str] | None:
  """Names of ImageNet's 1,000 classes; None where TFDS, which has them, is not installed."""
  try:
    from lip_jax.data import imagenet
  except ImportError:
    return None
  return imagenet.class_names()


def check(
  num_classes: int, names: Sequence[str] | None, source_names: Sequence[str], source: str
) -> None:
  """Compares a network's classes with those of a data set, `source`.

  Names may be None, and bare numbers, where they are not known.

  Raises:
    UsageError: they are not the same classes in the same order.
  """
  if num_classes != len(source_names):
    raise UsageError(
      f"the network has {num_classes} classes and {source} has {len(source_names)}; give the data "
      "set that it was trained on"
    )
  theirs = for_people(source_names)
  if names is None or _are_numbers(names) or _are_numbers(theirs):
    return
  for index, (own, their) in enumerate(zip(names, theirs, strict=True)):
    if own != their:
      raise UsageError(
        f"class {index} is {own!r} for the network and {their!r} in {source}; give a data set "
        "with the same classes in the same order"
      )


def _are_numbers(names: Sequence[str]) -> bool:
  return all(name == str(index) for index, name in enumerate(names))
