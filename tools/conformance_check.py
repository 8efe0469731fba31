"""`upcycle3d conformance check`: run any exporter on golden scans. Read next: `perception/conformance/foreign_run.py`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from ..core.errors import UpcycleError
from ..perception.conformance.comparison import ARITHMETIC, CaseResult
from ..perception.conformance.foreign_run import run_conformance
from ..perception.conformance.golden import GoldenFolder
from .console import console, print_table, progress_bar, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class ConformanceCheck:
    """Run an exporter on every scan of a conformance folder and compare the shards that it writes. Its output is never trusted."""

    folder: tyro.conf.Positional[Path]
    """What `conformance write` wrote."""
    exporter: tyro.conf.Positional[tuple[str, ...]]
    """After `--`: the command of the exporter, run without a shell once per scan. In every word, {scan} stands for the scan file, {out}
    for the folder to write shards into, and {encoder} for the encoder file."""
    timeout: float = 300.0
    """Seconds for one scan."""
    arithmetic: float = ARITHMETIC
    """Difference of features that is allowed besides the codec's, as a share of the largest feature of a scan. An exporter that computes in
    half precision needs about 0.01; its features are then not those that the decoder was trained on."""
    json: Path | None = None
    """Also write the result of every case to this file as JSON."""


def command(config: ConformanceCheck) -> None:
    """Check an exporter against golden scenes: upcycle3d conformance check FOLDER -- COMMAND … {scan} … {out}."""
    golden = GoldenFolder.open(config.folder)
    total = len(golden.spec.cases)
    results: list[CaseResult] = []
    with progress_bar("conformance", total) as advance:
        for result in run_conformance(golden, config.exporter, timeout=config.timeout, arithmetic=config.arithmetic):
            results.append(result)
            advance(len(results), total)
    write_json(config.json, {"folder": str(config.folder), "cases": [asdict(one) | {"passed": one.passed} for one in results]})
    rows = [
        (
            one.case.name,
            "equal" if one.passed else "DIFFERENT",
            f"{one.largest_difference:.1e}",
            f"{one.of_allowed:.2f}",
            _text(one),
        )
        for one in results
    ]
    print_table("exporter and golden scenes", ("case", "result", "largest difference", "of what is allowed", ""), rows)
    failed = [one.case.name for one in results if not one.passed]
    if failed:
        raise UpcycleError(f"{len(failed)} of {total} cases differ: {', '.join(failed)}")
    console.print(f"all {total} cases are equal")


def _text(result: CaseResult) -> str:
    return "\n".join(result.problems) if result.problems else result.note


if __name__ == "__main__":
    sys.exit(run_command(command))
