"""Image folders: DIR/SPLIT/CLASS/IMAGE, such as DIR/train/n01440764/n01440764_10026.JPEG."""

import os
import random
from collections.abc import Iterable
from typing import Any

import numpy as np

from lip_jax.data.preprocess import CorruptImage
from lip_jax.errors import UsageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

_LAYOUT = "expected DIR/train/CLASS/IMAGE.jpg and the same in DIR/validation"


class FolderImages:
  """The images of one split: examples of `Source`, read when they are asked for.

  Their order is shuffled, in the way in which TFDS's `ImageFolder` does it, so that a part of the
  split has images of all classes; it depends on the names alone.

  Attributes:
    names: "CLASS/IMAGE", in that order.
    labels: int32 [n], index of the class.
    sizes: int64 [n], bytes of the files.
  """

  def __init__(self, folder: str, split: str, files: list[tuple[str, int, int]]):
    order = list(range(len(files)))
    random.Random(split).shuffle(order)
    self._folder = folder
    self._split = split
    self.names = [files[i][0] for i in order]
    self.labels = np.array([files[i][1] for i in order], np.int32)
    self.sizes = np.array([files[i][2] for i in order], np.int64)

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {
      "image": self.read(index),
      "label": int(self.labels[index]),
      "id": f"{self._split}/{self.names[index]}",
    }

  def read(self, index: int) -> bytes:
    """The encoded image.

    Raises:
      CorruptImage: the file cannot be read, or has gone.
    """
    try:
      with open(os.path.join(self._folder, self._split, self.names[index]), "rb") as file:
        return file.read()
    except OSError as error:
      raise CorruptImage(f"{error.strerror}") from error


class ImageFolder:
  """Splits and classes of a folder; a split's images are listed when it is first used.

  Attributes:
    directory: the folder.
    class_names: names of the class folders of all splits, sorted; labels are indices into it.
    splits: name of a split -> its folder. "val" is called "validation".
  """

  def __init__(self, directory: str):
    """Looks for splits and classes.

    Raises:
      UsageError: there is no such folder, or none of classes in folders of splits.
    """
    self.directory = os.path.abspath(os.path.expanduser(directory))
    if "://" in directory:
      raise UsageError(
        f"image folder {directory!r} is not on a disk; copy it to one, or make an ArrayRecord data "
        "set of it with `lip-jax data prepare folder`"
      )
    if not os.path.isdir(self.directory):
      raise UsageError(f"there is no folder {directory!r}; {_LAYOUT}")
    self.splits: dict[str, str] = {}
    classes: set[str] = set()
    for split in sorted(_subfolders(self.directory)):
      found = _subfolders(os.path.join(self.directory, split))
      if found:
        self.splits[split] = split
        classes.update(found)
    if "val" in self.splits and "validation" not in self.splits:
      self.splits["validation"] = self.splits.pop("val")
    if not classes:
      raise UsageError(f"folder {directory!r} has no class folders in folders of splits; {_LAYOUT}")
    self.class_names = sorted(classes)
    self._images: dict[str, FolderImages] = {}

  def images(self, split: str) -> FolderImages:
    """Lists the images of a split.

    Raises:
      UsageError: a class folder is empty, or files are not images.
    """
    if split not in self._images:
      self._images[split] = self._list(self.splits[split])
    return self._images[split]

  def _list(self, split: str) -> FolderImages:
    labels = {name: label for label, name in enumerate(self.class_names)}
    root = os.path.join(self.directory, split)
    strangers = [f"{split}/{name}" for name, is_folder, _ in _entries(root) if not is_folder]
    files: list[tuple[str, int, int]] = []
    empty = []
    for class_name in sorted(_subfolders(root)):
      count = len(files)
      entries = sorted(_entries(os.path.join(root, class_name), sizes=True))
      for name, is_folder, size in entries:
        if is_folder or not name.lower().endswith(EXTENSIONS):
          strangers.append(f"{split}/{class_name}/{name}")
        else:
          files.append((f"{class_name}/{name}", labels[class_name], size))
      if len(files) == count:
        empty.append(f"{split}/{class_name}")
    if strangers:
      raise UsageError(
        f"folder {self.directory} holds what is not an image: {first_few(strangers)}; expected "
        f"{split}/CLASS/IMAGE with a name in {', '.join(EXTENSIONS)}; move the rest elsewhere"
      )
    if empty:
      raise UsageError(
        f"folder {self.directory} has classes without images: {first_few(empty)}; add images to "
        "them or delete them"
      )
    return FolderImages(self.directory, split, files)


def _entries(folder: str, *, sizes: bool = False) -> list[tuple[str, bool, int]]:
  """Name, whether it is a folder, and bytes, of everything that is not hidden."""
  with os.scandir(folder) as entries:
    return [
      # A link that leads nowhere has no size of its own; reading it says what is wrong.
      (entry.name, entry.is_dir(), os.path.getsize(entry) if sizes and os.path.exists(entry) else 0)
      for entry in entries
      if not entry.name.startswith(".")
    ]


def _subfolders(folder: str) -> list[str]:
  return [name for name, is_folder, _ in _entries(folder) if is_folder]


def first_few(names: Iterable[str]) -> str:
  """The first few names, and how many more there are."""
  names = list(names)
  text = ", ".join(names[:5])
  return text if len(names) <= 5 else f"{text} and {len(names) - 5:,} more"
