"""Defences on the list of cells: leave cells out, move them, add false ones.

They are baselines. Features survive them, and neighbors tell much about a cell that is missing or misplaced: measure before use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ....core.cut import CutSpec, cell_centers, cell_index, cells_of_centers
from ....core.errors import require_counts, require_numbers
from ....core.features import CutFeatures, Keypoints
from .defence import Defence, keep_cells, uniform


@dataclass(frozen=True, kw_only=True)
class DropConfig:
    """Leaves out random cells and keypoints."""

    share: float = 0.3
    """Share that is left out, 0..1."""

    def __post_init__(self) -> None:
        require_numbers("DropConfig", least=0, most=1, share=self.share)

    def build(self, spec: CutSpec) -> DropCells:
        """Make the defence.

        Args:
            spec: The cut.

        Returns:
            The defence.
        """
        return DropCells(spec, self)


class DropCells(Defence):
    """Sends a random part of the cells and keypoints."""

    sends_everywhere = False

    def __init__(self, spec: CutSpec, config: DropConfig) -> None:
        """Keep the settings.

        Args:
            spec: The cut.
            config: The share.
        """
        super().__init__(spec)
        self.config = config

    def send(self, features: CutFeatures, rng: np.random.Generator) -> CutFeatures:
        """Leave out random cells and keypoints.

        Args:
            features: One scene.
            rng: Draws them.

        Returns:
            Fewer cells and keypoints, unchanged.
        """
        rows = features.voxels.features
        points = None
        if features.keypoints is not None:
            points = uniform(rng, len(features.keypoints.xyz), rows) >= self.config.share
        return keep_cells(features, uniform(rng, len(rows), rows) >= self.config.share, points)


@dataclass(frozen=True, kw_only=True)
class JitterConfig:
    """Moves cells and keypoints at random."""

    cells: int = 1
    """Most cells by which a cell is moved along x and y."""

    voxels: int = 4
    """Most voxels of the input grid by which a keypoint is moved along x, y and z. Only PV-RCNN has keypoints."""

    share: float = 0.5
    """Share of the cells and keypoints that are moved, 0..1."""

    def __post_init__(self) -> None:
        require_counts("JitterConfig", least=0, most=1000, cells=self.cells, voxels=self.voxels)
        require_numbers("JitterConfig", least=0, most=1, share=self.share)

    def build(self, spec: CutSpec) -> JitterCells:
        """Make the defence.

        Args:
            spec: The cut.

        Returns:
            The defence.
        """
        return JitterCells(spec, self)


class JitterCells(Defence):
    """Sends a random part of the cells and keypoints as if they lay somewhere near."""

    def __init__(self, spec: CutSpec, config: JitterConfig) -> None:
        """Keep the settings.

        Args:
            spec: The cut.
            config: Distance and share.
        """
        super().__init__(spec)
        self.config = config

    def send(self, features: CutFeatures, rng: np.random.Generator) -> CutFeatures:
        """Move random cells and keypoints. Of two that meet in a cell, one is sent.

        Args:
            features: One scene.
            rng: Draws them and their ways.

        Returns:
            The scene with cells and keypoints elsewhere.
        """
        voxels, config = features.voxels, self.config
        cells = _moved(voxels.coords[:, 1:], (0, config.cells, config.cells), self.spec.shape, config.share, rng)
        rows = _first_of_each(cells, self.spec.shape, rng)
        coords = torch.cat([torch.zeros_like(cells[:, :1]), cells], 1)
        voxels = replace(voxels, features=voxels.features[rows], coords=coords[rows])
        keypoints = features.keypoints
        if keypoints is not None:
            grid, v = self.spec.grid, config.voxels
            points = _moved(cells_of_centers(keypoints.xyz, grid), (v, v, v), grid.shape, config.share, rng)
            rows = _first_of_each(points, grid.shape, rng)
            keypoints = Keypoints(xyz=cell_centers(points[rows], grid), features=keypoints.features[rows], starts=(0, len(rows)))
        return replace(features, voxels=voxels, keypoints=keypoints)


@dataclass(frozen=True, kw_only=True)
class DecoyConfig:
    """Adds false cells."""

    share: float = 0.3
    """Number of false cells, as a share of the true ones."""

    def __post_init__(self) -> None:
        require_numbers("DecoyConfig", least=0, most=100, share=self.share)

    def build(self, spec: CutSpec) -> DecoyCells:
        """Make the defence.

        Args:
            spec: The cut.

        Returns:
            The defence.
        """
        return DecoyCells(spec, self)


class DecoyCells(Defence):
    """Sends false cells among the true ones: features of random true cells in random empty places. Keypoints are not changed."""

    def __init__(self, spec: CutSpec, config: DecoyConfig) -> None:
        """Keep the settings.

        Args:
            spec: The cut.
            config: The share.
        """
        super().__init__(spec)
        self.config = config

    def send(self, features: CutFeatures, rng: np.random.Generator) -> CutFeatures:
        """Add false cells.

        Args:
            features: One scene.
            rng: Draws places and features.

        Returns:
            The scene with more cells.
        """
        voxels = features.voxels
        count = round(self.config.share * len(voxels.coords))
        if not count:
            return features
        shape = self.spec.shape
        places = np.stack([rng.integers(0, n, count) for n in shape], 1).astype(np.int32)
        sources = torch.from_numpy(rng.integers(0, len(voxels.coords), count)).to(voxels.coords.device)
        cells = torch.cat([voxels.coords[:, 1:], torch.from_numpy(places).to(voxels.coords.device)])
        rows = _first_of_each(cells, shape, None)  # the true cell stays where a false one falls on it
        coords = torch.cat([torch.zeros_like(cells[:, :1]), cells], 1)
        values = torch.cat([voxels.features, voxels.features[sources]])
        return replace(features, voxels=replace(voxels, features=values[rows], coords=coords[rows]))


def _moved(
    cells: Tensor, most: tuple[int, int, int], shape: tuple[int, int, int], share: float, rng: np.random.Generator
) -> Tensor:
    """(N, 3) int32 cells, a share of them moved by up to `most` cells along each axis and kept in the grid."""
    steps = np.stack([rng.integers(-m, m + 1, len(cells)) for m in most], 1).astype(np.int32)
    way = torch.from_numpy(steps).to(cells.device)
    moved = torch.where((uniform(rng, len(cells), cells) < share)[:, None], cells + way, cells)
    return torch.minimum(moved.clamp_min(0), moved.new_tensor(shape) - 1)


def _first_of_each(cells: Tensor, shape: tuple[int, int, int], rng: np.random.Generator | None) -> Tensor:
    """Rows of `cells` without repeats, ascending: of equal cells the first one, or with `rng` a random one."""
    index = cell_index(cells, shape).cpu().numpy()
    order = np.arange(len(index)) if rng is None else rng.permutation(len(index))
    _, first = np.unique(index[order], return_index=True)
    return torch.from_numpy(np.sort(order[first])).to(cells.device)
