"""The truth that rebuilt scans are compared with: a scan, its occupied voxels, its objects and its road.

Regions are given by the truth alone, so every attack on a frame is scored on the same ones:

* *object* regions: the labeled boxes, enlarged by `RegionRules.margin` on every side. Boxes of weight 0 belong to no class;
* *background*: everything outside all enlarged boxes, those of weight 0 included;
* *background above the road*: background at least `RegionRules.above_road` meters over the road.

The height of the road is estimated per place. The plane is divided into tiles of 5 m. The low value of a tile is the 10 % quantile of
the z of its points. A tile whose low value lies more than half a meter from the lower quartile of the low values in the 5 x 5 tiles
around it shows a wall, a roof or a reflection instead of the road, and takes that quartile. A place without a point takes the
height of the nearest tile that has one. So a road may climb, and neither the zero of the shifted frame nor a car hides it.

Read next: `geometry_metrics.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from ...core.cut import VoxelGrid
from ...core.errors import InvalidInput, require
from ...core.structures import Labels, PointCloud
from ...ops.points_in_boxes import points_in_boxes_mask
from .frames import AuditFrame

Points = NDArray[np.float64]
"""(N, 3) x, y, z in meters."""
Mask = NDArray[np.bool_]
"""(N,) which points."""

TILE = 5.0
"""Meters along each side of a tile in which the height of the road is estimated."""
LOW_QUANTILE = 0.1
"""The quantile of z that stands for the low points of a tile; a few points below the road do not move it."""
FAR_FROM_ROAD = 0.5
"""Meters from the low values around a tile at which its own low value is not the road."""


@dataclass(frozen=True, kw_only=True)
class RegionRules:
    """Which points count as object, background and background above the road."""

    classes: tuple[str, ...] = ()
    """Names of the class numbers of the labels. Each gets a score of its own."""

    margin: float = 0.2
    """Meters that a labeled box is enlarged on every side. A point that is rebuilt a little outside the object still counts for it."""

    above_road: float = 0.5
    """Meters over the road from which background is scored separately, because a flat road can be guessed without any upload."""

    def __post_init__(self) -> None:
        require(
            self.margin >= 0 and self.above_road >= 0,
            f"RegionRules needs a margin and a height of at least 0 m, found {self.margin} and {self.above_road}",
        )


class RoadHeight:
    """The height of the road at every place of one scan, by the rule at the top of this file."""

    def __init__(self, points: Points) -> None:
        """Estimate the heights.

        Args:
            points: The true scan, with at least one point.
        """
        tiles = np.floor(points[:, :2] / TILE).astype(np.int64)
        self._tiles, tile = np.unique(tiles, axis=0, return_inverse=True)
        tile = tile.reshape(-1)
        low = np.array([np.quantile(points[tile == t, 2], LOW_QUANTILE) for t in range(len(self._tiles))])
        near = np.abs(self._tiles[:, None] - self._tiles[None]).max(2) <= 2
        around = np.array([np.quantile(low[row], 0.25) for row in near])
        self._heights = np.where(np.abs(low - around) > FAR_FROM_ROAD, around, low)
        self._tree = cKDTree(self._tiles)

    def at(self, points: Points) -> NDArray[np.float64]:
        """Give the height of the road below points.

        Args:
            points: (N, 3) x, y, z in meters.

        Returns:
            (N,) z of the road in meters.
        """
        if not len(points):
            return np.zeros(0)
        return self._heights[self._tree.query(np.floor(points[:, :2] / TILE))[1]]


@dataclass(frozen=True, kw_only=True)
class Regions:
    """Which of some points lie in which region of a scene."""

    background: Mask | None
    """Points outside all enlarged boxes; None where the frame has no labels."""

    above_road: Mask | None
    """Background at least `RegionRules.above_road` over the road; None where the frame has no labels or no point."""

    objects: tuple[Mask | None, ...]
    """For each class, the points in its enlarged boxes; None where the frame has no labels or no box of the class."""


class TrueScan:
    """A true scan, ready to be compared with many rebuilt ones."""

    def __init__(self, scan: PointCloud, labels: Labels | None, grid: VoxelGrid, rules: RegionRules) -> None:
        """Index a scan.

        Args:
            scan: The points inside the grid, in the shifted frame.
            labels: The objects; None where nobody labeled the frame.
            grid: The input grid, whose occupied voxels are counted.
            rules: Which points count as object and background.

        Raises:
            InvalidInput: A point is not finite, or a label has a class that has no name.
        """
        self.points, self.grid, self.rules = finite_points(scan.xyz, "the true scan"), grid, rules
        self.cells = occupied_cells(self.points, grid)
        self.voxels = (self.cells + 0.5) * np.array(grid.voxel_size) + np.array(grid.range[:3])
        self.tree, self.voxel_tree = cKDTree(self.points), cKDTree(self.voxels)
        self._labels = labels
        self._road = RoadHeight(self.points) if len(self.points) else None
        if labels is not None and rules.classes and len(labels) and int(labels.classes.max()) >= len(rules.classes):
            raise InvalidInput(
                f"a label has the class number {int(labels.classes.max())}, and the rules name {len(rules.classes)} classes "
                f"({', '.join(rules.classes)}); give RegionRules the names of all classes of the dataset"
            )
        self.regions = self.regions_of(self.points)

    @staticmethod
    def of(frame: AuditFrame, rules: RegionRules) -> TrueScan:
        """Index the scan of a frame at the input grid of its upload.

        Args:
            frame: The frame.
            rules: Which points count as object and background.

        Returns:
            The truth of the frame.
        """
        return TrueScan(frame.scan, frame.labels, frame.upload.spec.grid, rules)

    def regions_of(self, points: Points) -> Regions:
        """Sort points, true or rebuilt ones, into the regions of this scene.

        Args:
            points: (N, 3) x, y, z in meters.

        Returns:
            The regions.
        """
        if self._labels is None:
            return Regions(background=None, above_road=None, objects=(None,) * len(self.rules.classes))
        boxes = self._labels.boxes.data.double().clone()
        boxes[:, 3:6] += 2 * self.rules.margin
        inside = points_in_boxes_mask(torch.from_numpy(points), boxes).numpy() if len(boxes) else np.zeros((0, len(points)), bool)
        background: Mask = np.logical_not(inside.any(axis=0))
        above = None
        if self._road is not None:
            above = background & (points[:, 2] >= self._road.at(points) + self.rules.above_road)
        counted = (self._labels.weight > 0).numpy()
        objects: list[Mask | None] = []
        for number in range(len(self.rules.classes)):
            own = counted & (self._labels.classes == number).numpy()
            objects.append(inside[own].any(0) if own.any() else None)
        return Regions(background=background, above_road=above, objects=tuple(objects))


def finite_points(xyz: torch.Tensor, what: str) -> Points:
    """Give points as float64, and refuse those that are not finite.

    Args:
        xyz: (N, 3) x, y, z in meters.
        what: What the points are called, for the message.

    Returns:
        (N, 3) float64.

    Raises:
        InvalidInput: A coordinate is NaN or infinite.
    """
    points = xyz.detach().cpu().double().numpy()
    require(bool(np.isfinite(points).all()), f"{what} has coordinates that are NaN or infinite, so no distance can be computed")
    return points


def occupied_cells(points: Points, grid: VoxelGrid) -> NDArray[np.int64]:
    """Find the voxels that hold a point. Points outside the grid lie in voxels outside it, which no true scan has.

    Args:
        points: (N, 3) x, y, z in meters.
        grid: The grid.

    Returns:
        (M, 3) x, y, z numbers of the voxels, each once.
    """
    start, size = (np.array(v, dtype=np.float32) for v in (grid.range[:3], grid.voxel_size))
    cells = np.floor((points.astype(np.float32) - start) / size)  # float32, as the encoder does it
    return np.unique(np.clip(cells, -(2**40), 2**40).astype(np.int64), axis=0)
