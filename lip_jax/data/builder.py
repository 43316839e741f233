"""Finds prepared TFDS data sets on disk, without TensorFlow and without the data sets' own code."""

import difflib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import constants as tfds_constants
from tensorflow_datasets.core import read_only_builder

from lip_jax.data import disk, imagenet
from lip_jax.data.prepare import cluttered_digits
from lip_jax.data.prepare.cluttered_digits import ClutteredDigits
from lip_jax.errors import UsageError

_BUCKETS = ("gs://", "s3://", "az://")
# Keys under which TFDS writes the class of a feature, now and in earlier versions.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")


def open_builder(dataset: str, data_dir: str | None, *, prepare: bool = False) -> Any:
  """The builder of a data set, which knows its files, features and splits.

  Args:
    dataset: TFDS name, such as "imagenet2012" or "cluttered_digits/classify".
    data_dir: directory that holds the data sets; None is $TFDS_DATA_DIR or ~/tensorflow_datasets.
    prepare: whether to make the embedded data set (`cluttered_digits`) if it is not there yet.

  Raises:
    UsageError: there is no such data set or configuration, or it is not prepared.
  """
  root = disk.absolute(data_dir or tfds_constants.DATA_DIR)
  _check_bucket(root)
  name, _, config = dataset.partition("/")
  if name == ClutteredDigits.name and (not config or config in ClutteredDigits.builder_configs):
    embedded = cluttered_digits.open_builder(config or None, root, prepare=prepare)
    if embedded is not None:
      return embedded
  _check_feature_classes(dataset, root)
  try:
    # Reads what the files say of themselves: no code of the data set, which may need TensorFlow.
    return read_only_builder.builder_from_files(dataset, data_dir=root)
  except ValueError as error:
    raise UsageError(_explain_missing(dataset, root)) from error


def record_format(builder: Any) -> str:
  """The format in which a data set is read: "array_record" or "tfrecord".

  Of a data set that is there in both, ArrayRecord, because it has random access.

  Raises:
    UsageError: the data set is in another format.
  """
  info = builder.info
  formats = {file_format.value for file_format in info.available_file_formats()}
  for name in ("array_record", "tfrecord"):
    if name in formats:
      if info.file_format.value != name:
        # Of a data set that is there in several, `info.splits` has the files of the first.
        info.set_file_format(name, override=True, override_if_initialized=True)
      return name
  raise UsageError(
    f"data set {builder.info.full_name!r} in {builder.data_dir} is prepared as "
    f"{' and '.join(sorted(formats)) or 'no known format'}, not as array_record or tfrecord; "
    "convert it with `tfds convert_format --out_file_format=array_record "
    f"--dataset_version_dir={builder.data_dir}` (which needs TensorFlow)"
  )


def _check_bucket(root: str) -> None:
  """Raises UsageError if a bucket is named and nothing can read it."""
  if not root.startswith(_BUCKETS):
    return
  if not root.startswith("gs://"):
    raise UsageError(f"data_dir {root!r}: of buckets, only gs:// can be read; mount it as a folder")
  if importlib.util.find_spec("gcsfs") is None:
    raise UsageError(
      f"data_dir {root!r} is a bucket: install lip-jax[gcs] (gcsfs) to read it, or mount it with "
      "gcsfuse and give the folder"
    )


def _check_feature_classes(dataset: str, root: str) -> None:
  """Refuses a data set whose files name classes of features that are not TFDS's own.

  TFDS imports the modules that they name. A directory of data from elsewhere could so run code.
  """
  folder = epath.Path(root) / re.split("[/:]", dataset)[0]
  for name in (tfds_constants.FEATURES_FILENAME, tfds_constants.DATASET_INFO_FILENAME):
    for pattern in (f"*/{name}", f"*/*/{name}"):  # name/version and name/config/version
      for path in folder.glob(pattern):
        try:
          classes = list(_feature_classes(json.loads(path.read_text())))
        except (OSError, ValueError, RecursionError) as error:
          raise UsageError(
            f"{path} is damaged ({error}); copy the data set {dataset!r} again"
          ) from error
        for found in classes:
          module = found.rpartition(".")[0]
          if module and module not in sys.modules and not found.startswith("tensorflow_datasets."):
            raise UsageError(
              f"data set {dataset!r} is refused: {path} names the class {found!r}, and to import "
              "it could run code. If you trust it, import its module first"
            )


def _feature_classes(values: Any) -> Iterator[str]:
  """Names of classes in what `features.json` holds, at any depth."""
  if isinstance(values, dict):
    for key, value in values.items():
      if key in _CLASS_KEYS and isinstance(value, str):
        yield value
      yield from _feature_classes(value)
  elif isinstance(values, list):
    for value in values:
      yield from _feature_classes(value)


def _explain_missing(dataset: str, root: str) -> str:
  """Says in one line why a data set cannot be opened and what to do."""
  name = re.split("[/:]", dataset)[0]
  elsewhere = "or name the directory that holds it (--config.data.data_dir=DIR, or --data-dir DIR)"
  if name == ClutteredDigits.name:
    configs = " or ".join(f"{name}/{config}" for config in ClutteredDigits.builder_configs)
    return f"data set {dataset!r} is not in {root}; open {configs} with prepare=True, {elsewhere}"
  directory = epath.Path(root) / name
  known = tfds.list_builders(with_community_datasets=False)
  if name not in known and not directory.exists():
    close = difflib.get_close_matches(name, known)
    hint = f" did you mean {' or '.join(close)}? Else" if close else ""
    return (
      f"unknown data set {dataset!r}: TFDS has none of that name, and it is not in {root};"
      f"{hint} check the name, {elsewhere}"
    )
  without_tensorflow = ""
  if name == imagenet.NAME:
    without_tensorflow = (
      ", or without it `lip-jax data prepare imagenet --train-tar=FILE --val-tar=FILE "
      f"--data-dir={root}`"
    )
  return (
    f"data set {dataset!r} is not prepared: looked in {directory}; prepare it with `tfds build "
    f"{dataset} --file_format=array_record --data_dir={root}` (which needs TensorFlow)"
    f"{without_tensorflow}, {elsewhere}"
  )
