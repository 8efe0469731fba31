"""``upcycle3d bench upcycling``: UpCycling and everything it is compared with, over seeds; stop it and start it again."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

from ..core.errors import InvalidInput
from ..perception.evaluation.headline import Protocol
from ..perception.recipes.experiments import (
    ORACLES,
    SCENARIOS,
    VARIANTS,
    Comparison,
    Data,
    Row,
    Size,
    Source,
    adaptation_data,
    partial_data,
    read_cells,
    run_cells,
    simulated_adaptation,
    simulated_partial,
    summarise,
)
from ..perception.recipes.pipeline import RunOptions
from ..perception.recipes.presets import DEMO, DEMO_PV_RCNN, PRESETS, Preset
from ..perception.training.run_folder import describe_environment
from ..perception.viz.charts import Series, bar_chart, line_chart
from ..perception.viz.html import Section, figure_svg, page, paragraph, table, write_html
from .console import console, device, print_table, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Variants by seeds. Each cell (variant, seed) leaves a file as soon as it is known; a finished one is not run again."""

    preset: Preset
    """detector and settings, as in training; override any field, as in --preset.upcycle.loop.optim.lr 0.001"""
    scenario: Literal[tuple(SCENARIOS)]  # type: ignore[valid-type]
    """where the labels and the fleet are. Settings may be chosen on waymo_lyft; the others are run once, after a freeze"""
    out: Path
    """folder for runs and the report; one for each scenario and preset"""
    data: tuple[Path, ...] = ()
    """prepared datasets: source and target, or the one of a partial scenario (`prepare --label-shares`). Simulated without"""
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
    """of training, of simulated data, and (modulo three) of the draw of labels"""
    share: float = 0.05
    """of the training frames with labels, in a partial scenario"""
    checkpoints: tuple[tuple[Source, Path], ...] = ()
    """source models to take instead of training them, as `plain runs/source sn runs/source_sn`"""
    protocol: Protocol | None = None
    """the target's own by default; across datasets ST3D's"""
    cells: Path | None = None
    """folder for the cells' results; OUT/cells by default"""
    size: Size = Size()
    """of a simulated scenario"""
    scores_along: int = 4
    """how often a cell is scored on the target along the way, the last step included"""
    processes: int = 2
    """cells at a time, one thread each beyond one"""
    workers: int = 0
    """processes that prepare batches, for each cell"""
    device: str = "cpu"
    """cpu or cuda"""
    json: Path | None = None
    """also write the table for machines"""


_CHOICES = PRESETS | {"demo": DEMO, "demo_pv_rcnn": DEMO_PV_RCNN}
ARGUMENTS = tyro.extras.subcommand_type_from_defaults(
    {name: Bench(preset=preset, scenario=tyro.MISSING, out=tyro.MISSING) for name, preset in _CHOICES.items()},
    prefix_names=False,
)


def command(config: Bench) -> None:
    """Run what is missing of a comparison, then write its table and report (OUT/report.html)."""
    scenario, cells, start = SCENARIOS[config.scenario], config.cells or config.out / "cells", time.perf_counter()
    if len(config.data) not in (0, 1 if scenario.partial else 2):
        wanted = "one prepared dataset" if scenario.partial else "two prepared datasets, source and target,"
        raise InvalidInput(f"{config.scenario} takes {wanted} with --data, or none to simulate; found {len(config.data)}")
    comparison = Comparison(
        scenario=scenario,
        preset=config.preset,
        share=config.share,
        size=None if config.data else config.size,
        protocol=config.protocol,
    )

    def data(seed: int) -> Data:
        if scenario.partial and config.data:
            return partial_data(config.data[0], share=config.share, seed=seed)
        if config.data:
            return adaptation_data(*config.data)
        say("simulating and preparing")
        folder, classes, size = config.out / f"seed{seed}" / "data", config.preset.detector.class_names, config.size
        if scenario.partial:
            return simulated_partial(folder, scenario.source, size=size, share=config.share, seed=seed, classes=classes)
        return simulated_adaptation(folder, scenario.source, scenario.target, size=size, seed=seed, classes=classes)

    for seed in config.seeds:

        def say(text: str, seed: int = seed) -> None:
            console.print(f"[{time.perf_counter() - start:5.0f} s] seed {seed}: {text}", markup=False)

        run_cells(
            comparison,
            data,
            config.variants,
            seed,
            out=config.out,
            cells=cells,
            checkpoints=dict(config.checkpoints),
            record={"environment": describe_environment(command=sys.orig_argv, seed=seed)},
            options=RunOptions(
                say=say,
                scores_along=config.scores_along,
                device=device(config.device),
                workers=config.workers,
                processes=config.processes,
            ),
        )
    rows = summarise(read_cells(cells))
    if not rows:
        raise InvalidInput(f"no finished cell in {cells}; give --variants and --seeds")
    kind = "prepared" if config.data else "simulated"
    place = f"{scenario.source}, {config.share:.0%} labelled" if scenario.partial else f"{scenario.source} → {scenario.target}"
    title = f"{kind} {place}"
    for caption, header, body in _tables(rows):
        print_table(f"{caption}; {title}", header, body)
    write_html(config.out / "report.html", page(f"upcycle3d: {title}", _report(rows)))
    console.print(f"report: {config.out / 'report.html'}; cells: {cells}")
    environment = describe_environment(command=sys.orig_argv, seed=config.seeds[0])
    write_json(config.json, {"rows": {name: asdict(row) for name, row in rows.items()}, "environment": environment})


CURVES = 8  # in one chart; more cannot be told apart
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def _metrics(rows: Mapping[str, Row]) -> list[list[str]]:
    """The metrics, four to a table: those of one class."""
    names = list(next(iter(rows.values())).mean)
    return [names[i : i + 4] for i in range(0, len(names), 4)]


def _tables(rows: Mapping[str, Row]) -> list[Table]:
    """The scores, metric by metric, then how much of the gap is closed and what the best step would have had."""
    tables: list[Table] = []
    for metrics in _metrics(rows):
        body = [
            (name, str(row.seeds), *(f"{row.mean[m]:.1f}\u00a0±\u00a0{row.spread[m]:.1f}" for m in metrics), f"{row.minutes:.1f}")
            for name, row in rows.items()
        ]
        tables.append(("Percent, the last step's student", ("variant", "seeds", *metrics, "min"), body))
    first = _metrics(rows)[0][:2]
    header = ("variant", *(f"{m}: {o}" for m in first for o in ORACLES), *(f"{m}: best step" for m in first))
    body = [
        (name, *(_share(row.closed[o][m]) for m in first for o in ORACLES), *(f"{row.best[m]:.1f}" for m in first))
        for name, row in rows.items()
    ]
    tables.append(("Closed gap; best step, chosen by the target's labels, so no result", header, body))
    return tables


def _share(value: float | None) -> str:
    return "null" if value is None else f"{value:.0f} %"


def _report(rows: Mapping[str, Row]) -> list[Section]:
    names, highlight = list(rows), list(rows).index("upcycling") if "upcycling" in rows else None
    charts = [
        figure_svg(
            bar_chart(
                names,
                [rows[n].mean[metric] for n in names],
                [rows[n].spread[metric] for n in names],
                value_label="percent; whiskers: standard deviation over seeds",
                title=metric,
                highlight=highlight,
            ),
            f"{metric} of every variant",
        )
        for metrics in _metrics(rows)
        for metric in metrics
    ]
    first = _metrics(rows)[0][:2]
    trained = {name: row.along for name, row in rows.items() if len(row.along) > 1}
    curves = [
        figure_svg(
            line_chart(
                [Series(n, list(a), [scores[metric] for scores in a.values()]) for n, a in list(trained.items())[:CURVES]],
                "training step",
                "percent, mean over seeds",
                metric,
            ),
            f"{metric} of the student along the way, on the target's validation frames: to look at, not to choose by",
        )
        for metric in first
        if trained
    ]
    text = (
        "The last step's student on target scans nobody trained on. Gap: share of the distance from source_only to oracle_frozen and to "
        "oracle_full that a variant closes, of the means; null where there is no such distance or no such oracle. Best step: the mean over "
        "seeds of the best score along the way; it is chosen by the target's labels, so it is no result, but some papers report it. "
        "Minutes: training and scoring of one cell."
    )
    return [
        Section("Tables", [paragraph(text), *(table(header, body, caption) for caption, header, body in _tables(rows))]),
        Section("Charts", [*charts, *curves]),
    ]


if __name__ == "__main__":
    sys.exit(run_command(command, parsed_as=ARGUMENTS))
