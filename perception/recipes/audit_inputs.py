"""Refuses inputs of an audit whose numbers would look right and be wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...core.errors import InvalidInput
from ...core.scan_comparison import rig_differences
from ...datasets.data_split import DataSplit
from ..models.defences.table import DefenceConfig
from ..models.detector import Detector
from ..models.encoders.defended import DefendedEncoder, defences_of
from .defend import fresh_defences
from .training_frames import shared_frames_note


def check_audit_inputs(
    detector: Detector, path: Path, *, attacker: DataSplit, labeled: DataSplit, victims: DataSplit, warn: Callable[[str], None]
) -> None:
    """Check that detector and frames fit, and that no victim is a frame that an attack or a defence learns from.

    Args:
        detector: The audited detector.
        path: Where it was read from.
        attacker: Frames of the attacker.
        labeled: Frames that defences are fitted to.
        victims: Frames that are scored.
        warn: Called with a sentence where a rig is not that of the training.

    Raises:
        InvalidInput: The detector carries defences, the attacker has too few frames, labels have other classes than the detector, or a victim is among the other frames or
            among those of the detector's training, as far as its run folder names them.
    """
    if isinstance(detector.encoder, DefendedEncoder):
        raise InvalidInput(
            f"{path} carries defences already ({defences_of(detector.encoder)}), and an audit compares with uploads without any; give the "
            "detector that it was made from, and name the defences in --settings, as in guarded=region+noise:sigma=0.1@fp16"
        )
    if (count := len(attacker.open())) < 2:
        raise InvalidInput(
            f"the attacker ({attacker}) has {count} frames; an attack needs two at least, to learn from and to choose a threshold"
        )
    for split in (attacker, victims):
        check_audit_classes(detector, path, split)
        frames = split.open()
        trained = detector.trained_on
        for warning in () if trained is None else rig_differences(frames.rig, trained, f"the rig of {frames.root}"):
            warn(f"warning: {warning}")
    for role, other in (("attacker", attacker), ("labeled", labeled)):
        if other.root.resolve() == victims.root.resolve() and (both := {*other.open().ids} & {*victims.open().ids}):
            raise InvalidInput(
                f"{len(both)} frames of the victims ({victims}), such as {min(both)}, are among the {role} ones ({other}) too. An attack is scored "
                "on frames that nothing has learned from; choose another split"
            )
    learned = shared_frames_note(path, victims.open())
    if learned is not None:
        raise InvalidInput(f"the victims ({victims}) are no new frames for {path}: {learned}")


def check_audit_classes(detector: Detector, path: Path, split: DataSplit) -> None:
    """Check that labels were prepared for the classes of a detector.

    Args:
        detector: The audited detector.
        path: Where it was read from.
        split: Frames, with labels or without.

    Raises:
        InvalidInput: The labels have other classes than the detector.
    """
    frames, names = split.open(), [name.casefold() for name in detector.class_names]
    if frames.labeled and [name.casefold() for name in frames.classes] != names[: len(frames.classes)]:
        raise InvalidInput(
            f"the dataset {frames.root} was prepared for the classes {', '.join(frames.classes)}, and {path} detects "
            f"{', '.join(detector.class_names)}; prepare it again into another folder with --classes {' '.join(detector.class_names)}"
        )


def check_audit_defences(detector: Detector, settings: Mapping[str, Sequence[DefenceConfig]], labeled: DataSplit) -> None:
    """Check that every setting can be made, before hours of attacks on the others.

    Args:
        detector: The audited detector.
        settings: Defences by the name of the setting.
        labeled: Frames that defences are fitted to.

    Raises:
        InvalidInput: The detector cannot have the defences of a setting, or the frames that they are fitted to have no labels.
    """
    guarded = {name: defences for name, defences in settings.items() if defences}
    for name, defences in guarded.items():
        try:
            fresh_defences(detector, defences)
        except InvalidInput as error:
            raise InvalidInput(f"the setting {name!r}: {error}") from error
    if guarded:
        labeled.open().check_labeled()
