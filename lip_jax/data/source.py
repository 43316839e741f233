"""Data sets on disk: the examples of one split, read at random."""

import bisect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tensorflow_datasets.core import decode as tfds_decode

from lip_jax.data import disk, fake, imagenet, splits
from lip_jax.data.builder import open_builder, record_format
from lip_jax.data.folder import ImageFolder
from lip_jax.data.prepare import array_record_writer
from lip_jax.data.preprocess import CorruptImage
from lip_jax.data.records import ImageLabelParser, ParsedRecords, Parser
from lip_jax.data.tfrecord_index import FilePart, TFRecordFiles
from lip_jax.errors import UsageError

_FAKE = "fake"


class Source:
  """A split of a prepared data set: its examples, by their indices.

  An example is a dict with "image", the encoded image, bytes; what the task knows of it, such as
  "label", int; and "id", str, where the data set has one.

  Attributes:
    name: data set and split, such as "cluttered_digits/classify train".
    directory: where the files are.
    class_names: in the order of the labels.
    remedy: what to do about unreadable images, a sentence.
    identity: by which a run knows it again, wherever it lies.
    upright: whether images are to be turned as their EXIF orientation says.
  """

  def __init__(
    self,
    name: str,
    directory: str,
    examples: Sequence[dict[str, Any]],
    class_names: list[str],
    *,
    remedy: str | None = None,
    identity: str | None = None,
    upright: bool = False,
  ):
    self.name = name
    self.identity = identity or name
    self.upright = upright
    self.directory = directory
    self.class_names = class_names
    self.remedy = remedy or (
      f"The files in {directory} are damaged: delete them and prepare them again"
    )
    self._examples = examples

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Reads the example `index`, from 0 to len(self) - 1.

    Raises:
      CorruptImage: it cannot be used.
      UsageError: its file is damaged.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"{self.name} has {len(self)} images, not an image {index}")
    return self._examples[index]

  def describe(self, index: int) -> str:
    """Names an image, to a person who has to find it."""
    name = f"{self.name} image {index}"
    try:
      example = self[index]
    except CorruptImage:  # so damaged that it does not say its name
      return name
    return f"{name} ({example['id']})" if "id" in example else name


def open_split(
  dataset: str,
  split: str,
  data_dir: str | None,
  *,
  prepare: bool = True,
  parser: Callable[[Mapping[str, Any], str], Parser] = ImageLabelParser,
  train_split: str = "train",
) -> Source:
  """Opens a split of a data set.

  Args:
    dataset: TFDS name, such as "imagenet2012" or "cluttered_digits/classify", of files in
      ArrayRecord or TFRecord format; "folder:DIR" for images in DIR/train/CLASS and DIR/validation
      (or val); "fake", or "fake:N" for N images a split, for 500x375 JPEGs out of memory, with
      ImageNet's numbers of images unless given.
    split: TFDS split, such as "train", "validation" or "train[:10%]".
    data_dir: directory that holds the data sets; None is $TFDS_DATA_DIR or ~/tensorflow_datasets.
      Not used for "folder:" and "fake".
    prepare: whether to make the embedded data set (`cluttered_digits`) if it is not there yet, and
      the index of TFRecord files, which else is made when the first example is read.
    parser: makes, of (TFDS features, name of the data set), what reads the records; raises
      UsageError if the features are not those that it needs.
    train_split: of an image folder: says what the classes are, if it is there.

  Raises:
    UsageError: there is no such data set, configuration, split or folder, it is not prepared, or
      neither as ArrayRecord nor as TFRecord, files are missing or damaged, or it has no images with
      labels.
  """
  if dataset.startswith(disk.FOLDER):
    return _open_folder(dataset, split, train_split)
  if is_fake(dataset):
    return _open_fake(dataset, split)
  found = open_records(dataset, split, data_dir, parser, prepare=prepare)
  names = found.parse.class_names
  # A copy of an image folder shows the same images as the folder.
  upright = array_record_writer.made_from(found.directory) == "image folder"
  return Source(f"{dataset} {split}", found.directory, found.examples, names, upright=upright)


def is_fake(dataset: str) -> bool:
  """Whether a name is that of images out of memory."""
  return dataset == _FAKE or dataset.startswith(f"{_FAKE}:")


class Records(NamedTuple):
  """The records of a split of a TFDS data set."""

  directory: str
  file_format: str
  parts: list[FilePart]
  parse: Any
  examples: ParsedRecords


def open_records(
  dataset: str,
  split: str,
  data_dir: str | None,
  parser: Callable[[Mapping[str, Any], str], Parser],
  *,
  prepare: bool,
) -> Records:
  """Opens a split of a TFDS data set, as `open_split` does."""
  builder = open_builder(dataset, data_dir, prepare=prepare)
  parse = parser(dict(builder.info.features), dataset)
  directory = str(builder.data_dir)
  file_format = record_format(builder)
  parts = splits.select(builder.info.splits, dataset, split)
  splits.check_files(parts, directory)
  records: Any
  if file_format == "tfrecord":
    records = TFRecordFiles(parts)
    if prepare:
      records.open()
  else:
    records = builder.as_data_source(
      split, deserialize_method=tfds_decode.DeserializeMethod.RAW_BYTES, file_format=file_format
    )
  return Records(directory, file_format, parts, parse, ParsedRecords(records, parse, directory))


def _open_folder(dataset: str, split: str, train_split: str) -> Source:
  folder = ImageFolder(dataset.removeprefix(disk.FOLDER), train_split, split)
  if lost := folder.missing(split):
    raise UsageError(f"data set {dataset!r} has {lost}")
  split = re.sub(r"\bval\b", "validation", split) if "validation" in folder.splits else split
  # Listing a million files takes seconds: only of the splits that are named.
  images = {name: folder.images(name) for name in folder.parts(split)}
  lengths = {name: len(images.get(name, ())) for name in folder.splits}
  parts = splits.select_indices(lengths, dataset, split)
  return Source(
    f"{dataset} {split}",
    folder.directory,
    Joined([(images[name], indices) for name, indices in parts]),
    folder.class_names,
    remedy=f"Replace these images in {folder.directory}, or take them out",
    identity=f"{folder.identity(images)}: {split}",
    upright=True,
  )


def _open_fake(dataset: str, split: str) -> Source:
  _, _, count = dataset.partition(":")
  lengths = imagenet.COUNTS
  if count or dataset != _FAKE:
    if not count.isdecimal() or int(count) == 0:
      raise UsageError(f"data set {dataset!r}: expected fake, or fake:N with N images a split")
    lengths = dict.fromkeys(lengths, int(count))
  parts = splits.select_indices(lengths, dataset, split)
  examples = Joined([(fake.FakeImages(name, lengths[name]), indices) for name, indices in parts])
  names = [str(label) for label in range(fake.NUM_CLASSES)]
  return Source(f"{dataset} {split}", "memory", examples, names)


class Joined(Sequence[dict[str, Any]]):
  """Parts of several splits, one after the other: those examples whose indices are in the range."""

  def __init__(self, parts: Sequence[tuple[Any, Sequence[int]]]):
    self._parts = parts
    self._ends = list(itertools.accumulate(len(indices) for _, indices in parts))

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index):
    part = bisect.bisect_right(self._ends, index)
    examples, indices = self._parts[part]
    return examples[indices[index - self._ends[part]]]
