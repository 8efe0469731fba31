"""The page of an audit, with its tables, plots and pictures.

Read next: `audit_tables.py`, the tables, and `audit.py`, which measures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...core.config_json import config_to_json
from ...core.files import write_atomically
from ...core.provenance import Provenance
from ...core.structures import PointCloud
from ...datasets.prepared import PreparedDataset
from ..privacy.frames import inside_grid
from ..viz.bev import Panel, bev_panels_png
from ..viz.charts import Series, line_chart
from ..viz.html import Block, Section, figure_png, figure_svg, page, paragraph, table, tabs, write_html
from .audit import Audit, SettingResult
from .audit_cells import AttackName
from .audit_membership import membership_table
from .audit_plan import QUICK
from .audit_summary import SUMMARY_FILE, AttackStrength, AuditSummary, SettingSummary
from .audit_tables import LEAK_NOTE, STRONGEST, attack_table, attribute_table, summarize_audit, summary_table, weak_attacks
from .upcycling_report import TextTable

PICTURE = "scenes.png"
"""Picture of the first victim's scan beside what the strongest attack made of its upload in each setting."""
_EXPLAINED: dict[AttackName, str] = {
    "nothing": "no upload: the typical scan of the attacker's frames",
    "cells": "the centers of the cells that were sent, without learning",
    "regression": "a network that regresses points by squared error",
    "chamfer": "the same network, trained by Chamfer distance",
    "coordinates": "the occupancy attack, shown cells without features",
    "occupancy": "the occupancy attack, shown everything that was sent",
    "voxels": "no attack but an upper bound: the voxel centers of the raw scan",
}


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
    strength = attack_strength(audit, results)
    summary = AuditSummary(settings=tuple(rows), strength=strength)
    write_atomically(audit.folder / SUMMARY_FILE, (json.dumps(config_to_json(summary), indent=1) + "\n").encode())
    tables = [summary_table(rows), *(attack_table(result) for result in results if result.rebuilt)]
    told, member = attribute_table(results), audit.membership()
    tables += [*([told] if told else []), *([membership_table(member)] if member else [])]
    warnings = [f"Warning: {text}." for text in weak_attacks(results)]
    shown = [f"{t.caption}.\n\n{_markdown(t)}" for t in tables]
    lead = _lead(rows, strength)
    foot = [] if made_by is None else [made_by.sentence(), f"    {made_by.command}"]
    text = "\n\n".join([lead, *warnings, shown[0], f"{LEAK_NOTE}.", *shown[1:], *foot]) + "\n"
    write_atomically(audit.folder / "audit.md", text.encode())
    pictures = _pictures(audit, results)
    if pictures:
        write_atomically(audit.folder / PICTURE, pictures[0][1])
    sections = [
        Section("Summary", [paragraph(lead), *map(paragraph, warnings), _html(tables[0]), paragraph(f"{LEAK_NOTE}.")]),
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


def attack_strength(audit: Audit, results: Sequence[SettingResult]) -> AttackStrength:
    """Say how much work stands behind the numbers of an audit.

    Args:
        audit: The audit.
        results: What was measured.

    Returns:
        Frames and steps as they were used.
    """
    budget = audit.plan.budget
    return AttackStrength(
        attacker_frames=min(len(audit.plan.attacker.open()), budget.attacker_frames),
        victim_frames=results[0].sent.frames if results else 0,
        steps=budget.steps,
        seed=audit.plan.seed,
        quick=budget == QUICK,
    )


def _lead(rows: Sequence[SettingSummary], strength: AttackStrength) -> str:
    return (
        f"{len(rows)} setting{'s' if len(rows) != 1 else ''}. The work behind the numbers: {strength}. A stronger attacker finds more: these numbers are lower bounds of what is "
        "given away, and no setting makes an upload harmless."
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
