"""The errors that this project raises on purpose, and the one-line check that raises them.

Read next: `structures.py`, whose values check themselves with `require`.
"""

from __future__ import annotations


class UpcycleError(Exception):
    """An error whose message says what was tried, what was found and what to do. Commands print it without a traceback."""


class InvalidInput(UpcycleError, ValueError):
    """A value from outside (a file, an argument) breaks the contract of its type."""


def require(condition: bool, message: str) -> None:
    """Raise `InvalidInput` unless a condition holds. Values use it to check themselves.

    Args:
        condition: What must be true.
        message: What was expected, what was found, and what to do.

    Raises:
        InvalidInput: `condition` is false.
    """
    if not condition:
        raise InvalidInput(message)
