"""ImageNet (ILSVRC 2012): its numbers and its labels."""

from collections.abc import Sequence

import tensorflow_datasets as tfds

NAME = "imagenet2012"
VERSION = "5.1.0"  # of the TFDS data set whose names, labels and order these are
COUNTS = {"train": 1_281_167, "validation": 50_000}


def synsets() -> list[str]:
  """The 1,000 class names, such as "n01440764", in the order of TFDS's labels."""
  return _lines("labels.txt")


def class_names() -> list[str]:
  """Names for people, such as "tench, Tinca tinca", in the order of the labels; all different."""
  # TFDS keeps them with a data set of another kind, whose labels are a part of ImageNet's.
  from tensorflow_datasets.datasets.siscore import labels

  return list(labels.IMAGENET_LABELS_LIST)


def readable(names: Sequence[str]) -> list[str]:
  """`names` with names for people in place of synsets, if these are ImageNet's; else as given."""
  by_synset = dict(zip(synsets(), class_names(), strict=True))
  return [by_synset[name] for name in names] if set(names) <= set(by_synset) else list(names)


def validation_labels() -> list[str]:
  """The class names of the 50,000 validation images, in the order of the images' numbers."""
  return _lines("validation_labels.txt")


def _lines(name: str) -> list[str]:
  path = tfds.core.tfds_path(f"datasets/imagenet2012/{name}")
  return path.read_text(encoding="utf-8").split()
