"""Tiny data sets on disk: ImageNet's two tar files, an image folder, TFRecord files."""

import io
import json
import tarfile

import numpy as np
import simplejpeg
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorboardX.record_writer import RecordWriter

SYNSETS = ["n02", "n00", "n01"]  # not sorted: labels follow this order
VALIDATION_LABELS = ["n00", "n02", "n02", "n01", "n00"]


def jpeg(k, height=20, width=26):
  pixels = np.random.default_rng(k).integers(0, 256, (height, width, 3), np.uint8)
  return simplejpeg.encode_jpeg(pixels)


def tar_bytes(members):
  data = io.BytesIO()
  with tarfile.open(fileobj=data, mode="w") as tar:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return data.getvalue()


def train_images(per_class=10, **size):
  return {
    synset: {f"{synset}_{k}.JPEG": jpeg(100 * label + k, **size) for k in range(per_class)}
    for label, synset in enumerate(SYNSETS)
  }


def write_tars(folder, train=None, **size):
  """Both tar files, nested and flat as ImageNet's are; returns their paths."""
  train = train_images(**size) if train is None else train
  classes = [(f"{name}.tar", tar_bytes(train[name].items())) for name in sorted(train)]
  (folder / "train.tar").write_bytes(tar_bytes(classes))
  # Out of order, as they are in the tar file of the validation images.
  numbers = [3, 1, 5, 2, 4]
  images = [(f"ILSVRC2012_val_{k:08d}.JPEG", jpeg(1000 + k, **size)) for k in numbers]
  (folder / "val.tar").write_bytes(tar_bytes(images))
  return folder / "train.tar", folder / "val.tar"


def write_folder(folder, splits=("train", "validation"), per_class=4, **size):
  for split in splits:
    for label, name in enumerate(("bird", "cat", "dog")):
      (folder / split / name).mkdir(parents=True)
      for k in range(per_class):
        (folder / split / name / f"{k}.jpg").write_bytes(jpeg(10 * label + k, **size))
  return folder


def to_tfrecord(directory):
  """Turns a prepared data set from ArrayRecord into TFRecord, the format that TFDS has by default.

  TensorBoard's writer knows the format independently of our reader.
  """
  for path in directory.glob("*.array_record-*"):
    writer = RecordWriter(str(path).replace("array_record", "tfrecord"))
    source = ArrayRecordDataSource(str(path))
    for k in range(len(source)):
      writer.write(source[k])
    writer.close()
    path.unlink()
  info = directory / "dataset_info.json"
  values = json.loads(info.read_text())
  values["fileFormat"] = "tfrecord"
  info.write_text(json.dumps(values))
