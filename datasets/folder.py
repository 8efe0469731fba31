"""Your own data: a folder of scans and of plain text labels in our box convention.

    root/points/<id>.bin | .npy | .pcd     one scan
    root/labels/<id>.txt                   one object per line: class x y z dx dy dz yaw   (# starts a comment)
    root/splits/<name>.txt                 optional: the ids of a split, one per line

x y z is the center of the box; meters and radians, x forward, y left, z up, as drawn in `core/boxes.py`. An empty label file says
that the scene holds no object. A missing label file is an error, because it usually means a wrong path.

Read next: `core/point_files.py` for the formats of scans, `layouts.py` for the splits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import wrap_angle
from ..core.errors import InvalidInput
from ..core.foreign_text import check_name, shown
from ..core.frame import Frame
from ..core.ledger import Ledger
from ..core.point_files import POINT_SUFFIXES, read_scan
from ..core.rig import RigSpec
from ..core.scan_options import Axis, ScanOptions
from ..core.structures import Labels
from ..core.text_files import read_text
from .class_names import ClassRule, nearest
from .frame_source import DatasetOrigin, described_origin
from .id_lists import read_ids
from .kitti import scan_settings, with_point_counts
from .kitti_text import MOST_YAW, AngleError, count_label_types, finite_number, label_words

YawUnit = Literal["radians", "degrees"]
"""Unit of the angles in label files."""
BoxOrigin = Literal["center", "bottom"]
"""Which point of a box its x y z is."""
SizeLetter = Literal["l", "w", "h"]
"""One of length (along the heading), width and height."""


@dataclass(frozen=True, kw_only=True)
class LabelForm:
    """How the boxes of label files are written. The default is our own convention.

    Raises:
        InvalidInput: The size order does not name l, w and h once each.
    """

    yaw: YawUnit = "radians"
    """Unit of the yaw."""
    size_order: tuple[SizeLetter, SizeLetter, SizeLetter] = ("l", "w", "h")
    """Order of the three sizes in a line."""
    origin: BoxOrigin = "center"
    """Whether x y z is the center of the box or the center of its bottom face."""

    def __post_init__(self) -> None:
        if self.yaw not in ("radians", "degrees"):
            raise InvalidInput(f"the unit of the yaw (--yaw) must be radians or degrees, found {self.yaw!r}")
        if sorted(self.size_order) != ["h", "l", "w"]:
            raise InvalidInput(
                f"the order of the sizes (--size-order) must name l, w and h once each, found {' '.join(self.size_order)}"
            )
        if self.origin not in ("center", "bottom"):
            raise InvalidInput(f"the origin of the boxes (--origin) must be center or bottom, found {self.origin!r}")


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
    other_classes: tuple[str, ...] | None = ()
    """Names that may occur in the labels and are dropped. Any other name is an error, because it is usually a typing mistake. None
    drops and counts every name that is no class."""
    columns: tuple[str, ...] | None = None
    """What the values of a scan's row are; see `read_points`. `scan` has more options."""
    intensity_scale: float = 1.0
    """Factor that brings intensity to 0..1: 1/255 for a sensor that counts to 255."""
    drop_non_finite: bool = False
    """Leave out points with NaN or inf instead of refusing the frame. Organized clouds mark missing returns with NaN."""
    with_labels: bool = True
    """False leaves `labels` None and never opens the labels folder."""
    z_shift: float = 0.0
    """Mounting height of the sensor in m, added to z of points and boxes so that the road lies near 0."""
    class_map: Mapping[str, str] = field(default_factory=dict)
    """Type of the label files -> class, for example Vehicle -> Car."""
    unlabeled: tuple[str, ...] | frozenset[str] = ()
    """Ids of frames whose label files are not opened."""
    scan: ScanOptions | None = None
    """How scan files are read, instead of `columns`, `intensity_scale`, `drop_non_finite` and `z_shift`. Its axes turn the labels too."""
    form: LabelForm = LabelForm()
    """How the boxes of the label files are written."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))
        object.__setattr__(self, "ids", tuple(self.ids))
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "unlabeled", frozenset(self.unlabeled))
        if self.scan is not None:
            self._take_scan_options(self.scan)
        if not (Path(self.root) / "points").is_dir():
            raise InvalidInput(
                f"no folder {Path(self.root) / 'points'}; the root must hold points/<id>.bin|.npy|.pcd and labels/<id>.txt"
            )
        for frame_id in self.ids:
            check_name(frame_id, "frame id")
        self._rule  # noqa: B018 - it checks classes and class map
        if self.with_labels and len(self.unlabeled) < len(self.ids):
            _label_axes(self._scan_options.axes)

    def _take_scan_options(self, scan: ScanOptions) -> None:
        """Fill the fields that `scan` replaces. A field with a third value was given beside `scan` and would be lost."""
        scan.refuse_image_size("a folder of your own has no camera to crop to; leave it out")
        rig = scan.rig()
        for name, unset, value in (
            ("columns", None, scan.columns or None),
            ("intensity_scale", 1.0, rig.intensity_scale),
            ("drop_non_finite", False, scan.drop_non_finite),
            ("z_shift", 0.0, rig.z_shift),
        ):
            given = getattr(self, name)
            if given not in (unset, value):
                raise InvalidInput(f"{name}={given!r} is given beside scan, which says {value!r}; give it in ScanOptions only")
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Frame:
        """Read frame `index`. Raises `InvalidInput` with frame, path and root if a file is missing or broken."""
        frame_id = self.ids[index]
        points, reading = read_scan(self._scan(frame_id), self._scan_options, rig=self.rig)
        labels = None
        if self.has_labels(frame_id):
            path = self._label_path(frame_id)
            if not path.is_file():
                raise InvalidInput(
                    f"frame {frame_id}: no labels {path} (root {self.root}); write an empty file if the scene holds no object. Frames that "
                    "nobody labeled are prepared with --unlabeled SPLIT"
                )
            labels, dropped = _read(path, self._rule, self.other_classes, self.form, self._scan_options.axes)
            labels = with_point_counts(replace(labels, boxes=self.rig.from_sensor(labels.boxes)), points)
            reading = reading + Ledger(types_dropped=dropped)
        return Frame(id=frame_id, points=points, labels=labels, rig=self.rig, reading=reading)

    @cached_property
    def _rule(self) -> ClassRule:
        return ClassRule(self.classes, self.class_map)

    @cached_property
    def _scan_options(self) -> ScanOptions:
        return self.scan or ScanOptions(columns=self.columns or (), drop_non_finite=self.drop_non_finite)

    @property
    def rig(self) -> RigSpec:
        """What this reader does to scans and boxes."""
        return RigSpec(z_shift=self.z_shift, intensity_scale=self.intensity_scale)

    @property
    def origin(self) -> DatasetOrigin:
        """Where the frames come from."""
        options = {
            "z_shift": self.z_shift,
            "other_classes": "any" if self.other_classes is None else self.other_classes,
            "with_labels": self.with_labels,
            "class_map": self.class_map,
            "yaw": self.form.yaw,
            "size_order": self.form.size_order,
            "origin": self.form.origin,
        }
        settings = scan_settings(self._scan_options) | {"intensity_scale": self.intensity_scale}
        return described_origin("folder", self.root, options | settings)

    def has_labels(self, frame_id: str) -> bool:
        """Say whether the label file of a frame is read.

        Args:
            frame_id: Id of the frame.

        Returns:
            False for frames of `unlabeled`, and for all where `with_labels` is False.
        """
        return self.with_labels and frame_id not in self.unlabeled

    def files_of(self, frame_id: str) -> tuple[Path, ...]:
        """Name the files that a frame is read from; see `FiledSource`.

        Args:
            frame_id: Id of the frame.

        Returns:
            Its scan with every suffix, and its label file where that is opened.
        """
        scans = (Path(self.root) / "points" / (frame_id + suffix) for suffix in POINT_SUFFIXES)
        return (*scans, *([self._label_path(frame_id)] if self.has_labels(frame_id) else []))

    def label_types(self) -> Mapping[str, int]:
        """Count the objects of all labeled frames by type, without reading a scan. A file that is broken counts as empty here.

        Returns:
            Number of objects by type as spelled in the files.

        Raises:
            InvalidInput: A yaw lies beyond two pi, so all of them are probably in degrees; or no file can be read.
        """
        return count_label_types((self._label_path(i) for i in self.ids if self.has_labels(i)), self._types_of)

    def _types_of(self, path: Path) -> Counter[str]:
        lines = read_text(path, "label file").splitlines()
        found = [words for line in lines if (words := label_words(line.partition("#")[0], str(path)))]
        for words in found:
            if len(words) == 8 and self.form.yaw == "radians" and (yaw := finite_number(words[7])) is not None:
                _check_yaw(yaw, str(path))
        return Counter(words[0] for words in found)

    def _label_path(self, frame_id: str) -> Path:
        return Path(self.root) / "labels" / f"{frame_id}.txt"

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
    if not (root / "points").is_dir():
        raise InvalidInput(f"no folder {root / 'points'}; the root must hold points/<id>.bin|.npy|.pcd and labels/<id>.txt")
    ids = sorted({p.stem for p in (root / "points").glob("*") if p.suffix in POINT_SUFFIXES and not p.name.startswith(".")})
    if not ids:
        raise InvalidInput(f"there is no scan in {root / 'points'}; put <id>.bin, .npy or .pcd files there")
    return tuple(ids)


def read_labels(
    path: Path | str,
    classes: tuple[str, ...],
    *,
    other_classes: tuple[str, ...] | None = (),
    class_map: Mapping[str, str] | None = None,
    form: LabelForm | None = None,
    axes: tuple[Axis, Axis, Axis] = ("x", "y", "z"),
) -> Labels:
    """Read a text file of lines `class x y z dx dy dz yaw`.

    Args:
        path: The file.
        classes: Names of the classes to keep; their order gives the class numbers. Case does not matter.
        other_classes: Names that are dropped; None drops every name that is no class.
        class_map: Type of the file -> class.
        form: How the boxes are written.
        axes: Which axis of the file points forward, left and up.

    Returns:
        The labels, in the order of the file.

    Raises:
        InvalidInput: With file and line: a line has not eight columns, a number is not finite, a size is not positive, an angle lies
            beyond two pi, or a class is in neither list (the message suggests the nearest name).
    """
    labels, _ = _read(Path(path), ClassRule(classes, class_map or {}), other_classes, form or LabelForm(), axes)
    return labels


def _read(
    path: Path, rule: ClassRule, other_classes: tuple[str, ...] | None, form: LabelForm, axes: tuple[Axis, Axis, Axis]
) -> tuple[Labels, Counter[str]]:
    """The labels of a file, and the number of dropped objects by type."""
    boxes: list[list[float]] = []
    numbers: list[int] = []
    dropped: Counter[str] = Counter()
    others = None if other_classes is None else {name.casefold() for name in other_classes}
    known = (*rule.classes, *rule.class_map, *(other_classes or ()))
    for row, line in enumerate(read_text(path, "label file").splitlines(), start=1):
        where = f"{path}, line {row}"
        words = label_words(line.partition("#")[0], where)
        if not words:
            continue
        if len(words) != 8:
            raise InvalidInput(
                f"{where}: expected `class x y z dx dy dz yaw`, found {len(words)} columns: {shown(line.strip())!r}"
            )
        try:
            box = [float(w) for w in words[1:]]
        except ValueError as error:
            raise InvalidInput(f"{where}: the box must be seven numbers ({shown(error)}): {shown(line.strip())!r}") from error
        if not all(map(math.isfinite, box)):
            raise InvalidInput(f"{where}: found NaN or inf: {shown(line.strip())!r}")
        if min(box[3:6]) <= 0:
            raise InvalidInput(f"{where}: dx, dy, dz must be positive, found {box[3:6]}; give the box a size or remove the line")
        box[6] = math.radians(box[6]) if form.yaw == "degrees" else box[6]
        if form.yaw == "radians":
            _check_yaw(box[6], where)
        number = rule.number(words[0])
        if number is not None:
            boxes.append(box)
            numbers.append(number)
        elif others is None or words[0].casefold() in others:
            dropped[words[0]] += 1
        else:
            names = ", ".join(map(shown, known))
            raise InvalidInput(
                f"{where}: unknown class {shown(repr(words[0]))}; known are {names}{nearest(words[0], known)}. Types to leave out are named "
                "with --other-classes, other names of a class with --class-map TYPE CLASS"
            )
    data = _in_our_convention(torch.tensor(boxes, dtype=torch.float64).reshape(-1, 7), form, axes)
    return Labels.make(data.float(), torch.tensor(numbers, dtype=torch.int64)), dropped


def _check_yaw(yaw: float, where: str) -> None:
    if abs(yaw) > MOST_YAW:
        raise AngleError(
            f"{where}: the yaw is {yaw:g}, which is beyond two pi; angles are in radians, or in degrees with --yaw degrees"
        )


def _in_our_convention(boxes: Tensor, form: LabelForm, axes: tuple[Axis, Axis, Axis]) -> Tensor:
    """Turn (N, 7) boxes of a file into ours: order of sizes, axes, origin; the yaw is in radians already."""
    sizes = boxes[:, 3:6][:, [form.size_order.index(letter) for letter in ("l", "w", "h")]]
    turn = torch.from_numpy(_label_axes(axes))
    center = boxes[:, :3] @ turn.T
    if form.origin == "bottom":
        center = center + torch.stack([torch.zeros_like(sizes[:, 2])] * 2 + [sizes[:, 2] / 2], 1)
    yaw = boxes[:, 6]
    if axes != ("x", "y", "z"):
        heading = torch.stack([torch.cos(yaw), torch.sin(yaw), torch.zeros_like(yaw)], 1) @ turn.T
        yaw = torch.atan2(heading[:, 1], heading[:, 0])
    return torch.cat([center, sizes, wrap_angle(yaw)[:, None]], 1)


def _label_axes(axes: tuple[Axis, Axis, Axis]) -> np.ndarray:
    """(3, 3) the matrix that turns the file's axes into ours, for labels: their headings need an upright axis."""
    if axes[2].lstrip("-") != "z":
        raise InvalidInput(
            f"boxes cannot be turned by the axes {' '.join(axes)}, because the yaw of a label turns about the file's z axis, which must point "
            "up or down; convert the labels to x forward, y left, z up"
        )
    turn = np.zeros((3, 3))
    for row, axis in enumerate(axes):
        turn[row, "xyz".index(axis[-1])] = -1.0 if axis.startswith("-") else 1.0
    return turn
