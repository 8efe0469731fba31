"""What lies under the boxes of a picture in BEV: the points of a scan, or the features of a scene at the cut. Read next: `bev.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.features import CutFeatures
from ...core.smashed_scene import SmashedScene
from ...core.structures import PointCloud

Ground = PointCloud | SmashedScene | CutFeatures | None
"""What lies under the boxes of a picture."""

HEIGHT_COLORS = LinearSegmentedColormap.from_list("height", ["#C9CED2", "#97A4A5", "#5D7A70", "#2F4F3E"])
NORM_COLORS = LinearSegmentedColormap.from_list("norm", ["#E6EDE4", "#A9C4AE", "#63907A", "#1F4A3C"])


def ground_image(
    ground: Ground, view: tuple[float, float, float, float], size: tuple[int, int], heights: tuple[float, float]
) -> np.ndarray | None:
    """Paint points or features as seen in BEV.

    Args:
        ground: A scan, or the features of one scene; None paints nothing.
        view: (x0, y0, x1, y1) in meters.
        size: Rows and columns of the image.
        heights: Heights in meters of the lightest and of the darkest shade.

    Returns:
        (rows, columns, 4) uint8 with row 0 farthest ahead and column 0 farthest left, transparent where nothing is; None without ground.

    Raises:
        InvalidInput: The features hold several scenes.
    """
    if ground is None:
        return None
    if isinstance(ground, PointCloud):
        return _points_image(ground, view, size, heights)
    if isinstance(ground, SmashedScene):
        return _features_image(ground.coords[:, 1:], ground.features, ground, view, size)
    if ground.batch_size != 1:
        raise InvalidInput(f"a picture shows one scene, found a batch of {ground.batch_size}; take features.scene(index)")
    return _features_image(ground.voxels.coords[:, 2:], ground.voxels.features, ground, view, size)


def height_range(grounds: Sequence[Ground], view: tuple[float, float, float, float]) -> tuple[float, float]:
    """Choose where the shades of height begin and end, one pair for all pictures: all but the lowest and highest hundredth.

    Args:
        grounds: What lies in each picture; only scans count.
        view: (x0, y0, x1, y1) in meters.

    Returns:
        Heights in meters of the lightest and of the darkest shade.
    """
    z = np.concatenate([np.zeros(0), *(_visible(g, view)[:, 2] for g in grounds if isinstance(g, PointCloud))])
    return (float(np.quantile(z, 0.01)), float(np.quantile(z, 0.99))) if len(z) else (0.0, 1.0)


def _points_image(
    points: PointCloud, view: tuple[float, float, float, float], size: tuple[int, int], heights: tuple[float, float]
) -> np.ndarray:
    """Each point a dot of two by two pixels, the highest on top."""
    xyz = _visible(points, view)
    xyz = xyz[np.argsort(xyz[:, 2], kind="stable")]
    image = np.zeros((*size, 4), dtype=np.uint8)
    row = ((view[2] - xyz[:, 0]) / (view[2] - view[0]) * size[0]).astype(np.int64)
    column = ((view[3] - xyz[:, 1]) / (view[3] - view[1]) * size[1]).astype(np.int64)
    shade = (xyz[:, 2] - heights[0]) / max(heights[1] - heights[0], 1e-6)
    colors = HEIGHT_COLORS(np.round(np.clip(shade, 0, 1) * 15) / 15, bytes=True)  # 16 shades are enough and compress well
    for down in (0, 1):
        for right in (0, 1):
            image[np.clip(row + down, 0, size[0] - 1), np.clip(column + right, 0, size[1] - 1)] = colors
    return image


def _features_image(
    cells: Tensor,
    features: Tensor,
    source: SmashedScene | CutFeatures,
    view: tuple[float, float, float, float],
    size: tuple[int, int],
) -> np.ndarray:
    """cells: (M, 2) y, x at the cut. features: (M, C). The largest norm of a column of cells gives its shade."""
    spec = source.spec
    _, ny, nx = spec.shape
    cell = cells.detach().cpu().long()
    norm = features.detach().cpu().float().norm(dim=1)
    grid = torch.full((ny * nx,), -1.0).scatter_reduce(0, cell[:, 0] * nx + cell[:, 1], norm, "amax").view(ny, nx).numpy()
    size_x, size_y = spec.cell_size()
    # the cell under the middle of each pixel; outside the grid nothing is drawn
    x = view[2] - (np.arange(size[0]) + 0.5) / size[0] * (view[2] - view[0])
    y = view[3] - (np.arange(size[1]) + 0.5) / size[1] * (view[3] - view[1])
    at_x = np.floor((x - spec.grid.range[0]) / size_x).astype(np.int64)
    at_y = np.floor((y - spec.grid.range[1]) / size_y).astype(np.int64)
    inside = ((at_x >= 0) & (at_x < nx))[:, None] & ((at_y >= 0) & (at_y < ny))[None, :]
    value = grid[np.clip(at_y, 0, ny - 1)[None, :], np.clip(at_x, 0, nx - 1)[:, None]]
    image = NORM_COLORS(np.clip(value / max(float(grid.max()), 1e-12), 0, 1), bytes=True)
    image[~inside | (value < 0)] = 0
    return image


def _visible(points: PointCloud, view: tuple[float, float, float, float]) -> np.ndarray:
    """(N, 3) float32, the finite points inside the view."""
    xyz = points.xyz.detach().cpu().numpy()
    x, y = xyz[:, 0], xyz[:, 1]
    return xyz[np.isfinite(xyz).all(1) & (x >= view[0]) & (x < view[2]) & (y >= view[1]) & (y < view[3])]
