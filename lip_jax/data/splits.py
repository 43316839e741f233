"""Splits such as "train[:99%]+validation": which records of which files, by TFDS's rules."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from lip_jax.data.tfrecord_index import FilePart
from lip_jax.errors import UsageError


def select(splits: Any, dataset: str, split: str) -> list[FilePart]:
  """The records that a split consists of.

  Args:
    split: which one.

  Raises:
    UsageError: there is no such split, or it is empty.
  """
  try:
    info = splits[split]
    instructions = info.file_instructions if info.num_examples else []
  except (AssertionError, KeyError, ValueError, NotImplementedError) as error:
    raise UsageError(
      f"data set {dataset!r} has no split {split!r} ({str(error).splitlines()[0]}); it has "
      f"{', '.join(splits)}, and parts of them such as train[:10%]"
    ) from error
  if not instructions:
    raise UsageError(f"split {split!r} of data set {dataset!r} is empty")
  return [FilePart(str(file.filename), file.skip, file.take) for file in instructions]


def select_indices(lengths: Mapping[str, int], dataset: str, split: str) -> list[tuple[str, range]]:
  """The same for splits of these lengths that are in no files: which indices of which split."""
  infos, by_file = [], {}
  for name, length in lengths.items():
    template = tfds.core.ShardedFileTemplate(
      data_dir="", dataset_name="images", split=name, filetype_suffix="all"
    )
    info = tfds.core.SplitInfo(name, [length], 0, template)
    infos.append(info)
    by_file[str(info.filepaths[0])] = name
  parts = select(tfds.core.splits.SplitDict(infos), dataset, split)
  return [(by_file[part.path], range(part.skip, part.skip + part.take)) for part in parts]


def check_files(parts: Sequence[FilePart], directory: str) -> None:
  """Raises UsageError if files are missing: at the start, not in the middle of an epoch."""
  present = {path.name for path in epath.Path(directory).iterdir()}
  missing = [part.path for part in parts if os.path.basename(part.path) not in present]
  if missing:
    raise UsageError(
      f"{directory} lacks {len(missing)} of {len(parts)} files, the first is "
      f"{os.path.basename(missing[0])}; copy them again, or delete the directory and prepare the "
      "data set again"
    )
