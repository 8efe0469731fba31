"""What an attacker sees around any place of a scene: an upload, its coordinates alone, nothing, or the scan itself.

Attacks on objects (`attributes.py`, `people.py`) learn from a `SceneView` and do not know which kind they hold. So the same attacker gives
all rows of a table: nothing, coordinates, upload, rebuilt scan, and the upper bound.

Read next: `fits.py`, which learns values and classes from these descriptions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.boxes import rotate_z
from ....core.cut import CutSpec, VoxelGrid, cell_index
from ....core.features import CutFeatures, Keypoints
from ....core.structures import PointCloud
from ....core.tensor_value import TensorValue
from ...models.decoders.bev import height_compression

PATCH_X, PATCH_Y = (-2.2, -1.1, 0.0, 1.1, 2.2), (-1.0, 0.0, 1.0)
"""Offsets in meters, along and across an object, at which its surroundings are read."""
WINDOWS = ((0.6, 0.6), (3.0, 1.4))
"""Half sizes in meters, along and across, of the windows in which points are described: a person, a car."""
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
KEYPOINT_RADIUS = 1.0
PIXEL = 0.2
"""Side in meters of the BEV cells of a scan."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SceneView(TensorValue):
    """One scene as an attacker sees it."""

    bev: Tensor
    """(C, Y, X) BEV map; it has no channel where the attacker sees nothing."""

    origin: tuple[float, float]
    """x, y in meters of the center of cell (0, 0)."""

    cell: tuple[float, float]
    """x, y size of a cell of the map in meters."""

    keypoints: Keypoints | None = None
    """Keypoints of the upload, None without."""

    points: Tensor | None = None
    """(N, 3) points in meters, None where the attacker has none."""

    also: SceneView | None = None
    """A second view of the same scene, which is described too. None without."""

    def around(self, places: Tensor) -> Tensor:
        """Describe the surroundings of objects.

        Args:
            places: (N, 3) x, y in meters and heading in radians.

        Returns:
            (N, D) values; D depends on the kind of view only.
        """
        offsets = places.new_tensor([[x, y, 0.0] for x in PATCH_X for y in PATCH_Y])
        spots = (
            rotate_z(offsets.expand(len(places), -1, -1), places[:, 2:].expand(-1, len(offsets)))[..., :2] + places[:, None, :2]
        )
        parts = [_pose(places), self.read(spots.reshape(-1, 2)).reshape(len(places), len(offsets) * len(self.bev))]
        if self.keypoints is not None:
            parts += [_near_keypoints(self.keypoints, places), profile(self.keypoints.xyz, places)]
        if self.points is not None:
            parts.append(profile(self.points, places))
        if self.also is not None:
            parts.append(self.also.around(places))
        return torch.cat(parts, 1)

    def at(self, xyz: Tensor) -> Tensor:
        """Describe the surroundings of points.

        Args:
            xyz: (N, 3) x, y, z in meters.

        Returns:
            (N, D) values: place, place in the cell, map, and the nearest keypoint.
        """
        step = xyz.new_tensor(self.cell)
        inside = torch.remainder((xyz[:, :2] - xyz.new_tensor(self.origin)) / step, 1.0)
        parts = [xyz, torch.linalg.norm(xyz, dim=1, keepdim=True), inside, self.read(xyz[:, :2])]
        if self.keypoints is not None:
            parts.append(_nearest_keypoint(self.keypoints, xyz))
        return torch.cat(parts, 1)

    def with_keypoints(self) -> SceneView:
        """Write the keypoints into the map, for a network that reads nothing else.

        Returns:
            The same view where there is no keypoint; else a map of cells of half the size, with the mean features of the keypoints of
            each cell, their number, and their mean and highest z.
        """
        if self.keypoints is None:
            return self
        fine = self.bev.repeat_interleave(2, 1).repeat_interleave(2, 2)
        cell = (self.cell[0] / 2, self.cell[1] / 2)
        origin = (self.origin[0] - cell[0] / 2, self.origin[1] - cell[1] / 2)
        xyz = self.keypoints.xyz
        column, row = ((xyz[:, :2] - xyz.new_tensor(origin)) / xyz.new_tensor(cell)).round().long().unbind(1)
        rows, columns = fine.shape[1:]
        there = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
        spot = (row * columns + column)[there]
        values = torch.cat([self.keypoints.features, xyz[:, 2:]], 1)[there]
        count = torch.bincount(spot, minlength=rows * columns).float()
        total = fine.new_zeros(rows * columns, values.shape[1]).index_add(0, spot, values)
        top = fine.new_full((rows * columns,), -10.0).scatter_reduce(0, spot, xyz[there, 2], "amax")
        written = torch.cat([total / count[:, None].clamp_min(1), count[:, None], torch.where(count > 0, top, 0.0)[:, None]], 1)
        return replace(self, bev=torch.cat([fine, written.T.reshape(-1, rows, columns)]), origin=origin, cell=cell)

    def read(self, xy: Tensor) -> Tensor:
        """Read the map between its cells.

        Args:
            xy: (N, 2) x, y in meters.

        Returns:
            (N, C) bilinear values, 0 outside the map.
        """
        if not len(xy) or not len(self.bev):
            return self.bev.new_zeros(len(xy), len(self.bev))
        size = xy.new_tensor([self.bev.shape[2], self.bev.shape[1]])
        column = (xy - xy.new_tensor(self.origin)) / xy.new_tensor(self.cell)
        grid = (2 * (column + 0.5) / size - 1)[None, None]
        found: Tensor = F.grid_sample(self.bev[None], grid, align_corners=False)[0, :, 0].T
        return found


def view_of_upload(upload: CutFeatures) -> SceneView:
    """See everything that left a vehicle.

    Args:
        upload: A batch of one; it may hold no cell.

    Returns:
        The view: features by level, and which cells are there.
    """
    seen = view_of_coordinates(upload)
    bev = torch.cat([height_compression(upload.voxels)[0], seen.bev])
    return replace(seen, bev=bev, keypoints=upload.keypoints)


def view_of_coordinates(upload: CutFeatures) -> SceneView:
    """See which cells and keypoints left a vehicle, without their features.

    Args:
        upload: A batch of one.

    Returns:
        The view.
    """
    voxels, keypoints = upload.voxels, upload.keypoints
    there = replace(voxels, features=voxels.features.new_ones(len(voxels.coords), 1))
    return SceneView(
        bev=height_compression(there)[0],
        origin=upload.spec.position(0.0, 0.0),
        cell=upload.spec.cell_size(),
        keypoints=keypoints and replace(keypoints, features=keypoints.features[:, :0]),
    )


def view_of_nothing(spec: CutSpec) -> SceneView:
    """See nothing: what can be said of a place without any upload.

    Args:
        spec: The cut, for the size of the map.

    Returns:
        The view, with a map of no channel.
    """
    return SceneView(bev=torch.zeros(0, *spec.shape[1:]), origin=spec.position(0.0, 0.0), cell=spec.cell_size())


def view_of_points(xyz: Tensor, grid: VoxelGrid) -> SceneView:
    """See a scan, raw or rebuilt, as the centers of its voxels.

    Args:
        xyz: (N, 3) points in meters.
        grid: The input grid of the encoder; points outside are left out.

    Returns:
        The view: a map of 0.2 m cells with the number of voxels in slices of 0.2 m, and the voxel centers.
    """
    low, size = xyz.new_tensor(grid.range[:3]), xyz.new_tensor(grid.voxel_size)
    index = ((xyz - low) / size).floor().long()
    shape = index.new_tensor(grid.shape[::-1])
    index = index[((index >= 0) & (index < shape)).all(1)]
    number = cell_index(index.flip(1), grid.shape).unique()
    index = torch.stack(
        [number % grid.shape[2], number // grid.shape[2] % grid.shape[1], number // (grid.shape[2] * grid.shape[1])], 1
    )
    centers = low + (index + 0.5) * size
    cells = [max(1, round((grid.range[a + 3] - grid.range[a]) / PIXEL)) for a in range(3)]
    x, y, z = (((centers - low) / PIXEL).long().clamp_min(0).minimum(shape.new_tensor(cells) - 1)).unbind(1)
    counts = torch.bincount((z * cells[1] + y) * cells[0] + x, minlength=cells[0] * cells[1] * cells[2]).float()
    return SceneView(
        bev=torch.log1p(counts).view(cells[2], cells[1], cells[0]),
        origin=(grid.range[0] + PIXEL / 2, grid.range[1] + PIXEL / 2),
        cell=(PIXEL, PIXEL),
        points=centers,
    )


def voxel_means(scan: PointCloud, grid: VoxelGrid, column: int) -> Tensor:
    """Average a point feature over the points of each voxel: what the raw scan at the same grid tells of a point.

    Args:
        scan: N points inside the grid.
        grid: The input grid of the encoder.
        column: Which point feature.

    Returns:
        (N,) the mean of the voxel that each point lies in.
    """
    index = ((scan.xyz - scan.xyz.new_tensor(grid.range[:3])) / scan.xyz.new_tensor(grid.voxel_size)).floor().long()
    _, voxel = cell_index(index.flip(1), grid.shape).unique(return_inverse=True)
    count = torch.bincount(voxel).float()
    return (torch.bincount(voxel, weights=scan.features[:, column]) / count).float()[voxel]


def profile(xyz: Tensor, places: Tensor) -> Tensor:
    """Describe the points around objects: how many there are, and how far they reach along, across and up.

    Args:
        xyz: (N, 3) points in meters.
        places: (M, 3) x, y in meters and heading in radians.

    Returns:
        (M, D) values.
    """
    rows = []
    ordered = xyz[xyz[:, 0].argsort()]
    reach_x = 1.5 * WINDOWS[-1][0]  # more than the diagonal of a window
    first = torch.searchsorted(ordered[:, 0].contiguous(), places[:, 0].contiguous() - reach_x).tolist()
    last = torch.searchsorted(ordered[:, 0].contiguous(), places[:, 0].contiguous() + reach_x).tolist()
    for place, start, end in zip(places, first, last):
        xyz = ordered[start:end]
        local = rotate_z(torch.cat([xyz[:, :2] - place[:2], xyz[:, 2:]], 1), -place[2])
        local = local[(local[:, :2].abs() <= WINDOWS[-1][0]).all(1)]
        ground = local[:, 2].quantile(0.05) if len(local) else xyz.new_zeros(())
        row = [ground[None]]
        for length, width in WINDOWS:
            near = local[(local[:, 0].abs() <= length) & (local[:, 1].abs() <= width)]
            high = near[near[:, 2] > ground + 0.25] - torch.stack([ground * 0, ground * 0, ground])
            reach = high.quantile(high.new_tensor(QUANTILES), dim=0).flatten() if len(high) else xyz.new_zeros(3 * len(QUANTILES))
            row += [xyz.new_tensor([len(near), len(high)]).log1p(), reach]
        rows.append(torch.cat(row))
    return torch.stack(rows) if rows else xyz.new_zeros(0, 1 + len(WINDOWS) * (2 + 3 * len(QUANTILES)))


def _pose(places: Tensor) -> Tensor:
    yaw = places[:, 2]
    turns = torch.stack([yaw.cos(), yaw.sin(), (2 * yaw).cos(), (2 * yaw).sin()], 1)
    return torch.cat([places[:, :2], torch.linalg.norm(places[:, :2], dim=1, keepdim=True), turns], 1)


def _near_keypoints(keypoints: Keypoints, places: Tensor) -> Tensor:
    """(N, 1 + 3 C) number of keypoints nearby, mean and highest feature, and the features of the nearest keypoint."""
    c = keypoints.features.shape[1]
    if not len(keypoints.xyz):
        return places.new_zeros(len(places), 1 + 3 * c)
    distance = torch.cdist(places[:, :2], keypoints.xyz[:, :2])
    rows = []
    for d in distance:
        near = keypoints.features[d <= KEYPOINT_RADIUS]
        both = [near.mean(0), near.amax(0)] if len(near) else [places.new_zeros(2 * c)]
        rows.append(torch.cat([places.new_tensor([len(near)]).log1p(), *both, keypoints.features[d.argmin()]]))
    return torch.stack(rows) if rows else places.new_zeros(0, 1 + 3 * c)


def _nearest_keypoint(keypoints: Keypoints, xyz: Tensor) -> Tensor:
    """(N, 4 + C) offset and distance to the nearest keypoint, and its features."""
    if not len(keypoints.xyz):
        return xyz.new_zeros(len(xyz), 4 + keypoints.features.shape[1])
    distance, row = torch.cdist(xyz, keypoints.xyz).min(1)
    return torch.cat([xyz - keypoints.xyz[row], distance[:, None], keypoints.features[row]], 1)
