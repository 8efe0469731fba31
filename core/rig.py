"""The rig of a vehicle: how high its LiDAR is mounted and how its intensity is scaled.

A detector trained on one kind of vehicle works on another if both bring their scans to the same form first: z = 0 near the
road, intensity in 0..1. `RigSpec.from_sensor` goes from the *sensor frame* to this *shifted frame*, `RigSpec.to_sensor` goes back.
Nothing else in the toolkit adds or removes a mounting height; a `Frame` and a `PreparedDataset` name their rig in a field.

Read next: `structures.py` for the values that are shifted, `perception/models/encoders/fingerprint.py` for why a rig is part of
an encoder's identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import overload

from torch import Tensor

from .errors import InvalidInput
from .intensity import TOLERANCE, propose_scale
from .ledger import Ledger
from .structures import Boxes3D, PointCloud

HIGHEST_SHIFT = 10_000.0
"""Meters of the largest z shift: higher than any place on Earth, for scans whose z is the height above the sea."""

HEIGHT_STEP = 0.5
"""Meters between two mounting heights that count as two kinds of rig in an encoder fingerprint."""


@dataclass(frozen=True, kw_only=True)
class RigSpec:
    """How scans of one kind of vehicle become scans for the encoder.

    The encoder fingerprint covers the names of the fields and the values of the `rounded` rig: another kind of rig means another encoder to
    the server.

    Example:
        rig = RigSpec(z_shift=1.73, intensity_scale=1 / 255)
        found = detector.detect([rig.from_sensor(scan)])[0]
        boxes = rig.to_sensor(found.boxes)  # in the frame of `scan` again
    """

    z_shift: float = 0.0
    """Meters added to z so that the road lies near z = 0: the mounting height of the sensor. 0 for data in the vehicle's frame."""
    intensity_scale: float = 1.0
    """Factor that brings the sensor's intensity to 0..1: 1/255 for a sensor that counts to 255."""

    def __post_init__(self) -> None:
        if not (isinstance(self.z_shift, Real) and isinstance(self.intensity_scale, Real)):
            raise InvalidInput(
                f"a rig needs numbers, found z_shift {self.z_shift!r} and intensity_scale {self.intensity_scale!r}; "
                "write RigSpec(z_shift=1.73)"
            )
        if not (math.isfinite(self.z_shift) and math.isfinite(self.intensity_scale) and self.intensity_scale > 0):
            raise InvalidInput(
                f"a rig needs a finite z_shift and a positive intensity_scale, found {self.z_shift} and {self.intensity_scale}"
            )
        if not abs(self.z_shift) <= HIGHEST_SHIFT:
            raise InvalidInput(
                f"a rig's z_shift is in meters and at most {HIGHEST_SHIFT:,.0f}, found {self.z_shift:g}; give the mounting height, such as 1.73"
            )

    def rounded(self, nominal: RigSpec) -> RigSpec:
        """Name the kind of rig instead of the rig: what a vehicle may tell without telling which vehicle it is.

        A mounting height that was calibrated to the millimeter names a vehicle. Rigs of one kind have one fingerprint instead.

        Args:
            nominal: The rig that the encoder was trained with.

        Returns:
            The height of `nominal` for a rig within half a `HEIGHT_STEP` of it, otherwise the nearest whole multiple of `HEIGHT_STEP`; and the
            intensity scale of `nominal` for one within a factor of √2 of it, otherwise the nearest power of two.
        """
        near = abs(self.z_shift - nominal.z_shift) < HEIGHT_STEP / 2
        alike = abs(math.log2(self.intensity_scale / nominal.intensity_scale)) < 0.5
        return RigSpec(
            z_shift=nominal.z_shift if near else HEIGHT_STEP * round(self.z_shift / HEIGHT_STEP),
            intensity_scale=nominal.intensity_scale if alike else 2.0 ** round(math.log2(self.intensity_scale)),
        )

    def __str__(self) -> str:
        return f"z_shift {self.z_shift:g}, intensity_scale {self.intensity_scale:g}"

    @overload
    def from_sensor(self, value: PointCloud) -> PointCloud: ...
    @overload
    def from_sensor(self, value: Boxes3D) -> Boxes3D: ...
    @overload
    def from_sensor(self, value: Tensor) -> Tensor: ...

    def from_sensor(self, value: PointCloud | Boxes3D | Tensor) -> PointCloud | Boxes3D | Tensor:
        """Bring points or boxes from the sensor frame to the shifted frame.

        Args:
            value: A scan, whose intensity is scaled too; boxes; or coordinates of any float type that begin with x, y, z:
                (N, 3) points or (N, 7) boxes. It is left unchanged.

        Returns:
            The same kind of value in the shifted frame.

        Raises:
            InvalidInput: The scaled intensity leaves 0..1 by more than `TOLERANCE`; less is clipped. A wrong scale gives features
                that look right and are not.
        """
        if isinstance(value, Tensor):
            return value + self._offset(value)
        if isinstance(value, Boxes3D):
            return replace(value, data=value.data + self._offset(value.data))
        xyz = value.xyz + self._offset(value.xyz)
        scaled = scale_intensity(value, self.intensity_scale)
        if "intensity" in value.feature_names and len(value):
            column = scaled.features[:, value.feature_names.index("intensity")]
            low, high = column.min().item(), column.max().item()
            if not (low >= 0 and high <= 1):
                raise InvalidInput(
                    f"intensity must lie in 0..1, found {low:.6g} to {high:.6g} after scaling by {self.intensity_scale:.6g}; "
                    f"{propose_scale(low / self.intensity_scale, high / self.intensity_scale)}"
                )
        return replace(scaled, xyz=xyz)

    @overload
    def to_sensor(self, value: PointCloud) -> PointCloud: ...
    @overload
    def to_sensor(self, value: Boxes3D) -> Boxes3D: ...
    @overload
    def to_sensor(self, value: Tensor) -> Tensor: ...

    def to_sensor(self, value: PointCloud | Boxes3D | Tensor) -> PointCloud | Boxes3D | Tensor:
        """Bring points or boxes from the shifted frame back to the sensor frame: the inverse of `from_sensor`.

        Args:
            value: A scan, boxes, or coordinates that begin with x, y, z, as in `from_sensor`. It is left unchanged.

        Returns:
            The same kind of value in the sensor frame; the intensity of a scan in the sensor's own unit.
        """
        if isinstance(value, Tensor):
            return value - self._offset(value)
        if isinstance(value, Boxes3D):
            return replace(value, data=value.data - self._offset(value.data))
        scale = value.features.new_tensor([self.intensity_scale if n == "intensity" else 1.0 for n in value.feature_names])
        return replace(value, xyz=value.xyz - self._offset(value.xyz), features=value.features / scale)

    def _offset(self, coordinates: Tensor) -> Tensor:
        """(C,) what is added to each column of coordinates that begin with x, y, z."""
        return coordinates.new_tensor([0.0, 0.0, self.z_shift] + [0.0] * (coordinates.shape[1] - 3))


def scale_intensity(points: PointCloud, scale: float) -> PointCloud:
    """Scale the intensity of a scan, and clip values that lie outside 0..1 by no more than `TOLERANCE`.

    Args:
        points: A scan with intensity in the sensor's own unit; it is left unchanged.
        scale: The factor.

    Returns:
        The scan with scaled intensity. Values further outside are kept.
    """
    if "intensity" not in points.feature_names:
        return points
    features = points.features.clone()
    column = features[:, points.feature_names.index("intensity")]
    column *= scale
    near = (column >= -TOLERANCE) & (column <= 1 + TOLERANCE)
    column.copy_(column.where(~near, column.clamp(0, 1)))
    return replace(points, features=features)


def intensity_range(points: PointCloud) -> tuple[float, float] | None:
    """Find the lowest and the highest intensity of a scan.

    Args:
        points: A scan.

    Returns:
        The two values; None for a scan without intensity or without points.
    """
    if "intensity" not in points.feature_names or not len(points):
        return None
    column = points.features[:, points.feature_names.index("intensity")]
    return float(column.min()), float(column.max())


def count_intensity(points: PointCloud, scale: float) -> Ledger:
    """Count the points whose intensity leaves 0..1.

    Args:
        points: A scan with intensity in the sensor's own unit.
        scale: Factor that should bring it to 0..1.

    Returns:
        A ledger with the points that `scale_intensity` clips, those that lie further outside, and the range of the intensity.
    """
    if "intensity" not in points.feature_names or not len(points):
        return Ledger()
    column = points.features[:, points.feature_names.index("intensity")]
    scaled = column * scale
    odd = (scaled < 0) | (scaled > 1)
    far = (scaled < -TOLERANCE) | (scaled > 1 + TOLERANCE)
    return Ledger(
        points_intensity_clipped=int(odd.sum() - far.sum()),
        points_intensity_outside=int(far.sum()),
        lowest_intensity=float(column.min()),
        highest_intensity=float(column.max()),
    )
