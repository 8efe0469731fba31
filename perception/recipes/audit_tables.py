"""The tables of an audit: the frontier, the attacks on each setting, objects and people; and warnings where an attack is too weak.

Read next: `audit_report.py`, which puts them on a page.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...core.errors import InvalidInput
from ..privacy.geometry_metrics import GeometryScores
from ..privacy.leak_share import leak_share
from ..privacy.mean_score import MeanScore
from .audit import SettingResult
from .audit_cells import AttackName, RebuildMeasured
from .audit_plan import UNDEFENDED
from .audit_summary import SettingSummary
from .upcycling_report import TextTable

STRONGEST: AttackName = "occupancy"
"""The attack that plots and leak shares are about."""
LEAK_NOTE = (
    "Leak share L: what the occupancy attack rebuilds beyond a guess without upload; 0 is no more than the guess, 1 is as much as from "
    "undefended uploads"
)
"""The line below the summary table."""
_COLUMNS = {
    "F@0.2 m": "F@0.2 m: F-score of the scan that the occupancy attack rebuilds, at 0.2 m and matched density",
    "bits": "bits: what it costs to store a true scan for somebody who has the upload and the attack",
    "exact points": "exact points: points computed to 1 cm, per scan",
    "places tried": "places tried: of the keypoints with no other one close by, or groups of cells that stand alone, the share that the search "
    "for single points had time for",
    "neighbors": "neighbors: share of scenes whose neighbor in time is found",
}
"""What the columns of the summary mean, by the beginning of their names."""


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
        cells_per_frame=result.sent.cells_per_frame,
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
        "cells per frame",
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
            f"{row.cells_per_frame:,.0f}",
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
    always = ("setting", "kB per frame", "share of raw bytes", "cells per frame", "F@0.2 m whole scene", "leak share L")
    shown = [i for i, name in enumerate(header) if name in always or any(row[i] != "-" for row in body)]  # what somebody measured
    explained = [text for name, text in _COLUMNS.items() if any(header[i].startswith(name) for i in shown)]
    caption = f"What each setting sends and gives away. {'; '.join(explained)}"
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


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def _with_chance(value: float | None, chance: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f} ({_number(chance, decimals)})"


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"
