"""Publishes the results of an experiment as one table, and reads it back.

    results.csv          one row per result, or several with different metrics; numbers with all their digits
    environment.json     versions and machines that made the results; a row names one by its position in the list
    comparison.json      the configuration that all results share

Nothing in these files names a folder of the machine. They are what `docs/experiments` keeps, and the tables of docs/results.md are
computed from them.

Read next: `upcycling_report.py` and `category_shift_report.py`, which make the tables.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ...core.config_json import Json
from ...core.errors import InvalidInput
from ...core.files import write_atomically
from .result_cache import COMPARISON_FILE, ResultCache

CsvRow = Mapping[str, str | int | float | None]
"""Column -> value. None is an empty cell."""

RESULTS_FILE, ENVIRONMENT_FILE = "results.csv", "environment.json"
# What differs from result to result; the rest describes machine and versions.
_NOT_SHARED = ("time", "command", "seed")


def publish(folder: Path, cache: ResultCache, rows_of: Callable[[str, int, Json], Iterable[CsvRow]]) -> Path:
    """Write the three files from the results that are there.

    Args:
        folder: Folder to write.
        cache: The results.
        rows_of: Called with name, seed and result; gives the rows of this result. `time` and `environment` are added to each.

    Returns:
        The CSV file.
    """
    environments: list[dict[str, Json]] = []
    rows: list[CsvRow] = []
    for (name, seed), stored in cache.stored().items():
        shared = {key: value for key, value in stored["environment"].items() if key not in _NOT_SHARED}
        if shared not in environments:
            environments.append(shared)
        made = {"time": stored["environment"]["time"], "environment": environments.index(shared)}
        rows += [{**row, **made} for row in rows_of(name, seed, stored["result"])]
    write_rows(folder / RESULTS_FILE, rows)
    for file, value in ((ENVIRONMENT_FILE, environments), (COMPARISON_FILE, cache.configuration)):
        write_atomically(folder / file, (json.dumps(value, indent=1) + "\n").encode())
    return folder / RESULTS_FILE


def write_rows(path: Path, rows: Iterable[CsvRow]) -> None:
    """Write a CSV file.

    Args:
        path: The file.
        rows: Rows, which may have different columns. Floats are written so that reading gives the same value back.
    """
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: repr(value) if isinstance(value, float) else value for name, value in row.items()})
    write_atomically(path, text.getvalue().encode())


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file of `write_rows`.

    Args:
        path: The file, or the folder that holds `results.csv`.

    Returns:
        Rows as text by column, without the empty cells.

    Raises:
        InvalidInput: The file does not exist or has no row.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    if not file.exists():
        raise InvalidInput(f"there is no {file}; an experiment's folder has one after its first result")
    with file.open(newline="") as lines:
        rows = [{name: text for name, text in row.items() if text} for row in csv.DictReader(lines)]
    if not rows:
        raise InvalidInput(f"{file} has no row; run the experiment until it has a result")
    return rows
