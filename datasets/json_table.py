"""A JSON array of objects that is read one object at a time, because nuScenes' tables have over a gigabyte and far more in memory.

Read next: `nuscenes_tables.py`, which reads the tables of nuScenes and Lyft with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import InvalidInput

_CHUNK = 1 << 20  # characters read at a time
_MAX_ROW = 16 << 20  # characters of one row; a longer row means that this is another kind of file
_BETWEEN = re.compile(r"[\s,]*")
_OTHER_KINDS: Mapping[str, type | None] = {
    "translation": None, "rotation": None, "size": None, "timestamp": None, "is_key_frame": bool,
}  # fmt: skip


@dataclass(frozen=True)
class JsonTable:
    """One table."""

    path: Path
    """The JSON file."""

    def rows(self, *fields: str) -> Iterator[list[Any]]:
        """Read some fields of every row.

        Args:
            *fields: Names of the fields.

        Yields:
            The values of a row, in the order of `fields`; rows come in file order.

        Raises:
            InvalidInput: See `objects` and `values`.
        """
        return (self.values(row, fields) for row in self.objects())

    def values(self, row: Mapping[str, Any], fields: tuple[str, ...]) -> list[Any]:
        """Take fields out of a row. Tokens and names must be text; numbers are checked by `numbers`.

        Args:
            row: A row.
            fields: Names of the fields.

        Returns:
            The values in the order of `fields`.

        Raises:
            InvalidInput: With file, row and field: a field is missing or has another type.
        """
        try:
            values = [row[field] for field in fields]
        except KeyError as error:
            raise InvalidInput(
                f"{self.path}, row {row.get('token')}: there is no field {error}, only {', '.join(row)}. Is it another table?"
            ) from error
        for field, value in zip(fields, values):
            kind = _OTHER_KINDS.get(field, str)
            if kind is not None and not isinstance(value, kind):
                raise InvalidInput(f"{self.path}, row {row.get('token')}: {field} must be a {kind.__name__}, found {value!r}")
        return values

    def numbers(self, values: Any, count: int, token: str, field: str) -> list[float]:
        """Check that a field holds numbers.

        Args:
            values: What the field holds.
            count: How many numbers are expected.
            token: Token of the row, for the message.
            field: Name of the field, for the message.

        Returns:
            The numbers.

        Raises:
            InvalidInput: With file, row and field: there are more or fewer numbers, or something else.
        """
        try:
            numbers = [float(v) for v in values if not isinstance(v, str)]
        except (TypeError, ValueError, OverflowError):
            numbers = []
        if len(numbers) != count:
            raise InvalidInput(f"{self.path}, row {token}: {field} must hold {count} numbers, found {values!r}")
        return numbers

    def objects(self) -> Iterator[dict[str, Any]]:
        """Decode the objects one at a time.

        Yields:
            The objects in file order.

        Raises:
            InvalidInput: The file is missing, cut off, or not a JSON array of objects.
        """
        if not self.path.is_file():
            found = ", ".join(sorted(p.stem for p in self.path.parent.glob("*.json"))) or "none"
            raise InvalidInput(f"there is no table {self.path}; the folder holds {found}")
        decoder = json.JSONDecoder()
        try:
            with open(self.path, encoding="utf-8-sig") as file:
                text, position = file.read(_CHUNK).lstrip(), 1
                if not text.startswith("["):
                    raise InvalidInput(f"{self.path}: a table is a JSON array of objects, found {text[:20]!r}")
                while True:
                    position = _BETWEEN.match(text, position).end()  # type: ignore[union-attr]  # it matches at least the empty text
                    if text.startswith("]", position):
                        return
                    try:
                        row, end = decoder.raw_decode(text, position)
                    except json.JSONDecodeError as error:
                        more = file.read(_CHUNK)
                        if not more or len(text) - position > _MAX_ROW:
                            raise InvalidInput(
                                f"{self.path}: cut off, or not JSON, from {text[position : position + 60]!r} on ({error.msg})"
                            ) from error
                        text, position = text[position:] + more, 0
                        continue
                    if not isinstance(row, dict):
                        raise InvalidInput(f"{self.path}: a row must be an object with named fields, found {str(row)[:60]!r}")
                    yield row
                    position = end
        except InvalidInput:
            raise
        except (ValueError, RecursionError, OSError) as error:  # ValueError: no UTF-8, or a number with thousands of digits
            raise InvalidInput(f"{self.path} is not JSON text: {error}; unpack the tables again") from error
