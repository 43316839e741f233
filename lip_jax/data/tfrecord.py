"""Records of TFRecord files, without TensorFlow.

A record is its length (uint64), a checksum of the length, the bytes, and a checksum of the bytes
(uint32 each, little-endian, CRC-32C, "masked" by a rotation and an offset).
"""

import struct
from collections.abc import Iterator

import google_crc32c
from etils import epath

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


class CorruptFile(ValueError):  # noqa: N818
  """A file is cut short, padded, or overwritten."""


def read_records(path: str, *, skip: int = 0, take: int | None = None) -> Iterator[bytes]:
  """Yields the records of a TFRecord file in order.

  Checks that the file is whole: every length against its checksum, and the bytes of records that
  are not skipped against theirs.

  Args:
    path: the file; `gs://` as epath opens it.
    skip: records at the start that are left out.
    take: records to read; None is all the rest.

  Raises:
    CorruptFile: the file ends inside a record, or before `skip` + `take` of them, or a checksum is
      wrong.
  """
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
      if _masked_crc(header[:8]) != length_sum:
        raise CorruptFile(f"{where}: its length has a wrong checksum")
      if index < skip:
        file.seek(length + _FOOTER.size, 1)
      else:
        data, footer = file.read(length), file.read(_FOOTER.size)
        if len(data) < length or len(footer) < _FOOTER.size:
          raise CorruptFile(f"{where}: the file ends within it")
        if _masked_crc(data) != _FOOTER.unpack(footer)[0]:
          raise CorruptFile(f"{where}: its bytes have a wrong checksum")
        yield data
      index += 1


def _masked_crc(data: bytes) -> int:
  crc = google_crc32c.value(data)
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
