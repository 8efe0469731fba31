"""The tree of cells between a cut and its input grid: a node of level k is a cube of 2^k voxels along each side.

    roots (level L, stride of the cut) ── 8 children each ── ... ── voxels (level 0)

`occupancy_decoder.py` decides level by level which nodes hold a point. This file has the geometry, and the truth of a scan.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....core.cut import CutSpec, VoxelGrid
from ....ops.rulebook import ZYX

CHILDREN = 8
"""Children of a node, numbered (z * 2 + y) * 2 + x by the half that they lie in."""


@dataclass(frozen=True, kw_only=True)
class OccupancyTree:
    """The levels between the cells of a cut and the voxels of its grid."""

    grid: VoxelGrid
    """The input grid."""

    levels: int
    """Number of halvings from a root to a voxel."""

    @classmethod
    def of(cls, spec: CutSpec) -> OccupancyTree:
        """Choose the roots: the largest power of two that is not larger than the cell of the cut in BEV.

        Args:
            spec: The cut.

        Returns:
            The tree.
        """
        return cls(grid=spec.grid, levels=min(spec.stride[1:]).bit_length() - 1)

    def shape(self, level: int) -> ZYX:
        """Count the nodes of a level.

        Args:
            level: 0 for voxels.

        Returns:
            Nodes along z, y, x. The last ones may reach over the end of the grid.
        """
        z, y, x = (-(-n // 2**level) for n in self.grid.shape)
        return (z, y, x)

    def keys(self, nodes: Tensor, level: int) -> Tensor:
        """Number nodes in ascending order of (scene, z, y, x).

        Args:
            nodes: (M, 4) scene, z, y, x.
            level: Level of the nodes.

        Returns:
            (M,) int64.
        """
        depth, height, width = self.shape(level)
        scene, z, y, x = nodes.long().unbind(1)
        return ((scene * depth + z) * height + y) * width + x

    def inside(self, nodes: Tensor, level: int) -> Tensor:
        """Tell which nodes begin inside the grid.

        Args:
            nodes: (M, 4) scene, z, y, x, none negative.
            level: Level of the nodes.

        Returns:
            (M,) bool.
        """
        return (nodes[:, 1:] < nodes.new_tensor(self.shape(level))).all(1)

    def roots(self, scenes: int) -> Tensor:
        """List all roots.

        Args:
            scenes: Number of scenes.

        Returns:
            (M, 4) int32 scene, z, y, x, ascending.
        """
        axes = [torch.arange(n, dtype=torch.int32) for n in (scenes, *self.shape(self.levels))]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 4)

    def centers(self, nodes: Tensor, level: int) -> Tensor:
        """Find the centers of nodes.

        Args:
            nodes: (M, 4) scene, z, y, x.
            level: Level of the nodes.

        Returns:
            (M, 3) float32 x, y, z in meters.
        """
        start, size = (torch.tensor(v, dtype=torch.float32) for v in (self.grid.range[:3], self.grid.voxel_size))
        return (nodes[:, 1:].flip(1).float() + 0.5) * (size * 2**level) + start

    def truth(self, voxels: Tensor) -> list[Tensor]:
        """Find the nodes that hold a point, on every level.

        Args:
            voxels: (M, 4) int32 scene, z, y, x of the occupied voxels.

        Returns:
            For the levels 0, 1, ... the ascending int64 keys of the occupied nodes.
        """
        found = []
        for level in range(self.levels + 1):
            nodes = torch.cat([voxels[:, :1], voxels[:, 1:] >> level], 1)
            found.append(torch.unique(self.keys(nodes, level)))
        return found


def children_of(nodes: Tensor) -> Tensor:
    """List the children of nodes.

    Args:
        nodes: (M, 4) int32 scene, z, y, x.

    Returns:
        (M, 8, 4) int32, in the order of `CHILDREN`.
    """
    half = torch.arange(CHILDREN)
    step = torch.stack([torch.zeros(CHILDREN), half // 4, half // 2 % 2, half % 2], 1).to(torch.int32)
    return nodes[:, None] * torch.tensor([1, 2, 2, 2], dtype=torch.int32) + step


def row_of(keys: Tensor, wanted: Tensor) -> Tensor:
    """Look keys up.

    Args:
        keys: (M,) int64, ascending and without repeats.
        wanted: (N,) int64.

    Returns:
        (N,) int64 place of each wanted key in `keys`, -1 where it is not there.
    """
    if not len(keys):
        return torch.full_like(wanted, -1)
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[place] == wanted, place, -1)
