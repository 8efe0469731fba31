"""Your own data: a folder of scans and of plain text labels in our box convention.

    root/points/<id>.bin | .npy | .pcd     one scan
    root/labels/<id>.txt                   one object per line: class x y z dx dy dz yaw   (# starts a comment)
    root/splits/<name>.txt                 optional: the ids of a split, one per line

x y z is the center of the box; meters and radians, x forward, y left, z up, as drawn in `core/boxes.py`. An empty label file says
that the scene holds no object. A missing label file is an error, because it usually means a wrong path.

Read next: `core/point_files.py` for the formats of scans, `raw.py` for the splits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..core.boxes import wrap_angle
from ..core.errors import InvalidInput
from ..core.frame import Frame
from ..core.point_files import POINT_SUFFIXES, read_points
from ..core.rig import RigSpec
from ..core.structures import Labels
from .frame_source import DatasetOrigin, described_origin
from .kitti import read_ids, with_point_counts
from .kitti_text import unknown_class


@dataclass(frozen=True)
class FolderDataset:
    """Frames of your own folder.

    Example:
        frames = FolderDataset("my_data", folder_ids("my_data", "train"), classes=("Car",), z_shift=1.8)
        frame = frames[0]
    """

    root: Path | str
    """The folder."""
    ids: tuple[str, ...] | list[str]
    """Which frames, in this order: file names without suffix. See `folder_ids`."""
    classes: tuple[str, ...]
    """Names of the classes to keep; their order gives the class numbers."""
    other_classes: tuple[str, ...] = ()
    """Names that may occur in the labels and are dropped. Any other name is an error, because it is usually a typing mistake."""
    columns: tuple[str, ...] | None = None
    """What the values of a scan's row are; see `read_points`."""
    intensity_scale: float = 1.0
    """Factor that brings intensity to 0..1: 1/255 for a sensor that counts to 255."""
    drop_non_finite: bool = False
    """Leave out points with NaN or inf instead of refusing the frame. Organized clouds mark missing returns with NaN."""
    with_labels: bool = True
    """False leaves `labels` None and never opens the labels folder."""
    z_shift: float = 0.0
    """Mounting height of the sensor in m, added to z of points and boxes so that the road lies near 0."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))
        object.__setattr__(self, "ids", tuple(self.ids))
        object.__setattr__(self, "classes", tuple(self.classes))
        if not (Path(self.root) / "points").is_dir():
            raise InvalidInput(
                f"no folder {Path(self.root) / 'points'}; the root must hold points/<id>.bin|.npy|.pcd and labels/<id>.txt"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Frame:
        """Read frame `index`. Raises `InvalidInput` with frame, path and root if a file is missing or broken."""
        frame_id = self.ids[index]
        points = read_points(
            self._scan(frame_id),
            columns=self.columns,
            intensity_scale=self.intensity_scale,
            drop_non_finite=self.drop_non_finite,
        )
        points = replace(points, xyz=self.rig.from_sensor(points.xyz))
        labels = None
        if self.with_labels:
            path = Path(self.root) / "labels" / f"{frame_id}.txt"
            if not path.is_file():
                raise InvalidInput(
                    f"frame {frame_id}: no labels {path} (root {self.root}); write an empty file if the scene holds no object"
                )
            labels = read_labels(path, self.classes, other_classes=self.other_classes)
            labels = with_point_counts(replace(labels, boxes=self.rig.from_sensor(labels.boxes)), points)
        return Frame(id=frame_id, points=points, labels=labels, rig=self.rig)

    @property
    def rig(self) -> RigSpec:
        """What this reader does to scans and boxes."""
        return RigSpec(z_shift=self.z_shift, intensity_scale=self.intensity_scale)

    @property
    def origin(self) -> DatasetOrigin:
        """Where the frames come from."""
        options = {
            "z_shift": self.z_shift,
            "intensity_scale": self.intensity_scale,
            "other_classes": self.other_classes,
            "columns": self.columns or (),
            "drop_non_finite": self.drop_non_finite,
            "with_labels": self.with_labels,
        }
        return described_origin("folder", self.root, options)

    def _scan(self, frame_id: str) -> Path:
        base = Path(self.root) / "points"
        found = [base / (frame_id + suffix) for suffix in POINT_SUFFIXES if (base / (frame_id + suffix)).is_file()]
        if len(found) != 1:
            what = (
                f"several scans {[p.name for p in found]}; keep one" if found else f"no scan {base / frame_id}.bin, .npy or .pcd"
            )
            raise InvalidInput(f"frame {frame_id}: {what} (root {self.root})")
        return found[0]


def folder_ids(root: Path | str, split: str | None = None) -> tuple[str, ...]:
    """List frame ids.

    Args:
        root: The folder.
        split: Name of a file `splits/SPLIT.txt`; None takes all scans in `points`, sorted.

    Returns:
        The ids.

    Raises:
        InvalidInput: There is no such split, or no scan.
    """
    root = Path(root)
    if split is not None:
        return read_ids(root / "splits" / f"{split}.txt")
    ids = sorted({p.stem for p in (root / "points").glob("*") if p.suffix in POINT_SUFFIXES and not p.name.startswith(".")})
    if not ids:
        raise InvalidInput(f"there is no scan in {root / 'points'}; put <id>.bin, .npy or .pcd files there")
    return tuple(ids)


def read_labels(path: Path | str, classes: tuple[str, ...], *, other_classes: tuple[str, ...] = ()) -> Labels:
    """Read a text file of lines `class x y z dx dy dz yaw`.

    Args:
        path: The file.
        classes: Names of the classes to keep; their order gives the class numbers.
        other_classes: Names that are dropped.

    Returns:
        The labels, in the frame and the order of the file.

    Raises:
        InvalidInput: With file and line: a line has not eight columns, a number is not finite, a size is not positive, or a class is
            in neither list (the message suggests the nearest name).
    """
    boxes: list[list[float]] = []
    indices: list[int] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}, line {number}"
        if len(words) != 8:
            raise InvalidInput(f"{where}: expected `class x y z dx dy dz yaw`, found {len(words)} columns: {line.strip()!r}")
        try:
            box = [float(w) for w in words[1:]]
        except ValueError as error:
            raise InvalidInput(f"{where}: the box must be seven numbers ({error}): {line.strip()!r}") from error
        if not all(map(math.isfinite, box)):
            raise InvalidInput(f"{where}: found NaN or inf: {line.strip()!r}")
        if min(box[3:6]) <= 0:
            raise InvalidInput(f"{where}: dx, dy, dz must be positive, found {box[3:6]}; give the box a size or remove the line")
        if words[0] in classes:
            boxes.append(box)
            indices.append(classes.index(words[0]))
        elif words[0] not in other_classes:
            raise InvalidInput(f"{where}: {unknown_class(words[0], classes + other_classes)}")
    data = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 7)
    data[:, 6] = wrap_angle(data[:, 6])
    return Labels.make(data.float(), torch.tensor(indices, dtype=torch.int64))
