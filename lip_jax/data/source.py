"""Data sets on disk: random access to the encoded images and labels of one split."""

import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import constants as tfds_constants
from tensorflow_datasets.core import decode as tfds_decode
from tensorflow_datasets.core import read_only_builder

from lip_jax.data.cluttered_digits import ClutteredDigits
from lip_jax.errors import UsageError

# Features that say which image it is, in the data sets that have one.
_ID_FEATURES = ("id", "file_name", "image/filename")


class Source:
  """A split of a prepared data set: random access to encoded images and labels.

  Attributes:
    name: data set and split, such as "cluttered_digits/classify train".
    directory: where the files are.
    num_classes: number of labels.
    class_names: their names, in the order of the labels.
  """

  def __init__(self, name: str, directory: str, records: Sequence[bytes], features: dict[str, Any]):
    """Wraps serialised records; `features` are the TFDS features that they were written with."""
    self.name = name
    self.directory = directory
    self.num_classes: int = features["label"].num_classes
    self.class_names: list[str] = features["label"].names
    self._records = records
    texts = (key for key in _ID_FEATURES if isinstance(features.get(key), tfds.features.Text))
    self._id = next(texts, None)
    wanted = ["image", "label"] if self._id is None else ["image", "label", self._id]
    self._features = tfds.features.FeaturesDict({key: features[key] for key in wanted})
    self._decoders = {"image": tfds.decode.SkipDecoding()}

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads one example.

    Args:
      index: from 0 to len(self) - 1.

    Returns:
      "image": the encoded image, bytes; "label": int; and "id": str, where the data set has one.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"{self.name} has {len(self)} images, not an image {index}")
    example = self._features.deserialize_example_np(self._records[index], decoders=self._decoders)
    result = {"image": example["image"], "label": int(example["label"])}
    if self._id is not None:
      result["id"] = example[self._id].decode()
    return result

  def describe(self, index: int) -> str:
    """Names an image, to a person who has to find it."""
    name = f"{self.name} image {index}"
    return name if self._id is None else f"{name} ({self[index]['id']})"


def open_split(dataset: str, split: str, data_dir: str | None, *, prepare: bool = True) -> Source:
  """Opens a split of a data set that TFDS prepared as ArrayRecord.

  Args:
    dataset: TFDS name, such as "imagenet2012" or "cluttered_digits/classify".
    split: TFDS split, such as "train", "validation" or "train[:10%]".
    data_dir: directory that holds the data sets; None is $TFDS_DATA_DIR or ~/tensorflow_datasets.
    prepare: whether to make the embedded data set (`cluttered_digits`) if it is not there yet.

  Raises:
    UsageError: there is no such data set, configuration or split, it is not prepared, or not as
      ArrayRecord, or it has no images with labels.
  """
  root = os.path.expanduser(data_dir or tfds_constants.DATA_DIR)
  builder = _open_builder(dataset, root, prepare)
  features = dict(builder.info.features)
  if not isinstance(features.get("label"), tfds.features.ClassLabel) or "image" not in features:
    raise UsageError(
      f"data set {dataset!r} has the features {', '.join(sorted(features))}; "
      "classification needs 'image' and a class 'label'"
    )
  try:
    num_examples = builder.info.splits[split].num_examples
  except (KeyError, ValueError, NotImplementedError) as error:
    raise UsageError(
      f"data set {dataset!r} has no split {split!r} ({str(error).splitlines()[0]}); it has "
      f"{', '.join(builder.info.splits)}, and parts of them such as train[:10%]"
    ) from error
  if num_examples == 0:
    raise UsageError(f"split {split!r} of data set {dataset!r} is empty")
  try:
    records = builder.as_data_source(
      split,
      deserialize_method=tfds_decode.DeserializeMethod.RAW_BYTES,
      file_format="array_record",
    )
  except (ValueError, NotImplementedError) as error:
    found = builder.info.file_format.value if builder.info.file_format else "no known format"
    raise UsageError(
      f"data set {dataset!r} in {builder.data_dir} is prepared as {found}, not as array_record; "
      "convert it with `tfds convert_format --out_file_format=array_record "
      f"--dataset_version_dir={builder.data_dir}` (which needs TensorFlow)"
    ) from error
  return Source(f"{dataset} {split}", str(builder.data_dir), records, features)


def _open_builder(dataset: str, root: str, prepare: bool) -> Any:
  """Finds the files of a data set; makes those of the embedded one."""
  name, _, config = dataset.partition("/")
  if name == ClutteredDigits.name and (not config or config in ClutteredDigits.builder_configs):
    builder = ClutteredDigits(config=config or None, data_dir=root)
    if prepare and not _is_prepared(builder):
      _prepare(builder)
      builder = ClutteredDigits(config=config or None, data_dir=root)
    if _is_prepared(builder):
      return builder
  try:
    # Reads what the files say of themselves: no code of the data set, which may need TensorFlow.
    return read_only_builder.builder_from_files(dataset, data_dir=root)
  except ValueError as error:
    raise UsageError(_explain_missing(dataset, root)) from error


def _is_prepared(builder: Any) -> bool:
  return (epath.Path(builder.data_dir) / tfds_constants.DATASET_INFO_FILENAME).exists()


def _prepare(builder: Any) -> None:
  """Writes the embedded data set; TFDS does it aside and renames at the end."""
  print(f"making {builder.info.full_name} in {builder.data_dir}, this once", file=sys.stderr)
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()  # it would fill a log file
  try:
    # TFDS talks of a download, on stdout, which belongs to the caller.
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
      )
  except OSError as error:
    # Of several processes that prepare at once, one renames; the others find its files there.
    if not _is_prepared(builder):
      raise UsageError(
        f"cannot write data set {builder.info.full_name} to {builder.data_dir}: {error}; "
        "choose another directory with --config.data.data_dir=DIR"
      ) from error
  if not _is_prepared(builder):
    raise UsageError(f"{builder.data_dir} holds no whole data set: delete it and run this again")


def _explain_missing(dataset: str, root: str) -> str:
  """Says in one line why a data set cannot be opened and what to do."""
  name = re.split("[/:]", dataset)[0]
  elsewhere = "or name the directory that holds it with --config.data.data_dir=DIR"
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
  return (
    f"data set {dataset!r} is not prepared: looked in {directory}; prepare it with `tfds build "
    f"{dataset} --file_format=array_record --data_dir={root}` (which needs TensorFlow), {elsewhere}"
  )
