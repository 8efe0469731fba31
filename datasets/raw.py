"""Datasets as they lie on disk, with their splits, ready for preparation: KITTI, your own folder, Lyft, nuScenes, Waymo.

    raw = open_kitti("KITTI", z_shift=1.73)
    prepared = prepare_raw(raw, "data/kitti", label_shares=(0.01, 0.02))

`open_...` finds frames and splits and sets up a reader; nothing but lists and tables is read. `prepare_raw` reads every frame,
draws partial labels, and cuts out the objects of each labeled split for ground-truth sampling. `upcycle3d prepare` does the same.

Read next: `prepare.py` for the preparation of any source of frames, `label_shares.py`, `gt_database.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ..core.errors import InvalidInput
from .folder import FolderDataset, folder_ids
from .frame_source import DescribedSource
from .gt_database import build_gt_database
from .kitti import KITTI_CLASSES, KittiDataset, PointsFolder, read_ids
from .label_shares import DRAWS, label_share_splits, labeled_split
from .nuscenes import Dialect, NuScenesDataset, draw_scenes, split_by_scene
from .nuscenes_tables import read_tables
from .prepare import PrepareReport, ProgressCallback, prepare
from .prepared import PreparedDataset
from .waymo import WAYMO_CLASSES, WaymoDataset
from .waymo_places import find_waymo_frames, find_waymo_splits, segment_of


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


@dataclass(frozen=True, kw_only=True)
class RawReport:
    """What `prepare_raw` wrote."""

    frames: PrepareReport
    """Counts, and the frames that were left out."""
    gt_objects: Mapping[str, int]
    """Number of objects to paste by name of the labeled split."""


def prepare_raw(
    raw: RawDataset,
    out: Path | str,
    *,
    labeled: Sequence[str] = (),
    label_shares: Sequence[float] = (),
    workers: int = 2,
    on_progress: ProgressCallback | None = None,
) -> RawReport:
    """Prepare a dataset, with partial labels and a database of objects for every labeled split.

    Args:
        raw: From one of the `open_...` functions.
        out: Folder to write. The database of a split goes to `out/gt_database/SPLIT`.
        labeled: Splits whose labels may be learned from. By default `train` with the labeled splits of `label_shares`, or every
            split where there is no `train`.
        label_shares: Also split `train` into `train-SHARE-DRAW` and `train-SHARE-DRAW-rest`, draws 0, 1, 2.
        workers: Number of processes.
        on_progress: Called after each chunk with the frames that are done and all frames.

    Returns:
        What was written.

    Raises:
        InvalidInput: A split does not exist, or `out` was begun with other settings.
        UpcycleError: See `prepare`.
    """
    splits = {**raw.splits, **_share_splits(raw, label_shares)}
    names = tuple(labeled) or _labeled_by_default(splits, label_shares)
    for name in names:
        if name not in splits:
            near = get_close_matches(name, splits, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidInput(f"labeled split {name!r}: there is no such split among {', '.join(splits)}{hint}")
    report = prepare(raw.source, raw.ids, out, splits=splits, classes=raw.classes, workers=workers, on_progress=on_progress)
    objects = {}
    for name in names:
        frames = PreparedDataset(out, name)
        fingerprint = frames.split_fingerprint()
        path = Path(out) / "gt_database" / name
        objects[name] = len(build_gt_database(frames, path, class_names=raw.classes, fingerprint=fingerprint))
    return RawReport(frames=report, gt_objects=objects)


def _share_splits(raw: RawDataset, shares: Sequence[float]) -> Mapping[str, tuple[str, ...]]:
    if not shares:
        return {}
    if "train" not in raw.splits:
        raise InvalidInput(f"label shares are drawn from the split train, which is not among {', '.join(raw.splits)}")
    return label_share_splits(raw.splits["train"], shares, group=raw.group, given=raw.splits)


def _labeled_by_default(splits: Mapping[str, object], shares: Sequence[float]) -> tuple[str, ...]:
    if "train" not in splits:
        return tuple(splits)
    return ("train", *(labeled_split(share, draw) for share in shares for draw in DRAWS))


# ---- the layouts


def open_kitti(
    root: Path | str,
    *,
    splits: Sequence[str] = (),
    classes: tuple[str, ...] = KITTI_CLASSES,
    points_folder: PointsFolder = "auto",
    z_shift: float = 0.0,
    crop_to_camera: bool = True,
) -> RawDataset:
    """Open a folder in KITTI's object layout.

    Args:
        root: Folder with `training` and `ImageSets`.
        splits: Names of `ImageSets/NAME.txt`; by default all.
        classes: See `KittiDataset`.
        points_folder: See `KittiDataset`.
        z_shift: See `KittiDataset`.
        crop_to_camera: See `KittiDataset`.

    Returns:
        The dataset.

    Raises:
        InvalidInput: A folder or a split is missing.
    """
    found = _listed(Path(root) / "ImageSets", splits)
    if not found:
        raise InvalidInput(f"there is no split in {Path(root) / 'ImageSets'}; write NAME.txt with one frame id per line")
    ids = _together(found)
    source = KittiDataset(root, ids, points_folder=points_folder, classes=classes, z_shift=z_shift, crop_to_camera=crop_to_camera)
    return RawDataset(source=source, ids=ids, splits=found, classes=classes)


def open_folder(
    root: Path | str,
    *,
    splits: Sequence[str] = (),
    classes: tuple[str, ...],
    other_classes: tuple[str, ...] = (),
    columns: tuple[str, ...] | None = None,
    intensity_scale: float = 1.0,
    drop_non_finite: bool = False,
    z_shift: float = 0.0,
) -> RawDataset:
    """Open your own folder of scans and labels.

    Args:
        root: Folder with `points`, `labels` and perhaps `splits`.
        splits: Names of `splits/NAME.txt`; by default all, or one split `all` where there is none.
        classes: See `FolderDataset`.
        other_classes: See `FolderDataset`.
        columns: See `FolderDataset`.
        intensity_scale: See `FolderDataset`.
        drop_non_finite: See `FolderDataset`.
        z_shift: See `FolderDataset`.

    Returns:
        The dataset.

    Raises:
        InvalidInput: A folder or a split is missing, or there is no scan.
    """
    found = _listed(Path(root) / "splits", splits) or {"all": folder_ids(root)}
    ids = _together(found)
    source = FolderDataset(
        root,
        ids,
        classes=classes,
        other_classes=other_classes,
        columns=columns,
        intensity_scale=intensity_scale,
        drop_non_finite=drop_non_finite,
        z_shift=z_shift,
    )
    return RawDataset(source=source, ids=ids, splits=found, classes=classes)


def open_nuscenes(
    root: Path | str,
    dialect: Dialect,
    *,
    version: str | None = None,
    splits: Sequence[str] = (),
    val_share: float = 0.0,
    classes: tuple[str, ...] = KITTI_CLASSES,
    class_map: Mapping[str, str] | None = None,
    neighbors: Mapping[str, str] | None = None,
    sweeps: int = 1,
    max_length: float | None = None,
    z_shift: float = 0.0,
) -> RawDataset:
    """Open nuScenes or Lyft Level 5.

    Args:
        root: Folder with the tables, the sweeps and perhaps `ImageSets`.
        dialect: `NUSCENES_DIALECT` or `LYFT_DIALECT`.
        version: Folder of the tables; by default the dialect's usual one.
        splits: Names of `ImageSets/NAME.txt`, which list scenes; by default all, or one split `all` where there is none.
        val_share: Without `ImageSets`: share of the frames for a split `val`, drawn by whole drives; the rest is `train`. 0 draws none.
        classes: See `NuScenesDataset`.
        class_map: See `NuScenesDataset`.
        neighbors: See `NuScenesDataset`.
        sweeps: See `NuScenesDataset`.
        max_length: See `NuScenesDataset`.
        z_shift: See `NuScenesDataset`.

    Returns:
        The dataset.

    Raises:
        InvalidInput: A table, a split or a scene is missing, or `val_share` is given although `ImageSets` names splits.
    """
    tables = read_tables(root, version or dialect.version, keyframes_only=sweeps == 1)
    scenes: Mapping[str, Sequence[str]] = _listed(Path(root) / "ImageSets", splits)
    if scenes and val_share:
        raise InvalidInput(
            f"a share for val (--val-share) draws splits, but {Path(root) / 'ImageSets'} already names {', '.join(scenes)}; drop one"
        )
    if not scenes:
        scenes = draw_scenes(tables, val_share=val_share) if val_share else {"all": tuple(tables.scenes)}
    found = split_by_scene(tables, scenes)
    ids = _together(found)
    source = NuScenesDataset(
        tables,
        ids,
        dialect,
        classes=classes,
        class_map=class_map,
        neighbors=neighbors or {},
        z_shift=z_shift,
        sweeps=sweeps,
        max_length=max_length,
    )
    scene_of = {token: scene for scene, tokens in tables.scenes.items() for token in tokens}
    return RawDataset(source=source, ids=ids, splits=found, classes=classes, group=scene_of.__getitem__)


def open_waymo(
    root: Path | str,
    *,
    splits: Sequence[str] = (),
    every: int = 1,
    classes: tuple[str, ...] = WAYMO_CLASSES,
    class_map: Mapping[str, str] | None = None,
    second_return: bool = True,
    drop_no_label_zones: bool = True,
    with_labels: bool = True,
    z_shift: float = 0.0,
) -> RawDataset:
    """Open the Waymo Open Dataset, Perception, v1 or v2.

    Args:
        root: Folder of the download.
        splits: Which splits of `find_waymo_splits` to take; by default all.
        every: Take each n-th frame of a segment.
        classes: See `WaymoDataset`.
        class_map: See `WaymoDataset`.
        second_return: See `WaymoDataset`.
        drop_no_label_zones: See `WaymoDataset`.
        with_labels: See `WaymoDataset`.
        z_shift: See `WaymoDataset`.

    Returns:
        The dataset.

    Raises:
        InvalidInput: There is no such folder or split, or nothing of Waymo's in it.
    """
    segments = find_waymo_splits(root, splits)
    found = find_waymo_frames(root, (s for part in segments.values() for s in part), every=every)
    by_split = {split: tuple(place.id for s in part for place in found[s]) for split, part in segments.items()}
    if not by_split:
        raise InvalidInput(f"there is no split in {Path(root) / 'ImageSets'}; write NAME.txt with one segment per line")
    places = {place.id: place for part in found.values() for place in part}
    source = WaymoDataset(
        tuple(places.values()),
        classes=classes,
        class_map=class_map,
        second_return=second_return,
        drop_no_label_zones=drop_no_label_zones,
        z_shift=z_shift,
        with_labels=with_labels,
        root=root,
    )
    return RawDataset(source=source, ids=source.ids, splits=by_split, classes=classes, group=segment_of)


def _listed(folder: Path, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The lists `NAME.txt` of a folder, all of them or those named."""
    return {name: read_ids(folder / f"{name}.txt") for name in names or sorted(p.stem for p in folder.glob("*.txt"))}


def _together(splits: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Every frame once, in the order of the splits."""
    return tuple(dict.fromkeys(i for part in splits.values() for i in part))
