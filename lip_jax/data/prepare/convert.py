"""TFDS data sets from TFRecord to ArrayRecord, byte for byte: `lip-jax data convert`."""

import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tensorflow_datasets.core import constants as tfds_constants

from lip_jax.data import tfrecord
from lip_jax.data.builder import open_builder, record_format
from lip_jax.data.prepare import array_record_writer
from lip_jax.data.prepare.array_record_writer import Shard
from lip_jax.errors import UsageError


def convert_to_array_record(
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
  info, old = builder.info, Path(builder.data_dir)
  if record_format(builder) == "array_record":
    raise UsageError(f"data set {dataset!r} in {old} is in ArrayRecord format already")
  directory = array_record_writer.dataset_directory(out_dir, *info.full_name.split("/"))
  settings = {
    "made_from": "tfrecord files",
    "name": info.full_name,
    "shard_lengths": {split: list(info.splits[split].shard_lengths) for split in info.splits},
  }
  if directory.resolve() == old.resolve():
    raise UsageError(f"{out_dir} is the directory of the TFRecord files; name another for the new")
  if array_record_writer.is_prepared(directory, settings):
    return f"{directory} was prepared already, in the same way"
  shards, extras = [], {path.name for path in old.iterdir() if path.is_file()}
  for split in info.splits.values():
    template = split.filename_template
    new_template = template.replace(filetype_suffix="array_record")
    for index, count in enumerate(split.shard_lengths):
      path = old / template.sharded_filepath(shard_index=index, num_shards=split.num_shards).name
      if path.name not in extras:
        raise UsageError(f"{path} is missing; copy it again")
      extras.remove(path.name)
      target = new_template.sharded_filepath(shard_index=index, num_shards=split.num_shards)
      shards.append(Shard(target.name, count, functools.partial(_read_tfrecord, path, count)))
  with array_record_writer.workspace(directory, settings) as work:
    array_record_writer.check_space(work, sum(split.num_bytes for split in info.splits.values()))
    array_record_writer.write_shards(work, shards, num_workers=num_workers)
    info_name, settings_name = (
      tfds_constants.DATASET_INFO_FILENAME,
      array_record_writer.SETTINGS_FILENAME,
    )
    for name in sorted(extras - {info_name, settings_name}):
      shutil.copyfile(old / name, work / name)
    # The JSON itself, not what TFDS reads from it, so that nothing gets lost.
    values = json.loads((old / info_name).read_text(encoding="utf-8"))
    values["fileFormat"] = "array_record"
    values.pop("alternativeFileFormats", None)
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (work / info_name).write_text(text, encoding="utf-8")
  counts = {name: split.num_examples for name, split in info.splits.items()}
  return array_record_writer.summary(directory, counts, len(shards))


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
