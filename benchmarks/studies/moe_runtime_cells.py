"""Not a script: cells, tables and figures that the studies of the runtime share (`moe_runtime_cache.py`, `moe_runtime_batching.py`).

A *cell* holds all arms of one trace and one seed. Its rows are a JSON file that appears when the cell is done, so a study may be stopped
and started again.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from moe_dmu_arms import interval

from upcycle3d.core.files import write_atomically

Row = Mapping[str, str | int | float]
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B6670", "#1B2228")  # Okabe and Ito's


def cell(folder: Path, name: str, compute: Callable[[], Iterable[Row]]) -> list[Row]:
    """Give the rows of a cell, computed if they are not there."""
    path = folder / f"{name}.json"
    if not path.exists():
        write_atomically(path, json.dumps([dict(row) for row in compute()]).encode())
        print(f"done: {name}", flush=True)
    found: list[Row] = json.loads(path.read_text())
    return found


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode())


def chosen(rows: Sequence[Row], wanted: Mapping[str, str | int], column: str) -> list[float]:
    """Values of a column over the seeds, in their order."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return [float(row[column]) for row in sorted(found, key=lambda row: int(row["seed"]))]


def mean(rows: Sequence[Row], wanted: Mapping[str, str | int], column: str) -> float:
    """Mean over the seeds; NaN where there is no row."""
    values = chosen(rows, wanted, column)
    return statistics.fmean(values) if values else math.nan


def change(rows: Sequence[Row], wanted: Mapping[str, str | int], other: Mapping[str, str | int], column: str) -> str:
    """Relative difference from another arm in percent, seed by seed, with its 95 % interval."""
    pairs = zip(chosen(rows, wanted, column), chosen(rows, {**wanted, **other}, column))
    return f"{interval([a / b - 1 for a, b in pairs])} %"


def panels(titles: Sequence[str], height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """Begin a figure with panels in one row."""
    figure = Figure(figsize=(3.4 * len(titles), height), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, len(titles), sharey=True, squeeze=False)[0])
    for axis, title in zip(axes, titles):
        axis.set_title(title, fontsize=10)
        axis.grid(color="#E4E7E9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the same rows give the same bytes."""
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    write_atomically(path, data.getvalue())
