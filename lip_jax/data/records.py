"""Serialised TFDS examples: read without TensorFlow, and without decoding their images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from lip_jax.data import tfrecord
from lip_jax.data.prepare import array_record_writer
from lip_jax.data.preprocess import CorruptImage
from lip_jax.errors import UsageError

# Features that say which image it is, in the data sets that have one.
_ID_FEATURES = ("id", "file_name", "image/filename")


class Parser(Protocol):
  """What a task wants of a data set's records: serialised example -> example.

  Attributes:
    class_names: of the data set, in the order of its labels.
  """

  class_names: list[str]

  def __call__(self, record: bytes) -> dict[str, Any]:
    """Raises `CorruptImage` if the record is no such example."""


class ImageLabelParser:
  """For classification: "image", encoded, bytes; "label", int; and "id", str, where there is one.

  Args:
    any_label: also give out labels that are of no class, for who looks for them.

  Raises:
    UsageError: the data set has no images with labels, or not as many names as classes. When
      called: the label is that of no class.
  """

  def __init__(self, features: Mapping[str, Any], dataset: str, *, any_label: bool = False):
    label = features.get("label")
    if not isinstance(label, tfds.features.ClassLabel) or "image" not in features:
      raise UsageError(
        f"data set {dataset!r} has the features {', '.join(sorted(features))}; "
        "classification needs 'image' and a class 'label'"
      )
    self.class_names: list[str] = label.names
    if len(self.class_names) != label.num_classes:
      raise UsageError(
        f"data set {dataset!r} has {label.num_classes} classes and {len(self.class_names)} names "
        "in label.labels.txt, one a line without blank ones: labels would be those of other "
        "classes; write that file anew, or prepare the data set again"
      )
    self._dataset, self._any_label = dataset, any_label
    self._id = find_id(features)

  def __call__(self, record: bytes) -> dict[str, Any]:
    result = parse_example(record, self._get)
    if not (0 <= result["label"] < len(self.class_names) or self._any_label):
      what = "none" if result["label"] == -1 else f"beyond the {len(self.class_names)} classes"
      raise UsageError(
        f"data set {self._dataset!r}: label {result['label']} of {result.get('id', 'an image')} is "
        f"{what}; `lip-jax data verify` lists such images: prepare them again, or take a split "
        "that has labels"
      )
    return result

  def _get(self, feature: Mapping[str, Any]) -> dict[str, Any]:
    result = {
      "image": feature["image"].bytes_list.value[0],
      "label": feature["label"].int64_list.value[0],
    }
    if self._id is not None:
      result["id"] = feature[self._id].bytes_list.value[0].decode()
    return result


def find_id(features: Mapping[str, Any]) -> str | None:
  """The feature that says which image it is."""
  texts = (key for key in _ID_FEATURES if isinstance(features.get(key), tfds.features.Text))
  return next(texts, None)


def parse_example(
  record: bytes, get: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
  """What `get` takes out of the features of a serialised example.

  Raises:
    CorruptImage: the record is no such example.
  """
  try:
    # What TFDS's own deserialize_example_np gives for these features, in a fifth of its time.
    return get(tf_example_pb2.Example.FromString(record).features.feature)
  except Exception as error:  # protobuf and Python each have their own
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise CorruptImage(f"the record is no example ({reason}; {len(record)} bytes)") from error


def read_file(path: str, file_format: str) -> Iterator[bytes]:
  """Yields the records of an "array_record" or "tfrecord" file in order.

  Raises:
    CorruptFile, RuntimeError: the file is damaged, or an empty ArrayRecord file.
    OSError: there is no such file.
  """
  read = {"array_record": array_record_writer.read_records, "tfrecord": tfrecord.read_records}
  return read[file_format](path)


class ParsedRecords(Sequence[dict[str, Any]]):
  """The examples that records hold, parsed when they are asked for."""

  def __init__(self, records: Sequence[bytes], parse: Parser, directory: str):
    """`directory`: where the records are, for errors."""
    self._records = records
    self._parse = parse
    self._directory = directory

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index):
    reason = "it is empty"
    try:
      record = self._records[index]
    except RuntimeError as error:  # ArrayRecord's, which does not name the file
      record, reason = b"", str(error).splitlines()[0]
    if not record:  # ArrayRecord's reader also gives these, for a file that is cut short
      raise UsageError(
        f"cannot read image {index} ({reason}): files in {self._directory} are damaged; "
        "`lip-jax data verify` says which"
      )
    return self._parse(record)
