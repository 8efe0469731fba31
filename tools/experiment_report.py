"""`upcycle3d experiment report`: the tables of an experiment, computed again from the CSV file that it published."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..perception.recipes.published_results import published_tables
from .console import print_table, run_command


@dataclass(frozen=True, kw_only=True)
class ExperimentReport:
    """Print the tables of an experiment from its `results.csv`."""

    folder: tyro.conf.Positional[Path]
    """Folder with `results.csv`, as docs/experiments/waymo_kitti_small, or the `--out` of an experiment."""
    of: str = "upcycling"
    """Method whose differences to others are printed seed by seed, with `--minus`."""
    minus: tuple[str, ...] = ()
    """Methods to subtract from it, as in `--minus cell_dropout mean_teacher`."""


def command(config: ExperimentReport) -> None:
    """Print mean, spread, closed gap and best step of each method, as in docs/results.md."""
    for table in published_tables(config.folder, of=config.of, minus=config.minus):
        print_table(table.caption, table.header, table.rows)


if __name__ == "__main__":
    sys.exit(run_command(command))
