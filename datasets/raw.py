"""A dataset with its splits, prepared: `prepare_raw` compares its classes with the labels, reads every frame, draws partial labels, and
cuts out the objects of each labeled split for ground-truth sampling.

    raw = open_kitti("KITTI", z_shift=1.73)
    prepared = prepare_raw(raw, "data/kitti", label_shares=(0.01, 0.02))

`upcycle3d prepare` does the same.

Read next: `layouts.py`, which opens KITTI, Waymo, Lyft, nuScenes and your own folder; `prepare.py` for the preparation of any source of frames, `label_shares.py`, `gt_database.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol, runtime_checkable

from ..core.errors import InvalidInput
from ..core.foreign_text import shown
from ..core.ledger import Ledger
from .class_names import ClassRule, compare_types, nearest
from .folder import FolderDataset
from .frame_source import DescribedSource
from .gt_database import MIN_POINTS, build_gt_database
from .label_shares import DRAWS, label_share_splits, labeled_split
from .object_summary import ObjectSummary
from .prepare import PrepareReport, ProgressCallback, prepare
from .prepared import PreparedDataset

_FEWEST_PASTED = 0.1  # share of the labeled objects of a split that can be pasted, below which a warning follows


@runtime_checkable
class TypedSource(Protocol):
    """A source that can count the types of its labels without reading scans. The names of classes are compared with them first."""

    def label_types(self) -> Mapping[str, int]:
        """Number of labeled objects by type, as spelled in the labels."""
        ...


@dataclass(frozen=True, kw_only=True)
class RawDataset:
    """A dataset on disk: its frames, its splits, and which frames belong to one drive."""

    source: DescribedSource
    """The frames of all splits, one after another."""
    ids: tuple[str, ...]
    """Id of each frame of `source`."""
    splits: Mapping[str, tuple[str, ...]]
    """Frame ids by name of the split."""
    classes: tuple[str, ...]
    """Names of the class numbers of the labels."""
    group: Callable[[str], str] = str
    """Frame id -> name of its drive. Neighboring frames show the same objects, so shares of labels are drawn by drive. By default
    every frame is on its own."""
    rule: ClassRule | None = None
    """Classes and class map, to compare with the types of the labels; None compares names only."""
    classes_asked: bool = True
    """Whether the user named the classes. A class that occurs in no label is then an error, otherwise a warning."""
    class_map_asked: bool = False
    """Whether the user gave the class map. A type of it that occurs in no label is then an error."""
    allow_absent_classes: bool = False
    """Whether classes may occur in no label."""
    unlabeled: tuple[str, ...] = ()
    """Names of the splits without labels."""
    warnings: tuple[str, ...] = ()
    """What was noticed while the splits were listed."""
    found: Ledger = Ledger()
    """Files that were skipped while the splits were listed."""


@dataclass(frozen=True, kw_only=True)
class RawReport:
    """What `prepare_raw` wrote."""

    frames: PrepareReport
    """Counts, and the frames that were left out."""
    gt_objects: Mapping[str, int]
    """Number of objects to paste by name of the labeled split."""
    objects: tuple[ObjectSummary, ...] = ()
    """Sizes and points of the labeled objects, by class."""
    road_height: float | None = None
    """Median height of the road in the prepared scans, in meters; None where no road was found."""
    warnings: tuple[str, ...] = ()
    """What deserves the user's attention, one sentence each."""


def prepare_raw(
    raw: RawDataset,
    out: Path | str,
    *,
    labeled: Sequence[str] = (),
    label_shares: Sequence[float] = (),
    workers: int = 2,
    replace_splits: bool = False,
    on_progress: ProgressCallback | None = None,
) -> RawReport:
    """Prepare a dataset, with partial labels and a database of objects for every labeled split.

    Args:
        raw: From one of the `open_...` functions.
        out: Folder to write. The database of a split goes to `out/gt_database/SPLIT`. Splits that it holds already stay.
        labeled: Splits whose labels may be learned from. By default `train` with the labeled splits of `label_shares`, or every
            labeled split where there is no `train`.
        label_shares: Also split `train` into `train-SHARE-DRAW` and `train-SHARE-DRAW-rest`, draws 0, 1, 2.
        workers: Number of processes.
        replace_splits: Drop the splits that `out` holds already, instead of adding to them.
        on_progress: Called after each chunk with the frames that are done and all frames.

    Returns:
        What was written.

    Raises:
        InvalidInput: A split does not exist, a class occurs in no label, or `out` was begun with other settings.
        UpcycleError: See `prepare`.
    """
    splits = {**raw.splits, **_share_splits(raw, label_shares)}
    names = tuple(labeled) or _labeled_by_default(splits, label_shares, raw.unlabeled)
    for name in names:
        if name not in splits:
            near = get_close_matches(name, splits, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidInput(f"labeled split {shown(name)!r}: there is no such split among {', '.join(splits)}{hint}")
        if name in raw.unlabeled:
            raise InvalidInput(f"the split {name} has no labels, so it cannot be a labeled split; leave it out of --labeled")
    warnings = [*raw.warnings, *_compare_classes(raw)]
    report = prepare(
        raw.source,
        raw.ids,
        out,
        splits=splits,
        classes=raw.classes,
        workers=workers,
        replace_splits=replace_splits,
        on_progress=on_progress,
    )
    ledger = report.ledger + raw.found
    if not isinstance(raw.source, TypedSource):
        warnings += _compare_ledger(raw, ledger)
    objects = {}
    for name in names:
        frames = PreparedDataset(out, name)
        fingerprint = frames.split_fingerprint()
        path = Path(out) / "gt_database" / name
        objects[name] = len(build_gt_database(frames, path, class_names=raw.classes, fingerprint=fingerprint))
        warnings += _about_database(name, objects[name], frames)
    _drop_databases(Path(out), report.splits)
    return RawReport(
        frames=replace(report, ledger=ledger),
        gt_objects=objects,
        objects=report.objects,
        road_height=report.road_height,
        warnings=tuple(dict.fromkeys((*warnings, *report.warnings))),
    )


def _about_database(split: str, objects: int, frames: PreparedDataset) -> tuple[str, ...]:
    """A warning where hardly one labeled object of a split holds enough points to be pasted."""
    labels = [labels for labels in map(frames.labels, range(len(frames))) if labels is not None]
    boxes = sum(int((part.weight > 0).sum()) for part in labels)
    if not boxes or objects > _FEWEST_PASTED * boxes:
        return ()
    return (
        f"the split {split} has {objects} objects to paste although {boxes} are labeled: an object is pasted into other scans only if it "
        f"holds at least {MIN_POINTS} points. Look at the points per box; if they are few, boxes and scans do not fit together",
    )


def _compare_classes(raw: RawDataset) -> tuple[str, ...]:
    """Compare the classes with the types of the labels, before any scan is read. Returns warnings."""
    if not isinstance(raw.source, TypedSource) or all(name in raw.unlabeled for name in raw.splits):
        return ()
    types = raw.source.label_types()
    rule = raw.rule or ClassRule(raw.classes)
    source = raw.source
    if isinstance(source, FolderDataset) and source.other_classes is not None:
        others = {name.casefold() for name in source.other_classes}
        unknown = {k: n for k, n in types.items() if rule.number(k) is None and k.casefold() not in others}
        if unknown:
            listed = ", ".join(f"{shown(k, most=60)} {n}" for k, n in sorted(unknown.items())[:12])
            known = (*rule.classes, *rule.class_map, *source.other_classes)
            raise InvalidInput(
                f"the labels hold types that are neither classes nor known to be left out: {listed}{nearest(next(iter(unknown)), known)}. Leave "
                f"them out with --other-classes {' '.join(shown(k, most=60) for k in sorted(unknown)[:12])}, or give them the name of a class "
                "with --class-map TYPE CLASS"
            )
    return compare_types(
        rule, types, asked=raw.classes_asked, map_asked=raw.class_map_asked, allow_absent=raw.allow_absent_classes
    )


def _compare_ledger(raw: RawDataset, ledger: Ledger) -> tuple[str, ...]:
    """The same for a source whose types are known after reading only. An absent class is a warning here: the work is done."""
    types = {name: n for name, n in ledger.boxes.items() if n} | dict(ledger.types_dropped)
    return compare_types(ClassRule(raw.classes), types, asked=False, allow_absent=raw.allow_absent_classes)


def _drop_databases(out: Path, splits: Mapping[str, int]) -> None:
    """Remove the databases of splits that are no longer there."""
    folder = out / "gt_database"
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in splits and (path / "database.json").is_file():
            shutil.rmtree(path)


def _share_splits(raw: RawDataset, shares: Sequence[float]) -> Mapping[str, tuple[str, ...]]:
    if not shares:
        return {}
    if "train" not in raw.splits:
        raise InvalidInput(f"label shares are drawn from the split train, which is not among {', '.join(raw.splits)}")
    return label_share_splits(raw.splits["train"], shares, group=raw.group, given=raw.splits)


def _labeled_by_default(splits: Mapping[str, object], shares: Sequence[float], unlabeled: Sequence[str]) -> tuple[str, ...]:
    if "train" not in splits or "train" in unlabeled:
        return tuple(name for name in splits if name not in unlabeled)
    return ("train", *(labeled_split(share, draw) for share in shares for draw in DRAWS))
