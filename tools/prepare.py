"""`upcycle3d prepare`: a dataset on disk, checked, indexed and split, with its databases of objects to paste.

Read next: `prepare_layouts.py` and `prepare_readers.py` for the options of each layout, `datasets/raw.py`, which does the work.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Literal

import tyro

from ..core.ledger_rules import warnings_of
from ..datasets.object_summary import ObjectSummary, Size
from ..datasets.prepare import AbsurdDataError
from ..datasets.raw import RawReport, prepare_raw
from .console import console, print_table, print_warning, progress_bar, run_command, settle, write_json
from .prepare_layouts import PrepareFolder, PrepareKitti, PrepareLyft, PrepareNuScenes, PrepareWaymo
from .prepare_readers import (
    PrepareArgoverse2,
    PrepareBag,
    PrepareCvat,
    PrepareLabelCloud,
    PrepareOnce,
    PreparePandaset,
    PrepareSustechPoints,
)


def command(
    dataset: Annotated[PrepareKitti, tyro.conf.subcommand("kitti")]
    | Annotated[PrepareFolder, tyro.conf.subcommand("folder")]
    | Annotated[PrepareLyft, tyro.conf.subcommand("lyft")]
    | Annotated[PrepareNuScenes, tyro.conf.subcommand("nuscenes")]
    | Annotated[PrepareWaymo, tyro.conf.subcommand("waymo")]
    | Annotated[PrepareArgoverse2, tyro.conf.subcommand("argoverse2")]
    | Annotated[PrepareOnce, tyro.conf.subcommand("once")]
    | Annotated[PreparePandaset, tyro.conf.subcommand("pandaset")]
    | Annotated[PrepareLabelCloud, tyro.conf.subcommand("labelcloud")]
    | Annotated[PrepareSustechPoints, tyro.conf.subcommand("sustechpoints")]
    | Annotated[PrepareCvat, tyro.conf.subcommand("cvat")]
    | Annotated[PrepareBag, tyro.conf.subcommand("bag")],
) -> None:
    """Read every frame of a dataset once, check it, and write it for fast use. Kill it and start it again: nothing is done twice."""
    raw = dataset.open()
    if isinstance(dataset, PrepareKitti | PrepareFolder | PrepareBag) and dataset.scan.mirrors:
        axes = dataset.scan.axes
        console.print(
            f"--axes {' '.join(axes)} mirrors the scene: right for files whose own axes are left-handed, as CARLA's; otherwise left and right "
            "are swapped, which no check of the boxes can see",
            soft_wrap=True,
        )
    try:
        with progress_bar("prepare", len(raw.ids)) as advance:
            report = prepare_raw(
                raw,
                dataset.out,
                labeled=dataset.labeled,
                label_shares=dataset.label_shares,
                workers=dataset.workers,
                replace_splits=dataset.replace,
                on_progress=advance,
            )
    except AbsurdDataError as error:
        print_table("what was read", ("", "number", "share"), error.ledger.rows())
        raise
    frames = report.frames
    write_json(dataset.json, _json(report))
    _print(report)
    settle(frames.ledger, "what was read")
    said = warnings_of(frames.ledger)  # by `settle`
    for warning in report.warnings:
        if warning not in said:
            print_warning(warning)
    objects = f"; objects to paste in {frames.root / 'gt_database'}" if any(report.gt_objects.values()) else ""
    console.print(f"{frames.root}: prepared, with the splits {', '.join(frames.splits) or 'none'}{objects}", soft_wrap=True)


def _json(report: RawReport) -> dict[str, object]:
    frames = report.frames
    return {
        **asdict(frames),
        "root": str(frames.root),
        "gt_objects": dict(report.gt_objects),
        "objects": [asdict(summary) for summary in report.objects],
        "road_height": report.road_height,
        "warnings": list(dict.fromkeys((*report.warnings, *warnings_of(frames.ledger)))),
        "ledger": frames.ledger.to_json(),
    }


def _print(report: RawReport) -> None:
    frames = report.frames
    kept: dict[str, Literal["kept", ""]] = dict.fromkeys(frames.kept_splits, "kept")
    rows = [(name, count, report.gt_objects.get(name, "-"), kept.get(name, "")) for name, count in frames.splits.items()]
    print_table("prepared dataset", ("split", "frames", "objects to paste", "earlier"), rows)
    print_table(
        "labeled objects (meters)",
        ("class", "boxes", "mean length x width x height", "usual", "points per box", "distance", "bottom above road"),
        [_row(summary) for summary in report.objects],
    )
    weightless = sum(frames.ledger.types_ignored.values())
    ignored = f", {weightless} of weight 0" if weightless else ""
    if any(summary.above_road is None for summary in report.objects):
        console.print("'-' in the last column: too few boxes of this class have points of the road near them")
    console.print(
        f"{frames.frames} frames ({frames.reused_frames} were already there), {frames.points:,} points, {frames.boxes} boxes, "
        f"{frames.empty_boxes} without a point{ignored}"
    )
    if report.road_height is not None:
        console.print(
            f"the road lies at z = {report.road_height:.2f} m in the prepared scans; presets expect it at 0, or at -1.7 where they are "
            "unshifted (docs/presets.md)",
            soft_wrap=True,
        )
    if frames.failures:
        print_table("left out", ("frame", "why"), [(f.id, f.reason) for f in frames.failures])


def _row(summary: ObjectSummary) -> tuple[object, ...]:
    def size(values: Size | None) -> str:
        return "-" if values is None else " x ".join(f"{value:.2f}" for value in values)

    return (
        summary.name,
        summary.boxes,
        size(summary.size),
        size(summary.usual),
        "-" if summary.points is None else f"{summary.points:.0f}",
        "-" if summary.distance is None else f"{summary.distance[0]:.0f} to {summary.distance[1]:.0f}",
        "-" if summary.above_road is None else f"{summary.above_road:+.2f}",
    )


if __name__ == "__main__":
    sys.exit(run_command(command))
