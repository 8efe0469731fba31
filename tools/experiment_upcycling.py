"""`upcycle3d experiment upcycling`: UpCycling and everything it is compared with, over seeds; stop it and start it again."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

from ..core.device import find_device
from ..core.errors import InvalidInput
from ..core.provenance import provenance_of_process, relative_command
from ..perception.evaluation.score import Protocol
from ..perception.recipes.experiment_data import (
    ExperimentData,
    SimulationSize,
    adaptation_data,
    partial_data,
    simulated_adaptation,
    simulated_partial,
)
from ..perception.recipes.job_folder import RunOptions
from ..perception.recipes.presets import DEMO, DEMO_PV_RCNN, PRESETS, Preset
from ..perception.recipes.result_csv import publish
from ..perception.recipes.result_summary import summarize
from ..perception.recipes.upcycling_experiment import (
    COMPARED_METHODS,
    SCENARIOS,
    Comparison,
    SourceModel,
    run_comparison,
    upcycling_results,
)
from ..perception.recipes.upcycling_report import report_sections, upcycling_rows, upcycling_tables
from ..perception.training.environment import describe_environment
from ..perception.viz.html import page, write_html
from .console import console, print_table, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class UpcyclingExperiment:
    """Compare methods over seeds. Each result is stored as soon as it is known, and a stored one is not computed again."""

    preset: Preset
    """Detector and settings, as in training. Override any field, as in `--preset.upcycle.loop.optim.lr 0.001`."""
    scenario: Literal[tuple(SCENARIOS)]  # type: ignore[valid-type]
    """Where the labels are and where the fleet drives. Choose settings on `waymo_lyft` only; run the others once, with frozen settings."""
    out: Path
    """Folder for runs, results, `results.csv` and `report.html`. Take one for each scenario and preset."""
    data: tuple[Path, ...] = ()
    """Prepared datasets: source and target, or one dataset for a partial scenario (see `prepare --label-shares`). Without this option
    the domains are simulated."""
    methods: tuple[Literal[tuple(COMPARED_METHODS)], ...] = (  # type: ignore[valid-type]
        "source_only",
        "source_continued",
        "pseudo_label",
        "upcycling",
        "oracle_frozen",
        "oracle_full",
    )
    """Rows of the table; docs/experiments.md explains them."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of training and of simulated data. Modulo three they pick the draw of labeled frames in a partial scenario."""
    share: float = 0.05
    """Share of the training frames that have labels, in a partial scenario."""
    source_models: tuple[tuple[SourceModel, Path], ...] = ()
    """Run folders of trained source models to use instead of training them, as in `plain runs/source sn runs/source_sn`."""
    protocol: Protocol | None = None
    """How detections are scored. The default is the target's own protocol, and ST3D's across datasets."""
    results: Path | None = None
    """Folder for the results; `OUT/results` by default."""
    size: SimulationSize = SimulationSize()
    """Numbers of frames of a simulated scenario."""
    scores_along: int = 4
    """How often a method is scored on the way, the last step included."""
    processes: int = 2
    """Methods that run at a time; with more than one, each has one thread."""
    workers: int = 0
    """Processes that prepare batches, for each method."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    json: Path | None = None
    """Also write the summary to this file as JSON."""


_CHOICES = PRESETS | {"demo": DEMO, "demo_pv_rcnn": DEMO_PV_RCNN}


def _next_steps(config: UpcyclingExperiment) -> list[tuple[str, str]]:
    again = shlex.join(relative_command([*sys.orig_argv]))
    data = ("Compare on your own data: prepare it, and name it with --data.", f"{again} --data DIR") if not config.data else None
    more = ("Add seeds: one seed is an example, not a measurement. Finished results are kept.", f"{again} --seeds 0 1 2")
    tables = ("Print the tables again.", f"upcycle3d experiment report {shlex.quote(str(config.out))}")
    return [step for step in (data, more if len(config.seeds) < 3 else None, tables) if step is not None]


ARGUMENTS = tyro.extras.subcommand_type_from_defaults(
    {name: UpcyclingExperiment(preset=preset, scenario=tyro.MISSING, out=tyro.MISSING) for name, preset in _CHOICES.items()},
    prefix_names=False,
)


def command(config: UpcyclingExperiment) -> None:
    """Run the missing results of a comparison, then write its tables (OUT/results.csv) and its report (OUT/report.html)."""
    scenario, results, start = SCENARIOS[config.scenario], config.results or config.out / "results", time.perf_counter()
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

    def say(text: str) -> None:
        console.print(f"[{time.perf_counter() - start:5.0f} s] {text}")

    for seed in config.seeds:
        say(f"seed {seed}")
        run_comparison(
            comparison,
            lambda seed: _data(config, seed),
            config.methods,
            seed,
            jobs=config.out,
            results=results,
            source_models=dict(config.source_models),
            options=RunOptions(
                say=say,
                scores_along=config.scores_along,
                device=find_device(config.device),
                workers=config.workers,
                processes=config.processes,
            ),
        )
    cache = comparison.cache(results)
    rows = summarize(upcycling_results(cache))
    if not rows:
        raise InvalidInput(f"there is no finished result in {results}; give --methods and --seeds")
    title = _title(config)
    for table in upcycling_tables(rows):
        print_table(f"{table.caption}; {title}", table.header, table.rows)
    write_html(
        config.out / "report.html",
        page(f"upcycle3d: {title}", report_sections(rows), made_by=provenance_of_process(), next_steps=_next_steps(config)),
    )
    published = publish(config.out, cache, upcycling_rows)
    console.print(f"report: {config.out / 'report.html'}; results: {published}")
    environment = describe_environment(command=sys.orig_argv, seed=config.seeds[0])
    write_json(config.json, {"rows": {name: asdict(row) for name, row in rows.items()}, "environment": environment})


def _data(config: UpcyclingExperiment, seed: int) -> ExperimentData:
    scenario = SCENARIOS[config.scenario]
    if scenario.partial and config.data:
        return partial_data(config.data[0], share=config.share, seed=seed)
    if config.data:
        return adaptation_data(*config.data)
    console.print("simulating and preparing")
    folder, classes, size = config.out / f"seed{seed}" / "data", config.preset.detector.class_names, config.size
    if scenario.partial:
        return simulated_partial(folder, scenario.source, size=size, share=config.share, seed=seed, classes=classes)
    return simulated_adaptation(folder, scenario.source, scenario.target, size=size, seed=seed, classes=classes)


def _title(config: UpcyclingExperiment) -> str:
    scenario, kind = SCENARIOS[config.scenario], "prepared" if config.data else "simulated"
    if scenario.partial:
        return f"{kind} {scenario.source}, {config.share:.0%} labeled"
    return f"{kind} {scenario.source} → {scenario.target}"


if __name__ == "__main__":
    sys.exit(run_command(command, parsed_as=ARGUMENTS))
