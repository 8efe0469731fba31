"""The values that flow through the toolkit: scans, boxes, labels, predictions and losses.

Every function of this project takes and returns these values or plain tensors; there is no dictionary of everything. All of them
are frozen, hold torch tensors, check types and shapes where they are made, and move with `to(device)`. Boxes and points may be
given as numpy arrays or in other precisions; they become float32 tensors.

Numbers are checked where they come from outside: by `PointCloud.from_array`, `PointCloud.from_file`, `Boxes3D.from_array` and
`Labels.make`. The constructors do not check them. They run inside the network, where a box may be infinite before training has
begun (the training loop then names the loss that is not finite), and where a look at the numbers would make the program wait for
the GPU.

Coordinates are x forward, y left, z up, in meters. Classes count from 0. The file is long because every value that users meet
stands in it, with the documentation of its fields.

    raw scan ── PointCloud ── encoder ── features at the cut (`features.py`) ── decoder ── Predictions

Read next: `frame.py`, which joins a scan and its labels, `boxes.py` for the geometry of a box, `cut.py` and `features.py` for what an encoder returns.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import InvalidInput, require
from .intensity import TOLERANCE, propose_scale
from .tensor_value import TensorValue, float32_table, float32_tensor, shape_of

_XYZI = ("x", "y", "z", "intensity")


@dataclass(frozen=True, kw_only=True, repr=False)
class PointCloud(TensorValue):
    """One scan: the points of one LiDAR sweep.

    Example:
        >>> rows = np.array([[1.0, 2.0, 0.5, 0.3], [4.0, -1.0, 0.2, 0.9]])
        >>> PointCloud.from_array(rows)
        PointCloud(xyz=(2, 3) float32, features=(2, 1) float32, feature_names=('intensity',))
    """

    xyz: Tensor
    """(N, 3) float32, meters, in the sensor frame, or in the shifted frame (see `rig.py`)."""

    features: Tensor
    """(N, C) float32, one column per name in `feature_names`."""

    feature_names: tuple[str, ...] = ("intensity",)
    """What the columns of `features` are. Intensity lies in 0..1."""

    def __post_init__(self) -> None:
        _set(self, xyz=float32_tensor(self.xyz, "PointCloud.xyz"), features=float32_tensor(self.features, "PointCloud.features"))
        _set(self, feature_names=column_names(self.feature_names, "PointCloud.feature_names"))
        require(self.xyz.ndim == 2 and self.xyz.shape[1] == 3, f"PointCloud.xyz must be (N, 3), found {shape_of(self.xyz)}")
        require(
            self.features.shape == (self.xyz.shape[0], len(self.feature_names)),
            f"PointCloud.features must be ({self.xyz.shape[0]}, {len(self.feature_names)}) for the names "
            f"{self.feature_names}, found {shape_of(self.features)}",
        )

    def __len__(self) -> int:
        return self.xyz.shape[0]

    @staticmethod
    def from_array(
        array: NDArray[Any] | Tensor | Sequence[Sequence[float]],
        columns: Sequence[str] = _XYZI,
        *,
        drop_non_finite: bool = False,
    ) -> PointCloud:
        """Make a scan of a table of numbers.

        Args:
            array: (N, C) numpy array, tensor or list of rows.
            columns: What the columns are, in order. "x", "y" and "z" in meters must be among them, "_" leaves a column out, all
                others become features. Intensity must lie in 0..1: divide it by 255 first if the sensor counts to 255.
            drop_non_finite: Leave out points with a NaN or infinite value instead of refusing the scan. Organized clouds mark a
                missing return this way.

        Returns:
            The scan, in the order of the rows.

        Raises:
            InvalidInput: Another shape, columns without x, y or z or with a name twice, or non-finite values.

        Warns:
            UserWarning: Intensity leaves 0..1. The values are kept as they are.
        """
        scan = scan_of_table(array, columns, drop_non_finite=drop_non_finite)
        warn_of_intensity(scan, "the array of points", scale=1.0, stacklevel=3)
        return scan

    @staticmethod
    def from_file(
        path: str | Path, *, columns: tuple[str, ...] | None = None, intensity_scale: float = 1.0, drop_non_finite: bool = False
    ) -> PointCloud:
        """Read a scan from a `.bin`, `.npy` or `.pcd` file; see `read_points` in `point_files.py`.

        Args:
            path: The file.
            columns: What the values of a row are. None means x, y, z, intensity, or what the header of a `.pcd` names.
            intensity_scale: Factor that brings intensity to 0..1; 1/255 for sensors that count to 255.
            drop_non_finite: Leave out points with a NaN or infinite value instead of refusing the file.

        Returns:
            The scan, in the order of the file.

        Raises:
            InvalidInput: The file is missing, broken or of another format.
        """
        from .point_files import read_points  # it imports this module

        return read_points(path, columns=columns, intensity_scale=intensity_scale, drop_non_finite=drop_non_finite)

    def select(self, mask_or_index: Tensor) -> PointCloud:
        """Select points.

        Args:
            mask_or_index: (N,) bool, or int64 rows in the wanted order.

        Returns:
            The points selected.
        """
        return replace(self, xyz=self.xyz[mask_or_index], features=self.features[mask_or_index])

    @staticmethod
    def concatenate(clouds: Sequence[PointCloud]) -> PointCloud:
        """Join the points of several scans.

        Args:
            clouds: At least one scan; all with the same feature names.

        Returns:
            All points, in order.

        Raises:
            InvalidInput: There is no scan, or the feature names differ.
        """
        require(len(clouds) > 0, "PointCloud.concatenate needs at least one scan")
        names = {c.feature_names for c in clouds}
        require(len(names) == 1, f"PointCloud.concatenate needs scans with the same features, found {sorted(names)}")
        return replace(clouds[0], xyz=torch.cat([c.xyz for c in clouds]), features=torch.cat([c.features for c in clouds]))


def scan_of_table(array: object, columns: Sequence[str], *, drop_non_finite: bool) -> PointCloud:
    """Make a scan of a table whose intensity may be in the sensor's own unit, for a caller that scales it.

    Args:
        array: (N, C) numpy array, tensor or list of rows.
        columns: What the columns are, as for `PointCloud.from_array`.
        drop_non_finite: As for `PointCloud.from_array`.

    Returns:
        The scan, in the order of the rows.

    Raises:
        InvalidInput: As for `PointCloud.from_array`.
    """
    names = column_names(columns, "columns")
    rows = float32_table(array, len(names), "the array of points")
    require(
        rows.ndim == 2 and rows.shape[1] == len(names),
        f"the points must be (N, {len(names)}) for the columns {names}, found {shape_of(array)}",
    )
    require(all(axis in names for axis in "xyz"), f"the columns must hold x, y and z, found {names}")
    feature_names = tuple(n for n in names if n not in ("x", "y", "z", "_"))
    rows = rows[:, [names.index(n) for n in ("x", "y", "z", *feature_names)]]
    finite = torch.isfinite(rows).all(1)
    if not finite.all():
        require(
            drop_non_finite,
            f"{int((~finite).sum())} of {len(rows)} points hold NaN or inf; repair them, or leave those points out with "
            "drop_non_finite (option --drop-non-finite of the commands)",
        )
        rows = rows[finite]
    return PointCloud(xyz=rows[:, :3].contiguous(), features=rows[:, 3:].contiguous(), feature_names=feature_names)


def warn_of_intensity(scan: PointCloud, what: str, *, scale: float, stacklevel: int) -> None:
    """Warn where intensity leaves 0..1, because a network trained on the other unit finds nothing and gives no error.

    Args:
        scan: The scan.
        what: What it was made from, for the message.
        scale: Factor that its intensity was scaled with.
        stacklevel: Whose line the warning names, as for `warnings.warn`; 2 is the caller of this function.
    """
    if "intensity" not in scan.feature_names or not len(scan):
        return
    column = scan.features[:, scan.feature_names.index("intensity")]
    low, high = float(column.min()), float(column.max())
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        advice = propose_scale(low / scale, high / scale).replace("--intensity-scale", "intensity_scale")
        warnings.warn(
            f"{what}: intensity reaches {high if high > 1 else low:.6g}, expected 0..1; {advice}",
            UserWarning,
            stacklevel=stacklevel,
        )


def column_names(names: Sequence[str], what: str) -> tuple[str, ...]:
    """Check names of columns.

    Args:
        names: The names. "_", which leaves a column out, may occur several times.
        what: What they are called, for the message.

    Returns:
        The names.

    Raises:
        InvalidInput: One text instead of several names, or a name that occurs twice.
    """
    if isinstance(names, str) or not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise InvalidInput(f'{what} must be a sequence of names, such as ("x", "y", "z", "intensity"), found {str(names)[:60]!r}')
    names = tuple(names)
    twice = sorted({name for name in names if name != "_" and names.count(name) > 1})
    require(not twice, f"{what} must hold each name once, found {', '.join(twice)} more than once in {names}")
    return names


@dataclass(frozen=True, kw_only=True, repr=False)
class Boxes3D(TensorValue):
    """Oriented boxes; `boxes.py` draws the convention.

    Example:
        >>> Boxes3D.from_array([[10.0, -2.0, 0.8, 4.2, 1.8, 1.6, 0.1]])
        Boxes3D(data=(1, 7) float32)
    """

    data: Tensor
    """(N, 7) float32: x, y, z of the center, dx (length), dy (width), dz (height) in meters, and yaw in radians, 0 along +x and
    counter-clockwise in BEV. Yaw may hold any number of turns; `wrap_angle` brings it into [-pi, pi). Readers of datasets do
    that; boxes of a network are as it gives them."""

    def __post_init__(self) -> None:
        _set(self, data=float32_tensor(self.data, "Boxes3D.data"))
        require(self.data.ndim == 2 and self.data.shape[1] == 7, f"Boxes3D.data must be (N, 7), found {shape_of(self.data)}")

    def __len__(self) -> int:
        return self.data.shape[0]

    @staticmethod
    def from_array(array: NDArray[Any] | Tensor | Sequence[Sequence[float]]) -> Boxes3D:
        """Make boxes of a table of numbers, and check every number.

        Args:
            array: (N, 7) numpy array, tensor or list of rows.

        Returns:
            The boxes.

        Raises:
            InvalidInput: Another shape, a NaN or infinite value, or a size that is zero or negative.
        """
        boxes = Boxes3D(data=float32_table(array, 7, "the array of boxes"))
        finite, solid = torch.isfinite(boxes.data).all(1), (boxes.data[:, 3:6] > 0).all(1)
        for good, fault in ((finite, "a NaN or infinite value"), (solid, "a size (dx, dy, dz) that is zero or negative")):
            if not good.all():
                row = int((~good).nonzero()[0])
                raise InvalidInput(
                    f"{int((~good).sum())} of {len(boxes)} boxes have {fault}, the first is row {row}: "
                    f"{[round(v, 3) for v in boxes.data[row].tolist()]}; remove or repair them"
                )
        return boxes

    @staticmethod
    def empty() -> Boxes3D:
        """Make a set of no boxes."""
        return Boxes3D(data=torch.zeros(0, 7))


_WHOLE, _REAL, _TRUE = "whole numbers (int64)", "numbers (float32)", "True and False (bool)"
_DTYPES = {_WHOLE: torch.int64, _REAL: torch.float32, _TRUE: torch.bool}
_LABEL_COLUMNS = {
    "classes": _WHOLE, "num_points": _WHOLE, "difficulty": _WHOLE, "weight": _REAL, "exact": _TRUE, "box_weight": _REAL
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
class Labels(TensorValue):
    """The objects of one frame, as far as they are known: from people, from a teacher, or pasted.

    Example:
        >>> boxes = Boxes3D.from_array([[10.0, -2.0, 0.8, 4.2, 1.8, 1.6, 0.1]])
        >>> len(Labels.make(boxes, classes=[0]))
        1
    """

    boxes: Boxes3D
    """The N boxes, in the frame of the points."""

    classes: Tensor
    """(N,) int64, counted from 0."""

    num_points: Tensor
    """(N,) int64, number of LiDAR points in the box, -1 where it is unknown."""

    difficulty: Tensor
    """(N,) int64, the dataset's own level (KITTI: 0 easy, 1 moderate, 2 hard), -1 where there is none."""

    weight: Tensor
    """(N,) float32, 1 to learn from the object, 0 to ignore it: neither object nor background."""

    exact: Tensor
    """(N,) bool, whether the box is right to the centimeter (labeled or pasted), so that heads that predict quality may learn."""

    box_weight: Tensor
    """(N,) float32, weight in box regression. A teacher may know that there is a car, but not where its sides are."""

    complete: bool = True
    """Whether everything else is background. False for pseudo labels, because a teacher misses objects."""

    seen: Tensor | None = None
    """(H, W) bool, the BEV cells of the cut where the scene shows what is there; nothing is learned elsewhere. None: everywhere. Only
    scenes of which a vehicle sent a part have it (`perception/server/partial_scenes.py`)."""

    def __post_init__(self) -> None:
        if not isinstance(self.boxes, Boxes3D):
            raise InvalidInput(f"Labels.boxes must be Boxes3D, found {shape_of(self.boxes)}; use Labels.make, which converts it")
        _check_columns(self, _LABEL_COLUMNS, hint="; use Labels.make, which converts arrays and fills in the usual values")

    def __len__(self) -> int:
        return len(self.boxes)

    @staticmethod
    def make(
        boxes: Boxes3D | Tensor | NDArray[Any],
        classes: Tensor | NDArray[Any] | Sequence[int],
        *,
        num_points: Tensor | NDArray[Any] | Sequence[int] | None = None,
        difficulty: Tensor | NDArray[Any] | Sequence[int] | None = None,
        weight: Tensor | NDArray[Any] | Sequence[float] | None = None,
        exact: Tensor | NDArray[Any] | Sequence[bool] | bool = True,
        box_weight: Tensor | NDArray[Any] | Sequence[float] | None = None,
        complete: bool = True,
    ) -> Labels:
        """Make labels with the usual values for what is not given.

        Columns may be tensors, arrays or lists. A tensor of whole numbers for a column of whole numbers, or of floats for a column of
        floats, is taken without a look at its values, because that would make training wait for the GPU. The values of everything
        else are checked.

        Args:
            boxes: (N, 7) boxes. Their numbers are not checked; `Boxes3D.from_array` checks them.
            classes: (N,) classes, counted from 0. Evaluation marks classes that are not asked for with -1.
            num_points: (N,) number of points in each box. None: unknown.
            difficulty: (N,) level of each object. None: no level.
            weight: (N,) weight of each object. None: 1.
            exact: (N,) whether each box is right to the centimeter, or one value for all.
            box_weight: (N,) weight of each object in box regression. None: 1.
            complete: Whether everything else is background.

        Returns:
            The labels.

        Raises:
            InvalidInput: A wrong type, columns that do not fit the boxes, whole numbers that are not whole or below -1, or weights
                that are negative or not finite.
        """
        solid = boxes if isinstance(boxes, Boxes3D) else Boxes3D(data=float32_tensor(boxes, "the boxes of labels"))
        n, device = len(solid), solid.data.device
        unknown = torch.full((n,), -1, dtype=torch.int64, device=device)
        return Labels(
            boxes=solid,
            classes=_label_column(classes, "classes", device),
            num_points=unknown if num_points is None else _label_column(num_points, "num_points", device),
            difficulty=unknown if difficulty is None else _label_column(difficulty, "difficulty", device),
            weight=torch.ones(n, device=device) if weight is None else _label_column(weight, "weight", device),
            exact=torch.full((n,), exact, device=device) if isinstance(exact, bool) else _label_column(exact, "exact", device),
            box_weight=torch.ones(n, device=device) if box_weight is None else _label_column(box_weight, "box_weight", device),
            complete=complete,
        )

    @staticmethod
    def empty(*, complete: bool = True) -> Labels:
        """Make labels without an object.

        Args:
            complete: Whether everything is background. False: it is unknown what there is.

        Returns:
            The labels.
        """
        return Labels.make(Boxes3D.empty(), torch.zeros(0, dtype=torch.int64), complete=complete)

    def select(self, mask_or_index: Tensor) -> Labels:
        """Select objects.

        Args:
            mask_or_index: (N,) bool, or int64 rows in the wanted order.

        Returns:
            The labels selected.
        """
        return replace(
            self,
            boxes=Boxes3D(data=self.boxes.data[mask_or_index]),
            **{n: getattr(self, n)[mask_or_index] for n in _LABEL_COLUMNS},
        )

    @staticmethod
    def concatenate(parts: Sequence[Labels]) -> Labels:
        """Join several labels of one frame.

        Args:
            parts: At least one part.

        Returns:
            All objects, in order; complete only if every part is, and seen where one part is.

        Raises:
            InvalidInput: There is no part.
        """
        require(len(parts) > 0, "Labels.concatenate needs at least one part")
        seen = [p.seen for p in parts if p.seen is not None]
        return Labels(
            boxes=Boxes3D(data=torch.cat([p.boxes.data for p in parts])),
            complete=all(p.complete for p in parts),
            seen=torch.stack(seen).any(0) if len(seen) == len(parts) else None,
            **{n: torch.cat([getattr(p, n) for p in parts]) for n in _LABEL_COLUMNS},
        )


_ANY_REAL = "numbers of a float type"  # a network in half precision gives scores in half precision
_PREDICTION_COLUMNS = {"classes": _WHOLE, "scores": _ANY_REAL, "class_scores": _ANY_REAL, "iou_scores": _ANY_REAL}


@dataclass(frozen=True, kw_only=True, repr=False)
class Predictions(TensorValue):
    """The detections of one scan, best first. Types and shapes are checked, numbers are as the network gives them."""

    boxes: Boxes3D
    """The N boxes, in the frame of the points."""

    classes: Tensor
    """(N,) int64, counted from 0."""

    scores: Tensor
    """(N,) float in 0..1, by which the detections are ranked."""

    class_scores: Tensor
    """(N,) float in 0..1, the classifier's own score."""

    iou_scores: Tensor
    """(N,) float in 0..1, the predicted overlap with the object."""

    def __post_init__(self) -> None:
        if not isinstance(self.boxes, Boxes3D):
            raise InvalidInput(f"Predictions.boxes must be Boxes3D, found {shape_of(self.boxes)}; wrap it with Boxes3D(data=...)")
        _check_columns(self, _PREDICTION_COLUMNS)

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, mask_or_index: Tensor) -> Predictions:
        """Select detections.

        Args:
            mask_or_index: (N,) bool, or int64 rows in the wanted order.

        Returns:
            The detections selected.
        """
        return Predictions(
            boxes=Boxes3D(data=self.boxes.data[mask_or_index]),
            **{n: getattr(self, n)[mask_or_index] for n in _PREDICTION_COLUMNS},
        )

    @staticmethod
    def empty() -> Predictions:
        """Make the predictions of a scan in which nothing was found."""
        zero = torch.zeros(0)
        return Predictions(
            boxes=Boxes3D.empty(), classes=torch.zeros(0, dtype=torch.int64), scores=zero, class_scores=zero, iou_scores=zero
        )


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Named losses of one step, already weighted; their sum is minimized."""

    terms: dict[str, Tensor] = field(default_factory=dict)
    """Name -> scalar tensor."""

    def total(self) -> Tensor:
        """Add the terms up, as a scalar tensor to differentiate."""
        return torch.stack(list(self.terms.values())).sum()

    def merged(self, other: LossTerms) -> LossTerms:
        """Join the terms of two losses.

        Args:
            other: Terms under other names.

        Returns:
            The terms of both.

        Raises:
            InvalidInput: Both have a term of one name.
        """
        clash = self.terms.keys() & other.terms.keys()
        require(not clash, f"two losses share a name: {sorted(clash)}; rename one of them")
        return LossTerms(terms={**self.terms, **other.terms})

    def first_non_finite(self) -> str | None:
        """Find the first term that is NaN or infinite, by name, or None."""
        return next((name for name, value in self.terms.items() if not math.isfinite(value.item())), None)

    def floats(self) -> dict[str, float]:
        """Give the terms as plain numbers by name, for a log."""
        return {name: value.item() for name, value in self.terms.items()}


def _set(value: TensorValue, **converted: object) -> None:
    """Replace fields of a frozen value while it is made."""
    for name, new in converted.items():
        object.__setattr__(value, name, new)


def _check_columns(value: Labels | Predictions, columns: Mapping[str, str], hint: str = "") -> None:
    """Refuse columns that are no tensors with one number of the right type per box. Values are not looked at: see the module."""
    n = len(value.boxes)
    for name, kind in columns.items():
        column = getattr(value, name)
        if not isinstance(column, Tensor) or column.shape != (n,):
            raise InvalidInput(
                f"{type(value).__name__}.{name} must be a tensor ({n},) like the boxes, found {shape_of(column)}{hint}"
            )
        if not column.is_floating_point() if kind == _ANY_REAL else column.dtype != _DTYPES[kind]:
            raise InvalidInput(f"{type(value).__name__}.{name} must hold {kind}, found {shape_of(column)}{hint}")


def _label_column(value: object, name: str, device: torch.device) -> Tensor:
    """A column of labels in its type; what `Labels.make` says about values."""
    kind = _LABEL_COLUMNS[name]
    dtype = _DTYPES[kind]
    if isinstance(value, Tensor) and value.dtype == dtype:
        return value.to(device)
    try:
        # A numpy array is copied, because the caller may change it afterwards.
        column = torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        hint = "; the number of a class is its position among the class names" if name == "classes" else ""
        raise InvalidInput(f"labels: {name} must be {kind}, one for each box, found {str(value)[:60]}{hint}") from error
    found = column.dtype
    if column.numel() and (found.is_complex or (found == torch.bool) != (dtype == torch.bool)):
        raise InvalidInput(f"labels: {name} must be {kind}, one for each box, found {shape_of(column)}")
    if not (isinstance(value, Tensor) and found.is_floating_point == dtype.is_floating_point):
        numbers = column.double()
        if kind == _WHOLE:
            # From 2 ** 53 on not every whole number is a float64.
            good, rule = (numbers == numbers.floor()) & (numbers >= -1) & (numbers < 2**53), "whole numbers, not below -1"
        else:
            good, rule = torch.isfinite(numbers) & (numbers >= 0), "finite numbers, not below 0"
        if not good.all():
            raise InvalidInput(f"labels: {name} must be {rule}, found {column[~good].flatten()[0].item()}")
    return column.to(dtype)
