"""The errors that this project raises on purpose, and the one-line check that raises them.

Read next: `structures.py`, whose values check themselves with `require`.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

from .foreign_text import shown

_LONGEST_LINE = 1500  # letters that are kept: damaged files hold names and values of any length
_MOST_LINES = 200


class UpcycleError(Exception):
    """An error whose message says what was tried, what was found and what to do. Commands print it without a traceback.

    A message often quotes a file of others, so control characters become escapes and long lines are cut, here for all errors.
    """

    def __init__(self, message: str = "") -> None:
        lines = message.split("\n")
        kept = [shown(line, most=_LONGEST_LINE) for line in lines[:_MOST_LINES]]
        super().__init__("\n".join(kept if len(lines) <= _MOST_LINES else [*kept, "…"]))


class InvalidInput(UpcycleError, ValueError):
    """A value from outside (a file, an argument) breaks the contract of its type."""


class NonFiniteValue(InvalidInput):
    """A network computed NaN or infinite values: its weights are broken, or its input is."""


class Interrupted(UpcycleError):
    """Training was stopped by Ctrl-C or SIGTERM; the message says what is kept and how to resume.

    Attributes:
        signal: The signal. A command then ends with the exit code 128 + `signal`: 130 or 143.
    """

    def __init__(self, message: str = "", *, by: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal = int(by)


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


def require_numbers(owner: str, *, least: float, most: float, **numbers: float | Sequence[float]) -> None:
    """Raise `InvalidInput` unless fields of a configuration are numbers within limits; NaN is not.

    Args:
        owner: Class of the configuration, for the message.
        least: Smallest number that is allowed.
        most: Largest number that is allowed.
        **numbers: Fields by name: a number, or several.

    Raises:
        InvalidInput: A field has another value; the message names it.
    """
    for name, value in numbers.items():
        for number in value if isinstance(value, Sequence) else (value,):
            if not least <= number <= most:
                raise InvalidInput(f"{owner}.{name} must be in {least}..{most}, found {str(number)[:80]}")


def require_counts(owner: str, *, least: int = 1, most: int = 65_536, **counts: int | Sequence[int]) -> None:
    """Raise `InvalidInput` unless fields of a configuration are whole numbers within limits.

    Configurations come from files of others, and their numbers decide how much memory is taken: no network of this kind has 65,536
    channels, and a product of a few such numbers still fits into 64 bits.

    Args:
        owner: Class of the configuration, for the message.
        least: Smallest number that is allowed.
        most: Largest number that is allowed.
        **counts: Fields by name: a number, or several.

    Raises:
        InvalidInput: A field has another value; the message names it.
    """
    require_numbers(owner, least=least, most=most, **counts)
