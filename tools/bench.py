"""``upcycle3d bench``: UpCycling and everything it is compared with, over seeds; stop it and start it again."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..perception.experiments import METRICS, SCENARIOS, VARIANTS, Row, Size, read_cells, run_cells, summarise
from ..perception.presets import DEMO, DEMO_PV_RCNN, PRESETS
from ..perception.structures import InvalidInput
from ..perception.training.run_folder import describe_environment
from ..perception.viz.charts import bar_chart
from ..perception.viz.html import Section, figure_svg, page, paragraph, table, write_html
from .console import console, print_table, run_command, write_json

BENCH_PRESETS = {"small": PRESETS["small"], "small_pv_rcnn": PRESETS["small_pv_rcnn"], "demo": DEMO, "demo_pv_rcnn": DEMO_PV_RCNN}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Variants by seeds on a simulated scenario. Each cell (variant, seed) leaves a file; a finished one is not run again."""

    scenario: Literal[tuple(SCENARIOS)]  # type: ignore[valid-type]
    """where the labels and the fleet are. waymo_lyft may be tuned on; waymo_kitti is run once, after a freeze"""
    out: Path
    """folder for data, runs and the report; one for each scenario and preset"""
    variants: tuple[Literal[tuple(VARIANTS)], ...] = (  # type: ignore[valid-type]
        "source_only",
        "source_continued",
        "pseudo_label",
        "upcycling",
        "oracle_frozen",
        "oracle_full",
    )
    """rows of the table; see docs/experiments.md"""
    seeds: tuple[int, ...] = (0,)
    """of data and training"""
    preset: Literal[tuple(BENCH_PRESETS)] = "small"  # type: ignore[valid-type]
    """detector and settings; the demo ones train fewer steps"""
    cells: Path | None = None
    """folder for the cells' results; OUT/cells by default"""
    labelled: int = 100
    """labelled source frames"""
    fleet: int = 200
    """unlabelled target frames"""
    validation: int = 100
    """scored target frames"""
    processes: int = 2
    """cells at a time, one thread each"""
    json: Path | None = None
    """also write the table for machines"""


def command(config: Bench) -> None:
    """Run what is missing of a comparison, then write its table and report (OUT/report.html)."""
    scenario, cells = SCENARIOS[config.scenario], config.cells or config.out / "cells"
    size = Size(labelled=config.labelled, fleet=config.fleet, validation=config.validation)
    for seed in config.seeds:
        run_cells(
            scenario,
            BENCH_PRESETS[config.preset],
            config.variants,
            seed,
            size=size,
            out=config.out,
            cells=cells,
            processes=config.processes,
            say=lambda text: console.print(text, markup=False),
        )
    rows = summarise(read_cells(cells))
    if not rows:
        raise InvalidInput(f"no finished cell in {cells}; give --variants and --seeds")
    title = f"simulated {scenario.source.name} → {scenario.target.name}, {config.preset}"
    header = (
        "variant",
        "seeds",
        "3D 0.7",
        "BEV 0.7",
        "3D 0.5",
        "BEV 0.5",
        "gap 3D: frozen, full",
        "gap BEV: frozen, full",
        "min",
    )
    print_table(f"Car AP, moderate, R40, last step's student; {title}", header, [_cells(name, row) for name, row in rows.items()])
    write_html(config.out / "report.html", page(f"upcycle3d: {title}", _report(rows, header)))
    console.print(f"report: {config.out / 'report.html'}; cells: {cells}")
    environment = describe_environment(command=sys.argv, seed=config.seeds[0])
    write_json(config.json, {"rows": {name: asdict(row) for name, row in rows.items()}, "environment": environment})


def _cells(name: str, row: Row) -> tuple[str, ...]:

    def gap(metric: str) -> str:
        values = (row.closed[f"{metric}_{oracle}"] for oracle in ("oracle_frozen", "oracle_full"))
        return ", ".join("null" if v is None else f"{v:.0f} %" for v in values)

    return (
        name,
        str(row.seeds),
        *(f"{row.mean[m]:.1f}\u00a0±\u00a0{row.spread[m]:.1f}" for m in METRICS),
        gap("ap_3d"),
        gap("ap_bev"),
        f"{row.minutes:.1f}",
    )


def _report(rows: Mapping[str, Row], header: tuple[str, ...]) -> list[Section]:
    names, highlight = list(rows), list(rows).index("upcycling") if "upcycling" in rows else None
    charts = [
        figure_svg(
            bar_chart(
                names,
                [rows[n].mean[metric] for n in names],
                [rows[n].spread[metric] for n in names],
                value_label="percent; whiskers: standard deviation over seeds",
                title=label,
                highlight=highlight,
            ),
            f"{label} of every variant",
        )
        for metric, label in (("ap_bev", "BEV AP at IoU 0.7"), ("ap_3d", "3D AP at IoU 0.7"), ("ap_3d_50", "3D AP at IoU 0.5"))
    ]
    text = (
        "Simulated data; the last step's student on target scans nobody trained on. Gap: share of the distance from source_only to "
        "oracle_frozen and to oracle_full that a variant closes, of the means; null where there is no such distance or no such oracle. Minutes: training and scoring of one cell on one thread."
    )
    listing = table(header, [_cells(name, row) for name, row in rows.items()], "Car AP, moderate, R40, in percent")
    return [Section("Table", [paragraph(text), listing]), Section("Charts", charts)]


if __name__ == "__main__":
    sys.exit(run_command(command))
