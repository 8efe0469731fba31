"""Attacks that read no feature: the rows that every table of the audit needs as its floor and as its ceiling.

`MeanOccupancy` sees no upload at all, `CellCenters` sees coordinates and learns nothing, and `voxel_centers` is the true scan itself at
the resolution of the grid, which no attack on the grid beats. The attack that learns from coordinates alone is `OccupancyAttack` in
`occupancy.py` with `sees="coordinates"`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ....core.cut import VoxelGrid, cell_centers, cell_index
from ....core.errors import InvalidInput
from ....core.features import CutFeatures
from ....core.structures import PointCloud
from ..frames import AuditFrame, Rebuilt, inside_grid


def occupied_voxels(points: PointCloud, grid: VoxelGrid) -> Tensor:
    """Find the voxels of a scan that hold a point.

    Args:
        points: A scan in the shifted frame. Points outside the grid are left out.
        grid: The input grid.

    Returns:
        (M, 3) int32 z, y, x, ascending and without repeats.
    """
    cells = voxel_of_points(inside_grid(points, grid).xyz, grid)
    number = torch.unique(cell_index(cells, grid.shape))
    _, height, width = grid.shape
    return torch.stack([number // (height * width), number // width % height, number % width], 1).to(torch.int32)


def voxel_of_points(xyz: Tensor, grid: VoxelGrid) -> Tensor:
    """Find the voxel that each point lies in.

    Args:
        xyz: (N, 3) x, y, z in meters, inside the grid.
        grid: The input grid.

    Returns:
        (N, 3) int32 z, y, x. Rounding at the far sides of the grid never leaves it.
    """
    start, size = xyz.new_tensor(grid.range[:3]), xyz.new_tensor(grid.voxel_size)
    cells = ((xyz - start) / size).floor().to(torch.int32).flip(1)
    last = cells.new_tensor(grid.shape) - 1
    return torch.minimum(cells.clamp(min=0), last)


def voxel_centers(scan: PointCloud, grid: VoxelGrid) -> Rebuilt:
    """Rebuild a scan from itself: the centers of its occupied voxels, the upper bound of every attack on the grid.

    Args:
        scan: The true scan in the shifted frame.
        grid: The input grid.

    Returns:
        One point per occupied voxel, all of score 1.
    """
    xyz = cell_centers(occupied_voxels(scan, grid), grid)
    return Rebuilt(xyz=xyz, score=torch.ones(len(xyz)))


class CellCenters:
    """The simplest attack: the centers of the cells that were sent, and the keypoints where there are some."""

    def train(self, frames: Sequence[AuditFrame]) -> None:
        """Learn nothing.

        Args:
            frames: Not looked at.
        """

    def rebuild(self, upload: CutFeatures) -> Rebuilt:
        """Take the centers of cells, and keypoints, as points.

        Args:
            upload: What left a vehicle, a batch of one.

        Returns:
            Keypoints with score 1, then the centers of the cells with score 0.5.
        """
        spec, cells = upload.spec, upload.voxels.coords[:, 1:].float()
        x, y = spec.position(cells[:, 1], cells[:, 2])
        z = spec.grid.range[2] + (cells[:, 0] + 0.5) * spec.stride[0] * spec.grid.voxel_size[2]
        centers = torch.stack([x, y, z], 1)
        sure = centers.new_zeros(0, 3) if upload.keypoints is None else upload.keypoints.xyz
        score = torch.cat([torch.ones(len(sure)), torch.full((len(centers),), 0.5)])
        return Rebuilt(xyz=torch.cat([sure, centers]), score=score)


class MeanOccupancy:
    """What is known without any upload: how often each voxel holds a point in other scans of such a vehicle.

    The shares are blurred, because a few hundred scans are few for millions of voxels. Where the grid reaches as far to the left as to the
    right, they are made the same on both sides.
    """

    def __init__(self, *, blur: float = 1.5, share: float = 0.02) -> None:
        """Choose how the shares are smoothed.

        Args:
            blur: Standard deviation of the blur in voxels along y and x. Along z it is a quarter of it, because the road is thin.
            share: Voxels with a lower share are left out.

        Raises:
            InvalidInput: A number is negative.
        """
        if min(blur, share) < 0:
            raise InvalidInput(f"MeanOccupancy needs a blur and a share of at least 0, found {blur} and {share}")
        self.blur, self.share = blur, share
        self._rebuilt: Rebuilt | None = None

    def train(self, frames: Sequence[AuditFrame]) -> None:
        """Count how often each voxel is occupied.

        Args:
            frames: Frames of the attacker's own; only their scans are looked at.

        Raises:
            InvalidInput: There is no frame.
        """
        if not frames:
            raise InvalidInput("the mean occupancy needs at least one frame; give the attacker frames of its own")
        grid = frames[0].upload.spec.grid
        count: NDArray[np.float32] = np.zeros(grid.shape, np.float32)
        for frame in frames:
            z, y, x = occupied_voxels(frame.scan, grid).numpy().T
            count[z, y, x] += 1 / len(frames)
        if abs(grid.range[1] + grid.range[4]) < 1e-6:
            count = ((count + count[:, ::-1]) / 2).astype(np.float32)
        mean = gaussian_filter(count, (self.blur / 4, self.blur, self.blur), mode="constant")
        cells = torch.from_numpy(np.argwhere(mean > self.share).astype(np.int32))
        score = torch.from_numpy(mean[mean > self.share])
        self._rebuilt = Rebuilt(xyz=cell_centers(cells, grid), score=score)

    def rebuild(self, upload: CutFeatures) -> Rebuilt:
        """Give the same typical scan for every upload.

        Args:
            upload: Not looked at.

        Returns:
            The voxels that are often occupied, with their shares as scores.

        Raises:
            InvalidInput: The attack was not trained.
        """
        if self._rebuilt is None:
            raise InvalidInput("the mean occupancy was not trained; call `train` with frames of the attacker first")
        return self._rebuilt
