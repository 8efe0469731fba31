"""The Point Cloud Library's `.pcd` files: ascii, binary and compressed, with any fields.

Format: pointclouds.org, "The PCD file format", version 0.7. The header comes from outside: every size in it is checked against the
bytes that follow before memory is taken. VIEWPOINT is not applied: the points stay in the frame in which the file has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidInput
from .field_names import find_fields
from .foreign_text import shown

_MAX_HEADER = 64 * 1024
_MAX_FIELDS = 512
_MAX_COUNT = 65_536
_MOST_GROWTH = 90  # a reference of three bytes gives at most 264
_SIZES = {"F": (2, 4, 8), "I": (1, 2, 4, 8), "U": (1, 2, 4, 8)}


@dataclass(frozen=True, kw_only=True)
class _Header:
    fields: tuple[str, ...]
    kinds: tuple[np.dtype[Any], ...]
    counts: tuple[int, ...]
    points: int
    organized: bool
    encoding: str
    start: int

    def bytes_per_point(self, *, padding: bool = True) -> int:
        parts = zip(self.fields, self.kinds, self.counts)
        return sum(kind.itemsize * count for name, kind, count in parts if padding or name != "_")


def read_pcd(data: bytes, columns: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.float64], bool]:
    """Read the wanted fields of a `.pcd` file.

    Args:
        data: The bytes of the file.
        columns: Names of fields; empty for x, y, z, and intensity where the file has it. See `find_fields`.

    Returns:
        The names of the columns; their values (N, C); and whether the cloud is organized in rows, where NaN marks a missing return.

    Raises:
        InvalidInput: The header or the points are broken, or a field is missing.
    """
    header = _read_header(data)
    names, wanted = find_fields(header.fields, columns)
    empty = [header.fields[i] for i in wanted if not header.counts[i]]
    if empty:
        raise InvalidInput(f"the field {shown(empty[0])} has COUNT 0, so the file holds no value of it")
    if header.points == 0:
        return names, np.empty((0, len(names))), header.organized
    body = memoryview(data)[header.start :]
    if header.encoding == "ascii":
        table = _ascii(bytes(body), header, wanted)
    elif header.encoding == "binary":
        table = _binary(body, header, wanted)
    elif header.encoding == "binary_compressed":
        table = _compressed(body, header, wanted)
    else:
        raise InvalidInput(
            f"the points are stored as DATA {shown(header.encoding)}; known are ascii, binary and binary_compressed"
        )
    return names, table, header.organized


def _read_header(data: bytes) -> _Header:
    lines, start = _header_lines(data)

    def integers(key: str, default: list[str] | None = None) -> list[int]:
        words = lines.get(key, default)
        if words is None or not words or not all(w.isdigit() and len(w) < 16 for w in words):
            raise InvalidInput(f"the PCD header needs a line {key} with whole numbers, found {shown(words)}")
        return [int(w) for w in words]

    fields = lines.get("FIELDS") or lines.get("COLUMNS") or []
    if len(fields) > _MAX_FIELDS:
        raise InvalidInput(f"the PCD header names {len(fields)} fields; at most {_MAX_FIELDS} are read")
    sizes, counts = integers("SIZE"), integers("COUNT", ["1"] * len(fields))
    if max(counts, default=0) > _MAX_COUNT:
        raise InvalidInput(f"the PCD header gives a field COUNT {max(counts)}; at most {_MAX_COUNT} are read")
    types = lines.get("TYPE", [])
    if not fields or not len(fields) == len(sizes) == len(counts) == len(types):
        raise InvalidInput(
            "the PCD header must give FIELDS, SIZE, TYPE and COUNT of equal length, found "
            f"{len(fields)}, {len(sizes)}, {len(types)} and {len(counts)} entries"
        )
    for field, kind, size in zip(fields, types, sizes):
        if size not in _SIZES.get(kind, ()):
            raise InvalidInput(
                f"the PCD header gives the field {shown(field)} TYPE {shown(kind)} SIZE {size}; known are I and U of 1, 2, 4 or 8 bytes "
                "and F of 2, 4 or 8"
            )
    width, height = integers("WIDTH", lines.get("POINTS"))[0], integers("HEIGHT", ["1"])[0]
    points = integers("POINTS", [str(width * height)])[0]
    if points != width * height:
        raise InvalidInput(f"the PCD header contradicts itself: WIDTH {width} times HEIGHT {height} is not POINTS {points}")
    return _Header(
        fields=tuple(fields),
        kinds=tuple(np.dtype(f"<{kind.lower()}{size}") for kind, size in zip(types, sizes)),
        counts=tuple(counts),
        points=points,
        organized=height > 1,
        encoding=" ".join(lines["DATA"]).lower(),
        start=start,
    )


def _header_lines(data: bytes) -> tuple[dict[str, list[str]], int]:
    """The header's lines by keyword, and where the points start."""
    header: dict[str, list[str]] = {}
    position = 0
    while "DATA" not in header:
        end = data.find(b"\n", position, _MAX_HEADER)
        if end < 0:
            raise InvalidInput(f"the PCD header has no line DATA in the first {_MAX_HEADER} bytes; is it a .pcd file?")
        words = data[position:end].decode("ascii", errors="replace").split()
        position = end + 1
        if words and not words[0].startswith("#"):
            header[words[0].upper()] = words[1:]
    return header, position


def _ascii(body: bytes, header: _Header, wanted: Sequence[int]) -> NDArray[np.float64]:
    words, width = body.split(), sum(header.counts)
    if len(words) != header.points * width:
        raise InvalidInput(f"the header declares {header.points} points of {width} values, but {len(words)} values follow")
    first = np.concatenate([[0], np.cumsum(header.counts)[:-1]])
    try:
        columns = [np.array(words[int(first[i]) :: width], dtype=np.float64) for i in wanted]
    except ValueError as error:
        raise InvalidInput(f"the points hold a word that is not a number ({shown(error)})") from error
    return np.stack(columns, 1)


def _binary(body: memoryview, header: _Header, wanted: Sequence[int]) -> NDArray[np.float64]:
    size = header.bytes_per_point()
    if not header.points * size <= len(body) < (header.points + 1) * size:
        raise InvalidInput(
            f"the header declares {header.points} points of {size} bytes, but {len(body)} bytes follow; is the file cut off, or the "
            "header of another file?"
        )
    rows = np.frombuffer(body, np.uint8, count=header.points * size).reshape(header.points, size)
    starts = np.concatenate([[0], np.cumsum([k.itemsize * c for k, c in zip(header.kinds, header.counts)])[:-1]])
    return _table([rows[:, int(starts[i]) : int(starts[i]) + header.kinds[i].itemsize] for i in wanted], header, wanted)


def _compressed(body: memoryview, header: _Header, wanted: Sequence[int]) -> NDArray[np.float64]:
    """One field after another, together compressed with LZF. PCL leaves padding fields out of it."""
    packed, plain = (int.from_bytes(body[i : i + 4], "little") for i in (0, 4))
    padding = plain == header.points * header.bytes_per_point()
    expected = header.points * header.bytes_per_point(padding=padding)
    if len(body) < 8 or packed > len(body) - 8 or plain != expected or plain > _MOST_GROWTH * packed + 64:
        raise InvalidInput(
            f"the header declares {header.points} points of {header.bytes_per_point(padding=padding)} bytes, the compressed block "
            f"{packed} bytes that become {plain}, but {max(len(body) - 8, 0)} bytes follow; is the file cut off?"
        )
    values = np.frombuffer(_decompressed(bytes(body[8 : 8 + packed]), plain), np.uint8)
    columns, start = {}, 0
    for i, (name, kind, count) in enumerate(zip(header.fields, header.kinds, header.counts)):
        if padding or name != "_":
            part = values[start : start + header.points * kind.itemsize * count]
            columns[i] = part.reshape(header.points, -1)[:, : kind.itemsize] if part.size else part
            start += part.size
    return _table([columns[i] for i in wanted], header, wanted)


def _table(columns: Sequence[NDArray[np.uint8]], header: _Header, wanted: Sequence[int]) -> NDArray[np.float64]:
    """(N, C) numbers of (N, bytes) columns."""
    table = np.empty((header.points, len(wanted)))
    for to, (column, i) in enumerate(zip(columns, wanted)):
        with np.errstate(invalid="ignore"):  # random bits may be signaling NaN
            table[:, to] = np.ascontiguousarray(column).reshape(-1).view(header.kinds[i])
    return table


def _decompressed(packed: bytes, size: int) -> bytearray:
    """LZF: a control byte below 32 goes before that many literal bytes and one more; any other is a reference back."""
    out, at, end = bytearray(), 0, len(packed)
    try:
        while at < end:
            control = packed[at]
            at += 1
            if control < 32:
                if at + control + 1 > end:
                    raise IndexError
                out += packed[at : at + control + 1]
                at += control + 1
            else:
                length = control >> 5
                if length == 7:
                    length += packed[at]
                    at += 1
                back = len(out) - ((control & 31) << 8) - packed[at] - 1
                at += 1
                if back < 0:
                    raise IndexError
                length += 2
                piece = out[back : back + length]
                while len(piece) < length:  # it may reach into what it writes
                    piece += piece[: length - len(piece)]
                out += piece
            if len(out) > size:
                raise IndexError
    except IndexError:
        out = bytearray()
    if len(out) != size:
        raise InvalidInput(
            f"the compressed points are damaged: they do not become {size} bytes; write or download the file again"
        )
    return out
