"""Tables, plots, pictures and the page of an audit.

Read next: `audit.py`, which measures, and `perception/privacy/leak_share.py` for the leak share.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...core.config_json import config_to_json
from ...core.errors import InvalidInput
from ...core.files import write_atomically
from ...core.provenance import Provenance
from ...core.structures import PointCloud
from ...datasets.prepared import PreparedDataset
from ..privacy.frames import inside_grid
from ..privacy.geometry_metrics import GeometryScores
from ..privacy.leak_share import leak_share
from ..privacy.mean_score import MeanScore
from ..viz.bev import Panel, bev_panels_png
from ..viz.charts import Series, line_chart
from ..viz.html import Block, Section, figure_png, figure_svg, page, paragraph, table, tabs, write_html
from .audit import Audit, SettingResult
from .audit_cells import AttackName, RebuildMeasured
from .audit_membership import membership_table
from .audit_plan import UNDEFENDED
from .audit_summary import SUMMARY_FILE, SettingSummary
from .upcycling_report import TextTable

STRONGEST: AttackName = "occupancy"
"""The attack that plots and leak shares are about."""
PICTURE = "scenes.png"
"""Picture of the first victim's scan beside what the strongest attack made of its upload in each setting."""
LEAK_NOTE = (
    "Leak share L: what the occupancy attack rebuilds beyond a guess without upload; 0 is no more than the guess, 1 is as much as from "
    "undefended uploads"
)
"""The line below the summary table."""
_EXPLAINED: dict[AttackName, str] = {
    "nothing": "no upload: the typical scan of the attacker's frames",
    "cells": "the centers of the cells that were sent, without learning",
    "regression": "a network that regresses points by squared error",
    "chamfer": "the same network, trained by Chamfer distance",
    "coordinates": "the occupancy attack, shown cells without features",
    "occupancy": "the occupancy attack, shown everything that was sent",
    "voxels": "no attack but an upper bound: the voxel centers of the raw scan",
}


def summarize_audit(results: Sequence[SettingResult]) -> list[SettingSummary]:
    """Make one row per setting.

    Args:
        results: What was measured; the undefended setting among them.

    Returns:
        The rows in the same order.

    Raises:
        InvalidInput: A number is outside its limits.
    """
    plain = next((r for r in results if r.setting.name == UNDEFENDED), None)
    rows = []
    for result in results:
        try:
            rows.append(_summary(result, plain))
        except InvalidInput as error:
            name = result.setting.name
            raise InvalidInput(
                f"the cells of the setting {name!r} hold a number that no attack gives ({error}), so somebody edited them; delete the files "
                f"{name}__*.json in `cells`, and they are measured again"
            ) from error
    return rows


def _summary(result: SettingResult, plain: SettingResult | None) -> SettingSummary:
    found = result.rebuilt.get(STRONGEST)
    scores = found.matched if found else None
    exact = result.exact
    if exact is not None and not exact.raw_balls.scans + exact.lone_voxels.scans:
        exact = None  # a defence sends other channels than the encoder computes: nothing was solved, which is not the same as no point
    linked = result.linkage.scores if result.linkage else None
    metrics = {name for run in result.used.values() for name in run.student}
    return SettingSummary(
        name=result.setting.name,
        what=result.setting.what,
        bytes_per_frame=result.sent.bytes_per_frame,
        raw_bytes_per_frame=result.sent.raw_bytes_per_frame,
        encoder=result.sent.encoder,
        codec=result.setting.codec,
        noise_bound=result.sent.noise_bound,
        f_nothing=_f20(plain.rebuilt["nothing"]).mean if plain is not None and "nothing" in plain.rebuilt else None,
        f_scene=scores.scene.f_20cm.mean if scores else None,
        f_above_road=scores.background_above_road.f_20cm.mean if scores else None,
        f_objects={c.name: c.scores.f_20cm.mean for c in scores.objects} if scores else {},
        leak=_leak(result, plain),
        bits_per_voxel=found.bits_per_voxel if found else None,
        exact_per_scan=None if exact is None else exact.raw_balls.recovered_per_scan + exact.lone_voxels.recovered_per_scan,
        exact_chance=None if exact is None else exact.raw_balls.chance_per_scan + exact.lone_voxels.chance_per_scan,
        exact_tried=exact.lone_voxels.tried / exact.lone_voxels.sources
        if exact is not None and exact.lone_voxels.sources
        else None,
        neighbor=linked.neighbor.found if linked and linked.neighbor.asked else None,
        neighbor_chance=linked.neighbor.chance if linked and linked.neighbor.asked else None,
        ap={name: tuple(result.used[seed].student[name] for seed in sorted(result.used)) for name in sorted(metrics)},
    )


def _leak(result: SettingResult, plain: SettingResult | None) -> float | None:
    if plain is None or STRONGEST not in result.rebuilt or not {STRONGEST, "nothing"} <= plain.rebuilt.keys():
        return None
    f = [_f20(r) for r in (result.rebuilt[STRONGEST], plain.rebuilt["nothing"], plain.rebuilt[STRONGEST])]
    try:
        return leak_share(f[0], nothing=f[1], undefended=f[2]).value
    except InvalidInput:  # the attack sees no leak: there is none to share
        return None


def _f20(measured: RebuildMeasured) -> MeanScore:
    return measured.matched.scene.f_20cm


def summary_table(rows: Sequence[SettingSummary]) -> TextTable:
    """The frontier as a table: one row per setting.

    Args:
        rows: The settings.

    Returns:
        The table.
    """
    classes = list(dict.fromkeys(name for row in rows for name in row.f_objects))
    metrics = list(dict.fromkeys(name for row in rows for name in row.ap))
    header = (
        "setting",
        "kB per frame",
        "share of raw bytes",
        "F@0.2 m whole scene",
        "leak share L",
        "F@0.2 m above road",
        *(f"F@0.2 m in {name}" for name in classes),
        "bits per voxel",
        "exact points (by chance)",
        "places tried",
        "neighbors found (by chance)",
        *(f"AP {name}" for name in metrics),
    )
    body = [
        (
            row.name,
            f"{row.bytes_per_frame / 1000:.1f}",
            f"{row.bytes_per_frame / max(row.raw_bytes_per_frame, 1):.2f}",
            _number(row.f_scene, 3),
            _number(row.leak, 2),
            _number(row.f_above_road, 3),
            *(_number(row.f_objects.get(name), 3) for name in classes),
            _number(row.bits_per_voxel, 2),
            _with_chance(row.exact_per_scan, row.exact_chance, 2),
            "-" if row.exact_tried is None else f"{row.exact_tried:.1%}",
            _with_chance(row.neighbor, row.neighbor_chance, 3),
            *(_mean_and_spread(row.ap.get(name, ())) for name in metrics),
        )
        for row in rows
    ]
    caption = (
        "What each setting sends and gives away. F@0.2 m: F-score of the scan that the occupancy attack rebuilds, at 0.2 m and matched density; "
        "bits: what storing a scan costs who has its upload; exact points: per scan, within 1 cm; places tried: share of "
        "the keypoints or groups of cells in which the search for voxels without neighbors had time to look; neighbors: in time"
    )
    always = ("setting", "kB per frame", "share of raw bytes", "F@0.2 m whole scene", "leak share L")
    shown = [i for i, name in enumerate(header) if name in always or any(row[i] != "-" for row in body)]  # what somebody measured
    return TextTable(caption, tuple(header[i] for i in shown), [tuple(row[i] for i in shown) for row in body])


def weak_attacks(results: Sequence[SettingResult]) -> list[str]:
    """Find settings on which the occupancy attack learned too little, so that its row in the summary says nothing about the uploads.

    An attacker may always ignore the upload, so an attack that learned enough reaches at least the score of the typical scan; and it
    sees at least as much as the other attacks that rebuild a scan.

    Args:
        results: What was measured.

    Returns:
        One sentence per setting whose occupancy attack scores below another row of its table.
    """
    texts = []
    for result in results:
        scores: dict[AttackName, float | None] = {
            name: _f20(found).mean for name, found in result.rebuilt.items() if name != "voxels"
        }
        known: dict[AttackName, float] = {name: value for name, value in scores.items() if value is not None}
        own = known.get(STRONGEST)
        if own is None:
            continue
        best = max(known, key=lambda name: known[name])
        if known[best] > own:
            texts.append(
                f"the occupancy attack on the setting {result.setting.name!r} scores F@0.2 {own:.3f}, less than `{best}` with {known[best]:.3f}. It "
                "learned too little, so do not read its low score as protection. Give the attacker more steps and frames (--budget.steps, "
                "--budget.attacker-frames) in a new folder"
            )
    return texts


def attack_table(result: SettingResult) -> TextTable:
    """All attacks on one setting that rebuild a scan.

    Args:
        result: What was measured of the setting.

    Returns:
        The table.
    """
    header = (
        "attack", "F@0.1", "F@0.2", "F@0.5", "best F@0.2", "Chamfer m", "Hausdorff m", "above road F@0.2", "per voxel F@0.2",
        "objects F@0.2", "IoU", "points per voxel", "bits", "AP 3D of rebuilt",
    )  # fmt: skip
    body = [(name, *_attack_row(found)) for name, found in result.rebuilt.items()]
    return TextTable(f"Attacks on {result.setting}, at matched density", header, body)


def _attack_row(found: RebuildMeasured) -> tuple[str, ...]:
    s: GeometryScores = found.matched
    objects = ", ".join(f"{c.name} {c.scores.f_20cm}" for c in s.objects) or "-"
    ap = "-" if found.ap is None else ", ".join(f"{c.name} {c.box_3d_loose:.1f}" for c in found.ap.classes) or "-"
    return (
        str(s.scene.f_10cm), str(s.scene.f_20cm), str(s.scene.f_50cm), str(found.best.scene.f_20cm), str(s.chamfer), str(s.hausdorff),
        str(s.background_above_road.f_20cm), str(s.voxels.f_20cm), objects, str(s.iou), str(s.points_per_voxel),
        _number(found.bits_per_voxel, 2), ap,
    )  # fmt: skip


def attribute_table(results: Sequence[SettingResult]) -> TextTable | None:
    """What was told of objects and people, setting by setting.

    Args:
        results: What was measured.

    Returns:
        The table; None where nothing of this was measured.
    """
    body: list[tuple[str, ...]] = []
    for result in results:
        name, found, people = result.setting.name, result.attributes, result.people
        if found is not None:
            rows = [] if found.intensity is None else [("intensity, R2", found.intensity.r2)]
            rows += [] if found.classes is None else [("class of objects, balanced accuracy", found.classes.accuracy)]
            rows += [(f"cells of {c.class_name}, AUC", c.auc) for c in found.cells]
            rows += [(f"{s.side} of {s.class_name}, error in m", s.error) for s in found.sizes]
            body += [(name, what, *(f"{v:.3f}" for v in (r.nothing, r.coordinates, r.upload, r.raw))) for what, r in rows]
        if people is not None:
            views = (people.nothing, people.coordinates, people.upload, people.raw)
            body.append((name, "people found, AP", *(f"{v.average_precision:.3f}" for v in views)))
            errors = (v.height_error if v.found else None for v in views)  # without a person found there is no error
            body.append((name, "height of those found, error in cm", *(_number(v, 1) for v in errors)))
    if not body:
        return None
    header = ("setting", "what", "nothing", "coordinates", "upload", "raw scan")
    return TextTable(
        "Objects and people: what the same attacker tells with nothing, less, the upload, and the raw scan", header, body
    )


def write_audit_report(audit: Audit, results: Sequence[SettingResult], *, made_by: Provenance | None = None) -> Path:
    """Write `summary.json`, `audit.md`, `scenes.png` and `audit.html` into the folder of an audit.

    Args:
        audit: The audit.
        results: What was measured.
        made_by: Command, version and commit for the foot of the page.

    Returns:
        The page.
    """
    rows = summarize_audit(results)
    record = {
        "settings": [config_to_json(row) for row in rows],
        "victims": results[0].sent.frames if results else 0,
        "budget": config_to_json(audit.plan.budget),
    }
    write_atomically(audit.folder / SUMMARY_FILE, (json.dumps(record, indent=1) + "\n").encode())
    tables = [summary_table(rows), *(attack_table(result) for result in results if result.rebuilt)]
    told, member = attribute_table(results), audit.membership()
    tables += [*([told] if told else []), *([membership_table(member)] if member else [])]
    warnings = [f"Warning: {text}." for text in weak_attacks(results)]
    shown = [f"{t.caption}.\n\n{_markdown(t)}" for t in tables]
    text = "\n\n".join([*warnings, shown[0], f"{LEAK_NOTE}.", *shown[1:]]) + "\n"
    write_atomically(audit.folder / "audit.md", text.encode())
    pictures = _pictures(audit, results)
    if pictures:
        write_atomically(audit.folder / PICTURE, pictures[0][1])
    sections = [
        Section(
            "Summary", [paragraph(_lead(audit, rows)), *map(paragraph, warnings), _html(tables[0]), paragraph(f"{LEAK_NOTE}.")]
        ),
        Section("Frontier", _frontier(rows)),
        *(
            [Section("True and rebuilt", [tabs([(name, figure_png(png, _figure_text(name))) for name, png in pictures])])]
            if pictures
            else []
        ),
        Section("All attacks", [*_explained(results), *(_html(t) for t in tables[1:])]),
    ]
    title = "What uploads give away"
    path = audit.folder / "audit.html"
    write_html(path, page(title, sections, subtitle=str(audit.plan.detector), made_by=made_by))
    return path


def _lead(audit: Audit, rows: Sequence[SettingSummary]) -> str:
    budget = audit.plan.budget
    return (
        f"{len(rows)} settings, attacked by networks trained on at most {budget.attacker_frames} frames for {budget.steps} steps and scored on at "
        f"most {budget.victim_frames} other frames. A stronger attacker finds more: these numbers are lower bounds of what is given away, "
        "and no setting makes an upload harmless."
    )


def _figure_text(name: str) -> str:
    return f"The scan of one victim, and what the occupancy attack rebuilt of its upload: {name}"


def _explained(results: Sequence[SettingResult]) -> list[Block]:
    """What the names of the attacks mean, for a reader who has only the page."""
    names = dict.fromkeys(name for result in results for name in result.rebuilt)
    rows = [(name, _EXPLAINED[name]) for name in names if name in _EXPLAINED]
    return [table(("attack", "what it does"), rows, "The attacks that rebuild a scan")] if rows else []


def _frontier(rows: Sequence[SettingSummary]) -> list[Block]:
    """Leak against bytes, and leak against AP."""
    shown = [row for row in rows if row.f_scene is not None]
    if not shown:
        return [paragraph("The occupancy attack was not run, so there is no frontier.")]
    kb = [Series(row.name, [row.bytes_per_frame / 1000], [row.f_scene or 0.0]) for row in shown]
    blocks = [
        figure_svg(line_chart(kb, "kB per frame", "F@0.2 m of the rebuilt scan", "Leak and bytes"), "Lower left is better.")
    ]
    for metric in dict.fromkeys(name for row in shown for name in row.ap):
        points = [Series(row.name, [float(np.mean(row.ap[metric]))], [row.f_scene or 0.0]) for row in shown if row.ap.get(metric)]
        chart = line_chart(points, f"AP after UpCycling, {metric}", "F@0.2 m of the rebuilt scan", f"Leak and {metric}")
        blocks.append(figure_svg(chart, "Lower right is better."))
    return blocks


def _pictures(audit: Audit, results: Sequence[SettingResult]) -> list[tuple[str, bytes]]:
    """All settings together, then one picture per setting: the first victim's scan, and what the strongest attack made of its upload."""
    frames: PreparedDataset = audit.plan.victims.open()
    x0, y0, _, x1, y1, _ = audit.grid.range
    truth = Panel("true scan", inside_grid(frames[0].points, audit.grid))
    rebuilt: list[tuple[str, Panel]] = []
    for result in results:
        name, path = result.setting.name, audit.folder / "scenes" / f"{result.setting.name}__{STRONGEST}.npy"
        if path.exists():
            xyz = torch.from_numpy(np.load(path, allow_pickle=False))
            points = PointCloud(xyz=xyz, features=torch.zeros(len(xyz), 0), feature_names=())
            rebuilt.append((name, Panel(f"rebuilt: {name}" if len(xyz) else f"rebuilt: {name}, no points", points)))

    def picture(panels: list[Panel]) -> bytes:
        columns = 2 if len(panels) in (2, 4) else 3
        return bev_panels_png(panels, class_names=(), view_range=(x0, y0, x1, y1), columns=columns)

    together = [("all", picture([truth, *(panel for _, panel in rebuilt)]))] if len(rebuilt) > 1 else []
    return together + [(name, picture([truth, panel])) for name, panel in rebuilt]


def _html(text: TextTable) -> Block:
    return table(text.header, text.rows, text.caption)


def _markdown(text: TextTable) -> str:
    lines = ["| " + " | ".join(text.header) + " |", "|" + "---|" * len(text.header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in text.rows)])


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def _with_chance(value: float | None, chance: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f} ({_number(chance, decimals)})"


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"
