"""What every command shares: it runs a function, prints errors as sentences, and writes tables and JSON."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

from rich.table import Table

from ..core.errors import Interrupted, InvalidInput, UpcycleError
from ..core.foreign_text import shown
from ..core.ledger import Ledger
from ..core.ledger_rules import judge, stop_if_absurd
from ..core.short_numbers import duration_text
from .arguments import parse_arguments
from .config_file import defaults_of_file
from .terminal import SafeConsole, flush_output, plain, print_fault, print_labeled, silence, warnings_in_sentences

# Wide where the output is not a terminal, so that tables in a log keep their words. Text is printed as it is, never read as markup.
console = SafeConsole(stderr=False, highlight=False, width=None if sys.stdout is not None and sys.stdout.isatty() else 160)
_said: list[str] = []  # the warnings of this command

_RENAMED_PRESET_OPTIONS = {
    "--preset.upcycle.labelled-batch": "--preset.upcycle.labeled-batch",
    "--preset.upcycle.unlabelled-batch": "--preset.upcycle.unlabeled-batch",
}
_RENAMED_RIG = {"--rig.z-shift": "--z-shift", "--rig.intensity-scale": "--intensity-scale"}
# By command (its module's name): an option of version 0.1 and what to write now. Several words name an option with its values.
RENAMED_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "adapt": {"--labeller": "--labeler"},
    "adapt_detector": {"--source DIR SPLIT": "--source DIR:SPLIT", "--target DIR SPLIT": "--target DIR:SPLIT", **_RENAMED_RIG},
    "demo": {"--labelled": "--labeled"},
    "experiment_upcycling": {
        "--variants": "--methods",
        "--cells": "--results",
        "--checkpoints": "--source-models",
        "--size.labelled": "--size.labeled",
        **_RENAMED_PRESET_OPTIONS,
    },
    "extract": {"--encoder": "--detector", "--split": "--data DIR:SPLIT", **_RENAMED_RIG},
    "ingest": {"--encoder": "--detector", **_RENAMED_RIG},
    "view": {"--split": "--data DIR:SPLIT"},
    "evaluate": {"--split": "--data DIR:SPLIT"},
    "predict": _RENAMED_RIG,
    "prepare": {"--labelled": "--labeled", "--neighbours": "--neighbors", "--categories": "--class-map"},
    "train": {"--split": "--data DIR:SPLIT", **_RENAMED_PRESET_OPTIONS},
    "upcycle": {
        "--checkpoint": "--detector",
        "--split": "--data DIR:SPLIT",
        "--raw DIR SPLIT": "--raw DIR:SPLIT",
        **_RENAMED_RIG,
        **_RENAMED_PRESET_OPTIONS,
    },
}


def _refuse_renamed(command: str, arguments: Sequence[str]) -> None:
    """Raise InvalidInput for an option that has another name or form now."""
    words = [word.partition("=")[0].replace("_", "-") if word.startswith("--") else word for word in arguments]
    for old, new in RENAMED_OPTIONS.get(command, {}).items():
        name, *values = old.split()
        for at in [i for i, word in enumerate(words) if word == name]:
            after = words[at + 1 : at + 1 + len(values)]
            if len(after) == len(values) and not any(word.startswith("-") for word in after):
                raise InvalidInput(f"{command.replace('_', ' ')} has no option {old} any more; write {new}")


def _without_fractions(arguments: Sequence[str]) -> list[str]:
    """The words with numbers for fractions such as `1/255` as intensity scales: 0.0039216 is a rounded one."""
    words = list(arguments)
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not name.startswith("--") or not name.replace("_", "-").endswith("intensity-scale"):
            continue
        place = at if equals else at + 1
        value = value if equals else words[place] if place < len(words) else ""
        above, slash, below = value.partition("/")
        if not slash:
            continue
        try:
            number = repr(float(above) / float(below))
        except (ValueError, ZeroDivisionError) as error:
            raise InvalidInput(f"{name} takes a number or a fraction such as 1/255, found {shown(value)}") from error
        words[place] = f"{name}={number}" if equals else number
    return words


def run_command(
    function: Callable[..., Any], arguments: Sequence[str] | None = None, *, program: str | None = None, parsed_as: Any = None
) -> int:
    """Parse arguments into the type of a function's one parameter and call the function.

    Errors that the user can mend become one message without a traceback.

    Args:
        function: The command.
        arguments: Words of the command line; those of the program by default.
        program: Name in usage and errors.
        parsed_as: Another type to parse, whose values are of the parameter's type (subcommands with defaults).

    Returns:
        Exit code: 0, 1 after an error that nobody foresaw, 2 after one that the user can mend, 130 after Ctrl-C, 143 after SIGTERM.
    """
    console.quiet = False
    _said.clear()
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is printed as an escape
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings_in_sentences():
            _warn_of_cache()
            return _run(function, arguments, program, parsed_as)
    finally:
        flush_output()


def _warn_of_cache() -> None:
    """Print what `core/compiled.py` has to say. A command that compiles nothing has not loaded it, and does not."""
    loaded = sys.modules.get(f"{__package__.rpartition('.')[0]}.core.compiled")
    text = loaded.take_cache_warning() if loaded is not None else None
    if text is not None:
        print_warning(text)


def _run(function: Callable[..., Any], arguments: Sequence[str] | None, program: str | None, parsed_as: Any) -> int:
    try:
        arguments = _without_fractions(sys.argv[1:] if arguments is None else arguments)
        _refuse_renamed(function.__module__.rpartition(".")[2], arguments)
        (hint,) = [t for n, t in get_type_hints(function, include_extras=True).items() if n != "return"]
        given = defaults_of_file(hint, arguments)
        if given is None:
            options = parse_arguments(parsed_as or hint, arguments, program, function.__doc__)
        else:
            options = parse_arguments(hint, given.words, program, function.__doc__, default=given.default)
        _check_options(options)
        function(options)
    except Interrupted as error:
        _print_error(str(error))
        return 128 + error.signal
    except UpcycleError as error:
        _print_error(str(error))
        return 2
    except BrokenPipeError:  # nobody reads the output any more, as in `--help | head`
        silence(sys.stdout)
        return 0
    except OSError as error:
        _print_error(_sentence(error))
        return 2
    except MemoryError:
        _print_error(
            "the memory is full; close other programs, or give this one less: fewer workers, smaller batches, smaller files"
        )
        return 2
    except KeyboardInterrupt:
        _print_error("stopped by Ctrl-C; what was finished is kept, and the command may be given again")
        return 130
    except Exception as error:
        print_fault(error)
        return 1
    return 0


def _check_options(options: Any) -> None:
    """Refuse, before any work, what every command would only find at its end: places that cannot be written, seeds that no generator takes."""
    if (path := getattr(options, "json", None)) is not None:
        _check_writable(Path(path), "--json", "the name of a file")
    out = getattr(options, "out", None)
    if isinstance(out, Path) and out.resolve().parent == out.resolve():
        raise InvalidInput(f"--out must be a folder of its own, found {out}, the root of the file system; give another one")
    seeds = (getattr(options, "seed", None), *(getattr(options, "seeds", None) or ()))
    for seed in seeds:
        if isinstance(seed, int) and not 0 <= seed < 1 << 63:
            raise InvalidInput(f"a seed must be a whole number from 0 to {(1 << 63) - 1}, found {seed}")


def _check_writable(path: Path, option: str, wanted: str) -> None:
    if path.is_dir() or not path.name:
        raise InvalidInput(f"{option} takes {wanted}, and {path} is a folder; add one, as in {path / 'result.json'}")
    if path.exists() and not path.is_file():
        return  # such as /dev/stdout, and what the system thinks of it
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "is not a folder" if not folder.is_dir() else "cannot be written to"
        raise InvalidInput(f"{option} names {path}, and {folder} {what}; give another file")


def _sentence(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or error}); what was finished is kept. Make room and run the command again"
    names = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason}: {names}" if names else f"the system refused to read or write: {reason}"


def _print_error(text: str) -> None:
    print_labeled("error", "bold red", text)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a short table with numbers aligned to the right.

    Args:
        title: Text above the table.
        header: One name per column.
        rows: One value per column in each row.
    """
    table = Table(title=plain(title), title_justify="left", title_style="bold")
    body = [[f"{c:.2f}" if isinstance(c, float) else plain(c) for c in row] for row in rows]
    for i, name in enumerate(header):
        numeric = bool(body) and all(_is_number(row[i]) for row in body)
        table.add_column(name, justify="right" if numeric else "left")
    for row in body:
        table.add_row(*row)
    console.print(table)


def settle(ledger: Ledger, title: str, *, refuse_lost_cells: bool = False) -> None:
    """Print what a command read and dropped, warn of what is absurd, and stop where everything was lost.

    Args:
        ledger: The counts of the command. Write its result files before, so that nothing is lost.
        title: Text above the table.
        refuse_lost_cells: See `judge`.

    Raises:
        UpcycleError: A rule of `core/ledger_rules.py` stops the command.
    """
    print_table(title, ("", "number", "share"), ledger.rows())
    findings = judge(ledger, refuse_lost_cells=refuse_lost_cells)
    for finding in findings:
        if not finding.stops:
            print_warning(finding.text)
    stop_if_absurd(findings)


def print_warning(text: str) -> None:
    """Print one warning to the error stream.

    Args:
        text: One sentence: what was found, its likely cause, what to do.
    """
    _said.append(text)
    print_labeled("warning", "bold yellow", text)


def warnings_so_far() -> list[str]:
    """Return what `print_warning` has printed since the command began, for its `--json`."""
    return list(_said)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[\d,.]*\d(e[+-]\d+)?|-?inf|nan|-", text) is not None


def write_json(path: Path | None, value: object) -> None:
    """Write a result as JSON, atomically.

    Args:
        path: File to write; None writes nothing.
        value: JSON values.
    """
    if path is None:
        return
    from ..core.strict_json import write_json_file

    write_json_file(path, value)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Show progress and the time that is left: a bar on a terminal, a line per tenth elsewhere.

    Args:
        what: Text in front of the bar.
        total: Number of steps.

    Yields:
        A function to call with (steps done, steps in all).
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not console.is_terminal:
        last, began = -1, time.monotonic()

        def line(done: int, of: int) -> None:
            nonlocal last
            tenth = 10 * done // max(of, 1)
            if tenth > last:
                last = tenth
                left = duration_text((time.monotonic() - began) * (of - done) / max(done, 1))
                console.print(f"{what}: {done} of {of}" + (f", {left} left" if 0 < done < of else ""))

        yield line
        return
    with Progress(
        TextColumn(plain(what), markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, of: bar.update(task, completed=done, total=of)
