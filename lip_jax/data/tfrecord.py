"""Records of TFRecord files, without TensorFlow: in order, or each by its place in the file.

A record is its length (uint64), a checksum of the length, the bytes, and a checksum of the bytes
(uint32 each, little-endian, CRC-32C, "masked" by a rotation and an offset).
"""

import itertools
import os
import struct
from collections.abc import Iterator

import google_crc32c
import numpy as np
from etils import epath

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


class CorruptFile(ValueError):  # noqa: N818
  """A file is cut short, padded, or overwritten."""


def read_records(path: str) -> Iterator[bytes]:
  """Yields the records of a TFRecord file in order, on a disk or in a bucket.

  Raises:
    CorruptFile: the file ends inside a record, or a checksum is wrong.
  """
  with epath.Path(path).open("rb") as file:
    for number in itertools.count():
      header = file.read(_HEADER.size)
      if not header:
        return
      where = f"{path}, record {number}"
      length = _length(header, where)
      yield _checked(file.read(length + _FOOTER.size), length, where)


def record_offsets(path: str) -> np.ndarray:
  """Where each record of a TFRecord file starts, and last where the file ends: int64 [n + 1].

  Reads lengths and their checksums only.

  Raises:
    CorruptFile: the file ends inside a record, or the checksum of a length is wrong.
  """
  with epath.Path(path).open("rb") as file:
    size = file.seek(0, os.SEEK_END)
    offsets = [0]
    while offsets[-1] < size:
      where = f"{path}, record {len(offsets) - 1}"
      file.seek(offsets[-1])
      length = _length(file.read(_HEADER.size), where)
      offsets.append(offsets[-1] + _HEADER.size + length + _FOOTER.size)
  if offsets[-1] > size:
    raise CorruptFile(f"{where}: the file ends within it")
  return np.array(offsets, np.int64)


def read_record(path: str, offsets: np.ndarray, number: int) -> bytes:
  """Reads one record of a file whose `record_offsets` are known; threads may do so at once.

  Raises:
    CorruptFile: the record is not there (any more), or a checksum is wrong.
  """
  start, end = offsets[number : number + 2].tolist()
  data = _read_bytes(path, start, end)
  where = f"{path}, record {number}"
  length = _length(data[: _HEADER.size], where)
  if length != end - start - _HEADER.size - _FOOTER.size:
    raise CorruptFile(f"{where}: its length has changed since the file was indexed")
  return _checked(data[_HEADER.size :], length, where)


def _read_bytes(path: str, start: int, end: int) -> bytes:
  if "://" in path:
    import fsspec  # comes with gcsfs

    # One request: an open file would read ahead.
    return fsspec.filesystem("gcs").cat_file(path, start, end)
  file = os.open(path, os.O_RDONLY)
  try:
    return os.pread(file, end - start, start)
  finally:
    os.close(file)


def _length(header: bytes, where: str) -> int:
  """Length of the record that follows its header, bytes."""
  if len(header) < _HEADER.size:
    raise CorruptFile(f"{where}: the file ends before it")
  length, checksum = _HEADER.unpack(header)
  if _masked_crc(header[:8]) != checksum:
    raise CorruptFile(f"{where}: its length has a wrong checksum")
  return length


def _checked(data: bytes, length: int, where: str) -> bytes:
  """A record out of what follows its header."""
  record, footer = data[:length], data[length:]
  if len(footer) < _FOOTER.size:
    raise CorruptFile(f"{where}: the file ends within it")
  if _masked_crc(record) != _FOOTER.unpack(footer)[0]:
    raise CorruptFile(f"{where}: its bytes have a wrong checksum")
  return record


def _masked_crc(data: bytes) -> int:
  crc = google_crc32c.value(data)
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
