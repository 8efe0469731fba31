"""What one kind of vehicle does to a scan before the encoder sees it: mounting height and intensity scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .errors import InvalidInput
from .structures import PointCloud


@dataclass(frozen=True, kw_only=True)
class RigSpec:
    """How one kind of vehicle's scans become the encoder's scans.

    z_shift: metres added to z so that the ground lies near 0 (the sensor's mounting height).
    intensity_scale: factor that brings the sensor's intensity to 0..1 (1/255 for bytes).
    """

    z_shift: float = 0.0
    intensity_scale: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.z_shift) and math.isfinite(self.intensity_scale) and self.intensity_scale > 0):
            raise InvalidInput(f"a rig needs a finite z_shift and a positive intensity_scale, found {self}")

    def apply(self, points: PointCloud) -> PointCloud:
        """``points`` with z shifted and intensity scaled; the argument is left alone.

        Raises ``InvalidInput`` if the scaled intensity leaves 0..1: a wrong scale gives features that look right and are not.
        """
        xyz = points.xyz + points.xyz.new_tensor([0.0, 0.0, self.z_shift])
        if "intensity" not in points.feature_names:
            return replace(points, xyz=xyz)
        column = points.feature_names.index("intensity")
        features = points.features.clone()
        features[:, column] *= self.intensity_scale
        if len(points):
            low, high = features[:, column].min().item(), features[:, column].max().item()
            if low < -1e-3 or high > 1 + 1e-3:
                raise InvalidInput(
                    f"intensity must lie in 0..1 after scaling by {self.intensity_scale:g}, found {low:g} to {high:g}; "
                    "set RigSpec.intensity_scale for this sensor (1/255 for bytes)"
                )
        return replace(points, xyz=xyz, features=features)

    def undo(self, points: PointCloud) -> PointCloud:
        """The scan that ``apply`` made ``points`` of."""
        scale = points.features.new_tensor([self.intensity_scale if n == "intensity" else 1.0 for n in points.feature_names])
        return replace(points, xyz=points.xyz - points.xyz.new_tensor([0.0, 0.0, self.z_shift]), features=points.features / scale)

    @classmethod
    def of(cls, notes: Mapping[str, str | float | bool]) -> RigSpec:
        """The rig that a prepared dataset's notes tell of."""
        return cls(z_shift=float(notes.get("z_shift", 0.0)), intensity_scale=float(notes.get("intensity_scale", 1.0)))
