"""What reaches a terminal, safely: text of others without markup or escape sequences, warnings as sentences, closed pipes.

A file name, a manifest or a label file may hold anything. So no text is read as markup, and every control character is printed as its
escape. Read next: `console.py`, which every command uses.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from ..core.foreign_text import shown

LONGEST_LINE = 6000
"""Letters of the longest line that is printed: an error may list many names, but never a whole file."""


def plain(text: object) -> str:
    """Make any text fit for a terminal. Only line breaks stay: commands print lists with them.

    Args:
        text: The text; anything else is turned into text first.

    Returns:
        Lines without control characters.
    """
    return "\n".join(shown(line, most=LONGEST_LINE) for line in str(text).split("\n"))


class SafeConsole(Console):
    """A console that takes every text as it is: no markup, no emoji, no control characters, also in tables and titles."""

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """Turn a text into what rich prints.

        Args:
            text: Any text.
            **options: Options of rich, of which markup, emoji and highlighting have no effect.

        Returns:
            The text, printable.
        """
        look = {name: options[name] for name in ("style", "justify", "overflow") if options.get(name) is not None}
        return Text(plain(text), **look)

    def on_broken_pipe(self) -> None:
        """Go on without output when nobody reads it any more (`upcycle3d train … | head`): the work is worth more."""
        self.quiet = True
        silence(sys.stdout)


def silence(stream: TextIO | None) -> None:
    """Send what a stream still holds, and all that follows, nowhere.

    Args:
        stream: Output or error stream of the process.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)


def flush_output() -> None:
    """Write out what is buffered. A reader that has gone away (`--help | head`) is no error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            silence(stream)


def print_labeled(label: str, style: str, text: str) -> None:
    """Print a sentence to the error stream.

    Args:
        label: Word in front: "error", "warning".
        style: How rich draws the word.
        text: The sentence. Lines after the first are indented, so that none of them can pass for a message of its own.
    """
    line = Text(f"{label}:", style=style)
    line.append(" " + plain(text).replace("\n", "\n  "), style="not bold default")
    SafeConsole(stderr=True, highlight=False, soft_wrap=True).print(line)


def print_fault(error: BaseException) -> None:
    """Print an error that nobody foresaw as a sentence, and keep the details in a file for a report.

    Args:
        error: The error.
    """
    details = ""
    with contextlib.suppress(OSError):
        handle, path = tempfile.mkstemp(prefix="upcycle3d_fault_", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(traceback.format_exception(error)))
        details = f"; the details are in {path}"
    print_labeled(
        "error",
        "bold red",
        f"a fault of this program, or input that it does not know how to refuse: {type(error).__name__}: {error}{details}. "
        "Please report it with these details and the command",
    )


class _Sentences(logging.Formatter):
    """Log records as `warning: …`, without file, line and traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(f"{record.levelname.lower()}: {record.getMessage()}", most=LONGEST_LINE)


@contextlib.contextmanager
def warnings_in_sentences() -> Iterator[None]:
    """Show Python's warnings and log records as one line each, `warning: …`, and the same warning once per run."""
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Sentences())
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
    told: set[str] = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in told:
            told.add(str(message))
            print_labeled("warning", "bold yellow", str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
