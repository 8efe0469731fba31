"""JSON in one spelling when it is written, and with nothing taken on trust when it is read.

Hashes and comparisons of files need one spelling for one value (`canonical_json`). What comes from outside is refused where
Python's own reader is lenient: a key that stands twice, `NaN`, bytes that are not UTF-8, numbers that no 64 bits hold, values that lie
too deep for the code that reads them (`strict_json`). `read_json` is the one way to read a JSON file of a user or of ours: whatever
is wrong with the file, the error is a sentence with its path and a remedy. `write_json_file` is the one way to write a result.

Read next: `perception/wire/cut_json.py`, which reads the description of a cut with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import InvalidInput, UpcycleError
from .files import write_atomically

MOST_JSON_BYTES = 256 << 20
"""Bytes of the largest JSON file that `read_json` reads, unless its caller says something else."""
MOST_JSON_LEVELS = 64
"""Levels of lists and objects inside each other. Our deepest files have 8."""


def canonical_json(value: Any) -> bytes:
    """Write a value in its one spelling: sorted keys, no spaces, no NaN.

    Args:
        value: Plain JSON values (dictionaries with string keys, lists, strings, numbers, booleans, None).

    Returns:
        UTF-8 bytes without a line break at the end.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def strict_json(data: bytes, what: str, error: type[UpcycleError] = InvalidInput, *, allow_nan: bool = False) -> Any:
    """Read JSON from outside; a key that stands twice, NaN, too large numbers and too many levels are refused.

    Args:
        data: UTF-8 bytes, with or without a byte order mark. The caller limits their number.
        what: Subject of the error message, e.g. "the manifest".
        error: Class of the error to raise. Code that reads scenes asks for `CorruptScene`.
        allow_nan: Whether NaN and infinity may occur, as in metrics that were written by `write_json_file`.

    Returns:
        The plain value.

    Raises:
        UpcycleError: `data` is not valid JSON; its class is `error`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            raise ValueError("a key stands twice")
        return record

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique, parse_constant=None if allow_nan else refuse)
        _check_values(value, allow_nan)
    except (ValueError, RecursionError) as fault:  # ValueError covers broken UTF-8, broken JSON and oversized integers
        raise error(f"{what} is not valid JSON: {fault}") from fault
    return value


def read_json(
    path: Path | str,
    what: str,
    *,
    remedy: str,
    kind: type = dict,
    max_bytes: int = MOST_JSON_BYTES,
    error: type[UpcycleError] = InvalidInput,
    allow_nan: bool = False,
) -> Any:
    """Read a JSON file of a user or of ours. A byte order mark at its beginning is skipped.

    Args:
        path: The file.
        what: What the file is, for messages: "the header of a prepared dataset".
        remedy: What to do when it cannot be read: "prepare the dataset again".
        kind: `dict` or `list`: what its outermost value must be. `object` takes any.
        max_bytes: Bytes of the largest file that is read.
        error: Class of the error to raise.
        allow_nan: Whether NaN and infinity may occur.

    Returns:
        The plain value, as `strict_json` gives it.

    Raises:
        UpcycleError: There is no such file, it cannot be opened, is too large or is not valid JSON, or its outermost value is of
            another kind. The class is `error`, and the message names path, reason and remedy.

    Example:
        >>> from upcycle3d.core.strict_json import read_json
        >>> read_json("no.json", "the receipts", remedy="run `upcycle3d extract --receipts` again")
        Traceback (most recent call last):
        upcycle3d.core.errors.InvalidInput: there is no no.json (the receipts); run `upcycle3d extract --receipts` again
    """
    path = Path(path)
    subject = f"{path} ({what})"
    try:
        exists, is_file = path.exists(), path.is_file()
        size = path.stat().st_size if is_file else 0
        data = b""
        if size <= max_bytes and is_file:
            with open(path, "rb") as file:
                data = file.read(size + 1)  # not the limit, for which Python would take memory at once
    except (OSError, ValueError) as fault:  # ValueError: a path with a NUL in it
        raise error(f"{subject} cannot be read: {getattr(fault, 'strerror', None) or fault}; {remedy}") from fault
    if not is_file:
        raise error(f"{subject} is not a file; {remedy}" if exists else f"there is no {subject}; {remedy}")
    if size > max_bytes:
        raise error(f"{subject} has {size:,} bytes, more than the {max_bytes:,} that are read; {remedy}")
    try:
        value = strict_json(data, subject, error, allow_nan=allow_nan)
    except error as fault:
        raise error(f"{fault}; {remedy}") from fault
    if not isinstance(value, kind):
        names: dict[type, str] = {dict: "an object with named entries", list: "a list"}
        wanted = names.get(kind, kind.__name__)
        raise error(f"{subject} must hold {wanted}, found {_kind_of(value)}; {remedy}")
    return value


def json_digest(values: Mapping[str, Any]) -> str:
    """Compute the digest that a header names, over everything else that it says.

    Args:
        values: Plain JSON values; an entry `digest` among them does not count.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    return hashlib.sha256(canonical_json({name: value for name, value in values.items() if name != "digest"})).hexdigest()


def write_json_file(path: Path | str, value: Any) -> None:
    """Write a result as a JSON file that people can read, completely or not at all.

    Args:
        path: Where the file appears.
        value: Plain JSON values. Keys keep their order.

    Raises:
        OSError: The file cannot be written.
    """
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def _check_values(value: Any, allow_nan: bool) -> None:
    """Refuse what later code would stumble over: levels without end, numbers beyond 64 bits, text that is no Unicode."""
    level, depth = [value], 0
    while level:
        inner: list[Any] = []
        for v in level:
            kind = type(v)
            if kind is float:
                if not allow_nan and v - v != 0:
                    raise ValueError("a number is too large for 64 bits")
            elif kind is int:
                if not -(1 << 63) <= v < 1 << 64:
                    raise ValueError("a whole number is too large for 64 bits")
            elif kind is str:
                _check_text(v)
            elif kind is dict:
                for key in v:
                    _check_text(key)
                inner += v.values()
            elif kind is list:
                inner += v
        level, depth = inner, depth + 1
        if depth > MOST_JSON_LEVELS + 1:
            raise ValueError(f"lists and objects lie more than {MOST_JSON_LEVELS} levels deep")


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half of a surrogate pair") from None


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
