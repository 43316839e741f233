"""Writes labelled images as a TFDS data set in ArrayRecord files, without TensorFlow.

Training images are written in the order that TFDS gives them, by a hash of their names, so that
every file has images of all classes and parts such as train[:99%] hold the same images as those of
a data set that TFDS itself prepared.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.core.utils import shard_utils

from lip_jax.data.prepare import array_record_writer
from lip_jax.data.prepare.array_record_writer import Shard
from lip_jax.data.prepare.rescale import Rescaler
from lip_jax.errors import UsageError


class LabelledImages(Protocol):
  """The images of one split: their names, which are unique, and ways to read them."""

  names: list[str]
  labels: np.ndarray
  sizes: np.ndarray

  def read(self, index: int) -> bytes: ...


def write_labelled_images(
  directory: Path,
  splits: Mapping[str, LabelledImages],
  class_names: list[str],
  *,
  settings: dict[str, Any],
  description: str,
  homepage: str | None,
  rescale: Rescaler,
  num_shards: int | None,
  num_workers: int | None,
) -> str:
  """Writes a data set of images, labels and file names.

  Args:
    settings: what it is made from and how, for `array_record_writer.workspace`.
    num_shards: files of the train split, the others in proportion; None is as many as TFDS makes.
    num_workers: threads; None is one for each core, at most 16.

  Returns:
    What was made, for people.

  Raises:
    UsageError: as for `array_record_writer`.
  """
  names = [name.lower() for images in splits.values() for name in images.names]
  encoding = "jpeg" if all(name.endswith((".jpg", ".jpeg")) for name in names) else None
  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(encoding_format=encoding),
      "label": tfds.features.ClassLabel(names=class_names),
      "file_name": tfds.features.Text(),
    }
  )
  shards: dict[str, list[Shard]] = {}
  numbers = shard_numbers(splits, num_shards)
  with array_record_writer.workspace(directory, settings) as work:
    for split, images in splits.items():
      template = tfds.core.ShardedFileTemplate(
        data_dir=work,
        dataset_name=directory.parent.name,
        split=split,
        filetype_suffix="array_record",
      )
      order = _tfds_order(split, images.names)
      bounds = [0, *shard_utils.get_shard_boundaries(len(order), numbers[split])]
      shards[split] = [
        Shard(
          template.sharded_filepath(shard_index=k, num_shards=len(bounds) - 1).name,
          end - start,
          functools.partial(_records, images, order[start:end], features, rescale),
        )
        for k, (start, end) in enumerate(itertools.pairwise(bounds))
      ]
    if not rescale.settings:
      needed = sum(int(images.sizes.sum()) for images in splits.values())
      array_record_writer.check_space(work, needed)
    array_record_writer.write_shards(
      work, list(itertools.chain.from_iterable(shards.values())), num_workers=num_workers
    )
    _write_info(work, directory, shards, features, f"{description} {rescale.description}", homepage)
  counts = {split: len(images.names) for split, images in splits.items()}
  num_files = sum(map(len, shards.values()))
  return array_record_writer.summary(directory, counts, num_files, rescale.unreadable)


def _write_info(
  work: Path,
  directory: Path,
  shards: Mapping[str, list[Shard]],
  features: tfds.features.FeaturesDict,
  description: str,
  homepage: str | None,
) -> None:
  """Writes what the data set says of itself, beside its files."""
  infos = []
  for split, files in shards.items():
    size = sum((work / shard.filename).stat().st_size for shard in files)
    infos.append(tfds.core.SplitInfo(split, [shard.count for shard in files], size))
  identity = tfds.core.dataset_info.DatasetIdentity(
    name=directory.parent.name,
    version=tfds.core.Version(directory.name),
    data_dir=str(work),
    module_name=__name__,
  )
  info = tfds.core.DatasetInfo(
    builder=identity,
    description=description,
    features=features,
    supervised_keys=("image", "label"),
    homepage=homepage,
  )
  info.set_file_format("array_record")
  info.set_splits(tfds.core.splits.SplitDict(infos))
  info.write_to_directory(work)


def _records(
  images: LabelledImages,
  indices: np.ndarray,
  features: tfds.features.FeaturesDict,
  rescale: Rescaler,
) -> Iterator[bytes]:
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
  for index in indices.tolist():
    name = images.names[index]
    example = {
      "image": rescale(name, images.read(index)),
      "label": int(images.labels[index]),
      "file_name": name,
    }
    record = serializer.get_tf_example(features.encode_example(example))
    # Else every process would write the fields in an order of its own, and files could not be
    # compared by their checksums.
    yield record.SerializeToString(deterministic=True)


def _tfds_order(split: str, names: Sequence[str]) -> np.ndarray:
  """The order in which TFDS writes examples with these keys: by MD5, salted with the split."""
  if len(set(names)) != len(names):
    seen: set[str] = set()
    twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
    raise UsageError(f"split {split!r} has two images of the name {twice}; names must be unique")
  salt = hashlib.md5(split.encode(), usedforsecurity=False)
  keys = []
  for name in names:
    digest = salt.copy()
    digest.update(name.encode())
    keys.append(digest.digest())
  return np.array(sorted(range(len(names)), key=keys.__getitem__), np.int64)


def shard_numbers(splits: Mapping[str, LabelledImages], num_shards: int | None) -> dict[str, int]:
  """Files of each split: as TFDS would, or `num_shards` for train and in proportion for others."""
  counts = {split: len(images.names) for split, images in splits.items()}
  if num_shards is None:
    return {
      split: shard_utils.ShardConfig.calculate_number_shards(int(images.sizes.sum()), counts[split])
      for split, images in splits.items()
    }
  first = counts.get("train", max(counts.values()))
  if not 1 <= num_shards <= first:
    raise UsageError(f"num_shards={num_shards}, expected 1 to {first}, the number of images")
  return {
    split: num_shards if count == first else min(count, max(1, num_shards * count // first))
    for split, count in counts.items()
  }
