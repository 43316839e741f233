"""The two tar files that ImageNet comes in: where each image lies in them."""

import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from lip_jax.errors import UsageError

_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


class TarImages:
  """Where the images of a split lie in a tar file, which is read at random, and is to be closed.

  Attributes:
    names: names of the files.
    labels: int32 [n].
    sizes: int64 [n], bytes.
  """

  def __init__(self, path: str, members: Sequence[tuple[str, int, int, int]]):
    """`members`: name, label, offset, size."""
    self.names = [member[0] for member in members]
    self.labels = np.array([member[1] for member in members], np.int32)
    self.sizes = np.array([member[3] for member in members], np.int64)
    self._offsets = np.array([member[2] for member in members], np.int64)
    self._path = path
    self._file = os.open(path, os.O_RDONLY)

  def read(self, index: int) -> bytes:
    """The encoded image; threads may call this at once."""
    size = int(self.sizes[index])
    data = os.pread(self._file, size, int(self._offsets[index]))
    if len(data) != size:
      raise UsageError(f"{self._path} ended within {self.names[index]}; it changed meanwhile")
    return data

  def __enter__(self) -> "TarImages":
    return self

  def __exit__(self, *_: object) -> None:
    os.close(self._file)


def index_train_tar(path: str | Path, class_names: Sequence[str]) -> TarImages:
  """Finds the images in a tar file that holds one tar file for each class.

  Reads only the headers, and unpacks nothing.

  Args:
    path: ILSVRC2012_img_train.tar.

  Raises:
    UsageError: there is no such file, it is damaged or something else, or classes are missing.
  """
  path = os.fspath(path)
  labels = {name: label for label, name in enumerate(class_names)}
  members: list[tuple[str, int, int, int]] = []
  found = set()
  with _open_tar(path) as file:
    outer = _members(file, path)
    for tar, member in tqdm(
      outer, desc="classes", total=len(class_names), unit=" tar", disable=None
    ):
      tar_name = os.path.basename(member.name)
      name = tar_name.removesuffix(".tar")
      if name == tar_name or name not in labels or name in found:
        raise UsageError(
          f"{path} holds {tar_name}; expected a tar file for each of {len(class_names)} classes, "
          f"such as {class_names[0]}.tar, as in ILSVRC2012_img_train.tar. If the images are "
          "unpacked, use `lip-jax data prepare folder`"
        )
      found.add(name)
      inner = tar.extractfile(member)
      assert inner is not None  # it is a file
      count = len(members)
      for _, image in _members(inner, f"{path}, {tar_name}"):
        offset = member.offset_data + image.offset_data
        members.append((os.path.basename(image.name), labels[name], offset, image.size))
      if len(members) == count:
        raise UsageError(f"{tar_name} in {path} is empty; copy {path} again")
  missing = [name for name in class_names if name not in found]
  if missing:
    raise UsageError(
      f"{path} lacks {len(missing)} of {len(class_names)} classes, the first is {missing[0]}; "
      "it is cut short: copy it again"
    )
  return TarImages(path, members)


def index_validation_tar(
  path: str | Path, image_labels: Sequence[str], class_names: Sequence[str]
) -> TarImages:
  """Finds the images in a flat tar file, and gives them their labels by their numbers.

  Args:
    path: ILSVRC2012_img_val.tar, with ILSVRC2012_val_00000001.JPEG and so on.
    image_labels: class names of the images 1, 2, ...

  Raises:
    UsageError: there is no such file, it is damaged or something else, or images are missing.
  """
  path = os.fspath(path)
  labels = {name: label for label, name in enumerate(class_names)}
  members: dict[int, tuple[str, int, int, int]] = {}
  with _open_tar(path) as file:
    for _, member in _members(file, path):
      name = os.path.basename(member.name)
      match = _VALIDATION_NAME.fullmatch(name)
      number = int(match[1]) if match else 0
      if not 1 <= number <= len(image_labels) or number in members:
        raise UsageError(
          f"{path} holds {name}; expected ILSVRC2012_val_00000001.JPEG to "
          f"ILSVRC2012_val_{len(image_labels):08d}.JPEG, each once, as in ILSVRC2012_img_val.tar"
        )
      members[number] = (name, labels[image_labels[number - 1]], member.offset_data, member.size)
  if len(members) < len(image_labels):
    raise UsageError(
      f"{path} holds {len(members):,} of {len(image_labels):,} images; it is cut short: copy it "
      "again"
    )
  return TarImages(path, [members[number] for number in sorted(members)])


def _open_tar(path: str) -> io.FileIO:
  if not os.path.isfile(path):
    hint = "; copy it to a disk first" if "://" in path else ""
    raise UsageError(f"there is no tar file {path!r}{hint}")
  return io.FileIO(path)


def _members(file: IO[bytes], where: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
  """The files in an uncompressed tar file, and the open tar file."""
  try:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
      for member in tar:
        if member.isfile():
          if member.offset_data + member.size > size:
            raise tarfile.ReadError("unexpected end of data")
          yield tar, member
      # Zeros end a tar file. At a header that is cut or overwritten tarfile just stops as well.
      file.seek(tar.offset)
      if file.read(tarfile.BLOCKSIZE) not in (b"", bytes(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"no header at byte {tar.offset:,}")
  except tarfile.TarError as error:
    raise UsageError(
      f"{where} is damaged or no uncompressed tar file ({error}): copy it again"
    ) from error
