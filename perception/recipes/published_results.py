"""The tables of a published experiment of either kind.

Read next: `result_csv.py` for the files, `upcycling_report.py` and `category_shift_report.py` for the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...core.errors import InvalidInput
from . import category_shift_report, upcycling_report
from .result_csv import read_rows
from .result_summary import summarize
from .upcycling_report import TextTable


def published_tables(folder: Path, *, of: str = "upcycling", minus: Sequence[str] = ()) -> list[TextTable]:
    """Compute the tables of an experiment from its `results.csv`.

    Args:
        folder: Folder of the file, or the file.
        of: Method whose differences to others are computed by seed.
        minus: Methods to subtract from it; none for no table of differences.

    Returns:
        The tables in the order of docs/results.md.

    Raises:
        InvalidInput: There is no such file, or it has no result of a method in `of` or `minus`.
    """
    if "classified_by" in read_rows(folder)[0]:
        if minus:
            raise InvalidInput(f"{folder} holds a category-shift experiment, which has no methods to subtract; leave --minus out")
        return category_shift_report.category_shift_tables(category_shift_report.read_category_shift_csv(folder))
    results = upcycling_report.read_upcycling_csv(folder)
    unknown = [name for name in (of, *minus) if minus and name not in results]
    if unknown:
        raise InvalidInput(f"{folder} has no result of {', '.join(unknown)}; it has {', '.join(results)}")
    tables = upcycling_report.upcycling_tables(summarize(results))
    return [*tables, upcycling_report.difference_table(results, of, minus)] if minus else tables
