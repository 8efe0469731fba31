"""Frames from nuScenes and Lyft Level 5, from their tables and sweeps, without either SDK.

    root/<version>/*.json                     the tables (`nuscenes_tables.py`)
    root/samples, sweeps/LIDAR_TOP/*.pcd.bin  nuScenes' sweeps, or
    root/lidar/*.bin                          Lyft's: float32 rows x y z intensity ring
    root/ImageSets/<split>.txt                yours: one scene name per line (scenes, not frames: neighbors in time look alike)

The frame that points and boxes come in is the vehicle's, moved to the sensor: axes of the ego frame, origin of the LiDAR.

       nuScenes' file     Lyft's file (host-a101)     what comes out, for both                      (in BEV)
           ^ y forward          o--> y                     ^ x forward
           |                    |                          |          z_shift lifts z by the mounting height,
           o--> x               v x backward      y <------o          so that the road is near 0

Points are turned by the whole `calibrated_sensor.rotation`, roll and pitch included (these LiDARs lean by 1 to 3 degrees), but not
moved by its translation. A vehicle knows that rotation, so its extractor can do the same. It need not know its pose in the world, so
the ego pose serves boxes and earlier sweeps only. A box that leans in this frame (labels of nuScenes and Lyft are upright in the
world, the vehicle on a slope is not) keeps its center, its sizes and the heading of its long axis.
OpenPCDet and ST3D leave nuScenes' points unchanged, with x to the right; our detectors need x forward.

nuScenes counts intensity to 255. Lyft published no intensity and writes 100 everywhere. Both are divided by 255.

Read next: `drive_tables.py`, `nuscenes_tables.py`; `layouts.py` for the splits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import wrap_angle
from ..core.errors import InvalidInput
from ..core.files import check_input_file
from ..core.foreign_text import shown
from ..core.frame import Frame
from ..core.ledger import Ledger
from ..core.point_files import MOST_SCAN_BYTES, read_scan
from ..core.rig import RigSpec
from ..core.row_width import check_number_rows
from ..core.scan_options import ScanOptions
from ..core.structures import Labels, PointCloud
from .drive_tables import DriveTables, Sweep
from .frame_source import DatasetOrigin, described_origin
from .kitti import with_point_counts

_COLUMN_NAMES = ("x", "y", "z", "intensity", "ring")
_COLUMNS = len(_COLUMN_NAMES)
_SWEEP = ScanOptions(columns=("x", "y", "z", "intensity", "_"))
_INTENSITY_MAX = 255.0
INTENSITY_SCALE = 1 / _INTENSITY_MAX
"""What brings the intensity of the sweeps to 0..1. The reader applies it; a detector's user needs it for the same files."""
_EGO_RADIUS = 1.0  # m; points of an earlier sweep within this square are the vehicle itself and would be smeared along its path


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What differs between nuScenes and Lyft."""

    name: Literal["lyft", "nuscenes"]
    """Name of the layout."""
    version: str
    """The usual folder of the tables."""
    class_map: Mapping[str, str]
    """Category of the tables -> class, by default."""


LYFT_DIALECT = Dialect(
    name="lyft",
    version="v1.01-train",
    class_map={
        "car": "Car",
        "pedestrian": "Pedestrian",
        "bicycle": "Cyclist",
        "motorcycle": "Motorcyclist",
        "truck": "Truck",
        "bus": "Bus",
        "other_vehicle": "OtherVehicle",
        "emergency_vehicle": "EmergencyVehicle",
        "animal": "Animal",
    },
)
"""Lyft Level 5: every category is a class."""
NUSCENES_DIALECT = Dialect(
    name="nuscenes",
    version="v1.0-trainval",
    class_map={
        "vehicle.car": "Car",
        "human.pedestrian.adult": "Pedestrian",
        "human.pedestrian.child": "Pedestrian",
        "human.pedestrian.construction_worker": "Pedestrian",
        "human.pedestrian.police_officer": "Pedestrian",
        "vehicle.bicycle": "Cyclist",
        "vehicle.motorcycle": "Motorcyclist",
        "vehicle.truck": "Truck",
        "vehicle.bus.bendy": "Bus",
        "vehicle.bus.rigid": "Bus",
        "vehicle.trailer": "Trailer",
        "vehicle.construction": "ConstructionVehicle",
        "movable_object.barrier": "Barrier",
        "movable_object.trafficcone": "TrafficCone",
    },
)
"""nuScenes, grouped as in its detection benchmark; what the benchmark leaves out (strollers, wheelchairs, debris, ...) has no class."""


@dataclass(frozen=True)
class NuScenesDataset:
    """Keyframes of a nuScenes or Lyft folder.

    `num_points` of a label is the table's where the table knows it (nuScenes), else counted. In both cases it counts the keyframe's
    own turn. Options that contradict each other and names that do not exist raise `InvalidInput`.

    Example:
        tables = read_tables("nuscenes", "v1.0-mini")
        frames = NuScenesDataset(tables, tables.samples, NUSCENES_DIALECT, classes=("Car",), z_shift=1.84)
    """

    tables: DriveTables
    """The tables, from `read_tables`."""
    ids: tuple[str, ...] | list[str]
    """Which frames, in this order: sample tokens. See `split_by_scene`."""
    dialect: Dialect
    """`NUSCENES_DIALECT` or `LYFT_DIALECT`."""
    classes: tuple[str, ...] = ("Car", "Pedestrian", "Cyclist")
    """Names of the classes to keep; their order gives the class numbers."""
    class_map: Mapping[str, str] | None = None
    """Category of the tables -> class; None takes the dialect's. A category that leads to none of `classes` is background."""
    neighbors: Mapping[str, str] = field(default_factory=dict)
    """Category -> the class that it looks like. Its boxes are kept with weight 0, as KITTI's vans are for cars."""
    z_shift: float = 0.0
    """Mounting height of the LiDAR in m, added to z of points and boxes so that the road lies near 0: nuScenes 1.84, Lyft 1.83."""
    sweeps: int = 1
    """Turns of the LiDAR per frame: the keyframe's and those before it, moved by the vehicle's own motion. With more than 1, a feature
    "time" gives the age of each point in s, and the tables must be read with `keyframes_only=False`. A scene's first frames hold
    fewer turns."""
    max_length: float | None = None
    """Boxes longer than this, in m, are left out of the labels. ST3D drops buses and trucks from a source's vehicles with 10 m."""
    with_labels: bool = True
    """False leaves `labels` None."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(self.ids))
        object.__setattr__(self, "classes", tuple(self.classes))
        if self.class_map is None:
            object.__setattr__(self, "class_map", self.dialect.class_map)
        if self.sweeps < 1 or (self.max_length is not None and self.max_length <= 0):
            raise InvalidInput(f"sweeps must be at least 1 and max_length above 0, found {self.sweeps} and {self.max_length}")
        if self.with_labels:
            self._check_classes()

    def _check_classes(self) -> None:
        if not self.tables.categories:
            raise InvalidInput(
                "the tables hold no category: read them with annotations=True, or ask for frames with_labels=False"
            )
        class_map = self.class_map or {}
        known = tuple(dict.fromkeys((*self.tables.categories, *self.dialect.class_map)))
        for category in (*class_map, *self.neighbors):
            if category not in known:
                raise InvalidInput(
                    f"there is no category {category!r} in {self.dialect.name}'s tables{_nearest(category, known)}"
                )
        for name in self.classes:
            if name not in class_map.values():
                raise InvalidInput(
                    f"no category leads to the class {name!r}{_nearest(name, tuple(class_map.values()))}; name a category for it (--class-map CATEGORY CLASS)"
                )
        self._check_tables_hold(class_map)
        for category, name in self.neighbors.items():
            if name not in self.classes or class_map.get(category) in self.classes:
                raise InvalidInput(
                    f"neighbors: {category!r} -> {name!r}: the class must be one of {', '.join(self.classes)}, and the category must not "
                    "become one of them itself"
                )

    def _check_tables_hold(self, class_map: Mapping[str, str]) -> None:
        """Refuse the tables of the other dataset: with them all objects would be background."""
        if any(class_map.get(category) in self.classes or category in self.neighbors for category in self.tables.categories):
            return
        where = f"{self.tables.root / self.tables.version / 'category.json'} holds {_listed(self.tables.categories)}"
        other = NUSCENES_DIALECT if self.dialect.name == "lyft" else LYFT_DIALECT
        remedy = f"say which category is which class (--class-map CATEGORY {self.classes[0]})"
        if any(category in other.class_map for category in self.tables.categories):
            where, remedy = (
                f"{where}, which are names of {other.name}, not of {self.dialect.name}",
                f"use `upcycle3d prepare {other.name}`",
            )
        raise InvalidInput(f"no category of these tables leads to {_listed(self.classes)}: {where}; {remedy}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Frame:
        """Read frame `index`. Raises `InvalidInput` with the sample and the file or row that is missing or broken."""
        sample = self.ids[index]
        keyframe = self.tables.keyframe(sample)
        try:
            sweep, reading = _read_counted(keyframe.path)
            points = self._in_frame(sweep, keyframe, keyframe)
            reading = replace(reading, types_dropped=self._dropped(sample), types_ignored=self._ignored(sample))
            labels = self.labels(sample) if self.with_labels else None
            if labels is not None and bool((labels.num_points < 0).any()):
                counted = with_point_counts(labels, points).num_points
                labels = replace(labels, num_points=torch.where(labels.num_points < 0, counted, labels.num_points))
            if self.sweeps > 1:
                points, earlier = self._accumulate(points, keyframe)
                reading = reading + earlier
        except InvalidInput as error:
            if sample in str(error):
                raise
            raise InvalidInput(f"sample {sample}: {error}") from error
        return Frame(id=sample, points=points, labels=labels, rig=self.rig, reading=reading)

    @property
    def rig(self) -> RigSpec:
        """What this reader does to scans and boxes; `read_sweep` brings the intensity to 0..1 already."""
        return RigSpec(z_shift=self.z_shift)

    @property
    def origin(self) -> DatasetOrigin:
        """Where the frames come from."""
        options = {
            "z_shift": self.z_shift,
            "version": self.tables.version,
            "class_map": self.class_map or {},
            "neighbors": self.neighbors,
            "sweeps": self.sweeps,
            "max_length": self.max_length,
            "with_labels": self.with_labels,
        }
        return described_origin(self.dialect.name, self.tables.root, options)

    def files_of(self, frame_id: str) -> tuple[Path, ...]:
        """Name the files that a frame is read from; see `FiledSource`. The sweeps before the keyframe are not among them.

        Args:
            frame_id: Token of the sample.

        Returns:
            All tables, and the file of the keyframe.
        """
        tables = sorted((Path(self.tables.root) / self.tables.version).glob("*.json"))
        try:
            return (*tables, self.tables.keyframe(frame_id).path)
        except InvalidInput:
            return tuple(tables)

    def label_types(self) -> Mapping[str, int]:
        """Count the boxes of all frames by category, without reading a sweep.

        Returns:
            Number of boxes by category.
        """
        places = [self.tables.sample_order[i] for i in self.ids if i in self.tables.sample_order]
        rows = [np.arange(self.tables.box_starts[i], self.tables.box_starts[i + 1]) for i in places] if self.with_labels else []
        numbers = self.tables.box_counts[np.concatenate(rows), 0] if rows else np.zeros(0, np.int64)
        found = Counter(numbers[numbers >= 0].tolist())
        return {self.tables.categories[number]: count for number, count in sorted(found.items())}

    def labels(self, sample: str) -> Labels:
        """Read the labels of a keyframe without opening its sweep.

        Args:
            sample: Token of the sample.

        Returns:
            The labels; `num_points` is -1 where the table does not know it.

        Raises:
            InvalidInput: The sample does not exist, or a box is broken.
        """
        keyframe, found = self.tables.keyframe(sample), self.tables.annotations(sample)
        class_map = {**{c: n for c, n in (self.class_map or {}).items() if n in self.classes}, **self.neighbors}
        kept = [
            i for i, category in enumerate(found.categories)
            if category in class_map and (self.max_length is None or float(found.size[i, 1]) <= self.max_length)
        ]  # fmt: skip
        names = [found.categories[i] for i in kept]
        center = self._shifted(keyframe.vehicle.to_inner(found.center[kept]) - keyframe.sensor.translation)
        forward = found.rotation[kept, :, 0] @ keyframe.vehicle.rotation  # (N, 3), the boxes' x axes in the vehicle's frame
        yaw = wrap_angle(torch.atan2(forward[:, 1], forward[:, 0]))
        boxes = torch.cat([center, found.size[kept][:, [1, 0, 2]], yaw[:, None]], 1).float()
        boxes[:, 6] = wrap_angle(boxes[:, 6])
        return Labels.make(
            boxes,
            torch.tensor([self.classes.index(class_map[name]) for name in names], dtype=torch.int64),
            num_points=found.num_points[kept],
            weight=torch.tensor([0.0 if name in self.neighbors else 1.0 for name in names]),
        )

    def _dropped(self, sample: str) -> Mapping[str, int]:
        """Number of boxes that no class wants, by category; those that are too long for `max_length` count as `CATEGORY (too long)`."""
        if not self.with_labels:
            return {}
        found = self.tables.annotations(sample)
        wanted = {c for c, n in (self.class_map or {}).items() if n in self.classes} | set(self.neighbors)
        long = [self.max_length is not None and float(length) > self.max_length for length in found.size[:, 1]]
        return Counter(
            f"{category} (too long)" if category in wanted else category
            for category, too_long in zip(found.categories, long)
            if too_long or category not in wanted
        )

    def _ignored(self, sample: str) -> Mapping[str, int]:
        """Number of boxes that are kept with weight 0, by category."""
        if not self.with_labels:
            return {}
        found = self.tables.annotations(sample)
        return Counter(
            category
            for category, length in zip(found.categories, found.size[:, 1])
            if category in self.neighbors and (self.max_length is None or float(length) <= self.max_length)
        )

    def _accumulate(self, points: PointCloud, keyframe: Sweep) -> tuple[PointCloud, Ledger]:
        """Add the sweeps before the keyframe, every point with its age; the ledger counts their points, the vehicle's own left out."""
        clouds, sweep, earlier = [_with_age(points, 0.0)], keyframe, Ledger()
        while len(clouds) < self.sweeps and sweep.previous:
            sweep = self.tables.sweep(sweep.previous)
            cloud, read = _read_counted(sweep.path)
            own = len(cloud)
            cloud = cloud.select(cloud.xyz[:, :2].abs().amax(1) >= _EGO_RADIUS)
            earlier = earlier + replace(read, scans=0, points=read.points - own + len(cloud))
            clouds.append(_with_age(self._in_frame(cloud, sweep, keyframe), (keyframe.timestamp - sweep.timestamp) * 1e-6))
        return PointCloud.concatenate(clouds), earlier

    def _in_frame(self, cloud: PointCloud, sweep: Sweep, keyframe: Sweep) -> PointCloud:
        """Bring points of a sweep's own frame to the keyframe's frame as drawn above."""
        xyz = cloud.xyz.double()
        if sweep is keyframe:  # not through the world frame: the distance to a map's origin would cost digits
            return replace(cloud, xyz=self._shifted(xyz @ sweep.sensor.rotation.T).float())
        moved = keyframe.vehicle.to_inner(sweep.vehicle.to_outer(sweep.sensor.to_outer(xyz)))
        return replace(cloud, xyz=self._shifted(moved - keyframe.sensor.translation).float())

    def _shifted(self, xyz: Tensor) -> Tensor:
        return self.rig.from_sensor(xyz)


def read_sweep(path: Path | str) -> PointCloud:
    """Read one sweep: float32 rows of x y z intensity ring.

    Args:
        path: The file.

    Returns:
        The points in the sensor's own frame, without those at the sensor, intensity divided by 255. The ring is left out.

    Raises:
        InvalidInput: The file is missing, empty or cut off, holds NaN or inf, or its rows or intensities are no sweep's.
    """
    return _read_counted(Path(path))[0]


def _read_counted(path: Path) -> tuple[PointCloud, Ledger]:
    """`read_sweep`, with the counts of `read_scan`."""
    if not path.is_file():
        raise InvalidInput(
            f"there is no sweep {path}; unpack the LiDAR archive (earlier sweeps are in one of their own), or leave its scene out: write the "
            "other scenes, one name per line, into ImageSets/NAME.txt"
        )
    check_input_file(path, "sweep", most=MOST_SCAN_BYTES)
    size = path.stat().st_size
    if size % (4 * _COLUMNS) or not size:
        raise InvalidInput(
            f"{path}: {size} bytes are not a whole number of rows of {_COLUMNS} float32 (x y z intensity ring): the sweep is cut off. "
            "Download it again (Lyft's host-a011_lidar1_1233090652702363606.bin is cut off in v1.01 and whole in v1.02), or leave its scene "
            "out: write the other scenes, one name per line, into ImageSets/NAME.txt"
        )
    data = np.fromfile(path, np.uint8)
    try:
        check_number_rows(data, _COLUMN_NAMES, "float32", named=True)
    except InvalidInput as error:
        raise InvalidInput(
            f"{path}: a sweep of nuScenes or Lyft has rows of x y z intensity ring, but {str(error).rpartition(': ')[0] or error}; put the "
            "original file back"
        ) from error
    rows = data.view("<f4").reshape(-1, _COLUMNS)
    if not np.isfinite(rows[:, :4]).all():
        raise InvalidInput(
            f"{path}: {int((~np.isfinite(rows[:, :4]).all(1)).sum())} of {len(rows)} points hold NaN or inf; repair the file"
        )
    lowest, highest = float(rows[:, 3].min()), float(rows[:, 3].max())
    scaled = 0 < highest <= 1 and bool((rows[:, 3] % 1 != 0).any())
    if lowest < 0 or highest > _INTENSITY_MAX or scaled:
        raise InvalidInput(
            f"{path}: its intensity lies in {lowest:g}..{highest:g}, while nuScenes and Lyft count in whole numbers to 255; the file was "
            "changed, or is of another sensor: put the original file back"
        )
    cloud, reading = read_scan(path, _SWEEP)
    return replace(cloud, features=cloud.features / _INTENSITY_MAX), reading


def split_by_scene(tables: DriveTables, scenes: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """List the frames of splits that name scenes.

    Args:
        tables: The tables.
        scenes: Name of a split -> names of its scenes.

    Returns:
        Name of a split -> sample tokens, scene by scene in order of time.

    Raises:
        InvalidInput: A scene does not exist; the message suggests the nearest name.
    """
    splits: dict[str, tuple[str, ...]] = {}
    for split, names in scenes.items():
        for name in names:
            if name not in tables.scenes:
                near = _nearest(name, tuple(tables.scenes))
                raise InvalidInput(
                    f"split {split!r}: there is no scene {name!r} in {tables.version}/scene.json{near}; a split lists scene names"
                )
        splits[split] = tuple(token for name in dict.fromkeys(names) for token in tables.scenes[name])
    return splits


def draw_scenes(tables: DriveTables, *, val_share: float, seed: int = 0) -> dict[str, tuple[str, ...]]:
    """Draw a "train" and a "val" split by whole logs. Scenes of one log are one drive with the same street and cars, so they never part.

    Args:
        tables: The tables.
        val_share: Logs are drawn until "val" holds this share of the frames.
        seed: Seed of the draw.

    Returns:
        Name of the split -> names of its scenes.

    Raises:
        InvalidInput: The share is not between 0 and 1, or there are fewer than two logs.
    """
    logs = sorted({tables.logs[name] for name in tables.scenes})
    if not 0 < val_share < 1 or len(logs) < 2:
        raise InvalidInput(f"a val split needs 0 < val_share < 1 and at least two logs, found {val_share} and {len(logs)}")
    wanted, taken, val = val_share * len(tables.sample_order), 0, set()
    for i in np.random.default_rng(seed).permutation(len(logs))[:-1]:  # at least one log is left for training
        if taken >= wanted:
            break
        val.add(logs[i])
        taken += sum(len(tokens) for name, tokens in tables.scenes.items() if tables.logs[name] == logs[i])
    return {
        "train": tuple(name for name in tables.scenes if tables.logs[name] not in val),
        "val": tuple(name for name in tables.scenes if tables.logs[name] in val),
    }


def _with_age(cloud: PointCloud, seconds: float) -> PointCloud:
    age = torch.full((len(cloud), 1), seconds)
    return replace(cloud, features=torch.cat([cloud.features, age], 1), feature_names=(*cloud.feature_names, "time"))


def _listed(names: Sequence[str]) -> str:
    """Up to a dozen names of others for a message."""
    some = [shown(name, most=40) for name in names[:12]]
    return ", ".join(some) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(set(known))[:12])}"
