"""What an attacker has and what is true: the upload of a frame beside the scan that it was made from.

An attack learns from `AuditFrame`s of its own and is scored on others. It never sees the truth of the frames that it is scored on.

Read next: `attacks/`, one file for each attack, and `geometry_metrics.py`, which scores a rebuilt scan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...core.cut import VoxelGrid
from ...core.errors import require
from ...core.features import CutFeatures
from ...core.frame import Frame
from ...core.structures import Labels, PointCloud
from ...core.tensor_value import TensorValue, shape_of
from ..models.encoders.encoder import Encoder
from ..server.store import quantize_features


@dataclass(frozen=True, kw_only=True, repr=False)
class AuditFrame(TensorValue):
    """One frame, seen from both sides."""

    id: str
    """Name of the frame."""

    upload: CutFeatures
    """What left the vehicle, as a batch of one, after the round trip of the codec."""

    scan: PointCloud
    """The truth: the points of the scan inside the grid, in the shifted frame."""

    labels: Labels | None = None
    """The objects in the scan; None where nobody labeled the frame."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Rebuilt(TensorValue):
    """A scan that an attack made of an upload."""

    xyz: Tensor
    """(N, 3) float32 x, y, z in meters, in the shifted frame."""

    score: Tensor
    """(N,) how sure the attack is of each point; the metrics take the surest points first."""

    def __post_init__(self) -> None:
        require(
            self.xyz.ndim == 2 and self.xyz.shape[1] == 3 and self.score.shape == self.xyz.shape[:1],
            f"Rebuilt needs xyz (N, 3) and score (N,), found {shape_of(self.xyz)} and {shape_of(self.score)}",
        )


class RebuildAttack(Protocol):
    """An attack that turns an upload back into a scan."""

    def train(self, frames: Sequence[AuditFrame]) -> None:
        """Learn from frames whose scans the attacker knows.

        Args:
            frames: Frames of the attacker's own. An attack that learns nothing ignores them.
        """
        ...

    def rebuild(self, upload: CutFeatures) -> Rebuilt:
        """Rebuild a scan.

        Args:
            upload: What left a vehicle, a batch of one.

        Returns:
            The scan.
        """
        ...


@torch.no_grad()
def audit_frames(
    frames: Iterable[Frame], encoder: Encoder, codec: str, *, rng: np.random.Generator | None = None
) -> list[AuditFrame]:
    """Smash frames as a vehicle would, and keep their scans beside the uploads.

    Args:
        frames: Frames in the shifted frame, as a prepared dataset gives them.
        encoder: The encoder that the fleet runs, in evaluation mode.
        codec: "fp16" or "int8".
        rng: Where random defences of the encoder draw from; None draws a seed from torch's global generator.

    Returns:
        One value per frame, in order.
    """
    found = []
    for frame in frames:
        voxels = encoder.voxelize([frame.points])
        upload = quantize_features(encoder.upload([frame.points], voxels, rng), codec)
        scan = inside_grid(frame.points, encoder.spec.grid)
        found.append(AuditFrame(id=frame.id, upload=upload, scan=scan, labels=frame.labels))
    return found


def inside_grid(points: PointCloud, grid: VoxelGrid) -> PointCloud:
    """Keep the points of a scan that the encoder can see.

    Args:
        points: A scan in the shifted frame.
        grid: The input grid.

    Returns:
        The points inside the grid, in the same order.
    """
    low, high = (points.xyz.new_tensor(side) for side in (grid.range[:3], grid.range[3:]))
    return points.select(((points.xyz >= low) & (points.xyz < high)).all(1))
