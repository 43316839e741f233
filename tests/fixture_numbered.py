"""A data set whose image k has label k, so that a label says which image it is."""

import itertools
import pathlib

import numpy as np
import simplejpeg
import tensorflow_datasets as tfds

from lip_jax.data import tfrecord
from lip_jax.data.records import ImageLabelParser, ParsedRecords
from lip_jax.data.source import Source
from lip_jax.data.tfrecord_index import FilePart, TFRecordFiles


def jpeg(k, height=12, width=16):
  pixels = np.random.default_rng(k).integers(0, 256, (height, width, 3), np.uint8)
  return simplejpeg.encode_jpeg(pixels)


def features(count):
  return tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
      "label": tfds.features.ClassLabel(num_classes=count),
      "file_name": tfds.features.Text(),
    }
  )


def write(folder, lengths, images=None):
  """Writes TFRecord files of these lengths.

  `images`: encoded, by number; the others are random.
  """
  # Here, because the processes of the tests only read.
  from tensorboardX.record_writer import RecordWriter
  from tensorflow_datasets.core import example_serializer

  images = images or {}
  info = features(sum(lengths))
  serializer = example_serializer.ExampleSerializer(info.get_serialized_info())
  numbers = itertools.count()
  for shard, length in enumerate(lengths):
    # TensorBoard's writer knows the format independently of our reader.
    writer = RecordWriter(str(folder / f"numbered.tfrecord-{shard:05d}-{length}"))
    for k in itertools.islice(numbers, length):
      image = images[k] if k in images else jpeg(k)
      example = {"image": image, "label": k, "file_name": f"{k}.JPEG"}
      writer.write(serializer.serialize_example(info.encode_example(example)))
    writer.close()


def files(folder):
  paths = sorted(pathlib.Path(folder).glob("numbered.tfrecord-*"))
  return [FilePart(str(path), 0, int(path.name.rpartition("-")[2])) for path in paths]


def open_records(folder, records):
  parse = ImageLabelParser(dict(features(len(records))), "numbered")
  examples = ParsedRecords(records, parse, str(folder))
  return Source("numbered train", str(folder), examples, parse.class_names)


def open_tfrecord(folder):
  return open_records(folder, TFRecordFiles(files(folder)))


def open_memory(folder):
  """The same images, read in order into memory, without an index."""
  return open_records(
    folder, [record for file in files(folder) for record in tfrecord.read_records(file.path)]
  )
