"""Datasets as they lie on disk, with their splits: KITTI, your own folder, Lyft, nuScenes, Waymo.

`open_...` finds frames and splits and sets up a reader; nothing but lists and tables is read.

Read next: `raw.py`, which prepares what was opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.errors import InvalidInput
from ..core.foreign_text import shown
from ..core.ledger import Ledger
from ..core.point_files import POINT_SUFFIXES
from ..core.scan_options import ScanOptions
from .class_names import ClassRule, check_class_names, spelled_map
from .folder import FolderDataset, LabelForm, folder_ids
from .id_lists import FramePlaces, find_listed, hidden_files, read_lists
from .kitti import KITTI_CLASSES, TESTING, KittiDataset, PointsFolder
from .nuscenes import Dialect, NuScenesDataset, draw_scenes, split_by_scene
from .nuscenes_tables import read_tables
from .raw import RawDataset
from .waymo import WAYMO_CLASSES, WaymoDataset
from .waymo_geometry import TYPES
from .waymo_places import find_waymo_frames, find_waymo_splits, segment_of

_TEST_LISTS = ("test", "testing")  # names of KITTI's lists, in small letters, whose frames lie in testing


def open_kitti(
    root: Path | str,
    *,
    splits: Sequence[str] = (),
    classes: tuple[str, ...] | None = None,
    class_map: Mapping[str, str] | None = None,
    allow_absent_classes: bool = False,
    unlabeled: Sequence[str] = (),
    points_folder: PointsFolder = "auto",
    z_shift: float = 0.0,
    crop_to_camera: bool = True,
    scan: ScanOptions | None = None,
) -> RawDataset:
    """Open a folder in KITTI's object layout.

    The frames of the split `test` lie in `testing` and have no labels; `testing` is another name of it, in any case. Where all lists are
    taken and there is no folder `testing`, that split is left out with a warning.

    Args:
        root: Folder with `training` and `ImageSets`.
        splits: Names of `ImageSets/NAME.txt`; by default all.
        classes: See `KittiDataset`; None takes those of KITTI's benchmark.
        class_map: See `KittiDataset`.
        allow_absent_classes: Whether a class may occur in no label.
        unlabeled: Splits whose label files are not opened.
        points_folder: See `KittiDataset`.
        z_shift: See `KittiDataset`.
        crop_to_camera: See `KittiDataset`.
        scan: How scan files are read; its z shift is not used.

    Returns:
        The dataset.

    Raises:
        InvalidInput: A folder, a split or a frame of one is missing, or a whole split has no label files.
    """
    root = Path(root)
    folder = root / "ImageSets"
    if not folder.is_dir() and (root / "lidar" / "ImageSets").is_dir():
        raise InvalidInput(f"{root} looks like View-of-Delft, whose LiDAR has a folder of its own: give {root / 'lidar'}")
    if root.is_dir() and not folder.is_dir():
        raise InvalidInput(
            f"there is no folder {folder}; make it, with a file train.txt (and val.txt, test.txt) that lists the frames, one id per line"
        )
    lists = read_lists(folder, splits)
    if not lists:
        raise InvalidInput(f"there is no split in {folder}; write NAME.txt with one frame id per line")
    warnings = []
    tests = [name for name in lists if name.casefold() in _TEST_LISTS]
    for name in tests if not (root / "testing").is_dir() else ():
        if name in splits or len(lists) == 1:
            raise InvalidInput(
                f"the frames of the split {shown(name)} lie in {root / 'testing'}, which does not exist; unpack it, or leave the split out. If "
                "these frames lie in training, give the list another name, such as ImageSets/holdout.txt"
            )
        del lists[name]
        warnings.append(
            f"the split {shown(name)} is left out, because there is no folder {root / 'testing'}, where its frames belong"
        )
    tests = [name for name in tests if name in lists]
    warnings += [
        f"the list {shown(name)} is read from {root / 'training'} with the labels there, although its name begins with test; KITTI's own test "
        "frames lie in testing and have no labels. If it means them, call the list test; otherwise give it a name such as holdout"
        for name in lists
        if name.casefold().startswith("test") and name not in tests
    ]
    _refuse_unknown_splits(unlabeled, lists)
    scans = ("velodyne", "velodyne_reduced") if points_folder == "auto" else (points_folder,)
    places = {
        base: FramePlaces(ids=frozenset(_file_names(root / base, scans, (".bin",))), where=f"{root / base}/{' or '.join(scans)}")
        for base in ("training", "testing")
    }
    found = find_listed(lists, {name: places["testing" if name in tests else "training"] for name in lists}, folder)
    for name in tests:
        found[name] = tuple(TESTING + i for i in found[name])
    unlabeled = (*unlabeled, *(name for name in tests if name not in unlabeled))
    labels = set(_file_names(root / "training", ("label_2",), (".txt",)))
    _refuse_splits_without_labels(found, labels, unlabeled, root / "training" / "label_2")
    ids = _together(found)
    source = KittiDataset(
        root,
        ids,
        points_folder=points_folder,
        classes=tuple(KITTI_CLASSES if classes is None else classes),
        class_map=class_map or {},
        z_shift=z_shift,
        crop_to_camera=crop_to_camera,
        unlabeled=_only_in(found, unlabeled),
        scan=scan or ScanOptions(),
    )
    return RawDataset(
        source=source,
        ids=ids,
        splits=found,
        classes=source.classes,
        rule=ClassRule(source.classes, source.class_map),
        classes_asked=classes is not None,
        class_map_asked=bool(class_map),
        allow_absent_classes=allow_absent_classes,
        unlabeled=tuple(unlabeled),
        warnings=tuple(warnings),
        found=_skipped(folder),
    )


def open_folder(
    root: Path | str,
    *,
    splits: Sequence[str] = (),
    classes: tuple[str, ...] | None = None,
    other_classes: tuple[str, ...] | None = (),
    class_map: Mapping[str, str] | None = None,
    allow_absent_classes: bool = False,
    unlabeled: Sequence[str] = (),
    columns: tuple[str, ...] | None = None,
    intensity_scale: float = 1.0,
    drop_non_finite: bool = False,
    z_shift: float = 0.0,
    scan: ScanOptions | None = None,
    form: LabelForm | None = None,
) -> RawDataset:
    """Open your own folder of scans and labels.

    Args:
        root: Folder with `points`, `labels` and perhaps `splits`.
        splits: Names of `splits/NAME.txt`; by default all, or one split `all` where there is none.
        classes: See `FolderDataset`; None takes Car.
        other_classes: See `FolderDataset`.
        class_map: See `FolderDataset`.
        allow_absent_classes: Whether a class may occur in no label.
        unlabeled: Splits whose label files are not opened.
        columns: See `FolderDataset`.
        intensity_scale: See `FolderDataset`.
        drop_non_finite: See `FolderDataset`.
        z_shift: See `FolderDataset`.
        scan: How scan files are read, instead of the four arguments before.
        form: How the boxes of the label files are written.

    Returns:
        The dataset.

    Raises:
        InvalidInput: A folder, a split or a frame of one is missing, there is no scan, or a whole split has no label files.
    """
    root = Path(root)
    folder = root / "splits"
    lists = read_lists(folder, splits)
    known = folder_ids(root)
    places = FramePlaces(ids=frozenset(known), where=str(root / "points"))
    found = find_listed(lists, dict.fromkeys(lists, places), folder) if lists else {"all": known}
    _refuse_unknown_splits(unlabeled, found)
    warnings = []
    if not lists and (root / "ImageSets").is_dir():
        warnings.append(
            f"the lists of a folder of your own lie in {folder}, which does not exist; {root / 'ImageSets'} is not read, and all scans form the "
            "split all"
        )
    labels = set(_file_names(root, ("labels",), (".txt",)))
    _refuse_splits_without_labels(found, labels, unlabeled, root / "labels")
    ids = _together(found)
    source = FolderDataset(
        root,
        ids,
        classes=("Car",) if classes is None else tuple(classes),
        other_classes=other_classes,
        class_map=class_map or {},
        columns=columns,
        intensity_scale=intensity_scale,
        drop_non_finite=drop_non_finite,
        z_shift=z_shift,
        unlabeled=_only_in(found, unlabeled),
        scan=scan,
        form=form or LabelForm(),
    )
    return RawDataset(
        source=source,
        ids=ids,
        splits=found,
        classes=source.classes,
        rule=ClassRule(source.classes, source.class_map),
        classes_asked=classes is not None,
        class_map_asked=bool(class_map),
        allow_absent_classes=allow_absent_classes,
        unlabeled=tuple(unlabeled),
        warnings=tuple(warnings),
        found=_skipped(folder) + _skipped(root / "points", POINT_SUFFIXES),
    )


def open_nuscenes(
    root: Path | str,
    dialect: Dialect,
    *,
    version: str | None = None,
    splits: Sequence[str] = (),
    val_share: float = 0.0,
    classes: tuple[str, ...] | None = None,
    class_map: Mapping[str, str] | None = None,
    allow_absent_classes: bool = False,
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
        classes: See `NuScenesDataset`; None takes those of KITTI's benchmark.
        class_map: See `NuScenesDataset`.
        allow_absent_classes: Whether a class may occur in no label.
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
    scenes: Mapping[str, Sequence[str]] = read_lists(Path(root) / "ImageSets", splits)
    if scenes and val_share:
        raise InvalidInput(
            f"a share for val (--val-share) draws splits, but {Path(root) / 'ImageSets'} already names {', '.join(scenes)}; drop one"
        )
    if not scenes:
        scenes = draw_scenes(tables, val_share=val_share) if val_share else {"all": tuple(tables.scenes)}
    found = split_by_scene(tables, scenes)
    ids = _together(found)
    names = check_class_names(tuple(KITTI_CLASSES if classes is None else classes))
    known = tuple(dict.fromkeys((*tables.categories, *dialect.class_map)))
    source = NuScenesDataset(
        tables,
        ids,
        dialect,
        classes=names,
        class_map=spelled_map(class_map or dialect.class_map, known, names),
        neighbors=neighbors or {},
        z_shift=z_shift,
        sweeps=sweeps,
        max_length=max_length,
    )
    scene_of = {token: scene for scene, tokens in tables.scenes.items() for token in tokens}
    return RawDataset(
        source=source,
        ids=ids,
        splits=found,
        classes=source.classes,
        group=scene_of.__getitem__,
        rule=ClassRule(
            source.classes, {k: n for k, n in (source.class_map or {}).items() if n in source.classes}, own_names=False
        ),
        classes_asked=classes is not None,
        class_map_asked=bool(class_map),
        allow_absent_classes=allow_absent_classes,
        found=_skipped(Path(root) / "ImageSets"),
    )


def open_waymo(
    root: Path | str,
    *,
    splits: Sequence[str] = (),
    every: int = 1,
    classes: tuple[str, ...] | None = None,
    class_map: Mapping[str, str] | None = None,
    allow_absent_classes: bool = False,
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
        classes: See `WaymoDataset`; None takes those of Waymo's benchmark.
        class_map: See `WaymoDataset`.
        allow_absent_classes: Whether a class may occur in no label.
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
    names, types = check_class_names(tuple(WAYMO_CLASSES if classes is None else classes)), tuple(TYPES.values())
    mapped = {kind.casefold() for kind in class_map or {}}
    own = {t: n for t in types for n in names if t != n and t.casefold() == n.casefold() and t.casefold() not in mapped}
    source = WaymoDataset(
        tuple(places.values()),
        classes=names,
        class_map=spelled_map({**own, **(class_map or {})}, types, names),
        second_return=second_return,
        drop_no_label_zones=drop_no_label_zones,
        z_shift=z_shift,
        with_labels=with_labels,
        root=root,
    )
    return RawDataset(
        source=source,
        ids=source.ids,
        splits=by_split,
        classes=source.classes,
        group=segment_of,
        classes_asked=classes is not None,
        allow_absent_classes=allow_absent_classes,
        found=_skipped(Path(root) / "ImageSets"),
    )


def _file_names(base: Path, folders: Sequence[str], suffixes: Sequence[str]) -> tuple[str, ...]:
    """Names without suffix of the files in folders; hidden ones are left out."""
    paths = (path for folder in folders if (base / folder).is_dir() for path in (base / folder).iterdir())
    return tuple({path.stem: None for path in paths if path.suffix in suffixes and not path.name.startswith(".")})


def _refuse_unknown_splits(unlabeled: Sequence[str], splits: Mapping[str, object]) -> None:
    for name in unlabeled:
        if name not in splits:
            raise InvalidInput(f"--unlabeled names the split {shown(name)}, which is not among {', '.join(map(shown, splits))}")


def _refuse_splits_without_labels(
    splits: Mapping[str, Sequence[str]], labels: set[str], unlabeled: Sequence[str], folder: Path
) -> None:
    """A whole split without label files was not labeled; one missing file of many is a fault of that frame, told when it is read."""
    bare = [name for name, ids in splits.items() if name not in unlabeled and not any(i in labels for i in ids)]
    if bare:
        raise InvalidInput(
            f"no frame of the split {' and '.join(bare)} has a label file in {folder}; for frames that nobody labeled give --unlabeled "
            f"{' '.join(bare)}. An empty label file says that a labeled scene holds no object"
        )


def _only_in(splits: Mapping[str, Sequence[str]], names: Sequence[str]) -> frozenset[str]:
    """Ids of the frames that no other split than these names."""
    other = {i for name, ids in splits.items() if name not in names for i in ids}
    return frozenset(i for name in names for i in splits[name]) - other


def _skipped(folder: Path, suffixes: Sequence[str] = (".txt",)) -> Ledger:
    count = hidden_files(folder, suffixes)
    return Ledger(files_skipped={"hidden file": count} if count else {})


def _together(splits: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Every frame once, in the order of the splits."""
    return tuple(dict.fromkeys(i for part in splits.values() for i in part))
