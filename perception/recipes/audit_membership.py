"""The attack on membership as a part of an audit: which frames and reference detectors it takes, and what they must fulfil.

Read next: `perception/privacy/attacks/membership.py`, the attack.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import InvalidInput, require
from ...core.frame import Frame
from ...datasets.data_split import DataSplit
from ..models.detector import Detector
from ..privacy.attacks.membership import MembershipLeak, ReferenceDetector, attack_membership
from ..privacy.ranking_metrics import MembershipScore
from ..training.detector_files import DETECTOR_FILE, load_detector
from .audit_inputs import check_audit_classes
from .training_frames import shared_frames_note, training_is_recorded
from .upcycling_report import TextTable


@dataclass(frozen=True, kw_only=True)
class ReferencePlan:
    """A detector that the attacker trained, so that it knows the members."""

    detector: Path
    """Its run folder or file. It has the classes and the cut of the audited detector."""
    members: DataSplit
    """Labeled frames that it was trained on."""
    others: DataSplit
    """Labeled frames of the same kind that neither it nor the audited detector was trained on."""


@dataclass(frozen=True, kw_only=True)
class MembershipPlan:
    """What an attack on membership needs besides the victims, which are the frames that the detector was not trained on."""

    members: DataSplit
    """Labeled frames that the audited detector was trained on, of the same kind as the victims."""
    references: tuple[ReferencePlan, ...] = ()
    """Detectors of the attacker. Without one, a score may say no more than which frames are hard."""

    def digest(self) -> str:
        """Hash the frames and weights, so that the result of others is never taken for this one.

        Returns:
            16 hexadecimal digits.
        """
        parts = [self.members.summary()]
        for r in self.references:
            path = r.detector / DETECTOR_FILE if r.detector.is_dir() else r.detector
            parts += [hashlib.sha256(path.read_bytes()).hexdigest(), r.members.summary(), r.others.summary()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def check_membership(plan: MembershipPlan, detector: Detector, path: Path, victims: DataSplit) -> None:
    """Check that detectors and frames fit, and that no frame is in two places.

    Args:
        plan: Members and references.
        detector: The audited detector.
        path: Where it was read from.
        victims: Frames that it was not trained on.

    Raises:
        InvalidInput: No member is in the detector's training, a split has no labels or other classes, a reference has other classes or another cut, or a frame is in two places.
    """
    members = plan.members.open()
    if training_is_recorded(path) and shared_frames_note(path, members) is None:
        raise InvalidInput(
            f"no frame of --members ({plan.members}) is in the training that the run folder of {path} names, so there is no member to find; give the "
            "split that the detector was trained on"
        )
    places = [("--members", plan.members), ("--victims", victims)]
    for r in plan.references:
        other = load_detector(r.detector)
        require(
            other.class_names == detector.class_names and other.spec == detector.spec,
            f"the reference {r.detector} has other classes or another cut than {path}; train it with the same preset and classes",
        )
        places += [(f"the members of {r.detector}", r.members), (f"the others of {r.detector}", r.others)]
    for number, (role, split) in enumerate(places):
        check_audit_classes(detector, path, split)
        split.open().check_labeled()
        of_references = number > 1
        for earlier, seen in places[: 2 if of_references else number]:
            _check_apart(split, role, seen, earlier)
        if of_references and number % 2:  # the members of the same reference stand before its others
            _check_apart(split, role, places[number - 1][1], places[number - 1][0])


def _check_apart(split: DataSplit, role: str, seen: DataSplit, earlier: str) -> None:
    """Refuse frames that two splits of one dataset share."""
    if split.root.resolve() == seen.root.resolve() and (both := {*split.open().ids} & {*seen.open().ids}):
        raise InvalidInput(
            f"{len(both)} frames of {role} ({split}), such as {min(both)}, are among {earlier} ({seen}) too. An attack on membership needs "
            "frames that are in one place only; choose another split"
        )


def measure_membership(plan: MembershipPlan, detector: Detector, victims: DataSplit, *, most: int, seed: int) -> MembershipLeak:
    """Attack the membership of frames in the training set of a detector.

    Args:
        plan: Members and references.
        detector: The audited detector.
        victims: Frames that it was not trained on.
        most: Frames of each split at most.
        seed: Every random draw.

    Returns:
        The scores of every variant of the attack.
    """
    references = [
        ReferenceDetector(
            detector=load_detector(r.detector).eval(), members=_frames(r.members, most), others=_frames(r.others, most)
        )
        for r in plan.references
    ]
    return attack_membership(detector.eval(), _frames(plan.members, most), _frames(victims, most), references, seed=seed)


def membership_table(leak: MembershipLeak) -> TextTable:
    """How well the weights of the detector tell its training frames from others.

    Args:
        leak: What was measured.

    Returns:
        The table: one row for each way to tell.
    """
    ways: dict[str, MembershipScore | None] = {
        "loss of the frame": leak.loss,
        "confidence of the detections, without labels": leak.confidence,
        "loss compared with the references": leak.calibrated,
        "classifier that learned from the references": leak.shadow,
        "encoder file alone": leak.encoder,
        "encoder file compared with the references": leak.encoder_calibrated,
    }
    body = [(way, *_membership_row(score)) for way, score in ways.items() if score is not None]
    header = ("what tells members", "AUC (by chance)", "found at 1 % false alarms", "found at 5 % false alarms")
    caption = (
        f"Training frames of the detector: {leak.members} members, {leak.others} others, {leak.references} reference detectors"
    )
    return TextTable(caption, header, body)


def _membership_row(score: MembershipScore) -> tuple[str, ...]:
    found = (score.found_at_1_percent, score.found_at_5_percent)
    area = f"{score.auc.value:.3f} (0.5 ± {score.auc.chance_deviation:.3f})"
    return area, *("-" if value is None else f"{value:.3f}" for value in found)


def _frames(split: DataSplit, most: int) -> list[Frame]:
    """Frames of a split, spread over it."""
    frames = split.open()
    return [frames[i] for i in range(0, len(frames), max(1, math.ceil(len(frames) / most)))]
