"""Words of a command line become the options of a command; a misspelt word becomes one sentence with the nearest right one.

Read next: `console.py`, which runs the command with them.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
import typing
from collections.abc import Sequence
from typing import Any

import tyro

from ..core.errors import InvalidInput
from ..core.foreign_text import shown


def parse_arguments(kind: Any, arguments: Sequence[str] | None, program: str | None, description: str | None) -> Any:
    """Parse the words of a command line.

    Args:
        kind: The type to make.
        arguments: The words; those of the program by default.
        program: Name in usage and errors.
        description: What `--help` says first.

    Returns:
        A value of the type.

    Raises:
        InvalidInput: A subcommand or an option does not exist; the message names the nearest one.
        SystemExit: After `--help`, or after tyro has said what is missing or cannot be read.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            # A preset's detector is one of several kinds; its default has decided which, so it is no subcommand.
            return tyro.cli(kind, args=words, prog=program, description=description, config=(tyro.conf.AvoidSubcommands,))
    except SystemExit as stop:
        if stop.code:
            _explain(kind, words, said.getvalue(), program or sys.argv[0].rpartition("/")[2])
        sys.stderr.write(said.getvalue())
        raise


def _explain(kind: Any, words: Sequence[str], said: str, program: str) -> None:
    """Raise a sentence for a word that does not exist; do nothing where tyro's own text is the better one."""
    flat = " ".join(re.sub(r"[│╭╮╰╯─]", " ", said).split())
    names = re.search(r"Available subcommands: ((?:[\w-]+, )*[\w-]+)", flat)
    wrong = re.search(r"Unrecognized (?:or misplaced )?options: ([^\s,]+)", flat)
    if names is not None and wrong is not None and not wrong[1].startswith("-"):
        known = names[1].split(", ")
        what = _what(known)
        raise InvalidInput(
            f"{program} has no {what} {shown(repr(wrong[1]), most=80)}{_nearest(wrong[1], known)}; the {what}s are {', '.join(known)}"
        )
    first = _subcommands(kind)
    if first and words and words[0].startswith("-"):
        raise InvalidInput(f"{program} takes the {_what(first)} first, before any option: one of {', '.join(first)}")
    refused = re.search(r"Error parsing __tyro-dummy-inner__\S*?: (.+?)(?: For full helptext.*)?$", flat)
    if refused is not None:  # a group of options whose values do not fit together; tyro names it by a name of its own
        raise InvalidInput(refused[1])
    if "nrecognized" not in flat:
        return
    chosen = [word for word in words[:1] if not word.startswith("-") and re.fullmatch(r"[\w-]+", word)]
    options = _options(kind, chosen, program)
    unknown = [
        w.partition("=")[0] for w in words if w.startswith("--") and _plain(w) not in options and w not in ("--", "--help")
    ]
    if options and unknown:
        listed = " and ".join(f"{shown(word, most=80)}{_nearest(_plain(word), options, '--')}" for word in unknown[:5])
        raise InvalidInput(f"{program} has no option {listed}; `{' '.join([program, *chosen])} --help` lists all options")


def _subcommands(kind: Any) -> list[str]:
    """The words that may come first, of a union of subcommands; empty for a command without them."""
    marks = [mark for part in typing.get_args(kind) for mark in getattr(part, "__metadata__", ())]
    return [name for mark in marks if isinstance(name := getattr(mark, "name", None), str)]


def _options(kind: Any, chosen: Sequence[str], program: str) -> list[str]:
    """All options that `--help` lists, without their dashes."""
    text = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text), contextlib.redirect_stderr(io.StringIO()):
        tyro.cli(kind, args=[*chosen, "--help"], prog=program, config=(tyro.conf.AvoidSubcommands,))
    return sorted({option.removeprefix("--") for option in re.findall(r"--[a-z][\w.-]*", text.getvalue())})


def _what(subcommands: Sequence[str]) -> str:
    return "preset" if "kitti_small" in subcommands else "kind"


def _plain(word: str) -> str:
    return word.partition("=")[0].removeprefix("--").replace("_", "-")


def _nearest(word: str, known: Sequence[str], dashes: str = "") -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {dashes}{near[0]}?)" if near else ""
