"""Splits for layouts of drives with boxes: which frames belong to which list, and which of them are labeled.

Read next: `boxed.py`, whose frames are opened here; `../raw.py`, which prepares them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...core.errors import InvalidInput
from ...core.foreign_text import check_name, shown
from ...core.ledger import Ledger
from ...core.point_files import POINT_SUFFIXES
from ..class_names import ClassRule, check_class_names, spelled_map
from ..id_lists import FramePlaces, find_listed, hidden_files, read_lists
from ..kitti import KITTI_CLASSES
from ..raw import RawDataset
from .boxed import BoxedDataset, BoxFormat, FrameFiles

_WITHOUT_LABELS = ("test", "raw")  # what the names of lists begin with, in small letters, whose frames have no labels by custom


@dataclass(frozen=True, kw_only=True)
class BoxedOptions:
    """What a user may choose about any layout of drives with boxes."""

    splits: Sequence[str] = ()
    """Names of the splits to take; by default all."""
    classes: tuple[str, ...] | None = None
    """Names of the classes to keep; None takes Car, Pedestrian and Cyclist."""
    class_map: Mapping[str, str] = field(default_factory=dict)
    """Type of the labels -> class. Where it is empty, the layout's usual map is taken."""
    allow_absent_classes: bool = False
    """Whether a class may occur in no label."""
    unlabeled: Sequence[str] = ()
    """Splits whose labels are not read."""
    z_shift: float = 0.0
    """Meters added to z."""
    intensity_scale: float | None = None
    """Factor that brings intensity to 0..1; None takes the layout's usual one."""


@dataclass(frozen=True, kw_only=True)
class FoundFrames:
    """The frames of a folder, before lists are read."""

    frames: tuple[FrameFiles, ...]
    """All frames: drive by drive, each drive in order of time."""
    splits: Mapping[str, str] = field(default_factory=dict)
    """Drive -> split, where the folders of the dataset say so; empty for none."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Files that are not read, by kind."""


def open_boxed(
    root: Path | str,
    found: FoundFrames,
    form: BoxFormat,
    options: BoxedOptions,
    *,
    usual_map: Mapping[str, str] | None = None,
    usual_scale: float = 1.0,
    all_unlabeled: bool = False,
) -> RawDataset:
    """Make a dataset with its splits.

    `ImageSets/NAME.txt` lists drives or frames of a split. Without such lists the folders of the dataset are the splits, else everything is
    the split `all`. Scans that nobody labeled are left out of a labeled split and counted, because they would count as empty roads.

    Args:
        root: Folder of the dataset.
        found: Its frames.
        form: How its files are read.
        options: What the user chose.
        usual_map: Type -> class, where the user gives no map. Types that lead to no chosen class are left out of it.
        usual_scale: Intensity scale, where the user gives none.
        all_unlabeled: Whether the layout has no labels at all.

    Returns:
        The dataset.

    Raises:
        InvalidInput: There is no frame, a list names something that does not exist, or a whole split has no labels.
    """
    root = Path(root)
    for frame in found.frames:
        check_name(frame.id, "frame id")
    if len({frame.id for frame in found.frames}) < len(found.frames):
        twice = Counter(frame.id for frame in found.frames).most_common(1)[0][0]
        raise InvalidInput(f"{root} holds two scans that would be called {shown(twice)!r}; rename one of the files or folders")
    listed = _splits(root, found, options.splits)
    for name in options.unlabeled:
        if name not in listed:
            raise InvalidInput(f"--unlabeled names the split {shown(name)}, which is not among {', '.join(map(shown, listed))}")
    labeled = {frame.id for frame in found.frames if frame.labels is not None}
    unlabeled = [
        name for name, ids in listed.items()
        if all_unlabeled or name in options.unlabeled or (name.casefold().startswith(_WITHOUT_LABELS) and not labeled.intersection(ids))
    ]  # fmt: skip
    splits, left_out = {}, 0
    for name, ids in listed.items():
        splits[name] = ids if name in unlabeled else tuple(i for i in ids if i in labeled)
        left_out += len(ids) - len(splits[name])
        if not splits[name]:
            raise InvalidInput(
                f"no frame of the split {shown(name)} has labels in {root}; for frames that nobody labeled give --unlabeled {shown(name)}"
            )
    asked = {i for part in splits.values() for i in part}
    read_labels_of = {i for name, part in splits.items() if name not in unlabeled for i in part}
    frames = tuple(frame for frame in found.frames if frame.id in asked)
    classes = check_class_names(tuple(KITTI_CLASSES if options.classes is None else options.classes))
    known = {name.casefold() for name in classes}
    usual = {kind: name for kind, name in (usual_map or {}).items() if name.casefold() in known}
    source = BoxedDataset(
        root=root,
        format=form,
        frames=frames,
        classes=classes,
        class_map=spelled_map(options.class_map or usual, (), classes),
        unlabeled=frozenset(asked - read_labels_of),
        z_shift=options.z_shift,
        intensity_scale=usual_scale if options.intensity_scale is None else options.intensity_scale,
    )
    drive_of = {frame.id: frame.drive for frame in frames}
    hidden = hidden_files(root / "ImageSets")
    skipped = {
        **found.skipped,
        **({"scan without labels": left_out} if left_out else {}),
        **({"hidden file": hidden} if hidden else {}),
    }
    return RawDataset(
        source=source,
        ids=tuple(frame.id for frame in frames),
        splits=splits,
        classes=classes,
        group=drive_of.__getitem__,
        rule=ClassRule(source.classes, source.class_map),
        classes_asked=options.classes is not None,
        class_map_asked=bool(options.class_map),
        allow_absent_classes=options.allow_absent_classes,
        unlabeled=tuple(unlabeled),
        found=Ledger(files_skipped=skipped),
    )


def scans_in(folder: Path) -> tuple[dict[str, Path], Counter[str]]:
    """List the scan files of a folder.

    Args:
        folder: The folder; it may be missing.

    Returns:
        Name without suffix -> file, sorted by name; and the number of other files by kind.

    Raises:
        InvalidInput: Two scans have the same name apart from the suffix.
    """
    scans: dict[str, Path] = {}
    skipped: Counter[str] = Counter()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith("."):
            skipped["hidden file"] += 1
        elif path.suffix not in POINT_SUFFIXES or path.is_dir():
            skipped["not a scan"] += 1
        elif scans.setdefault(path.stem, path) != path:
            raise InvalidInput(f"{scans[path.stem]} and {path} have the same name apart from the suffix; keep one")
    return scans, skipped


def _splits(root: Path, found: FoundFrames, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Name of a split -> ids of its frames."""
    drives: dict[str, list[str]] = {}
    for frame in found.frames:
        drives.setdefault(frame.drive, []).append(frame.id)
    folder = root / "ImageSets"
    if folder.is_dir():
        lists = read_lists(folder, names)
        if lists:
            ids = frozenset((*drives, *(frame.id for frame in found.frames)))
            places = FramePlaces(ids=ids, where=f"{root}, neither as a drive nor as a frame")
            spelled = find_listed(lists, dict.fromkeys(lists, places), folder)
            return {
                name: tuple(dict.fromkeys(i for entry in part for i in drives.get(entry, [entry])))
                for name, part in spelled.items()
            }
    by_split: dict[str, tuple[str, ...]] = {}
    for drive, members in drives.items():
        split = found.splits.get(drive, "all")
        by_split[split] = (*by_split.get(split, ()), *members)
    for name in names:
        if name not in by_split:
            raise InvalidInput(
                f"there is no split {shown(name)} in {root}; there are {', '.join(by_split)}, and {folder}/NAME.txt would name others"
            )
    return {name: by_split[name] for name in names} if names else by_split
