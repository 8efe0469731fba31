"""JSON in one spelling when it is written, and with nothing taken on trust when it is read.

Hashes and comparisons of files need one spelling for one value (`canonical_json`). What comes from outside is refused where
Python's own reader is lenient: a key that stands twice, `NaN`, bytes that are not UTF-8, an integer with a million digits
(`strict_json`).

Read next: `perception/wire/cut_json.py`, which reads the description of a cut with it.
"""

from __future__ import annotations

import json
from typing import Any

from .errors import InvalidInput, UpcycleError


def canonical_json(value: Any) -> bytes:
    """Write a value in its one spelling: sorted keys, no spaces, no NaN.

    Args:
        value: Plain JSON values (dictionaries with string keys, lists, strings, numbers, booleans, None).

    Returns:
        UTF-8 bytes without a line break at the end.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def strict_json(data: bytes, what: str, error: type[UpcycleError] = InvalidInput) -> Any:
    """Read JSON from outside; a key that stands twice and NaN are refused.

    Args:
        data: UTF-8 bytes. The caller limits their number.
        what: Subject of the error message, e.g. "the manifest".
        error: Class of the error to raise. Code that reads scenes asks for `CorruptScene`.

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
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as fault:  # ValueError covers broken UTF-8, broken JSON and oversized integers
        raise error(f"{what} is not valid JSON: {fault}") from fault
