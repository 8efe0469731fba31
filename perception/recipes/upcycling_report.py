"""Tables and pages of the upcycling experiment, from its results or from the CSV file that it publishes.

Read next: `result_summary.py` for what the numbers mean.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ...core.config_json import Json
from ...core.errors import InvalidInput
from ..viz.charts import Series, bar_chart, line_chart
from ..viz.html import Section, figure_svg, paragraph, table
from .method_run import MethodResult
from .method_styles import style_of
from .result_csv import CsvRow, read_rows
from .result_summary import ORACLES, ResultRow, Results, differences
from .upcycling_experiment import COMPARED_METHODS

CURVES = 8
"""Curves in one chart. More cannot be told apart."""


class TextTable(NamedTuple):
    """A table of text, for the terminal and for pages."""

    caption: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


# ---- one row of results.csv per result


def upcycling_rows(name: str, seed: int, result: Json) -> list[CsvRow]:
    """A result as one row of `results.csv`.

    Args:
        name: The method.
        seed: The seed.
        result: `MethodResult` as JSON.

    Returns:
        One row: `student/METRIC`, `teacher/METRIC`, and `step N/METRIC` for each entry of the history.
    """
    found = MethodResult.from_json(result)
    parts = {"student": found.student, "teacher": found.teacher, **{f"step {step}": scores for step, scores in found.history}}
    scores = {f"{part}/{metric}": value for part, values in parts.items() for metric, value in values.items()}
    return [{"method": name, "seed": seed, "seconds": found.seconds, **scores}]


def read_upcycling_csv(path: Path) -> Results:
    """Read results back from `results.csv`.

    Args:
        path: The file or its folder.

    Returns:
        Results by method and seed; methods in the order of `COMPARED_METHODS`.

    Raises:
        InvalidInput: The file is missing or empty, a row is not one that `upcycling_rows` makes, or two rows are of one method and seed.
    """
    found: dict[str, dict[int, MethodResult]] = {}
    for number, row in enumerate(read_rows(path), 1):
        try:
            name, seed, result = row["method"], int(row["seed"]), _result_of(row)
        except (KeyError, ValueError, AttributeError) as error:
            raise InvalidInput(
                f"row {number} of the results in {path} cannot be read ({type(error).__name__}: {error}); was the file edited? "
                "Take it from the experiment again"
            ) from error
        if name not in COMPARED_METHODS:
            raise InvalidInput(f"row {number} of the results in {path} is of the method {name!r}, which no experiment compares")
        if seed in found.setdefault(name, {}):
            raise InvalidInput(
                f"row {number} of the results in {path} is a second result of the method {name} with seed {seed}; leave one of them"
            )
        found[name][seed] = result
    return {name: found[name] for name in COMPARED_METHODS if name in found}


def _result_of(row: Mapping[str, str]) -> MethodResult:
    """The result in one row; KeyError, ValueError or AttributeError (a cell too many) where it is none."""
    parts: dict[str, dict[str, float]] = {}
    for column, text in row.items():
        part, slash, metric = column.partition("/")
        if slash:
            parts.setdefault(part, {})[metric] = float(text)
    steps = sorted(int(part.removeprefix("step ")) for part in parts if part.startswith("step "))
    return MethodResult(
        student=parts["student"],
        teacher=parts["teacher"],
        history=tuple((step, parts[f"step {step}"]) for step in steps),
        seconds=float(row["seconds"]),
    )


# ---- tables


def _metrics(rows: Mapping[str, ResultRow]) -> list[list[str]]:
    """The metrics, four to a table: the metrics of one class."""
    names = list(next(iter(rows.values())).mean)
    return [names[i : i + 4] for i in range(0, len(names), 4)]


def upcycling_tables(rows: Mapping[str, ResultRow]) -> list[TextTable]:
    """The scores, then the closed gaps and the best steps.

    Args:
        rows: Methods with their summaries.

    Returns:
        One table for each class, then one for the first two metrics.
    """
    tables: list[TextTable] = []
    for metrics in _metrics(rows):
        body = [
            (name, str(row.seeds), *(_with_spread(row, m) for m in metrics), f"{row.minutes:.1f}") for name, row in rows.items()
        ]
        tables.append(TextTable("Student after the last step, percent", ("method", "seeds", *metrics, "minutes"), body))
    first = _metrics(rows)[0][:2]
    header = ("method", *(f"{m}: {o}" for m in first for o in ORACLES), *(f"{m}: best step" for m in first))
    body = [
        (name, *(_percent(row.closed[o][m]) for m in first for o in ORACLES), *(f"{row.best[m]:.1f}" for m in first))
        for name, row in rows.items()
    ]
    caption = "Closed gap; best step, selected with target labels, so not a reportable result"
    return [*tables, TextTable(caption, header, body)]


def difference_table(results: Results, name: str, others: Sequence[str]) -> TextTable:
    """What one method scores above others, seed by seed and on the mean.

    Args:
        results: Results by method and seed.
        name: The method.
        others: Methods to subtract.

    Returns:
        A row for each of the others.
    """
    found = differences(results, name, others)
    metrics = list(next(iter(found.values())))
    rows = [
        (other, *(f"{' '.join(f'{v:+.1f}' for v in values[m])}, mean {statistics.fmean(values[m]):+.1f}" for m in metrics))
        for other, values in found.items()
    ]
    return TextTable(f"{name} minus other methods, percentage points by seed", ("minus", *metrics), rows)


def _with_spread(row: ResultRow, metric: str) -> str:
    """Mean and standard deviation; one seed has no spread, so none is given."""
    spread = f"\u00a0±\u00a0{row.spread[metric]:.1f}" if row.seeds > 1 else ""
    return f"{row.mean[metric]:.1f}{spread}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} %"


# ---- page


def report_sections(rows: Mapping[str, ResultRow]) -> list[Section]:
    """The HTML report.

    Args:
        rows: Methods with their summaries.

    Returns:
        Sections with the tables and the charts.
    """
    names, highlight = list(rows), list(rows).index("upcycling") if "upcycling" in rows else None
    several = any(row.seeds > 1 for row in rows.values())
    bars = [
        figure_svg(
            bar_chart(
                names,
                [rows[n].mean[metric] for n in names],
                [rows[n].spread[metric] for n in names],
                value_label="percent; whiskers: standard deviation over seeds" if several else "percent, one seed",
                title=metric,
                highlight=highlight,
                styles=[style_of(n) for n in names],
            ),
            f"{metric} of every method",
        )
        for metrics in _metrics(rows)
        for metric in metrics
    ]
    trained = {name: row.along for name, row in list(rows.items()) if len(row.along) > 1}
    shown = dict(list(trained.items())[:CURVES])
    curves = [
        figure_svg(
            line_chart(
                [
                    Series(name, list(along), [scores[metric] for scores in along.values()], style_of(name))
                    for name, along in shown.items()
                ],
                "training step",
                "percent, mean over seeds",
                metric,
            ),
            f"{metric} of the student along the way, on the target's validation frames: to look at, not to choose by",
        )
        for metric in _metrics(rows)[0][:2]
        if shown
    ]
    text = (
        "Scores are those of the student after the last step, on target frames that no training saw. The closed gap is the share of the "
        "distance from source_only to an oracle that a method covers, computed from means over seeds; it is - where there is no such "
        "distance or no result of the oracle. The best step is the mean over seeds of the best score along the way. It is selected with "
        "target labels, so it is not a reportable result; it is shown because some papers report it. Minutes are the duration of training "
        "and scoring for one seed."
    )
    tables = [table(t.header, t.rows, t.caption) for t in upcycling_tables(rows)]
    return [Section("Tables", [paragraph(text), *tables]), Section("Charts", [*bars, *curves])]
