"""How many values each column of a Parquet file declares, read without Arrow.

Arrow ends the whole process, without a Python error, when one asks it for the description of a column that is damaged (seen with
pyarrow 26). So the footer is read here, before Arrow is asked: it is a Thrift structure in the compact protocol, of which only
the numbers of values are needed.

Formats: Apache Parquet, `parquet.thrift` (FileMetaData, RowGroup, ColumnChunk, ColumnMetaData); Apache Thrift, "Thrift compact protocol".

Read next: `parquet.py`, which compares the numbers with its limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

_MAGIC = b"PAR1"
_MOST_FOOTER_BYTES = 64 << 20
_MOST_DEPTH = 24
# Numbers of the fields that are needed, by structure.
_ROW_GROUPS, _COLUMNS, _META_DATA, _PATH, _NUM_VALUES = 4, 1, 3, 3, 5
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


def declared_values(source: bytes | Path) -> tuple[Mapping[str, int], ...]:
    """Read how many values every column of every row group declares.

    Args:
        source: A Parquet file, or its content.

    Returns:
        For each row group the number of values by the column's path, whose parts are joined by dots; values inside lists count one by
        one.

    Raises:
        ArrowInvalid: The footer is damaged.
        OSError: The file cannot be read.
    """
    footer = _footer(source)
    try:
        groups = _Reader(footer).struct()[_ROW_GROUPS]
        return tuple(
            {
                ".".join(part.decode() for part in column[_META_DATA][_PATH]): int(column[_META_DATA][_NUM_VALUES])
                for column in group[_COLUMNS]
            }
            for group in groups
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise pa.ArrowInvalid(f"its footer is damaged ({type(error).__name__})") from error


def _footer(source: bytes | Path) -> bytes:
    if isinstance(source, bytes):
        size, tail = len(source), source[-8:]
    else:
        size = source.stat().st_size
        with source.open("rb") as file:
            file.seek(max(size - 8, 0))
            tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or not 0 < length <= min(size - 8, _MOST_FOOTER_BYTES):
        raise pa.ArrowInvalid("it does not end like a Parquet file")
    if isinstance(source, bytes):
        return source[-8 - length : -8]
    with source.open("rb") as file:
        file.seek(size - 8 - length)
        return file.read(length)


class _Reader:
    """Reads Thrift's compact protocol: structures become dictionaries by field number. Every step consumes bytes, so it ends."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            kind, step = head & 15, head >> 4
            number = number + step if step else self._signed()
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _MOST_DEPTH:
            raise ValueError("nested too deeply")
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if kind in (_I16, _I32, _I64):
            return self._signed()
        if kind == _DOUBLE:
            return self._bytes(8)
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 != 15 else self._varint()
            self._expect(count)
            return [self.struct(depth + 1) if head & 15 == _STRUCT else self._value(head & 15, depth + 1) for _ in range(count)]
        if kind == _MAP:
            count = self._varint()
            self._expect(count)
            kinds = self._byte() if count else 0
            return [(self._value(kinds >> 4, depth + 1), self._value(kinds & 15, depth + 1)) for _ in range(count)]
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise ValueError(f"there is no type {kind}")

    def _expect(self, count: int) -> None:
        if count > len(self._data) - self._at:  # each element takes at least one byte
            raise ValueError("more elements than bytes")

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, length: int) -> bytes:
        self._expect(length)
        self._at += length
        return self._data[self._at - length : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
