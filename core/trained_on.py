"""What a training knew about its data, kept beside the weights: rig, point features, and simple statistics of the scans.

A detector file and an encoder file carry one `TrainedOn`. Later commands take the rig from it.

Read next: `scan_comparison.py`, which compares scans with those of training; `perception/training/detector_files.py`, which writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config_json import config_from_json, config_to_json
from .errors import InvalidInput, require, require_counts, require_numbers
from .foreign_text import is_one_name, shown
from .rig import RigSpec
from .scan_options import Axis, NumberType
from .structures import PointCloud
from .tensor_file import TensorFile

_KEY = "trained_on"
_MOST_NAMES = 1000


@dataclass(frozen=True, kw_only=True)
class ScanStatistics:
    """Simple statistics of scans in the shifted frame: medians over scans, so that one odd scan changes nothing."""

    scans: int
    """Number of scans that were looked at."""
    points: float
    """Points per scan in the detector's range."""
    cells: float
    """Occupied cells of the detector's grid per scan, those over the voxel limit included."""
    ground_height: float
    """Height of the road in meters: the 10th percentile of z of the points within 5 to 30 m of the sensor. NaN without such points."""
    intensity: float
    """Mean intensity. NaN for scans without intensity."""


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """What a training knew about its data."""

    rig: RigSpec
    """Rig of the training data: the default of every later command."""
    feature_names: tuple[str, ...]
    """Point features of the training scans, after x, y, z."""
    classes: tuple[str, ...]
    """Class names of the detector, in the order of the class numbers."""
    point_range: tuple[float, float, float, float, float, float]
    """Range of the detector's grid: x, y, z where it starts, then where it ends, in meters."""
    scans: ScanStatistics | None = None
    """Statistics of the training scans; None where nobody measured them, as in imported weights."""
    camera_view: bool = False
    """Whether the training scans held only what a camera sees."""
    axes: tuple[Axis, Axis, Axis] | None = None
    """Axes with which the scan files of the training were read (`--axes`). None where nobody knows."""
    columns: tuple[str, ...] | None = None
    """Columns with which they were read; empty for the usual ones. None where nobody knows."""
    dtype: NumberType | None = None
    """Type of the numbers in their `.bin` files. None where nobody knows."""
    reader_scale: float = 1.0
    """Factor by which the reader of the training data multiplied the intensity of the files, before the rig: 1/255 for nuScenes and Lyft.
    Scan files of the same sensor need it as their intensity scale."""

    def __post_init__(self) -> None:
        for what, names in (("feature_names", self.feature_names), ("classes", self.classes)):
            require(
                len(names) <= _MOST_NAMES and len(set(names)) == len(names) and all(map(is_one_name, names)),
                f"TrainedOn.{what} must be at most {_MOST_NAMES} different printable names, found {len(names)}: "
                f"{', '.join(shown(repr(name), most=60) for name in names[:5])}",
            )
        require(
            all(map(math.isfinite, self.point_range)) and all(a < b for a, b in zip(self.point_range[:3], self.point_range[3:])),
            f"TrainedOn.point_range must be finite and end after it starts, found {self.point_range}",
        )
        if self.scans is None:
            return
        require_counts("ScanStatistics", least=0, most=2**53, scans=self.scans.scans)
        for what, value, least in (
            ("points", self.scans.points, 0.0),
            ("cells", self.scans.cells, 0.0),
            ("ground_height", self.scans.ground_height, -1e6),
            ("intensity", self.scans.intensity, -1e9),
        ):
            if not math.isnan(value):  # nobody knows
                require_numbers("ScanStatistics", least=least, most=1e6 if what == "ground_height" else 1e9, **{what: value})

    def check_fits(
        self,
        where: str | Path,
        *,
        point_range: Sequence[float],
        features: Sequence[str],
        classes: Sequence[str] | None = None,
    ) -> None:
        """Refuse what cannot belong to the network in the same file.

        Args:
            where: The file, for the message.
            point_range: Range of the network's grid.
            features: Point features that it reads.
            classes: Classes that it tells apart; None for an encoder alone.

        Raises:
            InvalidInput: They differ, or the training lacked a feature that the network reads.
        """
        wrong = ""
        if classes is not None and tuple(classes) != self.classes:
            wrong = f"its classes are {_few(self.classes)}, and the network has {_few(classes)}"
        elif tuple(point_range) != self.point_range:
            wrong = f"its range is {self.point_range}, and the network's is {tuple(point_range)}"
        elif missing := [name for name in features if name not in self.feature_names]:
            wrong = f"it had the point features {_few(self.feature_names)}, and the network reads {_few(missing)} too"
        require(
            not wrong,
            f"what {where} says about its training belongs to another network: {wrong}; the file was edited or put together. Take the file "
            "that `train` wrote",
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values for a file."""
        return config_to_json(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TrainedOn:
        """Make one of the values of `to_json`.

        Args:
            data: Names and values.

        Returns:
            The same as was written.

        Raises:
            InvalidInput: A name is unknown, or a value has another type.
        """
        return config_from_json(TrainedOn, data)

    def as_metadata(self) -> dict[str, str]:
        """Return the entry of a tensor file's metadata that `from_metadata` reads."""
        return {_KEY: json.dumps(self.to_json(), sort_keys=True)}

    @staticmethod
    def from_metadata(file: TensorFile) -> TrainedOn | None:
        """Read what a tensor file says about the training of its weights.

        Args:
            file: The file.

        Returns:
            What the training knew; None where the file says nothing, as those of earlier versions.

        Raises:
            InvalidInput: The entry cannot be used.
        """
        if _KEY not in file.meta:
            return None
        described = file.described(_KEY)
        try:
            return TrainedOn.from_json(described)
        except InvalidInput as error:
            raise InvalidInput(f"what {file.path} says about its training cannot be used: {error}") from error


def _few(names: Sequence[str]) -> str:
    return ", ".join(shown(name, most=60) for name in names[:8]) or "none"


@dataclass(frozen=True, kw_only=True)
class ScanMeasures:
    """The measures of one scan that `ScanStatistics` summarizes."""

    points: int
    """Points in the detector's range."""
    cells: int
    """Occupied cells."""
    ground_height: float
    """Height of the road in meters, or NaN."""
    intensity: float
    """Mean intensity, or NaN."""


def estimate_road_height(points: PointCloud) -> float:
    """Estimate the height of the road in one scan.

    Args:
        points: A scan, z up.

    Returns:
        The 10th percentile of z of the points within 5 to 30 m of the sensor, in meters; NaN with fewer than 50 such points.
    """
    distance = torch.linalg.vector_norm(points.xyz[:, :2], dim=1)
    near = points.xyz[(distance > 5) & (distance < 30), 2]
    return float(np.percentile(near.numpy(), 10)) if len(near) >= 50 else float("nan")


def summarize_scans(measures: Sequence[ScanMeasures]) -> ScanStatistics | None:
    """Summarize the measures of scans.

    Args:
        measures: One entry per scan.

    Returns:
        Medians, NaN left out; None without a scan.
    """
    if not measures:
        return None

    def median(values: Sequence[float]) -> float:
        known = [v for v in values if v == v]
        return float(np.median(known)) if known else float("nan")

    return ScanStatistics(
        scans=len(measures),
        points=median([m.points for m in measures]),
        cells=median([m.cells for m in measures]),
        ground_height=median([m.ground_height for m in measures]),
        intensity=median([m.intensity for m in measures]),
    )
