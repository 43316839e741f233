"""Records of TFRecord files, without TensorFlow.

A record is its length (uint64), a checksum of the length, the bytes, and a checksum of the bytes
(uint32 each, little-endian, CRC-32C, "masked" by a rotation and an offset).
"""

import functools
import importlib
import struct
from collections.abc import Callable, Iterator

from etils import epath

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_POLYNOMIAL = 0x82F63B78  # CRC-32C, bits reversed


class CorruptFile(ValueError):  # noqa: N818
  """A file is cut short, padded, or overwritten."""


def read_records(path: str, *, skip: int = 0, take: int | None = None) -> Iterator[bytes]:
  """Yields the records of a TFRecord file in order.

  Checks that the file is whole: every length against its checksum, and the bytes of records that
  are not skipped against theirs if the package `google-crc32c` is installed (in Python it would
  take longer than everything else).

  Args:
    path: the file; `gs://` as epath opens it.
    skip: records at the start that are left out.
    take: records to read; None is all the rest.

  Raises:
    CorruptFile: the file ends inside a record, or before `skip` + `take` of them, or a checksum is
      wrong.
  """
  checksum = _fast_checksum()
  with epath.Path(path).open("rb") as file:
    index = 0
    while take is None or index < skip + take:
      header = file.read(_HEADER.size)
      if not header and take is None:
        return
      where = f"{path}, record {index}"
      if len(header) < _HEADER.size:
        raise CorruptFile(f"{where}: the file ends before it")
      length, length_sum = _HEADER.unpack(header)
      if _mask(_crc32c(header[:8])) != length_sum:
        raise CorruptFile(f"{where}: its length has a wrong checksum")
      if index < skip:
        file.seek(length + _FOOTER.size, 1)
      else:
        data, footer = file.read(length), file.read(_FOOTER.size)
        if len(data) < length or len(footer) < _FOOTER.size:
          raise CorruptFile(f"{where}: the file ends within it")
        if checksum is not None and _mask(checksum(data)) != _FOOTER.unpack(footer)[0]:
          raise CorruptFile(f"{where}: its bytes have a wrong checksum")
        yield data
      index += 1


def _mask(crc: int) -> int:
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _crc32c(data: bytes) -> int:
  """CRC-32C of a few bytes."""
  crc, table = 0xFFFFFFFF, _crc_table()
  for byte in data:
    crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
  return crc ^ 0xFFFFFFFF


@functools.cache
def _crc_table() -> tuple[int, ...]:
  table = []
  for crc in range(256):
    for _ in range(8):
      crc = (crc >> 1) ^ (_POLYNOMIAL if crc & 1 else 0)
    table.append(crc)
  return tuple(table)


@functools.cache
def _fast_checksum() -> Callable[[bytes], int] | None:
  try:
    return importlib.import_module("google_crc32c").value
  except ImportError:
    return None
