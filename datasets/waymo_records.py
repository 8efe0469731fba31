"""TFRecord files without TensorFlow: records in order, each with two checksums.

    8 bytes  length of the data, little-endian      4 bytes  masked CRC-32C of those 8 bytes
    length   the data                               4 bytes  masked CRC-32C of the data

(tensorflow, `lib/io/record_writer.h`.) A checksum is stored turned by 15 bits plus a constant, so that a CRC over data that holds
CRCs stays meaningful. Nothing marks the start of a record: after a broken length the rest of the file is lost, while broken data of a
record costs only that record.

Read next: `waymo_proto.py`, which reads the data of a record.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.compiled import compiled
from ..core.errors import InvalidInput

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), bits reversed
_MASK_DELTA = 0xA282EAD8


@dataclass(frozen=True, kw_only=True)
class RecordPlace:
    """Where a record lies."""

    path: Path
    """The file."""
    index: int
    """Number of the record in the file, from 0."""
    offset: int
    """Byte at which its length field begins."""
    length: int
    """Bytes of its data."""

    def __str__(self) -> str:
        return f"{self.path}, record {self.index} at byte {self.offset}"


def find_records(path: Path | str) -> tuple[tuple[RecordPlace, ...], str | None]:
    """List the records of a file. Only the length fields are read.

    Args:
        path: The file.

    Returns:
        All records up to the first broken length, and why the rest of the file is lost; None if nothing is lost.

    Raises:
        InvalidInput: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidInput(f"there is no TFRecord file {path}; check the root folder and the segment")
    places: list[RecordPlace] = []
    size, offset = path.stat().st_size, 0
    with open(path, "rb") as file:
        while offset < size:
            where = f"{path}, record {len(places)} at byte {offset}"
            file.seek(offset)
            head = file.read(12)
            if len(head) < 12:
                return tuple(places), f"{where}: the file ends inside the length field; it was cut off: copy it again"
            (length,) = struct.unpack("<Q", head[:8])
            if masked_crc32c(head[:8]) != struct.unpack("<I", head[8:])[0]:
                return tuple(places), f"{where}: the checksum of the length is wrong; is it a TFRecord file? Else copy it again"
            if offset + length + 16 > size:
                rest = size - offset - 12
                return tuple(
                    places
                ), f"{where}: {length} bytes of data are declared, {rest} are left; it was cut off: copy it again"
            places.append(RecordPlace(path=path, index=len(places), offset=offset, length=length))
            offset += length + 16
    return tuple(places), None


def read_record(place: RecordPlace) -> bytes:
    """Read and verify the data of a record.

    Args:
        place: The record.

    Returns:
        Its data.

    Raises:
        InvalidInput: With file, record and offset: the checksum is wrong, or the file became shorter.
    """
    with open(place.path, "rb") as file:
        file.seek(place.offset + 12)
        data, stored = file.read(place.length), file.read(4)
    if len(stored) < 4:
        raise InvalidInput(f"{place}: the file ends inside the data; it was cut off: copy it again")
    if masked_crc32c(data) != struct.unpack("<I", stored)[0]:
        raise InvalidInput(f"{place}: the checksum of its {place.length} bytes of data is wrong; copy the file again")
    return data


def read_head(place: RecordPlace, size: int) -> bytes:
    """Read the beginning of a record's data, unverified, because the checksum covers the whole.

    Args:
        place: The record.
        size: Number of bytes.

    Returns:
        The first `size` bytes, or all of a shorter record.
    """
    with open(place.path, "rb") as file:
        file.seek(place.offset + 12)
        return file.read(min(size, place.length))


def masked_crc32c(data: bytes) -> int:
    """Compute CRC-32C as TFRecord stores it.

    Args:
        data: Any bytes.

    Returns:
        The masked checksum.
    """
    crc = int(_crc32c(np.frombuffer(data, np.uint8), _TABLES))
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _make_tables() -> NDArray[np.uint32]:
    """(8, 256): row k is the CRC of a byte followed by k zero bytes, so that eight bytes are looked up at once ("slicing by 8")."""
    tables = np.zeros((8, 256), np.uint32)
    value = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        value = np.where(value & 1, value >> 1 ^ np.uint32(_POLYNOMIAL), value >> 1)
    tables[0] = value
    for k in range(1, 8):
        tables[k] = tables[k - 1] >> 8 ^ tables[0][tables[k - 1] & 255]
    return tables


_TABLES = _make_tables()


@compiled()
def _crc32c(data: np.ndarray, tables: np.ndarray) -> np.uint32:
    crc = np.uint32(0xFFFFFFFF)
    whole = len(data) // 8 * 8
    for i in range(0, whole, 8):
        low = crc ^ (
            np.uint32(data[i])
            | np.uint32(data[i + 1]) << np.uint32(8)
            | np.uint32(data[i + 2]) << np.uint32(16)
            | np.uint32(data[i + 3]) << np.uint32(24)
        )
        crc = (
            tables[7, low & np.uint32(255)]
            ^ tables[6, low >> np.uint32(8) & np.uint32(255)]
            ^ tables[5, low >> np.uint32(16) & np.uint32(255)]
            ^ tables[4, low >> np.uint32(24)]
            ^ tables[3, data[i + 4]]
            ^ tables[2, data[i + 5]]
            ^ tables[1, data[i + 6]]
            ^ tables[0, data[i + 7]]
        )
    for i in range(whole, len(data)):
        crc = tables[0, (crc ^ np.uint32(data[i])) & np.uint32(255)] ^ crc >> np.uint32(8)
    return crc ^ np.uint32(0xFFFFFFFF)
