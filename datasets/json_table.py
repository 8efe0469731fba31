"""A JSON array of objects read one object at a time: tables of nuScenes' kind run to over a gigabyte, far more as Python objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import InvalidInput

_CHUNK = 1 << 20  # characters read at a time
_MAX_ROW = 16 << 20  # characters of one row; what is longer is no such table
_BETWEEN = re.compile(r"[\s,]*")
_OTHER_KINDS: Mapping[str, type | None] = {
    "translation": None, "rotation": None, "size": None, "timestamp": None, "is_key_frame": bool,
}  # fmt: skip


@dataclass(frozen=True)
class JsonTable:
    """The table in the file ``path``."""

    path: Path

    def rows(self, *fields: str) -> Iterator[list[Any]]:
        """The values of ``fields`` of each row in file order. Raises what ``objects`` and ``values`` raise."""
        return (self.values(row, fields) for row in self.objects())

    def values(self, row: Mapping[str, Any], fields: tuple[str, ...]) -> list[Any]:
        """The values of ``fields``. Tokens and names are checked to be text here, numbers by ``numbers``.

        Raises InvalidInput naming file, row and field that is missing or has another type.
        """
        try:
            values = [row[field] for field in fields]
        except KeyError as error:
            raise InvalidInput(
                f"{self.path}, row {row.get('token')}: no field {error}; found {', '.join(row)}. Is it another table?"
            ) from error
        for field, value in zip(fields, values):
            kind = _OTHER_KINDS.get(field, str)
            if kind is not None and not isinstance(value, kind):
                raise InvalidInput(f"{self.path}, row {row.get('token')}: {field} must be a {kind.__name__}, found {value!r}")
        return values

    def numbers(self, values: Any, count: int, token: str, field: str) -> list[float]:
        """``values`` as ``count`` floats. Raises InvalidInput naming file, row and field."""
        try:
            numbers = [float(v) for v in values if not isinstance(v, str)]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != count:
            raise InvalidInput(f"{self.path}, row {token}: {field} must hold {count} numbers, found {values!r}")
        return numbers

    def objects(self) -> Iterator[dict[str, Any]]:
        """The objects, decoded one at a time. Raises InvalidInput: no such file, cut off, no JSON array of objects."""
        if not self.path.is_file():
            found = ", ".join(sorted(p.stem for p in self.path.parent.glob("*.json"))) or "none"
            raise InvalidInput(f"no table {self.path}; the folder holds {found}")
        decoder = json.JSONDecoder()
        try:
            with open(self.path, encoding="utf-8-sig") as file:
                text, position = file.read(_CHUNK).lstrip(), 1
                if not text.startswith("["):
                    raise InvalidInput(f"{self.path}: a table is a JSON array of objects, found {text[:20]!r}")
                while True:
                    position = _BETWEEN.match(text, position).end()  # type: ignore[union-attr]  # it matches nothing at least
                    if text.startswith("]", position):
                        return
                    try:
                        row, end = decoder.raw_decode(text, position)
                    except json.JSONDecodeError as error:
                        more = file.read(_CHUNK)
                        if not more or len(text) - position > _MAX_ROW:
                            raise InvalidInput(
                                f"{self.path}: cut off, or no JSON, from {text[position : position + 60]!r} on ({error.msg})"
                            ) from error
                        text, position = text[position:] + more, 0
                        continue
                    if not isinstance(row, dict):
                        raise InvalidInput(f"{self.path}: a row must be an object with named fields, found {str(row)[:60]!r}")
                    yield row
                    position = end
        except (UnicodeDecodeError, RecursionError) as error:
            raise InvalidInput(f"{self.path} is no JSON text: {error}") from error
