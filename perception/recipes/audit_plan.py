"""What decides the numbers of an audit: the ways of uploading, the work of the attackers, and the frames of everybody.

Read next: `audit.py`, which measures a plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...core.errors import require, require_counts
from ...datasets.data_split import DataSplit
from ..evaluation.score import Protocol
from ..models.defences.table import DefenceConfig, describe_defences
from ..privacy.attacks.occupancy_decoder import DecoderSize
from .audit_cells import REBUILDING, AttackName
from .audit_membership import MembershipPlan
from .presets import Preset

UNDEFENDED = "undefended"
"""Name of the setting without defences, which every audit has."""


@dataclass(frozen=True, kw_only=True)
class AuditSetting:
    """One way of uploading."""

    name: str
    """Name in tables and files: letters, digits, `-` and `_`."""
    defences: tuple[DefenceConfig, ...] = ()
    """Defences between encoder and upload, in order."""
    codec: Literal["fp16", "int8"] = "fp16"
    """How features are stored."""

    @property
    def what(self) -> str:
        """Defences and codec as `upcycle3d audit --settings` takes them after the name."""
        return f"{describe_defences(self.defences)}@{self.codec}"

    def __str__(self) -> str:
        return f"{self.name}={self.what}"


@dataclass(frozen=True, kw_only=True)
class AuditBudget:
    """How much work the attackers put in. A weak attack measures nothing: compare numbers of equal budgets only."""

    attacker_frames: int = 150
    """Frames of the attacker at most."""
    victim_frames: int = 50
    """Frames that are scored at most; of membership, frames of each split."""
    steps: int = 800
    """Optimizer steps of the occupancy attack, with one frame each."""
    size: DecoderSize = DecoderSize()
    """Size of its network."""
    exact_frames: int = 10
    """Frames for which single points are computed; each takes seconds."""
    defence_steps: int = 400
    """Optimizer steps of the head of a region upload."""

    def __post_init__(self) -> None:
        require_counts(
            "AuditBudget",
            most=10_000_000,
            attacker_frames=self.attacker_frames,
            victim_frames=self.victim_frames,
            steps=self.steps,
            exact_frames=self.exact_frames,
            defence_steps=self.defence_steps,
        )


QUICK = AuditBudget(attacker_frames=60, victim_frames=12, steps=200, exact_frames=3, defence_steps=150)
"""A first look in minutes. Its attacks are weaker than those of the default budget: they find less than there is."""


@dataclass(frozen=True, kw_only=True)
class AuditUse:
    """How the uploads are used: the training whose AP stands beside what they give away."""

    preset: Preset
    """Its `upcycle` settings are taken; the detector is the audited one."""
    labeled: DataSplit
    """Labeled frames of the server."""
    fleet: DataSplit
    """Frames of the fleet, which are smashed by every setting."""
    validation: DataSplit
    """Frames to score on."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the training. One seed resolves no difference of a few points."""
    protocol: Protocol | None = None
    """How detections are scored. None takes that of the validation frames."""


@dataclass(frozen=True, kw_only=True)
class AuditPlan:
    """Everything that decides the numbers of an audit."""

    detector: Path
    """Run folder or file of the detector without defences."""
    labeled: DataSplit
    """Labeled frames that defences are fitted to. The attacker should not have them."""
    attacker: DataSplit
    """Frames of the attacker."""
    victims: DataSplit
    """Frames that are attacked. Neither detector nor attacker may have learned from them."""
    drives: Path | None = None
    """CSV file with the columns `id`, `drive` and perhaps `position` for the victims' frames, which linkage is scored with. None: linkage
    is not measured. Without positions the order of the ids counts."""
    membership: MembershipPlan | None = None
    """Frames that the detector was trained on, and reference detectors, for the attack on membership. None: it is not run."""
    settings: tuple[AuditSetting, ...] = ()
    """Ways of uploading. The undefended one is added where it is missing."""
    attacks: tuple[AttackName, ...] = REBUILDING
    """Attacks by name."""
    budget: AuditBudget = AuditBudget()
    """How much work the attackers put in."""
    seed: int = 0
    """Every random draw."""

    def __post_init__(self) -> None:
        names = [setting.name for setting in self.settings]
        require(len(set(names)) == len(names), f"the settings of an audit need different names, found {', '.join(names)}")
        wrong = [setting.name for setting in self.settings if setting.name == UNDEFENDED and setting.defences]
        require(
            not wrong,
            f"the setting {UNDEFENDED} is what all others are compared with, so it has no defences; give yours another name",
        )
        if UNDEFENDED not in names:
            object.__setattr__(self, "settings", (AuditSetting(name=UNDEFENDED), *self.settings))
