"""Makes TFDS data sets in ArrayRecord format, without TensorFlow.

What `lip-jax data prepare` and `lip-jax data convert` call.

Training images are written in the order that TFDS gives them, by a hash of their names, so that
every file has images of all classes and parts such as train[:99%] hold the same images as those of
a data set that TFDS itself prepared.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants as tfds_constants
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.core.utils import shard_utils

from lip_jax.data import imagenet, tfrecord
from lip_jax.data.builder import open_builder, record_format
from lip_jax.data.folder import ImageFolder
from lip_jax.data.prepare.array_record_writer import (
  SETTINGS_FILENAME,
  PlannedShard,
  is_prepared,
  workspace,
  write_shards,
)
from lip_jax.data.prepare.rescale import Rescaler
from lip_jax.errors import UsageError

_FOLDER_VERSION = "1.0.0"


class _Images(Protocol):
  """The images of one split: their names, which are unique, and ways to read them."""

  names: list[str]
  labels: np.ndarray
  sizes: np.ndarray

  def read(self, index: int) -> bytes: ...


def prepare_imagenet(
  train_tar: str | Path,
  val_tar: str | Path,
  data_dir: str | Path | None,
  *,
  shorter_side: int | None = None,
  quality: int | None = None,
  num_shards: int | None = None,
  num_workers: int | None = None,
  synsets: Sequence[str] | None = None,
  validation_labels: Sequence[str] | None = None,
) -> str:
  """Makes `imagenet2012` from the two tar files, which are read at random and not unpacked.

  The images' bytes are kept, unless `shorter_side` is given. Interrupted, the same call goes on
  where it stopped.

  Args:
    train_tar: ILSVRC2012_img_train.tar, on a disk, best one without moving parts.
    val_tar: ILSVRC2012_img_val.tar.
    data_dir: where to; the data set comes into DIR/imagenet2012/5.1.0. None is $TFDS_DATA_DIR or
      ~/tensorflow_datasets.
    shorter_side: pixels; images whose shorter side is larger are scaled down to it.
    quality: JPEG quality of images that are scaled; None is 95.
    num_shards: files of the train split, the others in proportion; None is as many as TFDS makes,
      1,024 and 64.
    num_workers: threads; None is one for each core, at most 16.
    synsets: class names, where it is not ImageNet's 1,000; then images are not counted.
    validation_labels: class names of the validation images, where it is not ImageNet's 50,000.

  Returns:
    What was made, for people.

  Raises:
    UsageError: a tar file is missing, damaged, or another one; there is no room; a data set is
      there that was made otherwise.
  """
  encode = Rescaler(shorter_side, quality)
  settings = {
    "made_from": "imagenet tar files",
    "train_tar_bytes": _size(train_tar),
    "val_tar_bytes": _size(val_tar),
    "num_shards": num_shards,
    **encode.settings,
  }
  directory = _directory(data_dir, imagenet.NAME, imagenet.VERSION)
  if is_prepared(directory, settings):
    return _already(directory)
  class_names = list(synsets or imagenet.synsets())
  image_labels = validation_labels or imagenet.validation_labels()
  validation = imagenet.index_validation_tar(val_tar, image_labels, class_names)
  try:
    train = imagenet.index_train_tar(train_tar, class_names)
    try:
      if synsets is None and len(train.names) != imagenet.COUNTS["train"]:
        raise UsageError(
          f"{train_tar} holds {len(train.names):,} images, expected {imagenet.COUNTS['train']:,}; "
          "it is damaged or not ILSVRC2012_img_train.tar: download it again"
        )
      return _build(
        directory,
        {"train": train, "validation": validation},
        name=imagenet.NAME,
        version=imagenet.VERSION,
        class_names=class_names,
        encoding="jpeg",
        description="ImageNet (ILSVRC 2012), from the two tar files. " + encode.description,
        homepage="https://image-net.org/",
        encode=encode,
        settings=settings,
        num_shards=num_shards,
        num_workers=num_workers,
      )
    finally:
      train.close()
  finally:
    validation.close()


def prepare_folder(
  folder: str | Path,
  name: str,
  data_dir: str | Path | None,
  *,
  shorter_side: int | None = None,
  quality: int | None = None,
  num_shards: int | None = None,
  num_workers: int | None = None,
) -> str:
  """Makes a data set from FOLDER/train/CLASS/IMAGE.jpg, and the same of other splits.

  Args:
    folder: the image folder, as for "folder:DIR" in `open_split`.
    name: of the new data set: lower-case letters, digits and underscores.
    data_dir: where to; the data set comes into DIR/NAME/1.0.0. None as for `prepare_imagenet`.
    shorter_side: as for `prepare_imagenet`.
    quality: as for `prepare_imagenet`.
    num_shards: as for `prepare_imagenet`.
    num_workers: as for `prepare_imagenet`.

  Returns:
    What was made, for people.

  Raises:
    UsageError: as for `prepare_imagenet`, or the folder has another layout.
  """
  if not re.fullmatch("[a-z][a-z0-9_]*", name):
    raise UsageError(
      f"name {name!r} of the data set: expected lower-case letters, digits and underscores"
    )
  encode = Rescaler(shorter_side, quality)
  images = ImageFolder(os.fspath(folder))
  splits = {split: images.images(split) for split in images.splits}
  listing = hashlib.sha256()
  for split, part in splits.items():
    for file_name, size in zip(part.names, part.sizes.tolist(), strict=True):
      listing.update(f"{split}/{file_name} {size}\n".encode())
  settings = {
    "made_from": "image folder",
    "files_sha256": listing.hexdigest(),
    "num_shards": num_shards,
    **encode.settings,
  }
  directory = _directory(data_dir, name, _FOLDER_VERSION)
  if is_prepared(directory, settings):
    return _already(directory)
  jpegs = all(name.lower().endswith((".jpg", ".jpeg")) for s in splits.values() for name in s.names)
  return _build(
    directory,
    splits,
    name=name,
    version=_FOLDER_VERSION,
    class_names=images.class_names,
    encoding="jpeg" if jpegs else None,
    description="Images of a folder, labelled by the folders' names. " + encode.description,
    homepage=None,
    encode=encode,
    settings=settings,
    num_shards=num_shards,
    num_workers=num_workers,
  )


def convert(
  dataset: str,
  data_dir: str | Path | None,
  out_dir: str | Path,
  *,
  num_workers: int | None = None,
) -> str:
  """Converts a TFDS data set from TFRecord to ArrayRecord: the same records in as many files.

  Interrupted, the same call goes on where it stopped.

  Args:
    dataset: TFDS name, such as "imagenet2012".
    data_dir: directory that holds the data set.
    out_dir: directory for the new one; not `data_dir`.
    num_workers: threads; None is one for each core, at most 16.

  Returns:
    What was made, for people.

  Raises:
    UsageError: there is no such data set, it is not in TFRecord format, files are missing or
      damaged, there is no room, or another data set is there.
  """
  if data_dir is not None and "://" in os.fspath(data_dir):
    raise UsageError(f"{data_dir} is a bucket: copy the data set to a disk to convert it")
  builder = open_builder(dataset, None if data_dir is None else os.fspath(data_dir))
  old = Path(builder.data_dir)
  if record_format(builder) == "array_record":
    raise UsageError(f"data set {dataset!r} in {old} is in ArrayRecord format already")
  directory = _directory(out_dir, *builder.info.full_name.split("/"))
  info = builder.info
  settings = {
    "made_from": "tfrecord files",
    "name": info.full_name,
    "shard_lengths": {split: list(info.splits[split].shard_lengths) for split in info.splits},
  }
  if directory.resolve() == old.resolve():
    raise UsageError(f"{out_dir} is the directory of the TFRecord files; name another for the new")
  if is_prepared(directory, settings):
    return _already(directory)
  plan, extras = [], {path.name for path in old.iterdir() if path.is_file()}
  for split in info.splits.values():
    template = split.filename_template
    new_template = template.replace(filetype_suffix="array_record")
    for index, count in enumerate(split.shard_lengths):
      path = old / template.sharded_filepath(shard_index=index, num_shards=split.num_shards).name
      if path.name not in extras:
        raise UsageError(f"{path} is missing; copy it again")
      extras.remove(path.name)
      target = new_template.sharded_filepath(shard_index=index, num_shards=split.num_shards)
      plan.append(PlannedShard(target.name, count, functools.partial(_read_tfrecord, path, count)))
  with workspace(directory, settings) as work:
    _check_space(work, sum(split.num_bytes for split in info.splits.values()))
    write_shards(work, plan, num_workers=num_workers)
    for name in sorted(extras - {tfds_constants.DATASET_INFO_FILENAME, SETTINGS_FILENAME}):
      shutil.copyfile(old / name, work / name)
    # The JSON itself, not what TFDS reads from it, so that nothing gets lost.
    text = (old / tfds_constants.DATASET_INFO_FILENAME).read_text(encoding="utf-8")
    values = json.loads(text)
    values["fileFormat"] = "array_record"
    values.pop("alternativeFileFormats", None)
    (work / tfds_constants.DATASET_INFO_FILENAME).write_text(
      json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8"
    )
  counts = {name: split.num_examples for name, split in info.splits.items()}
  return _summary(directory, counts, len(plan))


def _read_tfrecord(path: Path, count: int) -> Iterator[bytes]:
  """All records of a file, which are to be `count`."""
  found = 0
  try:
    for record in tfrecord.read_records(str(path)):
      found += 1
      yield record
  except tfrecord.CorruptFile as error:
    raise UsageError(f"damaged file: {error}; copy it again") from error
  if found != count:
    raise UsageError(f"{path} holds {found} records, expected {count}; copy it again")


def _build(
  directory: Path,
  splits: Mapping[str, _Images],
  *,
  name: str,
  version: str,
  class_names: list[str],
  encoding: str | None,
  description: str,
  homepage: str | None,
  encode: Rescaler,
  settings: dict[str, Any],
  num_shards: int | None,
  num_workers: int | None,
) -> str:
  """Writes a data set of images, labels and file names."""
  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(encoding_format=encoding),
      "label": tfds.features.ClassLabel(names=class_names),
      "file_name": tfds.features.Text(),
    }
  )
  plans: dict[str, list[PlannedShard]] = {}
  shards_of = _shard_numbers(splits, num_shards)
  with workspace(directory, settings) as work:
    for split, images in splits.items():
      template = tfds.core.ShardedFileTemplate(
        data_dir=work, dataset_name=name, split=split, filetype_suffix="array_record"
      )
      order = _shuffled(split, images.names)
      bounds = [0, *shard_utils.get_shard_boundaries(len(order), shards_of[split])]
      plans[split] = [
        PlannedShard(
          template.sharded_filepath(shard_index=k, num_shards=len(bounds) - 1).name,
          end - start,
          functools.partial(_records, images, order[start:end], features, encode),
        )
        for k, (start, end) in enumerate(itertools.pairwise(bounds))
      ]
    if not encode.settings:
      _check_space(work, sum(int(images.sizes.sum()) for images in splits.values()))
    plan = [shard for shards in plans.values() for shard in shards]
    write_shards(work, plan, num_workers=num_workers)
    infos = []
    for split, shards in plans.items():
      size = sum((work / shard.filename).stat().st_size for shard in shards)
      infos.append(tfds.core.SplitInfo(split, [shard.count for shard in shards], size))
    identity = tfds.core.dataset_info.DatasetIdentity(
      name=name, version=tfds.core.Version(version), data_dir=str(work), module_name=__name__
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
  counts = {split: len(images.names) for split, images in splits.items()}
  return _summary(directory, counts, len(plan), encode.unreadable)


def _records(
  images: _Images,
  indices: np.ndarray,
  features: tfds.features.FeaturesDict,
  encode: Callable[[str, bytes], bytes],
) -> Iterator[bytes]:
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
  for index in indices.tolist():
    name = images.names[index]
    example = {
      "image": encode(name, images.read(index)),
      "label": int(images.labels[index]),
      "file_name": name,
    }
    record = serializer.get_tf_example(features.encode_example(example))
    # Else every process would write the fields in an order of its own, and files could not be
    # compared by their checksums.
    yield record.SerializeToString(deterministic=True)


def _shuffled(split: str, names: Sequence[str]) -> np.ndarray:
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


def _shard_numbers(splits: Mapping[str, _Images], num_shards: int | None) -> dict[str, int]:
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


def _directory(data_dir: str | Path | None, *parts: str) -> Path:
  data_dir = data_dir or tfds_constants.DATA_DIR
  if "://" in os.fspath(data_dir):
    raise UsageError(
      f"{data_dir} is a bucket: prepare the data set on a disk, then copy it with "
      "`gcloud storage cp --recursive`"
    )
  return Path(data_dir).expanduser().joinpath(*parts)


def _size(path: str | Path) -> int | None:
  return os.stat(path).st_size if os.path.isfile(path) else None


def _check_space(work: Path, needed: int) -> None:
  """Raises UsageError now, rather than after hours, if the disk will be full."""
  written = sum(path.stat().st_size for path in work.iterdir())
  free = shutil.disk_usage(work).free
  if needed - written > free:
    raise UsageError(
      f"{work} needs {(needed - written) / 1e9:,.1f} GB and there are {free / 1e9:,.1f} GB free; "
      "make room or choose another disk"
    )


def _already(directory: Path) -> str:
  return f"{directory} was prepared already, in the same way"


def _summary(
  directory: Path, counts: Mapping[str, int], num_files: int, unreadable: Sequence[str] = ()
) -> str:
  images = ", ".join(f"{split} {count:,}" for split, count in counts.items())
  text = f"{directory}: {images} images in {num_files:,} files"
  if unreadable:
    names = ", ".join(sorted(unreadable)[:5])
    text += f"; {len(unreadable)} cannot be decoded and were kept as they are, such as {names}"
  return text
