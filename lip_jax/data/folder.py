"""Image folders: DIR/SPLIT/CLASS/IMAGE, such as DIR/train/n01440764/n01440764_10026.JPEG."""

import hashlib
import os
import random
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from lip_jax.data import disk
from lip_jax.data.preprocess import CorruptImage
from lip_jax.errors import UsageError, printable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

_LAYOUT = "expected DIR/train/CLASS/IMAGE.jpg and the same in DIR/validation"
# Splits that every folder may have, and whose classes have to be those of the training split.
_USUAL = ("train", "validation")
# What systems, archives and storage servers leave in folders, in lower case.
_SYSTEM = frozenset(
  ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "lost+found", "$recycle.bin")
  + ("system volume information", "@eadir", "#recycle", "#snapshot", "@recycle", "@__thumb")
)


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

  Hidden files, and what operating systems and archives leave, are passed over.

  Attributes:
    directory: the folder.
    class_names: names of the class folders of the training split, sorted; labels are indices into
      it.
    splits: name of a split -> its folder. "val" is called "validation". Beside the usual ones and
      those that are asked for, what has some of the same classes is a split.
    others: further folders, which are left alone.
    passed_over: hidden and system files and folders that were met so far.
  """

  def __init__(self, directory: str, *asked: str):
    """Looks for splits and classes.

    Args:
      asked: splits that are used, such as "train[:90%]", of which the first that is there is that
        for training, and says what the classes are; "train" by default.

    Raises:
      UsageError: there is no such folder, none of classes in folders of splits, or two that are
        called validation.
    """
    if "://" in directory:
      raise UsageError(
        f"image folder {directory!r} is not on a disk; copy it to one, or make an ArrayRecord data "
        "set of it with `lip-jax data prepare folder`"
      )
    self.directory = disk.absolute(directory)
    self.passed_over: set[str] = set()
    if not os.path.isdir(self.directory):
      raise UsageError(f"there is no folder {directory!r}; {_LAYOUT}")
    folders = sorted(self._subfolders(""))
    classes = {name: set(self._subfolders(name, quiet=True)) for name in folders}
    self._flat = [name for name in folders if not classes[name] and self._has_images(name)]
    found = {name: name for name in folders if classes[name]}
    if {"val", "validation"} <= set(found):
      raise UsageError(
        f"folder {directory!r} has both val and validation, which name the same split; rename one "
        "of them, or move it elsewhere"
      )
    if "val" in found:
      found["validation"] = found.pop("val")
    named = [[part for part in self.parts(split) if part in found] for split in (*asked, *_USUAL)]
    training = next(filter(None, named), list(found))
    self.class_names = sorted(set().union(*(classes[found[name]] for name in training)))
    if not self.class_names:
      raise UsageError(
        f"folder {directory!r} has no class folders in folders of splits{self._flatness()}; "
        f"{_LAYOUT}"
      )
    self._training = " and ".join(training)
    self.splits = {
      name: folder
      for name, folder in found.items()
      if name in sum(named, training) or classes[folder] & set(self.class_names)
    }
    self.others = sorted(set(found) - set(self.splits))
    self._images: dict[str, FolderImages] = {}

  @staticmethod
  def parts(split: str) -> list[str]:
    """Names of the splits in an expression such as "train[:90%]+val", val as validation."""
    names = (re.split(r"\[", part)[0].strip() for part in split.split("+"))
    return ["validation" if name == "val" else name for name in names]

  def missing(self, split: str) -> str | None:
    """What is there instead of a split, and what to do; None if it is there."""
    lost = [name for name in self.parts(split) if name not in self.splits]
    if not lost:
      return None
    there = ", ".join([*self.splits, *self.others])
    return (
      f"no split {lost[0]!r}; it has {there}{self._flatness()}. Rename a folder, or name the split "
      "that is meant (config.data.train_split, config.data.validation_split, --split), which may "
      "be a part of one, such as train[90%:]"
    )

  def faults(self) -> list[str]:
    """Usual splits that are missing where another folder may be meant."""
    lost = filter(None, map(self.missing, _USUAL))
    return list(lost) if self._flat or set(self.splits) - {*_USUAL, "test"} else []

  def _flatness(self) -> str:
    if not self._flat:
      return ""
    names = first_few(self._flat)
    return f"; {names} has images that are in no class folder: move them to SPLIT/CLASS/"

  def notes(self) -> list[str]:
    """What of the folder was not read, for people, after its images were listed."""
    found = []
    if self.passed_over:
      names = first_few(sorted(self.passed_over))
      found.append(f"{len(self.passed_over):,} hidden or system files were passed over: {names}")
    if self._flat:
      found.append(self._flatness().removeprefix("; "))
    if self.others:
      found.append(f"folders that are no splits were left alone: {first_few(self.others)}")
    return found

  def images(self, split: str) -> FolderImages:
    """Lists the images of a split.

    Raises:
      UsageError: a class folder is empty or of no class, or files are not images.
    """
    if split not in self._images:
      self._images[split] = self._list(self.splits[split])
    return self._images[split]

  def identity(self, splits: Iterable[str]) -> str:
    """What the folder holds, wherever it lies: numbers, and a digest of the names."""
    digest = hashlib.sha256()
    parts = [self.images(split) for split in splits]
    for names in (self.class_names, *(part.names for part in parts)):
      digest.update("\n".join([*names, "\n"]).encode())
    return (
      f"image folder of {sum(map(len, parts))} images in {len(self.class_names)} classes, names "
      f"{digest.hexdigest()[:16]}"
    )

  def _list(self, split: str) -> FolderImages:
    labels = {name: label for label, name in enumerate(self.class_names)}
    strange = [f"{split}/{name}" for name, is_folder, _ in self._entries(split) if not is_folder]
    files: list[tuple[str, int, int]] = []
    empty, unknown = [], []
    for class_name in sorted(self._subfolders(split)):
      count, folder = len(files), f"{split}/{class_name}"
      if class_name not in labels:
        unknown.append(class_name)
        continue
      for name, is_folder, size in sorted(self._entries(folder, sizes=True)):
        if is_folder or not name.lower().endswith(EXTENSIONS):
          strange.append(f"{folder}/{name}")
        else:
          files.append((f"{class_name}/{name}", labels[class_name], size))
      if len(files) == count:
        empty.append(folder)
    where = f"folder {self.directory}"
    if unknown:
      raise UsageError(
        f"{where}: {split} has classes that {self._training} does not have: {first_few(unknown)}; "
        "name them alike, or move these elsewhere"
      )
    if strange:
      raise UsageError(
        f"{where} holds what is not an image: {first_few(strange)}; expected "
        f"{split}/CLASS/IMAGE with a name in {', '.join(EXTENSIONS)}; move the rest elsewhere"
      )
    if empty:
      raise UsageError(
        f"{where} has classes without images: {first_few(empty)}; add images to them or delete them"
      )
    return FolderImages(self.directory, split, files)

  def _entries(
    self, folder: str, *, sizes: bool = False, quiet: bool = False
  ) -> list[tuple[str, bool, int]]:
    """Name, whether it is a folder, and bytes, of everything in it that is not passed over.

    `quiet`: do not note what is.
    """
    found = []
    try:
      with os.scandir(os.path.join(self.directory, folder)) as entries:
        for entry in entries:
          if entry.name.startswith(".") or entry.name.lower() in _SYSTEM:
            if not quiet:
              self.passed_over.add(os.path.join(folder, entry.name))
            continue
          if not disk.is_utf8(entry.name):
            raise UsageError(
              f"the name of {printable(entry.path)} is not UTF-8; rename it, for example with "
              "`convmv -f latin1 -t utf8 --notest`"
            )
          # A link that leads nowhere has no size of its own; reading it says what is wrong.
          size = os.path.getsize(entry) if sizes and os.path.exists(entry) else 0
          # Nor one that leads in a circle, which `is_dir` of the entry would raise for.
          is_folder = os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()
          found.append((entry.name, is_folder, size))
    except OSError as error:
      raise UsageError(
        f"cannot read folder {error.filename}: {error.strerror}; let this user read it "
        "(chmod a+rX), or move it elsewhere"
      ) from error
    return found

  def _subfolders(self, folder: str, *, quiet: bool = False) -> list[str]:
    return [name for name, is_folder, _ in self._entries(folder, quiet=quiet) if is_folder]

  def _has_images(self, folder: str) -> bool:
    return any(name.lower().endswith(EXTENSIONS) for name, *_ in self._entries(folder, quiet=True))


def first_few(names: Iterable[str]) -> str:
  """The first few names, for people, and how many more there are."""
  names = list(map(printable, names))
  text = ", ".join(names[:5])
  return text if len(names) <= 5 else f"{text} and {len(names) - 5:,} more"
