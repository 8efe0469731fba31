"""The summary of an audit: one row per setting, as tables, plots and stores take it.

Read next: `audit_report.py`, which makes it of what was measured.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ...core.config_json import config_from_json
from ...core.errors import InvalidInput, require, require_counts, require_numbers
from ...core.foreign_text import is_one_name
from ...core.strict_json import read_json

SUMMARY_FILE = "summary.json"
"""The file in the folder of an audit."""
_MOST_BYTES = 4 << 20
"""Bytes of the largest summary that is read; one of a hundred settings has some hundred thousand."""
_MOST_NAMES = 1000
"""Classes or metrics of a setting."""


@dataclass(frozen=True, kw_only=True)
class SettingSummary:
    """One row of the summary: a setting, its price and what it gives away."""

    name: str
    """Name of the setting."""
    what: str
    """Defences and codec, as in `region+noise:sigma=0.1@int8`."""
    bytes_per_frame: float
    """Bytes of an encoded scene."""
    raw_bytes_per_frame: float
    """Bytes of the raw scan."""
    cells_per_frame: float
    """Cells that are sent."""
    encoder: str
    """Fingerprint of the encoder and its defences, without a rig. `upcycle3d ingest --audit` finds the setting of its store by it."""
    codec: str
    """How features are stored."""
    noise_bound: float | None
    """Least error in meters of an unbiased attacker, where noise proves one."""
    f_nothing: float | None
    """F-score at 0.2 m of the typical scan, which no upload is needed for; None where it was not measured."""
    f_scene: float | None
    """F-score at 0.2 m of the strongest attack, whole scene, matched density."""
    f_above_road: float | None
    """The same for the background above the road."""
    f_objects: dict[str, float | None]
    """The same inside objects, by class."""
    leak: float | None
    """Leak share of the whole scene."""
    bits_per_voxel: float | None
    """Code length of a scan given the upload."""
    exact_per_scan: float | None
    """Points computed to the centimeter, per scan."""
    exact_chance: float | None
    """The same for guesses of as many voxel centers."""
    exact_tried: float | None = None
    """Share of the places that the search for voxels without neighbors had time for: keypoints with no other one close by, or groups of cells
    that stand alone. None where there was no such place, or nobody searched."""
    neighbor: float | None
    """Share of scenes whose neighbor in time is found."""
    neighbor_chance: float | None
    """The same by guessing."""
    ap: dict[str, tuple[float, ...]]
    """AP after UpCycling, by metric: one value per seed."""

    def __post_init__(self) -> None:
        names = (self.name, *self.f_objects, *self.ap)
        require(
            len(names) <= _MOST_NAMES and all(map(is_one_name, names)),
            "a setting, a class or a metric has no name that can be shown, or there are too many",
        )
        require(self.codec in ("fp16", "int8"), "the codec must be fp16 or int8")
        require(
            re.fullmatch("[0-9a-f]{64}", self.encoder) is not None, "the encoder must be a fingerprint of 64 hexadecimal digits"
        )
        shares = (self.f_nothing, self.f_scene, self.f_above_road, *self.f_objects.values(), self.exact_tried, self.neighbor)
        amounts = (
            self.bytes_per_frame,
            self.raw_bytes_per_frame,
            self.cells_per_frame,
            self.noise_bound,
            self.bits_per_voxel,
            self.exact_per_scan,
        )
        require_numbers("SettingSummary", least=0, most=1, shares=_known(*shares, self.neighbor_chance))
        require_numbers("SettingSummary", least=0, most=1e12, amounts=_known(*amounts, self.exact_chance))
        require_numbers("SettingSummary", least=-sys.float_info.max, most=sys.float_info.max, leak=_known(self.leak))


@dataclass(frozen=True, kw_only=True)
class AttackStrength:
    """How much work stands behind the numbers of an audit: a weak attack measures little."""

    attacker_frames: int
    """Frames that the attacks learned from."""
    victim_frames: int
    """Frames that they were scored on."""
    steps: int
    """Optimizer steps of the occupancy attack."""
    seed: int
    """Every random draw."""
    quick: bool
    """Whether it was a first look, with attacks too weak to choose a defence by."""

    def __post_init__(self) -> None:
        counts = {"attacker_frames": self.attacker_frames, "victim_frames": self.victim_frames, "steps": self.steps}
        require_counts("AttackStrength", least=0, most=10_000_000, **counts)

    def __str__(self) -> str:
        first = "a first look (--quick) with weak attacks, no ground to choose a defence: " if self.quick else ""
        return (
            f"{first}{self.steps} steps on {self.attacker_frames} frames of the attacker, scored on {self.victim_frames} other frames, seed "
            f"{self.seed}"
        )


@dataclass(frozen=True, kw_only=True)
class AuditSummary:
    """What `summary.json` says."""

    settings: tuple[SettingSummary, ...]
    """One row per setting."""
    strength: AttackStrength
    """The work behind the rows."""


def read_audit_summary(folder: Path) -> AuditSummary:
    """Read the summary of an audit.

    Args:
        folder: Folder of the audit.

    Returns:
        The summary.

    Raises:
        InvalidInput: There is no summary, or the file is none.
    """
    path = folder / SUMMARY_FILE
    if not path.is_file():
        raise InvalidInput(f"{folder} holds no finished audit: there is no {SUMMARY_FILE}; run `upcycle3d audit --out {folder}`")
    record = read_json(
        path, "the summary of an audit", remedy=f"run `upcycle3d audit --out {folder}` again", max_bytes=_MOST_BYTES
    )
    try:
        return config_from_json(AuditSummary, record)
    except InvalidInput as error:
        raise InvalidInput(f"{path} is no summary of an audit: {error}; run `upcycle3d audit --out {folder}` again") from error


def _known(*numbers: float | None) -> list[float]:
    return [number for number in numbers if number is not None]


def sentence(row: SettingSummary) -> str:
    """Say in one sentence what was measured of a setting.

    Args:
        row: The setting.

    Returns:
        The sentence; it names what was not measured as such.
    """
    if row.f_scene is None:
        geometry = "no trained attack on geometry was run"
    else:
        floor = "" if row.f_nothing is None else f", a guess without upload {row.f_nothing:.2f}"
        above = "" if row.f_above_road is None else f", above the road {row.f_above_road:.2f}"
        cars = "".join(f", {name} {value:.2f}" for name, value in row.f_objects.items() if value is not None)
        geometry = f"a trained attack rebuilds scans with F@0.2 m {row.f_scene:.2f}{above}{cars}{floor}"
        if row.f_nothing is not None and row.f_scene < row.f_nothing:
            geometry += ", so the attack learned too little to measure anything"
    exact = "single points were not computed"
    if row.exact_per_scan is not None:
        exact = f"{row.exact_per_scan:.1f} single points per scan were computed to 1 cm (by chance {row.exact_chance or 0:.1f})"
        exact += "" if row.exact_tried is None else f", with {row.exact_tried:.0%} of the places tried that could hold one"
    return f"{row.codec}: {geometry}; {exact}"
