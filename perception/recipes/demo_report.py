"""The demo's report: one HTML file that tells the story with the run's own numbers and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...core.cut import CutSpec
from ...core.smashed_scene import SmashedScene
from ..server.methods import METHODS
from ..training.detector_files import load_detector
from ..training.run_folder import RunFolder
from ..viz.bev import bev_features_png, bev_panels_png
from ..viz.charts import Series, bar_chart, gap_chart, line_chart, stacked_bars
from ..viz.html import Block, Section, figure_png, figure_svg, key_numbers, page, paragraph, table, write_html
from .pipeline import Pipeline, TrialResult, closed_gap

PICTURED_FRAMES = 3
CAR_3D, CAR_BEV = "Car 3D 0.7", "Car BEV 0.7"


def write_report(
    path: Path, job: Pipeline, places: tuple[str, str], results: Mapping[str, TrialResult], summary: Mapping[str, object]
) -> None:
    """Write the report of a finished demo. places: names of source and target. summary: what ``result.json`` holds."""
    sections = [
        Section("What happened", _story(job, places, results, summary)),
        Section("Average precision", _scores(results)),
        Section("What the server learnt from: pseudo labels over time", _pseudo_labels(job, results)),
        Section("Training", _losses(job, results)),
        Section("What leaves the vehicle", _upload(job, summary)),
        Section("Seen from above, before and after", _pictures(job)),
        Section("Where the time went", _time(job, summary)),
    ]
    subtitle = (
        f"simulated {places[0]} to simulated {places[1]}, seed {job.config.seed}; one seed is an example, not a measurement"
    )
    write_html(path, page("upcycle3d: the main job on simulated data", sections, subtitle=subtitle))


def _number(summary: Mapping[str, object], name: str) -> float:
    value = summary[name]
    assert isinstance(value, int | float)
    return float(value)


def _story(
    job: Pipeline, places: tuple[str, str], results: Mapping[str, TrialResult], summary: Mapping[str, object]
) -> list[Block]:
    c, source, up = job.config, results["source_only"].student, results["upcycling"].student
    gap = closed_gap(source[CAR_BEV], up[CAR_BEV], results["oracle_full"].student[CAR_BEV])
    labeled, fleet, validation = (len(split.open()) for split in (c.labeled, c.fleet, c.validation))
    ratio = _number(summary, "bytes_per_frame") / _number(summary, "raw_bytes_per_frame")
    return [
        paragraph(
            f"A detector ({c.preset.detector.label}, small) was trained on {labeled} labelled scans of one simulated place ({places[0]}). A fleet "
            f"at another place ({places[1]}: other beams, mounting height, streets and car sizes) ran its vehicle half over {fleet} "
            "scans and handed over only the features at the cut, in smashed shards. The server verified the shards and went on training "
            "the server half with them: a teacher's boxes as hybrid pseudo labels, and labelled objects pasted as features (F-GT). "
            f"Every method started from the same checkpoint and was scored on {validation} target scans nobody trained on."
        ),
        key_numbers(
            [
                ("source only, BEV AP", source[CAR_BEV], "%", "the checkpoint as it is"),
                ("UpCycling, BEV AP", up[CAR_BEV], "%", "labelled source + smashed target"),
                ("closed gap, BEV", float("nan") if gap is None else gap, "%", "of source only to all target labels"),
                ("upload a frame", _number(summary, "bytes_per_frame") / 1000, "kB", f"{ratio:.1f} times the raw scan"),
            ]
        ),
        paragraph(
            "Read the numbers with care: the world is simulated, the detector is small, the validation set has a few hundred cars. "
            "How much the features give away about the scan is a question of its own; nothing here says that they hide it."
        ),
    ]


def _scores(results: Mapping[str, TrialResult]) -> list[Block]:
    header = ("method", "what it is", "3D 0.7", "BEV 0.7", "3D 0.5", "BEV 0.5", "EMA 3D 0.7", "EMA BEV 0.7")
    rows: list[tuple[str | float, ...]] = [
        (name, METHODS[name].summary, *r.student.values(), r.teacher[CAR_3D], r.teacher[CAR_BEV]) for name, r in results.items()
    ]
    blocks = [
        table(
            header,
            rows,
            "Car AP in percent, moderate, R40, at 3D or BEV overlap 0.7 and 0.5; the last epoch's student, then its EMA",
        )
    ]
    between = [n for n in results if n not in ("source_only", "oracle_full")]
    for metric, title in ((CAR_BEV, "BEV AP at IoU 0.7"), (CAR_3D, "3D AP at IoU 0.7")):
        values = {name: r.student[metric] for name, r in results.items()}
        chart = gap_chart(
            values["source_only"],
            [(name, values[name]) for name in between],
            values["oracle_full"],
            value_label="AP in percent",
            title=f"{title}: how much of the gap to the oracle each method closes",
        )
        blocks.append(
            figure_svg(
                chart,
                f"{title}. The oracle trains everything on the fleet's own labels; oracle_frozen keeps the source's encoder.",
            )
        )
    return blocks


def _pseudo_labels(job: Pipeline, results: Mapping[str, TrialResult]) -> list[Block]:
    names = [n for n in results if METHODS[n].unlabeled != "none"]
    logs = {n: RunFolder.open(job.folder / "methods" / n).metrics("pseudo_labels") for n in names}

    def chart(key: str, label: str, title: str) -> str:
        series = [Series(n, [m["step"] + 1 for m in log], [m[key] for m in log]) for n, log in logs.items()]
        return line_chart(series, "training step", label, title, height=260)

    return [
        paragraph(
            "The simulator knows the truth, so the teacher's labels can be judged; nothing of it reaches training. Precision: share of "
            "labels that meet a true car by 3D IoU 0.7. Recall: share of true cars (5 points or more) found so."
        ),
        figure_svg(chart("precision_70", "share of labels", "Precision at IoU 0.7"), "Precision of pseudo labels"),
        figure_svg(chart("recall_70", "share of true cars", "Recall at IoU 0.7"), "Recall of pseudo labels"),
        figure_svg(chart("labels_per_scene", "labels a scene", "Number of labels"), "Pseudo labels used in each scene"),
    ]


def _losses(job: Pipeline, results: Mapping[str, TrialResult]) -> list[Block]:
    blocks = []
    runs = {"source training": job.source} | {
        name: job.folder / "methods" / name for name in results if METHODS[name].trains != "nothing"
    }
    series = []
    for name, folder in runs.items():
        log = RunFolder.open(folder).metrics("train")
        series.append(Series(name, [m["step"] for m in log], [m["total_loss"] for m in log]))
    blocks.append(
        figure_svg(
            line_chart(series, "training step", "sum of loss terms", "Loss"),
            "Loss of each run; methods learn from different labels, so their levels do not compare",
        )
    )
    return blocks


def _upload(job: Pipeline, summary: Mapping[str, object]) -> list[Block]:
    stages = ("voxelize", "backbone", "codec", "write")
    detector, _ = load_detector(job.source)
    scene = job.store(detector)[0]
    sizes = [_number(summary, "raw_bytes_per_frame") / 1000, _number(summary, "bytes_per_frame") / 1000]
    return [
        paragraph(
            f"The cut is after the stride-8 sparse backbone: {scene.spec.channels} channels on the occupied cells of a "
            f"{scene.spec.shape[1]} x {scene.spec.shape[2]} map{_keypoints(scene.spec)}. Codec: {job.config.codec}, coordinates exact."
        ),
        figure_svg(
            bar_chart(
                ["raw scan, float32", f"smashed scene, {job.config.codec}"],
                sizes,
                value_label="kB a frame",
                title="Bytes a frame",
            ),
            "Bytes a frame: the raw camera-view scan and what is sent instead",
        ),
        figure_svg(
            stacked_bars(
                ["vehicle, one frame"],
                [(s, [_number(summary, f"{s}_ms")]) for s in stages],
                value_label="ms, median",
                title="Milliseconds a frame on this machine's CPU",
            ),
            "Milliseconds a frame by stage. A vehicle that runs the detector anyway pays for codec and write only.",
        ),
        figure_png(
            _features_picture(job, scene), "One smashed scene: norm of the features at the cut. This is all the server gets."
        ),
    ]


def _keypoints(spec: CutSpec) -> str:
    if spec.keypoints is None:
        return ""
    return f", and at most {spec.keypoints.count} keypoints, centres of occupied voxels, with {spec.keypoints.channels} channels"


def _features_picture(job: Pipeline, scene: SmashedScene) -> bytes:
    return bev_features_png(scene, class_names=job.config.preset.detector.class_names, title="features at the cut")


def _pictures(job: Pipeline) -> list[Block]:
    frames = job.config.validation.open()
    names = job.config.preset.detector.class_names
    x0, y0, _, x1, y1, _ = job.config.preset.detector.encoder.grid.range
    before, _ = load_detector(job.source)
    after, _ = load_detector(job.folder / "methods" / "upcycling")
    blocks = [paragraph("Points are simulated. Dashed boxes are ignored by the protocol (vans).")]
    # The frames with most cars say most.
    counts = [(len(labels) if (labels := frames.labels(i)) is not None else 0, i) for i in range(len(frames))]
    for _, index in sorted(counts, key=lambda c: (-c[0], c[1]))[:PICTURED_FRAMES]:
        frame = frames[index]
        panels = [
            (title, frame.points, frame.labels, detector.detect([frame.points])[0])
            for title, detector in (("source only", before), ("after UpCycling", after))
        ]
        picture = bev_panels_png(panels, class_names=names, view_range=(x0, y0, x1, y1))
        blocks.append(figure_png(picture, f"Target frame {frame.id}: truth and detections before and after"))
    return blocks


def _time(job: Pipeline, summary: Mapping[str, object]) -> list[Block]:
    rows = [(stage, seconds) for stage, seconds in job.seconds.items()]
    text = f"{_number(summary, 'seconds'):.0f} seconds in all, {_number(summary, 'peak_memory_gb'):.1f} GB at most (main process and twice its largest child)."
    return [paragraph(text), table(("stage", "seconds"), rows, "Seconds by stage; methods run two at a time")]
