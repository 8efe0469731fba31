"""KITTI's text format for objects: one line per labeled or detected object, in the camera frame, and the way to our values.

A line is `type truncated occluded alpha left top right bottom h w l x y z rotation_y [score]`: pixels for the 2D box, meters in the
rectified camera frame (x right, y down, z forward) for the center of the box's bottom face, radians for the angles. An unknown value
is written as -1 (sizes), -1000 (place) and -10 (angles), as in KITTI's own DontCare lines.

`KittiObjects` keeps every line and the file's order, because the evaluation depends on both. `labels_from_kitti` and
`predictions_to_kitti` translate to and from the LiDAR frame.

Read next: `kitti.py` for the folder around these files, `perception/evaluation/kitti.py` for the evaluation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core.boxes import corners_bev, kitti_camera_to_lidar, lidar_to_kitti_camera, wrap_angle
from ..core.errors import InvalidInput
from ..core.files import write_atomically
from ..core.foreign_text import LONGEST_NAME, shown
from ..core.frame import Calibration
from ..core.structures import Labels, Predictions
from ..core.text_files import read_text
from .class_names import ClassRule, is_dont_care

KITTI_TYPES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc", "DontCare")
"""Names of all types that label files use."""
NEIGHBORS: Mapping[str, tuple[str, ...]] = {"Car": ("Van",), "Pedestrian": ("Person_sitting",)}
"""Types that look alike, so finding one is neither right nor wrong (KITTI devkit, evaluate_object.cpp, cleanData)."""
MIN_HEIGHT = (40.0, 25.0, 25.0)
"""Easy, moderate, hard: the 2D box is taller than this, in pixels."""
MAX_OCCLUSION = (0, 1, 2)
"""Easy, moderate, hard: the highest level of occlusion."""
MAX_TRUNCATION = (0.15, 0.30, 0.50)
"""Easy, moderate, hard: the highest share of the object outside the picture."""

LONGEST_LABEL_LINE = 4096
"""Letters of the longest line of a label file; longer ones come from damaged files."""
MOST_YAW = 2 * math.pi + 1e-3
"""Radians of the largest angle in a label. Angles beyond are usually in degrees."""

_NEAR = 0.1  # m; what lies closer to the camera's plane is not projected


@dataclass(frozen=True, kw_only=True)
class KittiObjects:
    """One label or detection file in file order, in the camera frame."""

    types: tuple[str, ...]
    """N names."""
    truncated: Tensor
    """(N,) float64 share of the object outside the picture, 0..1."""
    occluded: Tensor
    """(N,) int64: 0 fully visible, 1 partly, 2 largely occluded, 3 unknown."""
    alpha: Tensor
    """(N,) float64 angle in radians at which the camera sees the object."""
    bbox: Tensor
    """(N, 4) float64 left, top, right, bottom in pixels."""
    dimensions: Tensor
    """(N, 3) float64 height, width, length in m."""
    location: Tensor
    """(N, 3) float64 x, y, z in m of the center of the bottom face."""
    rotation_y: Tensor
    """(N,) float64 heading about the camera's y axis in radians."""
    scores: Tensor | None = None
    """(N,) float64 scores of detections; None for labels."""

    def __post_init__(self) -> None:
        n = len(self.types)
        shapes = {"truncated": (n,), "occluded": (n,), "alpha": (n,), "bbox": (n, 4), "dimensions": (n, 3), "location": (n, 3)}
        shapes |= {"rotation_y": (n,)} | ({} if self.scores is None else {"scores": (n,)})
        for name, shape in shapes.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise InvalidInput(f"KittiObjects.{name} must be {shape} for {n} types, found {found}")

    def __len__(self) -> int:
        return len(self.types)

    def select(self, keep: Tensor) -> KittiObjects:
        """Choose objects.

        Args:
            keep: (N,) bool mask, or an index.

        Returns:
            The chosen objects, in that order.
        """
        index = torch.arange(len(self))[keep]
        return KittiObjects(
            types=tuple(self.types[i] for i in index.tolist()),
            truncated=self.truncated[index],
            occluded=self.occluded[index],
            alpha=self.alpha[index],
            bbox=self.bbox[index],
            dimensions=self.dimensions[index],
            location=self.location[index],
            rotation_y=self.rotation_y[index],
            scores=None if self.scores is None else self.scores[index],
        )

    @staticmethod
    def from_columns(types: tuple[str, ...], columns: Tensor) -> KittiObjects:
        """Make objects from the numeric columns of a label or detection file.

        Args:
            types: N names.
            columns: (N, 14) or, with scores, (N, 15) float64 in the order of the file.

        Returns:
            The objects in this order; `occluded` is cut to a whole number.
        """
        return KittiObjects(
            types=types,
            truncated=columns[:, 0],
            occluded=columns[:, 1].long(),
            alpha=columns[:, 2],
            bbox=columns[:, 3:7],
            dimensions=columns[:, 7:10],
            location=columns[:, 10:13],
            rotation_y=columns[:, 13],
            scores=columns[:, 14] if columns.shape[1] == 15 else None,
        )

    def label_columns(self) -> Tensor:
        """Return (N, 14) float64, the numeric columns of a label file, without scores; `from_columns` reads them."""
        parts = [self.truncated[:, None], self.occluded[:, None], self.alpha[:, None], self.bbox, self.dimensions, self.location]
        return torch.cat([part.double() for part in [*parts, self.rotation_y[:, None]]], 1)

    def difficulty(self) -> Tensor:
        """Return (N,) int64: the easiest of 0 easy, 1 moderate, 2 hard whose limits the object keeps, -1 if it keeps none."""
        height = self.bbox[:, 3] - self.bbox[:, 1]
        level = torch.full((len(self),), -1, dtype=torch.int64)
        for d in (2, 1, 0):
            fits = (height > MIN_HEIGHT[d]) & (self.occluded <= MAX_OCCLUSION[d]) & (self.truncated <= MAX_TRUNCATION[d])
            level[fits] = d
        return level


def parse_objects(text: str, source: str) -> KittiObjects:
    """Read the text of a label file (15 columns) or a detection file (16 columns).

    Args:
        text: The text. An empty text holds no object; `scores` is then None.
        source: What error messages call the text, usually its path.

    Returns:
        The objects.

    Raises:
        InvalidInput: With source and line: a wrong number of columns, a value that is not a finite number, a box without positive size.
            The size -1 -1 -1 ("not known") is legal, and so is any size of a DontCare region.
    """
    types: list[str] = []
    rows: list[list[float]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{source}, line {number}"
        words = label_words(line, where)
        if not words:
            continue
        if len(words) not in (15, 16) or (rows and len(words) - 1 != len(rows[0])):
            like = f"{len(rows[0]) + 1} like the lines before" if rows else "15 (label) or 16 (detection, with a score)"
            raise InvalidInput(f"{where}: expected {like} columns, found {len(words)}: {shown(line.strip())!r}")
        try:
            values = [float(w) for w in words[1:]]
        except ValueError as error:
            raise InvalidInput(
                f"{where}: all columns after the type must be numbers ({shown(error)}): {shown(line.strip())!r}"
            ) from error
        if not all(map(math.isfinite, values)):
            raise InvalidInput(f"{where}: found NaN or inf: {shown(line.strip())!r}")
        _check_object(words[0], values, where)
        types.append(words[0])
        rows.append(values)
    columns = len(rows[0]) if rows else 14
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, columns)
    return KittiObjects.from_columns(tuple(types), table)


def label_words(line: str, where: str) -> list[str]:
    """Divide one line of a label file into words.

    Args:
        line: The line.
        where: File and line, for the message.

    Returns:
        The words; the first is a type.

    Raises:
        InvalidInput: The line or its type is too long for a label.
    """
    words = line.split() if len(line) <= LONGEST_LABEL_LINE else []
    if len(line) > LONGEST_LABEL_LINE or (words and len(words[0]) > LONGEST_NAME):
        raise InvalidInput(f"{where}: a line of {len(line):,} letters is no label, the file is damaged: {shown(line, most=60)!r}")
    return words


def _check_object(kind: str, values: list[float], where: str) -> None:
    """Check size and angle of one object; `values` are the columns after the type."""
    size, yaw = values[7:10], values[13]
    unknown = size == [-1.0, -1.0, -1.0]
    if is_dont_care(kind):
        return
    if min(size) <= 0 and not unknown:
        raise InvalidInput(
            f"{where}: height, width, length of {shown(kind)} must be positive, found {size}; "
            "remove the line, or write -1 -1 -1 -1000 -1000 -1000 -10 for an object without a 3D box"
        )
    if not unknown:
        _check_yaw(kind, yaw, where, 2 if len(values) == 14 else 4)


class AngleError(InvalidInput):
    """An angle that cannot be in radians; one of them says that all are wrong."""


def _check_yaw(kind: str, yaw: float, where: str, most: int) -> None:
    """`most` is in units of pi: labels 2, detections 4, because some programs add a turn."""
    if abs(yaw) > MOST_YAW * most / 2:
        raise AngleError(
            f"{where}: rotation_y of {shown(kind)} is {yaw:g}, which is beyond {most} pi; angles are in radians, and this one is perhaps in "
            "degrees: convert the files"
        )


def finite_number(word: str) -> float | None:
    """Read a number.

    Args:
        word: A word of a label file.

    Returns:
        The number, or None where the word is none, or NaN or inf.
    """
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_types(path: Path) -> Counter[str]:
    """Count the objects of a label file by type. Of everything else, only the angles are checked.

    Args:
        path: The file.

    Returns:
        Number of objects by type as spelled in the file, without DontCare.

    Raises:
        InvalidInput: The file cannot be read, or a rotation_y lies beyond two pi, so all of them are probably in degrees.
    """
    lines = read_text(path, "label file").splitlines()
    found = [words for line in lines if (words := line[:LONGEST_LABEL_LINE].split()) and not is_dont_care(words[0])]
    for words in found:
        if len(words) == 15 and words[8:11] != ["-1", "-1", "-1"] and (yaw := finite_number(words[14])) is not None:
            _check_yaw(words[0], yaw, str(path), 2)
    return Counter(words[0][: LONGEST_NAME + 1] for words in found)


def count_label_types(files: Iterable[Path], read: Callable[[Path], Counter[str]]) -> Counter[str]:
    """Count the objects of label files by type.

    Args:
        files: The files.
        read: Counts the objects of one file.

    Returns:
        Number of objects by type. A file that cannot be read counts as empty, because reading its frame says what is wrong.

    Raises:
        InvalidInput: No object was found and a file cannot be read; or an angle cannot be in radians.
    """
    types: Counter[str] = Counter()
    fault: InvalidInput | None = None
    for path in files:
        try:
            types.update(read(path))
        except AngleError:
            raise
        except InvalidInput as error:
            fault = fault or error
    if fault is not None and not types:
        raise fault
    return types


def dropped_types(types: tuple[str, ...], rule: ClassRule) -> Mapping[str, int]:
    """Count the objects that no class wants.

    Args:
        types: Types of all objects of a file.
        rule: The classes. A neighboring type of one of them is not dropped.

    Returns:
        Number of objects by type, without DontCare.
    """
    return Counter(
        kind for kind in types if not is_dont_care(kind) and rule.number(kind) is None and _neighbor(kind, rule) is None
    )


def ignored_types(types: tuple[str, ...], rule: ClassRule) -> Mapping[str, int]:
    """Count the objects that are kept with weight 0, because they look like a class.

    Args:
        types: Types of all objects of a file.
        rule: The classes.

    Returns:
        Number of objects by type.
    """
    return Counter(
        kind for kind in types if not is_dont_care(kind) and rule.number(kind) is None and _neighbor(kind, rule) is not None
    )


def _neighbor(kind: str, rule: ClassRule) -> int | None:
    """Number of the class that an object of this type looks like."""
    for name, others in NEIGHBORS.items():
        if kind.casefold() in (other.casefold() for other in others):
            return next((i for i, known in enumerate(rule.classes) if known.casefold() == name.casefold()), None)
    return None


def read_objects(path: Path | str) -> KittiObjects:
    """Read a label or detection file.

    Args:
        path: The file.

    Returns:
        The objects.

    Raises:
        InvalidInput: The file is missing, is not text, or `parse_objects` refuses it.
    """
    return parse_objects(read_text(path, "label file"), str(path))


def format_objects(objects: KittiObjects) -> str:
    """Write objects as KITTI's text, with at most six decimals (scores nine) and no trailing zeros.

    Args:
        objects: Labels or detections.

    Returns:
        One line per object; with a score column if there are scores.
    """
    columns = [objects.truncated[:, None], objects.alpha[:, None], objects.bbox, objects.dimensions, objects.location]
    columns += [objects.rotation_y[:, None]]
    # Nine decimals tell float32 scores apart: rounding must not make ties that change the ranking.
    scores = [[]] * len(objects) if objects.scores is None else [[_number(s, 9)] for s in objects.scores.tolist()]
    lines = []
    for name, occluded, row, score in zip(objects.types, objects.occluded.tolist(), torch.cat(columns, 1).tolist(), scores):
        truncated, *rest = map(_number, row)
        lines.append(" ".join([name, truncated, str(occluded), *rest, *score]) + "\n")
    return "".join(lines)


def write_objects(path: Path | str, objects: KittiObjects) -> None:
    """Write a label or detection file atomically.

    Args:
        path: The file.
        objects: Labels or detections.
    """
    write_atomically(Path(path), format_objects(objects).encode())


def labels_from_kitti(
    objects: KittiObjects, calibration: Calibration, classes: tuple[str, ...], class_map: Mapping[str, str] | None = None
) -> Labels:
    """Translate a label file into labels in the LiDAR frame.

    A neighboring type (Van for Car, Person_sitting for Pedestrian) that is not a class itself is kept with the class's number and
    weight 0: neither object nor background. Other types and DontCare are dropped.

    Args:
        objects: The label file.
        calibration: Calibration of the frame.
        classes: Names of the classes to keep; their order gives the class numbers. Case does not matter.
        class_map: Type of the file -> class.

    Returns:
        Labels in file order, with KITTI's difficulty; `num_points` is unknown.

    Raises:
        InvalidInput: An object of these classes has no 3D box.
    """
    rule = ClassRule(classes, class_map or {})
    own = {kind: None if is_dont_care(kind) else rule.number(kind) for kind in set(objects.types)}
    index_of = {kind: _neighbor(kind, rule) if number is None else number for kind, number in own.items()}
    kept = objects.select(torch.tensor([index_of[t] is not None for t in objects.types], dtype=torch.bool))
    flat = (kept.dimensions <= 0).any(1).nonzero().flatten().tolist()
    if flat:
        raise InvalidInput(
            f"a label of type {shown(kept.types[flat[0]], most=60)} has no 3D box (size -1), so it is no object in the LiDAR frame: give it a "
            "size, or call it DontCare"
        )
    boxes = kitti_camera_to_lidar(kept.location, kept.dimensions, kept.rotation_y, calibration.lidar_to_camera)
    return Labels.make(
        boxes,
        torch.tensor([index_of[t] for t in kept.types], dtype=torch.int64),
        difficulty=kept.difficulty(),
        weight=torch.tensor([float(own[t] is not None) for t in kept.types]),
    )


def predictions_to_kitti(predictions: Predictions, class_names: tuple[str, ...], calibration: Calibration) -> KittiObjects:
    """Translate detections into KITTI's fields. A box of which nothing lies in the picture is dropped.

    alpha is rotation_y minus the bearing of the object. The 2D box encloses the projected corners and is cut at the picture's border.
    Truncation and occlusion are not estimated and are -1.

    Args:
        predictions: Detections in the LiDAR frame of the calibration, on any device.
        class_names: Names of the class numbers.
        calibration: Calibration of the frame.

    Returns:
        The detections, best first.
    """
    predictions = predictions.to("cpu")
    location, dimensions, rotation_y = lidar_to_kitti_camera(predictions.boxes.data, calibration.lidar_to_camera)
    alpha = wrap_angle(rotation_y - torch.atan2(location[:, 0], location[:, 2]))
    bbox, visible = project_boxes(location, dimensions, rotation_y, calibration)
    n = len(predictions)
    return KittiObjects(
        types=tuple(class_names[c] for c in predictions.classes.tolist()),
        truncated=torch.full((n,), -1.0, dtype=torch.float64),
        occluded=torch.full((n,), -1, dtype=torch.int64),
        alpha=alpha,
        bbox=bbox,
        dimensions=dimensions,
        location=location,
        rotation_y=rotation_y,
        scores=predictions.scores.double(),
    ).select(visible)


def project_boxes(location: Tensor, dimensions: Tensor, rotation_y: Tensor, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """Enclose the pictures of boxes by 2D boxes.

    Only the part of a box in front of the camera is projected: an edge that crosses the camera's plane is cut there, because the image
    of a point behind the camera would land on the wrong side.

    Args:
        location: (N, 3) centers of the bottom faces in the camera frame, in m.
        dimensions: (N, 3) height, width, length in m.
        rotation_y: (N,) headings in radians.
        calibration: Projection and size of the picture.

    Returns:
        (N, 4) float64 left, top, right, bottom in pixels, cut at the picture's border; and (N,) bool, whether anything is left.
    """
    h, w, length = dimensions.double().unbind(-1)
    x, y, z = location.double().unbind(-1)
    ground = corners_bev(torch.stack([x, z, y, length, w, h, -rotation_y.double()], -1))  # (N, 4, 2) camera x, z
    bottom = torch.stack([ground[..., 0], y[:, None].expand(-1, 4), ground[..., 1]], -1)
    corners = torch.cat([bottom, bottom - torch.stack([torch.zeros_like(h), h, torch.zeros_like(h)], -1)[:, None]], 1)
    ring = [0, 1, 2, 3]
    start = torch.tensor([*ring, *(i + 4 for i in ring), *ring])
    end = torch.tensor([1, 2, 3, 0, 5, 6, 7, 4, 4, 5, 6, 7])
    a, b = corners[:, start], corners[:, end]  # (N, 12, 3), the edges
    in_front = torch.maximum(a[..., 2], b[..., 2]) > _NEAR
    rise = b[..., 2] - a[..., 2]
    to_plane = ((_NEAR - a[..., 2]) / torch.where(rise == 0, torch.ones_like(rise), rise))[..., None]
    crossing = a + to_plane * (b - a)
    ends = torch.cat(
        [torch.where(a[..., 2:] > _NEAR, a, crossing), torch.where(b[..., 2:] > _NEAR, b, crossing)], 1
    )  # (N, 24, 3)
    pixels = ends @ calibration.projection[:, :3].T.double() + calibration.projection[:, 3].double()
    uv = pixels[..., :2] / pixels[..., 2:]
    valid = torch.cat([in_front, in_front], 1)[..., None]
    low = torch.where(valid, uv, torch.full_like(uv, math.inf)).amin(1)
    high = torch.where(valid, uv, torch.full_like(uv, -math.inf)).amax(1)
    border = torch.tensor(calibration.image_size, dtype=torch.float64) - 1
    low, high = low.clamp_min(0), torch.minimum(high, border)
    return torch.cat([low, high], -1), (high > low).all(-1)


def _number(value: float, decimals: int = 6) -> str:
    text = f"{value:.{decimals}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
