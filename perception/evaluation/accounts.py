"""What took part in an evaluation, what did not, and why: counts by type, and sentences for every number that is not what it seems.

An AP of 0 can mean that a detector finds nothing, that the labels spell a class in another way, or that KITTI's rules ignore every object.
These are told apart here. Read next: `score.py` and `tools/evaluate.py`, which print an account below the scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...core.foreign_text import shown
from ...core.ledger import Ledger
from ...datasets.kitti_text import MAX_OCCLUSION, MAX_TRUNCATION, MIN_HEIGHT, NEIGHBORS, KittiObjects
from .class_translation import did_you_mean, nearest_name
from .kitti import KittiResult
from .kitti_matching import SAMPLES

_MOST_TYPES = 40  # types of foreign files that a message or a ledger lists


@dataclass(frozen=True, kw_only=True)
class Account:
    """What an evaluation read and used."""

    ledger: Ledger
    """Frames, labels of scored classes, and types of labels that are not scored or count as neither right nor wrong."""
    labels: Mapping[str, int]
    """Objects in the labels by type, as spelled there."""
    detections: Mapping[str, int]
    """Detections by type, as spelled there."""
    scored_as: Mapping[str, str]
    """Class that a type is scored as, by type. Types that are missing here take no part."""
    frames_without_detections: int
    """Frames for which the detections hold nothing."""
    warnings: tuple[str, ...]
    """What is likely wrong: what was found, its likely cause, what to do."""
    notes: tuple[str, ...]
    """What must be known to read the scores."""

    def rows(self) -> tuple[tuple[str, int, int, str], ...]:
        """Give one row per scored class, and one per other type: its types, labels, detections, and the class ("-" for none)."""
        ignored = {t: "neither right nor wrong" for t in self.ledger.types_ignored}
        rows: dict[tuple[str, str], list[str]] = {}
        for kind in dict.fromkeys([*self.labels, *self.detections]):
            scored = self.scored_as.get(kind, ignored.get(kind, "-"))
            rows.setdefault((scored, "" if kind in self.scored_as else kind.casefold()), []).append(kind)
        return tuple(
            (
                ", ".join(kinds),
                sum(self.labels.get(kind, 0) for kind in kinds),
                sum(self.detections.get(kind, 0) for kind in kinds),
                scored,
            )
            for (scored, _), kinds in rows.items()
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values for a JSON file."""
        return {
            "ledger": self.ledger.to_json(),
            "types": {
                "labels": dict(self.labels),
                "detections": dict(self.detections),
                "frames_without_detections": self.frames_without_detections,
            },
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }

    def told(self, *, ledger: Ledger | None = None, warnings: Iterable[str] = (), notes: Iterable[str] = ()) -> Account:
        """Add to an account.

        Args:
            ledger: Further counts.
            warnings: Further warnings, which come first.
            notes: Further notes.

        Returns:
            The account with them.
        """
        counts = self.ledger if ledger is None else self.ledger + ledger
        return replace(self, ledger=counts, warnings=(*warnings, *self.warnings), notes=(*self.notes, *notes))


def count_types(frames: Iterable[KittiObjects]) -> Counter[str]:
    """Count objects by type.

    Args:
        frames: Content of label or detection files.

    Returns:
        Number of objects by type as spelled, DontCare left out.
    """
    return Counter(kind for frame in frames for kind in frame.types if kind.casefold() != "dontcare")


def extra_files(folder: Path, ids: Sequence[str], suffix: str) -> tuple[str, ...]:
    """Find files of detections that belong to no frame.

    Args:
        folder: Folder of the detection files.
        ids: Ids of the frames.
        suffix: End of the files' names, with the dot.

    Returns:
        Their names in order; hidden files and files of other kinds are left out.
    """
    known = set(ids)
    names = (p.name for p in folder.glob(f"*{suffix}") if not p.name.startswith(".") and p.stem not in known)
    return tuple(sorted(names))


def extra_files_warning(names: Sequence[str]) -> list[str]:
    """Say that detection files were not read.

    Args:
        names: What `extra_files` found.

    Returns:
        One sentence, or nothing.
    """
    if not names:
        return []
    few = ", ".join(shown(name, most=60) for name in names[:3]) + (", …" if len(names) > 3 else "")
    belong = "detection file belongs" if len(names) == 1 else "detection files belong"
    read = "is not read" if len(names) == 1 else "are not read"
    return [f"{len(names)} {belong} to none of the frames that are scored and {read} ({few}); check the list of ids"]


def account_of_types(
    *,
    labels: Mapping[str, int],
    detections: Mapping[str, int],
    label_classes: Mapping[str, str],
    detection_classes: Mapping[str, str],
    classes: Sequence[str],
    frames: int,
    frames_without_detections: int,
    neighbors: Sequence[str] = (),
    ignored: Sequence[str] = (),
) -> Account:
    """Compare the types of labels and detections with the classes that are scored.

    Args:
        labels: Objects in the labels by type.
        detections: Detections by type.
        label_classes: Scored class by type of the labels.
        detection_classes: Scored class by type of the detections.
        classes: The classes that are scored.
        frames: Number of frames.
        frames_without_detections: Frames without a detection.
        neighbors: Types that are expected in the labels although no class wants them.
        ignored: Types of which an object is neither right nor wrong to find, such as vans for cars; case does not matter.

    Returns:
        The account.
    """
    labels, detections = _most_frequent(labels), _most_frequent(detections)
    objects = {name: sum(n for kind, n in labels.items() if label_classes.get(kind) == name) for name in classes}
    found = {name: sum(n for kind, n in detections.items() if detection_classes.get(kind) == name) for name in classes}
    warnings: list[str] = []
    unscored = {kind: n for kind, n in labels.items() if kind not in label_classes}
    expected, weightless = ({kind.casefold() for kind in kinds} for kinds in (neighbors, ignored))
    for what, types, of in (("labels", labels, label_classes), ("detections", detections, detection_classes)):
        for kind, count in types.items():
            near = None if kind in of or kind.casefold() in expected else nearest_name(kind, classes)
            if near is not None or (kind not in of and what == "detections"):
                hint = f"; if they are meant to be {near}, rename them" if near else ""
                warnings.append(f"{count} {what} of the type {shown(kind)} are not scored{hint}")
    absent = [name for name in classes if not objects[name]]
    if absent and len(absent) == len(classes):
        there = f"they hold {_listed(labels)}" if labels else "they hold no object at all"
        warnings.append(f"the labels hold no object of the class {' or '.join(classes)}, so there is nothing to score: {there}")
    elif absent:
        warnings += [
            f"the labels hold no object of the class {name}, so it has no AP{did_you_mean(name, unscored)}"
            for name in absent
            if found[name]
        ]
    for name in classes:
        if objects[name] and not found[name]:
            there = f"The detections hold {_listed(detections)}" if detections else "There is no detection at all"
            warnings.append(f"no detection is a {name}, but the labels hold {objects[name]}: AP is 0. {there}")
    unheard = [name for name in absent if len(absent) < len(classes) and not found[name]]
    notes = [f"the labels hold no {' and no '.join(unheard)}, so there is no AP ('-')"] if unheard else []
    if frames_without_detections and sum(detections.values()):
        notes.append(f"{frames_without_detections} of {frames} frames have no detection")
    scored_as = {**dict(label_classes), **dict(detection_classes)}
    return Account(
        ledger=Ledger(
            scans=frames,
            boxes=objects,
            types_dropped={kind: n for kind, n in unscored.items() if kind.casefold() not in weightless},
            types_ignored={kind: n for kind, n in unscored.items() if kind.casefold() in weightless},
        ),
        labels=labels,
        detections=detections,
        scored_as={kind: name for kind, name in scored_as.items() if kind in labels or kind in detections},
        frames_without_detections=frames_without_detections,
        warnings=tuple(warnings),
        notes=tuple(notes),
    )


def account_of_kitti(
    result: KittiResult, truths: Sequence[KittiObjects], found: Sequence[KittiObjects], *, two_dimensional: bool = True
) -> Account:
    """Explain a result of KITTI's or ST3D's rules.

    Args:
        result: The result.
        truths: Labels per frame.
        found: Detections per frame.
        two_dimensional: Whether the labels have 2D boxes of their own, as in KITTI's protocol.

    Returns:
        The account.
    """
    classes = {name.casefold(): name for name in result.classes}
    labels, detections = count_types(truths), count_types(found)
    account = account_of_types(
        labels=labels,
        detections=detections,
        label_classes={kind: classes[kind.casefold()] for kind in labels if kind.casefold() in classes},
        detection_classes={kind: classes[kind.casefold()] for kind in detections if kind.casefold() in classes},
        classes=tuple(result.classes),
        frames=result.frames,
        frames_without_detections=sum(not len(frame) for frame in found),
        neighbors=tuple(other for others in NEIGHBORS.values() for other in others),
        ignored=tuple(other for name, others in NEIGHBORS.items() if name.casefold() in classes for other in others),
    )
    return account.told(
        warnings=ignored_objects(result, truths) if two_dimensional else (),
        notes=few_objects(result),
    )


def ignored_objects(result: KittiResult, truths: Sequence[KittiObjects]) -> list[str]:
    """Say which objects and detections KITTI's rules ignore so that a class has no AP or a misleading one.

    Args:
        result: The result.
        truths: Labels per frame.

    Returns:
        One sentence per class and reason.
    """
    st3d = "score by ST3D's rules, which need no 2D box (--rules st3d; in `evaluate run`, --protocol cross_dataset)"
    warnings: list[str] = []
    for name, scores in result.classes.items():
        all_of, without = scores.labels, scores.labels_without_2d_box
        if without and without == all_of:
            warnings.append(
                f"none of the {all_of} {name} labels has a 2D box, and KITTI's rules count an object by the height of its 2D box in "
                f"pixels: {name} has no AP. Write the 2D boxes (columns 5 to 8), or {st3d}"
            )
        elif without:
            warnings.append(f"{without} of {all_of} {name} labels have no 2D box, so KITTI's rules ignore them; {st3d}")
        elif all_of and not scores.ground_truths[2]:
            warnings.append(
                f"KITTI's rules ignore all {all_of} {name} labels, so {name} has no AP: {_reasons(name, truths)}; {st3d}"
            )
        flat = sum(
            1
            for frame in truths
            for kind, size in zip(frame.types, frame.dimensions.tolist())
            if kind.casefold() == name.casefold() and min(size) <= 0
        )
        if flat:
            warnings.append(f"{flat} of {all_of} {name} labels have no 3D box, so in BEV and 3D nobody can find them")
        found, empty = scores.detections, scores.detections_without_2d_box
        if empty:
            how = f"none of the {found} {name} detections has" if empty == found else f"{empty} of {found} {name} detections lack"
            warnings.append(f"{how} a 2D box, and KITTI's rules ignore detections lower than 25 pixels; {st3d}")
    return warnings


def few_objects(result: KittiResult) -> list[str]:
    """Say for which classes AP is coarse because few objects count.

    Args:
        result: The result.

    Returns:
        One sentence for all such classes.
    """
    few = {name: scores.ground_truths[1] for name, scores in result.classes.items() if 0 < scores.ground_truths[1] < SAMPLES}
    if not few:
        return []
    listed = ", ".join(f"{name} has {n} (AP R40 of at most {100 * (n - 1) / (SAMPLES - 1):g})" for name, n in few.items())
    return [
        f"AP is coarse where fewer than {SAMPLES} objects count, and even perfect detections do not reach 100: of moderate objects, {listed}. "
        "Compare such values only on the same frames"
    ]


def _reasons(name: str, truths: Sequence[KittiObjects]) -> str:
    """Why objects are beyond KITTI's last difficulty, with counts; an object may have several reasons."""
    reasons: Counter[str] = Counter()
    for frame in truths:
        own = [i for i, kind in enumerate(frame.types) if kind.casefold() == name.casefold()]
        height = (frame.bbox[:, 3] - frame.bbox[:, 1])[own]
        reasons[f"have a 2D box of at most {MIN_HEIGHT[2]:g} pixels in height"] += int((height <= MIN_HEIGHT[2]).sum())
        reasons[f"have an occlusion above {MAX_OCCLUSION[2]} (3 means unknown)"] += int(
            (frame.occluded[own] > MAX_OCCLUSION[2]).sum()
        )
        reasons[f"are truncated by more than {MAX_TRUNCATION[2]:g}"] += int((frame.truncated[own] > MAX_TRUNCATION[2]).sum())
    return ", ".join(f"{n} {why}" for why, n in reasons.items() if n)


def _most_frequent(types: Mapping[str, int]) -> dict[str, int]:
    """The most frequent types: a damaged file can make up thousands."""
    ranked = sorted(types.items(), key=lambda item: -item[1])
    rest = sum(n for _, n in ranked[_MOST_TYPES:])
    return dict(ranked[:_MOST_TYPES]) | ({f"{len(ranked) - _MOST_TYPES} other types": rest} if rest else {})


def _listed(types: Mapping[str, int]) -> str:
    names = [f"{shown(kind, most=60)} {n}" for kind, n in list(types.items())[:12]]
    return ", ".join(names) + (f" and {len(types) - 12} types more" if len(types) > 12 else "")
