"""Data sets on disk: the encoded images and labels of one split.

`open_split` gives a `Source` (random access) for ArrayRecord files, image folders and fake data,
and a `RecordStream` for TFRecord files, whose records can only be read in order.
"""

import bisect
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import decode as tfds_decode
from tensorflow_datasets.proto import tf_example_pb2

from lip_jax.data import fake, imagenet
from lip_jax.data.builder import open_builder, record_format
from lip_jax.data.folder import ImageFolder
from lip_jax.data.preprocess import CorruptImage
from lip_jax.errors import UsageError

# Features that say which image it is, in the data sets that have one.
_ID_FEATURES = ("id", "file_name", "image/filename")

_FOLDER = "folder:"
_FAKE = "fake"


class Shard(NamedTuple):
  """Records of one file: those from `skip` to `skip` + `take`."""

  path: str
  skip: int
  take: int


class RecordParser:
  """Reads serialised TFDS examples, without TensorFlow and without decoding their images.

  Attributes:
    num_classes: number of labels.
    class_names: their names, in the order of the labels.
    has_id: whether examples say which image they are.
  """

  def __init__(self, features: Mapping[str, Any]):
    """`features`: the TFDS features that the examples were written with."""
    self.num_classes: int = features["label"].num_classes
    self.class_names: list[str] = features["label"].names
    texts = (key for key in _ID_FEATURES if isinstance(features.get(key), tfds.features.Text))
    self._id = next(texts, None)
    self.has_id = self._id is not None

  def __call__(self, record: bytes) -> dict[str, Any]:
    """Returns "image": bytes, "label": int, and "id": str if there is one.

    Raises:
      CorruptImage: the record is no such example.
    """
    try:
      # What TFDS's own deserialize_example_np gives for these features, in a fifth of its time.
      feature = tf_example_pb2.Example.FromString(record).features.feature
      result = {
        "image": feature["image"].bytes_list.value[0],
        "label": feature["label"].int64_list.value[0],
      }
      if self._id is not None:
        result["id"] = feature[self._id].bytes_list.value[0].decode()
    except Exception as error:  # protobuf and Python each have their own
      reason = str(error).splitlines()[0] if str(error) else type(error).__name__
      raise CorruptImage(f"the record is no example ({reason}; {len(record)} bytes)") from error
    return result


class Source:
  """A split of a prepared data set: random access to encoded images and labels.

  Attributes:
    random_access: True.
    name: data set and split, such as "cluttered_digits/classify train".
    directory: where the files are.
    num_classes: number of labels.
    class_names: their names, in the order of the labels.
  """

  random_access: ClassVar[bool] = True

  def __init__(self, name: str, directory: str, records: Sequence[bytes], features: dict[str, Any]):
    """Wraps serialised records; `features` are the TFDS features that they were written with."""
    self.parse = RecordParser(features)
    self._set(name, directory, self.parse.class_names, self.parse.has_id)
    self._records = records

  def _set(self, name: str, directory: str, class_names: list[str], has_id: bool) -> None:
    self.name = name
    self.directory = directory
    self.num_classes = len(class_names)
    self.class_names = class_names
    self._has_id = has_id

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
    return self._read(index)

  def _read(self, index: int) -> dict[str, Any]:
    reason = "it is empty"
    try:
      record = self._records[index]
    except RuntimeError as error:  # ArrayRecord's, which does not name the file
      record, reason = b"", str(error).splitlines()[0]
    if not record:  # ArrayRecord's reader also gives these, for a file that is cut short
      raise UsageError(
        f"cannot read image {index} of {self.name} ({reason}): files in {self.directory} are "
        "damaged; `lip-jax data verify` says which"
      )
    return self.parse(record)

  def describe(self, index: int) -> str:
    """Names an image, to a person who has to find it."""
    name = f"{self.name} image {index}"
    return f"{name} ({self[index]['id']})" if self._has_id else name

  @property
  def remedy(self) -> str:
    """What to do about unreadable images, a sentence."""
    return _remedy(self.directory)


class Examples(Protocol):
  """Examples of `Source` by their indices."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class ExampleSource(Source):
  """A split that holds no serialised records: of an image folder, or generated."""

  def __init__(
    self,
    name: str,
    directory: str,
    parts: Sequence[tuple[Examples, range]],
    class_names: list[str],
  ):
    """Joins parts: those of the examples whose indices are in the range."""
    self._set(name, directory, class_names, has_id=True)
    self._parts = parts
    self._ends = list(itertools.accumulate(len(indices) for _, indices in parts))

  def __len__(self) -> int:
    return self._ends[-1]

  @property
  def remedy(self) -> str:
    return f"Replace these images in {self.directory}, or take them out"

  def _read(self, index: int) -> dict[str, Any]:
    part = bisect.bisect_right(self._ends, index)
    examples, indices = self._parts[part]
    return examples[indices[index - self._ends[part]]]


class RecordStream:
  """A split of a data set in TFRecord files, which are read in order, each from its start.

  Attributes:
    random_access: False.
    name: data set and split, such as "imagenet2012 train[:99%]".
    directory: where the files are.
    num_classes: number of labels.
    class_names: their names, in the order of the labels.
    files: paths of the files, in order.
    shard_lengths: number of examples that the split has of each file.
    parse: serialised example -> "image": encoded, bytes; "label": int; "id": str, if there is one.
      Raises `CorruptImage`.
  """

  random_access: ClassVar[bool] = False

  def __init__(self, name: str, directory: str, shards: Sequence[Shard], features: dict[str, Any]):
    """Wraps files; `features` are the TFDS features that their records were written with."""
    self.name = name
    self.directory = directory
    self.parse = RecordParser(features)
    self.num_classes = self.parse.num_classes
    self.class_names = self.parse.class_names
    self._shards = tuple(shards)

  def shards(self) -> list[Shard]:
    """Which records of which files make up the split."""
    return list(self._shards)

  @property
  def files(self) -> tuple[str, ...]:
    return tuple(shard.path for shard in self._shards)

  @property
  def shard_lengths(self) -> tuple[int, ...]:
    return tuple(shard.take for shard in self._shards)

  def __len__(self) -> int:
    return sum(self.shard_lengths)

  @property
  def remedy(self) -> str:
    """What to do about unreadable images, a sentence."""
    return _remedy(self.directory)


def _remedy(directory: str) -> str:
  return f"The files in {directory} are damaged: delete them and prepare them again"


def open_split(
  dataset: str, split: str, data_dir: str | None, *, prepare: bool = True
) -> Source | RecordStream:
  """Opens a split of a data set.

  Args:
    dataset: TFDS name, such as "imagenet2012" or "cluttered_digits/classify", of files in
      ArrayRecord or TFRecord format; "folder:DIR" for images in DIR/train/CLASS and DIR/validation
      (or val); "fake", or "fake:N" for N images a split, for 500x375 JPEGs out of memory, with
      ImageNet's numbers of images unless given.
    split: TFDS split, such as "train", "validation" or "train[:10%]".
    data_dir: directory that holds the data sets; None is $TFDS_DATA_DIR or ~/tensorflow_datasets.
      Not used for "folder:" and "fake".
    prepare: whether to make the embedded data set (`cluttered_digits`) if it is not there yet.

  Returns:
    A `Source`, or a `RecordStream` for TFRecord files.

  Raises:
    UsageError: there is no such data set, configuration, split or folder, it is not prepared, or
      neither as ArrayRecord nor as TFRecord, files are missing, or it has no images with labels.
  """
  if dataset.startswith(_FOLDER):
    return _open_folder(dataset, split)
  if dataset == _FAKE or dataset.startswith(f"{_FAKE}:"):
    return _open_fake(dataset, split)
  builder = open_builder(dataset, data_dir, prepare=prepare)
  features = dict(builder.info.features)
  if not isinstance(features.get("label"), tfds.features.ClassLabel) or "image" not in features:
    raise UsageError(
      f"data set {dataset!r} has the features {', '.join(sorted(features))}; "
      "classification needs 'image' and a class 'label'"
    )
  name, directory = f"{dataset} {split}", str(builder.data_dir)
  if record_format(builder) == "tfrecord":
    instructions = _select(builder.info.splits, dataset, split)
    _check_files(instructions, directory)
    return RecordStream(name, directory, instructions, features)
  _check_files(_select(builder.info.splits, dataset, split), directory)
  records = builder.as_data_source(
    split, deserialize_method=tfds_decode.DeserializeMethod.RAW_BYTES, file_format="array_record"
  )
  return Source(name, directory, records, features)


def _open_folder(dataset: str, split: str) -> Source:
  folder = ImageFolder(dataset.removeprefix(_FOLDER))
  split = re.sub(r"\bval\b", "validation", split) if "validation" in folder.splits else split
  # Listing a million files takes seconds: only of the splits that are named, or as it seems.
  named = [name for name in folder.splits if name in split] or list(folder.splits)
  images = {name: folder.images(name) for name in named}
  lengths = {name: len(images.get(name, ())) for name in folder.splits}
  slices = _slice(lengths, dataset, split)
  parts: list[tuple[Examples, range]] = [(images[name], indices) for name, indices in slices]
  return ExampleSource(f"{dataset} {split}", folder.directory, parts, folder.class_names)


def _open_fake(dataset: str, split: str) -> Source:
  _, _, count = dataset.partition(":")
  lengths = imagenet.COUNTS
  if count or dataset != _FAKE:
    if not count.isdecimal() or int(count) == 0:
      raise UsageError(f"data set {dataset!r}: expected fake, or fake:N with N images a split")
    lengths = dict.fromkeys(lengths, int(count))
  parts: list[tuple[Examples, range]] = [
    (fake.FakeImages(name, lengths[name]), indices)
    for name, indices in _slice(lengths, dataset, split)
  ]
  names = [str(label) for label in range(fake.NUM_CLASSES)]
  return ExampleSource(f"{dataset} {split}", "memory", parts, names)


def _slice(lengths: Mapping[str, int], dataset: str, split: str) -> list[tuple[str, range]]:
  """TFDS's arithmetic of splits: which indices of which split."""
  infos, by_file = [], {}
  for name, length in lengths.items():
    template = tfds.core.ShardedFileTemplate(
      data_dir="", dataset_name="images", split=name, filetype_suffix="all"
    )
    info = tfds.core.SplitInfo(name, [length], 0, template)
    infos.append(info)
    by_file[str(info.filepaths[0])] = name
  shards = _select(tfds.core.splits.SplitDict(infos), dataset, split)
  return [(by_file[shard.path], range(shard.skip, shard.skip + shard.take)) for shard in shards]


def _select(splits: Any, dataset: str, split: str) -> list[Shard]:
  """The records that a split consists of."""
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
  return [Shard(str(file.filename), file.skip, file.take) for file in instructions]


def _check_files(shards: Sequence[Shard], directory: str) -> None:
  """Raises UsageError if files are missing: at the start, not in the middle of an epoch."""
  present = {path.name for path in epath.Path(directory).iterdir()}
  missing = [shard.path for shard in shards if os.path.basename(shard.path) not in present]
  if missing:
    raise UsageError(
      f"{directory} lacks {len(missing)} of {len(shards)} files, the first is "
      f"{os.path.basename(missing[0])}; copy them again, or delete the directory and prepare the "
      "data set again"
    )
