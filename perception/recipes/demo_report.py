"""The demo's report: one HTML file that tells the story with the run's own numbers and pictures.

Read next: `demo.py`, whose result it shows, and `perception/viz/html.py`, which makes the page.
"""

from __future__ import annotations

from pathlib import Path

from ...core.cut import CutSpec
from ...core.provenance import provenance_of_process
from ...core.smashed_scene import SmashedScene
from ..server.methods import METHODS
from ..training.detector_files import load_detector
from ..training.run_folder import RunFolder
from ..viz.bev import bev_features_png, bev_panels_png
from ..viz.charts import Series, bar_chart, gap_chart, line_chart, stacked_bars
from ..viz.html import Block, Section, figure_png, figure_svg, key_numbers, page, paragraph, table, write_html
from .audit_report import PICTURE
from .audit_summary import sentence
from .demo import CAR_3D, CAR_BEV, DEMO_BUDGET, DemoResult
from .method_styles import METHOD_STYLES, style_of

PICTURED_FRAMES = 3
_NEXT = (
    ("Prepare labeled frames in KITTI's layout, or choose another layout.", "upcycle3d prepare kitti KITTI --out data/kitti"),
    ("Train the source model.", "upcycle3d train kitti_small --data data/kitti:train --out runs/source"),
    ("Extract features on the vehicle.", "upcycle3d extract --detector runs/source --scans SCANS --out shards"),
    ("Take the shards into a store.", "upcycle3d ingest shards --store store --detector runs/source"),
    (
        "Learn from the store.",
        "upcycle3d upcycle kitti_small --data data/kitti:train --detector runs/source --store store --out runs/upcycled",
    ),
    ("Score the result.", "upcycle3d evaluate run --detector runs/upcycled --data data/kitti:val"),
)
"""Commands of the same job on data of one's own."""


def write_report(path: Path, demo: DemoResult) -> None:
    """Write the report of a finished demo.

    Args:
        path: HTML file to write.
        demo: The finished demo.
    """
    sections = [
        Section("What happened", _story(demo)),
        Section("Average precision", _scores(demo)),
        Section("Training data of the server: pseudo labels over time", _pseudo_labels(demo)),
        Section("Training", _losses(demo)),
        Section("What leaves the vehicle", _smashed_scene(demo)),
        Section("What an attacker rebuilds", _leak(demo)),
        Section("Detections in BEV, before and after", _pictures(demo)),
        Section("Where the time went", _time(demo)),
    ]
    subtitle = f"simulated {demo.source} to simulated {demo.target}, seed {demo.job.config.seed}; one seed is an example, not a measurement"
    title = "upcycle3d: the pipeline on simulated data"
    write_html(path, page(title, sections, subtitle=subtitle, made_by=provenance_of_process(), next_steps=_NEXT))


def _story(demo: DemoResult) -> list[Block]:
    c, source, up = demo.job.config, demo.results["source_only"].student, demo.results["upcycling"].student
    gap = demo.closed_gap(CAR_BEV, "oracle_full")
    labeled, fleet, validation = (len(split.open()) for split in (c.labeled, c.fleet, c.validation))
    smashed = demo.extraction["bytes_per_frame"]
    return [
        paragraph(
            f"A small {c.preset.detector.label} was trained on {labeled} labeled scans of one simulated domain ({demo.source}). A fleet "
            f"in another domain ({demo.target}: other beams, mounting height, streets and car sizes) ran the detector's encoder on "
            f"{fleet} scans and handed over only the features at the cut, in shards. The server verified the shards and trained the "
            "decoder further: the boxes of a teacher served as hybrid labels, and labeled objects were pasted as features (F-GT). "
            f"Every method started from the same source model and was scored on {validation} target scans that no training saw."
        ),
        key_numbers(
            [
                ("source only, BEV AP", source[CAR_BEV], "%", "the source model as it is"),
                ("UpCycling, BEV AP", up[CAR_BEV], "%", "labeled source + smashed target"),
                ("closed gap, BEV", float("nan") if gap is None else gap, "%", "from the source model to all target labels"),
                (
                    "smashed scene",
                    smashed / 1000,
                    "kB",
                    f"{smashed / demo.extraction['raw_bytes_per_frame']:.1f} times the raw scan",
                ),
            ]
        ),
        paragraph(
            "Read the numbers with care: the world is simulated, the detector is small, and the validation set has a few hundred cars. "
            "The features do not hide the scan: see below what an attacker rebuilds from them."
        ),
    ]


def _leak(demo: DemoResult) -> list[Block]:
    folder, row = demo.job.folder / "audit", demo.leak
    blocks: list[Block] = [
        paragraph(
            f"Whoever has the encoder file and scans of his own can train a network that turns uploads back into scans. One such network "
            f"learned for {DEMO_BUDGET.steps} steps from {DEMO_BUDGET.attacker_frames} frames and was scored on {DEMO_BUDGET.victim_frames} "
            f"others: {sentence(row)}. It is a weak attacker; a longer training finds more. Region uploads and other "
            "defences, and what each costs: `upcycle3d audit`, docs/privacy.md."
        )
    ]
    if (folder / PICTURE).exists():
        blocks.append(
            figure_png((folder / PICTURE).read_bytes(), "A scan of the fleet, and what the attacker made of its upload")
        )
    return blocks


def _scores(demo: DemoResult) -> list[Block]:
    header = ("method", "what it is", "3D 0.7", "BEV 0.7", "3D 0.5", "BEV 0.5", "EMA 3D 0.7", "EMA BEV 0.7")
    rows: list[tuple[str | float, ...]] = [
        (name, METHODS[name].summary, *r.student.values(), r.teacher[CAR_3D], r.teacher[CAR_BEV])
        for name, r in demo.results.items()
    ]
    caption = "Car AP in percent, moderate, R40, at 3D or BEV IoU 0.7 and 0.5: the student after the last step, then its EMA"
    blocks = [table(header, rows, caption)]
    between = [n for n in demo.results if n not in ("source_only", "oracle_full")]
    for metric, title in ((CAR_BEV, "BEV AP at IoU 0.7"), (CAR_3D, "3D AP at IoU 0.7")):
        values = {name: r.student[metric] for name, r in demo.results.items()}
        chart = gap_chart(
            values["source_only"],
            [(name, values[name]) for name in between],
            values["oracle_full"],
            value_label="AP in percent",
            title=f"{title}: how much of the gap to the oracle each method closes",
            styles={**METHOD_STYLES, "source-only": style_of("source_only"), "oracle": style_of("oracle_full")},
        )
        explained = "oracle_full trains everything on the fleet's own labels; oracle_frozen keeps the source model's encoder."
        blocks.append(figure_svg(chart, f"{title}. {explained}"))
    return blocks


def _pseudo_labels(demo: DemoResult) -> list[Block]:
    names = [n for n in demo.results if METHODS[n].unlabeled != "none"]
    logs = {n: RunFolder.open(demo.job.method_folder(n)).metrics("pseudo_labels") for n in names}

    def chart(key: str, label: str, title: str) -> str:
        series = [Series(n, [m["step"] + 1 for m in log], [m[key] for m in log], style_of(n)) for n, log in logs.items()]
        return line_chart(series, "training step", label, title, height=260)

    return [
        paragraph(
            "The simulator knows the truth, so the teacher's labels can be measured. The truth never reaches training. Precision is the "
            "share of labels that match a true car with a 3D IoU of 0.7. Recall is the share of true cars (with 5 points or more) that "
            "are matched."
        ),
        figure_svg(chart("precision_70", "share of labels", "Precision at IoU 0.7"), "Precision of pseudo labels"),
        figure_svg(chart("recall_70", "share of true cars", "Recall at IoU 0.7"), "Recall of pseudo labels"),
        figure_svg(chart("labels_per_scene", "labels per scene", "Number of labels"), "Pseudo labels used in each scene"),
    ]


def _losses(demo: DemoResult) -> list[Block]:
    runs = {"source training": demo.job.source_model} | {
        name: demo.job.method_folder(name) for name in demo.results if METHODS[name].trains != "nothing"
    }
    series = []
    for name, folder in runs.items():
        log = RunFolder.open(folder).metrics("train")
        series.append(Series(name, [m["step"] for m in log], [m["total_loss"] for m in log], style_of(name)))
    chart = line_chart(series, "training step", "sum of loss terms", "Loss")
    return [figure_svg(chart, "Loss of each run. Methods learn from different labels, so their levels do not compare.")]


def _smashed_scene(demo: DemoResult) -> list[Block]:
    job, numbers = demo.job, demo.extraction
    detector = load_detector(job.source_model)
    scene = job.store(detector)[0]
    sizes = [numbers["raw_bytes_per_frame"] / 1000, numbers["bytes_per_frame"] / 1000]
    return [
        paragraph(
            f"The cut is after the stride-8 sparse backbone: {scene.spec.channels} channels on the occupied cells of a "
            f"{scene.spec.shape[1]} x {scene.spec.shape[2]} map{_keypoints(scene.spec)}. Codec: {job.config.codec}, coordinates exact."
        ),
        figure_svg(
            bar_chart(
                ["raw scan, float32", f"smashed scene, {job.config.codec}"],
                sizes,
                value_label="kB per frame",
                title="Bytes per frame",
            ),
            "Bytes per frame: the raw scan in the camera's view, and what is sent instead",
        ),
        figure_svg(
            stacked_bars(
                ["vehicle, one frame"],
                [(stage, [numbers[f"{stage}_ms"]]) for stage in ("voxelize", "backbone", "codec", "write")],
                value_label="ms, median",
                title="Milliseconds per frame on this machine's CPU",
            ),
            "Milliseconds per frame by stage. A vehicle that runs the detector anyway pays for codec and write only.",
        ),
        figure_png(
            _features_picture(demo, scene), "One smashed scene: norm of the features at the cut. The server gets nothing else."
        ),
    ]


def _keypoints(spec: CutSpec) -> str:
    if spec.keypoints is None:
        return ""
    return f", and at most {spec.keypoints.count} keypoints, centers of occupied voxels, with {spec.keypoints.channels} channels"


def _features_picture(demo: DemoResult, scene: SmashedScene) -> bytes:
    return bev_features_png(scene, class_names=demo.job.config.preset.detector.class_names, title="features at the cut")


def _pictures(demo: DemoResult) -> list[Block]:
    job = demo.job
    frames, detector = job.config.validation.open(), job.config.preset.detector
    x0, y0, _, x1, y1, _ = detector.encoder.grid.range
    before = load_detector(job.source_model)
    after = load_detector(job.method_folder("upcycling"))
    blocks = [paragraph("Points are simulated. Dashed boxes are ignored by the protocol (vans).")]
    # The frames with the most cars show most.
    counts = [(len(labels) if (labels := frames.labels(i)) is not None else 0, i) for i in range(len(frames))]
    for _, index in sorted(counts, key=lambda c: (-c[0], c[1]))[:PICTURED_FRAMES]:
        frame = frames[index]
        panels = [
            (title, frame.points, frame.labels, network.detect([frame.points])[0])
            for title, network in (("source only", before), ("after UpCycling", after))
        ]
        picture = bev_panels_png(panels, class_names=detector.class_names, view_range=(x0, y0, x1, y1))
        blocks.append(figure_png(picture, f"Target frame {frame.id}: truth and detections before and after"))
    return blocks


def _time(demo: DemoResult) -> list[Block]:
    text = (
        f"{demo.seconds:.0f} seconds in total; at most {demo.peak_memory_gb:.1f} GB (main process and twice its largest child)."
    )
    rows = list(demo.job.seconds.items())
    return [paragraph(text), table(("stage", "seconds"), rows, "Seconds by stage; two methods run at a time")]
