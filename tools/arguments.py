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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from ..core.errors import InvalidInput
from ..core.foreign_text import shown


def parse_arguments(
    kind: Any, arguments: Sequence[str] | None, program: str | None, description: str | None, *, default: Any = None
) -> Any:
    """Parse the words of a command line.

    Args:
        kind: The type to make.
        arguments: The words; those of the program by default.
        program: Name in usage and errors.
        description: What `--help` says first.
        default: Values of options that are not given; None takes those of the type.

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
            return tyro.cli(kind, args=words, prog=program, description=description, config=_CONFIG, **_default(default))
    except SystemExit as stop:
        if stop.code:
            _explain(kind, words, said.getvalue(), program or sys.argv[0].rpartition("/")[2], default)
        sys.stderr.write(said.getvalue())
        raise


def _explain(kind: Any, words: Sequence[str], said: str, program: str, default: Any) -> None:
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
    options = _options(kind, chosen, program, default)
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


# A preset's detector is one of several kinds; its default has decided which, so it is no subcommand.
_CONFIG = (tyro.conf.AvoidSubcommands,)


def _default(default: Any) -> dict[str, Any]:
    """The argument of tyro for defaults, where there are some."""
    return {} if default is None else {"default": default}


def _help(kind: Any, chosen: Sequence[str], program: str, default: Any = None) -> str:
    text = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text), contextlib.redirect_stderr(io.StringIO()):
        tyro.cli(kind, args=[*chosen, "--help"], prog=program, config=_CONFIG, **_default(default))
    return text.getvalue()


def _options(kind: Any, chosen: Sequence[str], program: str, default: Any) -> list[str]:
    """All options that `--help` lists, without their dashes."""
    return sorted({option.removeprefix("--") for option in re.findall(r"--[a-z][\w.-]*", _help(kind, chosen, program, default))})


@dataclass(frozen=True, kw_only=True)
class ParsedWords:
    """Words that a command takes, for the completion of a shell."""

    kinds: tuple[str, ...]
    """What comes first, where something must: presets, or layouts of datasets."""
    options: tuple[str, ...]
    """Options with their dashes, those of all kinds together."""
    choices: Mapping[str, tuple[str, ...]]
    """Values of the options that take one of a few."""


def words_of(kind: Any, program: str) -> ParsedWords:
    """List what `--help` of a command names.

    Args:
        kind: The type that its words become.
        program: Its name.

    Returns:
        The words.
    """
    kinds = _subcommands(kind)
    # Presets have nearly the same options, so the first and the last one stand for all: each takes a second.
    pages = (
        [_help(kind, [name], program) for name in dict.fromkeys((*kinds[:1], *kinds[-1:]))]
        if kinds
        else [_help(kind, [], program)]
    )
    if kinds and _what(kinds) != "preset":
        pages = [_help(kind, [name], program) for name in kinds]
    flat = " ".join(re.sub(r"[│╭╮╰╯─]", " ", " ".join(pages)).split())
    # The values of an option stand behind its first mention, between braces; `{None}|PATH` names no values.
    choices = {option: tuple(values.split(",")) for option, values in re.findall(r"(--[a-z][\w.-]*) \{([\w.,-]+)\}(?!\|)", flat)}
    options = sorted(set(re.findall(r"(?<!\S)--[a-z][\w.-]*", flat)))
    first = re.match(r"usage: .*? \[-h\] \{([\w.,-]+)\}", flat)  # a word without an option, such as a shell
    kinds = kinds or (first[1].split(",") if first is not None else [])
    return ParsedWords(kinds=tuple(kinds), options=tuple(options), choices=choices)


def _what(subcommands: Sequence[str]) -> str:
    return "preset" if "kitti_small" in subcommands else "kind"


def _plain(word: str) -> str:
    return word.partition("=")[0].removeprefix("--").replace("_", "-")


def _nearest(word: str, known: Sequence[str], dashes: str = "") -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {dashes}{near[0]}?)" if near else ""
