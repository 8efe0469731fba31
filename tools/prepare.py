"""``upcycle3d prepare``: a dataset on disk, indexed, verified and split, with its GT database."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..datasets.folder import FolderDataset, folder_ids
from ..datasets.frame_source import FrameSource
from ..datasets.gt_database import build_gt_database
from ..datasets.kitti import KITTI_CLASSES, KittiDataset, read_ids
from ..datasets.prepared import Notes, PreparedDataset, prepare
from ..perception.structures import InvalidInput
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
    labelled: tuple[str, ...] = ()
    """splits whose labels may be learnt from: each gets its own GT database. By default train, or every split if there is no train"""
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


def command(dataset: Annotated[Kitti, tyro.conf.subcommand("kitti")] | Annotated[Folder, tyro.conf.subcommand("folder")]) -> None:
    """Read every frame of a dataset once, check it, and write it for fast use. Kill it and start it again: nothing is done twice."""
    folder = "ImageSets" if isinstance(dataset, Kitti) else "splits"
    names = dataset.splits or tuple(sorted(p.stem for p in (dataset.root / folder).glob("*.txt")))
    splits: Mapping[str, Sequence[str]] = {name: read_ids(dataset.root / folder / f"{name}.txt") for name in names}
    if isinstance(dataset, Folder) and not splits:
        splits = {"all": folder_ids(dataset.root)}
    if not splits:
        raise InvalidInput(f"no split in {dataset.root / folder}; write NAME.txt with one frame id per line")
    labelled = dataset.labelled or (("train",) if "train" in splits else tuple(splits))
    for name in labelled:
        if name not in splits:
            near = get_close_matches(name, splits, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidInput(f"--labelled {name}: no such split among {', '.join(splits)}{hint}")
    ids = tuple(dict.fromkeys(i for part in splits.values() for i in part))
    with progress_bar("prepare", len(ids)) as advance:
        report = prepare(
            _source(dataset, ids),
            ids,
            dataset.out,
            splits=splits,
            classes=dataset.classes,
            notes=_notes(dataset),
            workers=dataset.workers,
            on_progress=advance,
        )
    objects = {}
    for name in labelled:
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


def _notes(dataset: Kitti | Folder) -> Notes:
    """Where the data comes from and every option that shapes it: a second start with other options must not go on with it."""
    notes: Notes = {"root": str(dataset.root.resolve()), "layout": type(dataset).__name__.lower(), "z_shift": dataset.z_shift}
    if isinstance(dataset, Kitti):
        return {**notes, "points": dataset.points, "crop_to_camera": dataset.crop_to_camera}
    return {
        **notes,
        "other_classes": " ".join(dataset.other_classes),
        "columns": " ".join(dataset.columns),
        "intensity_scale": dataset.intensity_scale,
        "drop_non_finite": dataset.drop_non_finite,
    }


def _source(dataset: Kitti | Folder, ids: tuple[str, ...]) -> FrameSource:
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
