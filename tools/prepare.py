"""``upcycle3d prepare``: a dataset on disk, indexed, verified and split, with its GT database."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..core.errors import InvalidInput
from ..datasets.folder import FolderDataset, folder_ids
from ..datasets.frame_source import FrameSource
from ..datasets.gt_database import build_gt_database
from ..datasets.kitti import KITTI_CLASSES, KittiDataset, read_ids
from ..datasets.label_shares import DRAWS, label_share_splits, labeled_split
from ..datasets.nuscenes import LYFT, NUSCENES, NuScenesDataset, draw_scenes, split_by_scene
from ..datasets.nuscenes_tables import DriveTables, read_tables
from ..datasets.prepared import Notes, PreparedDataset, prepare
from ..datasets.waymo import WAYMO_CLASSES, FramePlace, WaymoDataset, find_waymo_frames, find_waymo_splits, segment_of
from .console import console, print_table, progress_bar, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class Common:
    """What preparing any dataset needs."""

    root: tyro.conf.Positional[Path]
    """folder of the dataset"""
    out: Path
    """folder to write"""
    splits: tuple[str, ...] = ()
    """splits to take, by file name; all by default"""
    labeled: tuple[str, ...] = ()
    """splits whose labels may be learnt from: each gets its own GT database. By default train with the labelled ones of
    --label-shares, or every split if there is no train"""
    label_shares: tuple[float, ...] = ()
    """also split train into train-SHARE-DRAW and train-SHARE-DRAW-rest, draws 0 1 2, as `0.01 0.02 0.05 0.2`: whole segments or
    scenes where the dataset has them, else frames"""
    z_shift: float = 0.0
    """m, mounting height of the sensor, added to z so that the road is near 0"""
    workers: int = 2
    """processes"""
    json: Path | None = None
    """also write the result for machines"""


@dataclass(frozen=True, kw_only=True)
class Kitti(Common):
    """KITTI's object layout: training/velodyne or velodyne_reduced, label_2, calib, ImageSets."""

    classes: tuple[str, ...] = KITTI_CLASSES
    """classes to learn, in label order"""
    points: Literal["auto", "velodyne", "velodyne_reduced"] = "auto"
    """which scans to read"""
    crop_to_camera: bool = True
    """keep only what the camera sees: labels know no more"""


@dataclass(frozen=True, kw_only=True)
class Folder(Common):
    """Your own folder: points/ID.bin|npy|pcd, labels/ID.txt (class x y z dx dy dz yaw), splits/NAME.txt (docs/data_format.md)."""

    classes: tuple[str, ...] = ("Car",)
    """classes to learn, in label order"""
    other_classes: tuple[str, ...] = ()
    """classes that may stand in the labels and are dropped"""
    columns: tuple[str, ...] = ()
    """values of a scan's row in file order, `_` skips one; x y z intensity by default"""
    intensity_scale: float = 1.0
    """factor that brings intensity to 0..1; 0.0039216 for a sensor that counts to 255"""
    drop_non_finite: bool = False
    """leave out points with NaN or inf instead of refusing the frame"""


@dataclass(frozen=True, kw_only=True)
class _Tables(Common):
    """What Lyft Level 5 and nuScenes share. Splits are ImageSets/NAME.txt with one scene name per line; without one, `all`."""

    version: str
    """folder of the tables, below root"""
    classes: tuple[str, ...] = KITTI_CLASSES
    """classes to learn, in label order"""
    categories: tuple[tuple[str, str], ...] = ()
    """the tables' category and the class it is, as `car Car truck Car`; docs/data_format.md lists the defaults"""
    neighbors: tuple[tuple[str, str], ...] = ()
    """category and the class it looks like, as `other_vehicle Car`: neither right nor wrong"""
    sweeps: int = 1
    """turns of the LiDAR in a frame; beyond 1 a point has its age as a feature"""
    max_length: float | None = None
    """m, longer boxes are left out"""
    val_share: float = 0.0
    """without ImageSets: the share of frames for a split `val`, drawn by whole drives; the rest is `train`"""


@dataclass(frozen=True, kw_only=True)
class Lyft(_Tables):
    """Lyft Level 5: v1.01-train/*.json and lidar/*.bin. Splits are ImageSets/NAME.txt with one scene name per line."""

    version: str = LYFT.version
    """folder of the tables, below root"""


@dataclass(frozen=True, kw_only=True)
class NuScenes(_Tables):
    """nuScenes: v1.0-*/*.json, samples and sweeps/LIDAR_TOP. Splits are ImageSets/NAME.txt with one scene name per line."""

    version: str = NUSCENES.version
    """folder of the tables, below root"""


@dataclass(frozen=True, kw_only=True)
class Waymo(Common):
    """Waymo Open Dataset, Perception: v2 tables (lidar, lidar_pose, lidar_calibration, vehicle_pose, lidar_box) or v1 *.tfrecord.

    Splits are ImageSets/NAME.txt with one segment per line, else the folders training, validation and testing, else `all`.
    """

    classes: tuple[str, ...] = WAYMO_CLASSES
    """classes to learn, in label order"""
    class_map: tuple[tuple[str, str], ...] = ()
    """Waymo's type and your name for it, as `Vehicle Car`"""
    every: int = 1
    """take each n-th frame of a segment; 5 is usual for training"""
    second_return: bool = True
    """take both echoes of a pulse"""
    drop_no_label_zones: bool = True
    """leave out points where nobody labelled"""
    with_labels: bool = True
    """read lidar_box; the testing set has none"""


Dataset = Kitti | Folder | Lyft | NuScenes | Waymo


def command(
    dataset: Annotated[Kitti, tyro.conf.subcommand("kitti")]
    | Annotated[Folder, tyro.conf.subcommand("folder")]
    | Annotated[Lyft, tyro.conf.subcommand("lyft")]
    | Annotated[NuScenes, tyro.conf.subcommand("nuscenes")]
    | Annotated[Waymo, tyro.conf.subcommand("waymo")],
) -> None:
    """Read every frame of a dataset once, check it, and write it for fast use. Kill it and start it again: nothing is done twice."""
    folder = "splits" if isinstance(dataset, Folder) else "ImageSets"
    names = dataset.splits or tuple(sorted(p.stem for p in (dataset.root / folder).glob("*.txt")))
    if isinstance(dataset, Waymo):
        names = ()  # its lists name segments
    splits: Mapping[str, Sequence[str]] = {name: read_ids(dataset.root / folder / f"{name}.txt") for name in names}
    if isinstance(dataset, Folder) and not splits:
        splits = {"all": folder_ids(dataset.root)}
    places: tuple[FramePlace, ...] = ()
    if isinstance(dataset, Waymo):
        splits, places = _waymo_frames(dataset)
    tables = None
    if isinstance(dataset, Lyft | NuScenes):
        tables = read_tables(dataset.root, dataset.version, keyframes_only=dataset.sweeps == 1)
        if splits and dataset.val_share:
            raise InvalidInput(
                f"--val-share draws splits, but {dataset.root / folder} already names {', '.join(splits)}; drop one"
            )
        if not splits:
            splits = draw_scenes(tables, val_share=dataset.val_share) if dataset.val_share else {"all": tuple(tables.scenes)}
        splits = split_by_scene(tables, splits)
    if not splits:
        raise InvalidInput(f"no split in {dataset.root / folder}; write NAME.txt with one frame id per line")
    splits = {**splits, **_label_shares(dataset, splits, tables)}
    shared = tuple(labeled_split(share, draw) for share in dataset.label_shares for draw in DRAWS)
    labeled = dataset.labeled or (("train", *shared) if "train" in splits else tuple(splits))
    for name in labeled:
        if name not in splits:
            near = get_close_matches(name, splits, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidInput(f"--labeled {name}: no such split among {', '.join(splits)}{hint}")
    ids = tuple(dict.fromkeys(i for part in splits.values() for i in part))
    with progress_bar("prepare", len(ids)) as advance:
        report = prepare(
            _waymo_source(dataset, places) if isinstance(dataset, Waymo) else _source(dataset, ids, tables),
            ids,
            dataset.out,
            splits=splits,
            classes=dataset.classes,
            notes=_notes(dataset),
            workers=dataset.workers,
            on_progress=advance,
        )
    objects = {}
    for name in labeled:
        frames = PreparedDataset(dataset.out, name)
        path = dataset.out / "gt_database" / name
        objects[name] = len(build_gt_database(frames, path, class_names=dataset.classes, fingerprint=frames.split_fingerprint()))
    print_table(
        "prepared dataset",
        ("split", "frames", "objects to paste"),
        [(name, n, objects.get(name, "-")) for name, n in report.splits.items()],
    )
    console.print(
        f"{report.frames} frames ({report.reused_frames} were already there), {report.points:,} points, {report.boxes} boxes, "
        f"{report.empty_boxes} without a point"
    )
    if report.failures:
        print_table("left out", ("frame", "why"), [(f.id, f.reason) for f in report.failures])
    write_json(dataset.json, {**asdict(report), "root": str(report.root), "gt_objects": objects})


def _notes(dataset: Dataset) -> Notes:
    """Where the data comes from and every option that shapes it: a second start with other options must not go on with it."""
    notes: Notes = {"root": str(dataset.root.resolve()), "layout": type(dataset).__name__.lower(), "z_shift": dataset.z_shift}
    if isinstance(dataset, Kitti):
        return {**notes, "points": dataset.points, "crop_to_camera": dataset.crop_to_camera}
    if isinstance(dataset, Lyft | NuScenes):
        return {
            **notes,
            "version": dataset.version,
            "categories": " ".join(f"{category}={name}" for category, name in dataset.categories),
            "neighbors": " ".join(f"{category}={name}" for category, name in dataset.neighbors),
            "sweeps": dataset.sweeps,
            "max_length": dataset.max_length or "none",
        }
    if isinstance(dataset, Waymo):
        return {
            **notes,
            "class_map": " ".join(f"{kind}={name}" for kind, name in dataset.class_map),
            "second_return": dataset.second_return,
            "drop_no_label_zones": dataset.drop_no_label_zones,
            "with_labels": dataset.with_labels,
        }
    return {
        **notes,
        "other_classes": " ".join(dataset.other_classes),
        "columns": " ".join(dataset.columns),
        "intensity_scale": dataset.intensity_scale,
        "drop_non_finite": dataset.drop_non_finite,
    }


def _label_shares(
    dataset: Dataset, splits: Mapping[str, Sequence[str]], tables: DriveTables | None
) -> Mapping[str, Sequence[str]]:
    """The splits of --label-shares."""
    if not dataset.label_shares:
        return {}
    if "train" not in splits:
        raise InvalidInput(f"--label-shares splits train, which is not among {', '.join(splits) or 'no splits'}")
    group: Callable[[str], str] = segment_of if isinstance(dataset, Waymo) else str
    if tables is not None:
        scene_of = {token: scene for scene, tokens in tables.scenes.items() for token in tokens}
        group = scene_of.__getitem__
    return label_share_splits(splits["train"], dataset.label_shares, group=group, given=splits)


def _waymo_frames(dataset: Waymo) -> tuple[dict[str, tuple[str, ...]], tuple[FramePlace, ...]]:
    """Split -> frame ids, and where each frame is, in the order of the ids."""
    segments = find_waymo_splits(dataset.root, dataset.splits)
    found = find_waymo_frames(dataset.root, (s for part in segments.values() for s in part), every=dataset.every)
    splits = {split: tuple(place.id for s in part for place in found[s]) for split, part in segments.items()}
    return splits, tuple({place.id: place for part in found.values() for place in part}.values())


def _waymo_source(dataset: Waymo, places: tuple[FramePlace, ...]) -> WaymoDataset:
    return WaymoDataset(
        places,
        classes=dataset.classes,
        class_map=dict(dataset.class_map),
        second_return=dataset.second_return,
        drop_no_label_zones=dataset.drop_no_label_zones,
        z_shift=dataset.z_shift,
        with_labels=dataset.with_labels,
    )


def _source(dataset: Kitti | Folder | Lyft | NuScenes, ids: tuple[str, ...], tables: DriveTables | None) -> FrameSource:
    if isinstance(dataset, Lyft | NuScenes):
        assert tables is not None  # read above, because the splits come from them
        return NuScenesDataset(
            tables,
            ids,
            LYFT if isinstance(dataset, Lyft) else NUSCENES,
            classes=dataset.classes,
            class_map=dict(dataset.categories) or None,
            neighbors=dict(dataset.neighbors),
            z_shift=dataset.z_shift,
            sweeps=dataset.sweeps,
            max_length=dataset.max_length,
        )
    if isinstance(dataset, Kitti):
        return KittiDataset(
            dataset.root,
            ids,
            points_folder=dataset.points,
            classes=dataset.classes,
            z_shift=dataset.z_shift,
            crop_to_camera=dataset.crop_to_camera,
        )
    return FolderDataset(
        dataset.root,
        ids,
        classes=dataset.classes,
        other_classes=dataset.other_classes,
        columns=dataset.columns or None,
        intensity_scale=dataset.intensity_scale,
        drop_non_finite=dataset.drop_non_finite,
        z_shift=dataset.z_shift,
    )


if __name__ == "__main__":
    sys.exit(run_command(command))
