"""Features of a region: a small grid of samples of the bird's-eye-view (BEV) map, turned with the box.

SECOND-IoU's second stage looks at a 7 x 7 patch of the BEV map under each proposal. In cells of the map, with box center (cx, cy),
half length l, half width w, heading h and grid coordinates u (columns), v (rows) in [-1, 1], the samples are at

    faithful      x = cx + l (u cos h - v sin h)       y = cy + w (u sin h + v cos h)
    footprint     x = cx + l u cos h - w v sin h       y = cy + l u sin h + w v cos h

The second covers the box's footprint. The first is what OpenPCDet computes (`second_head.py`, `roi_grid_pool`): it turns the
unit square and *then* stretches it along the map's axes, so a car across the map (h = 90 degrees) is sampled in a patch as long
in x as the car is long. Published SECOND-IoU weights were trained with it and need it; a new model may prefer the second.
There is no compiled kernel: torch's `grid_sample` does the work on every device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.tensor_value import shape_of


def roi_grid_sample(
    bev: Tensor,
    rois: Tensor,
    *,
    origin: tuple[float, float],
    cell: tuple[float, float],
    grid_size: int = 7,
    faithful: bool = True,
) -> Tensor:
    """Sample a patch of the BEV map under each region, bilinearly, with zeros outside the map.

    It is differentiable in `bev`, not in `rois`.

    Args:
        bev: (B, C, H, W) map; H runs along y, W along x.
        rois: (B, R, 7) boxes in meters and radians.
        origin: x, y in meters of the middle of map cell (0, 0). OpenPCDet passes the start of the point range, half a cell off.
        cell: Size x, y of a map cell, in meters.
        grid_size: Samples G along each side of a patch.
        faithful: Place the samples the way OpenPCDet does, see the top of this file. False covers the box's footprint.

    Returns:
        (B, R, C, G, G) patches, rows v then columns u.

    Raises:
        InvalidInput: Shapes that do not fit together, or a grid without samples.
    """
    if bev.ndim != 4 or rois.ndim != 3 or rois.shape[-1] != 7 or rois.shape[0] != bev.shape[0]:
        raise InvalidInput(
            f"roi_grid_sample: bev must be (B, C, H, W) and rois (B, R, 7), found {shape_of(bev)} and {shape_of(rois)}"
        )
    if grid_size < 1:
        raise InvalidInput(f"roi_grid_sample: grid_size must be positive, found {grid_size}")
    batch, channels, height, width = bev.shape
    count = rois.shape[1]
    if batch * count == 0:
        return bev.new_zeros(batch, count, channels, grid_size, grid_size)
    # Sampling positions in half precision would be off by whole cells.
    dtype = torch.promote_types(bev.dtype, torch.float32)
    x, y = _sample_positions(rois.detach().to(dtype), origin, cell, grid_size, faithful)
    # Cell i of n stands at (2 i + 1) / n - 1 (align_corners=False), which holds for a map of one row or column too.
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)  # (B, R, G, G, 2)
    # The regions of a scene lie on top of each other in one tall grid: one call for all of them.
    tall = grid.view(batch, count * grid_size, grid_size, 2)
    sampled = F.grid_sample(bev.to(dtype), tall, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.view(batch, channels, count, grid_size, grid_size).transpose(1, 2).to(bev.dtype)


def roi_grid_sample_reference(
    bev: Tensor,
    rois: Tensor,
    *,
    origin: tuple[float, float],
    cell: tuple[float, float],
    grid_size: int = 7,
    faithful: bool = True,
) -> Tensor:
    """Compute `roi_grid_sample` the way OpenPCDet writes it, region by region, by an affine map of the normalized BEV map.

    Args:
        bev: (B, C, H, W) map of at least 2 x 2 cells.
        rois: (B, R, 7) boxes.
        origin: x, y in meters of the middle of map cell (0, 0).
        cell: Size x, y of a map cell, in meters.
        grid_size: Samples G along each side of a patch.
        faithful: Place the samples the way OpenPCDet does.

    Returns:
        (B, R, C, G, G) patches.
    """
    batch, channels, height, width = bev.shape
    out = bev.new_zeros(batch, rois.shape[1], channels, grid_size, grid_size)
    for scene in range(batch):
        for r, (x, y, _, length, across, _, yaw) in enumerate(rois[scene]):
            cos, sin = torch.cos(yaw), torch.sin(yaw)
            sx, sy = 1 / (cell[0] * (width - 1)), 1 / (cell[1] * (height - 1))
            cx, cy = 2 * (x - origin[0]) * sx - 1, 2 * (y - origin[1]) * sy - 1
            if faithful:
                row_x, row_y = [length * cos * sx, -length * sin * sx, cx], [across * sin * sy, across * cos * sy, cy]
            else:
                row_x, row_y = [length * cos * sx, -across * sin * sx, cx], [length * sin * sy, across * cos * sy, cy]
            theta = torch.stack([torch.stack(row_x), torch.stack(row_y)])
            grid = F.affine_grid(theta[None], [1, channels, grid_size, grid_size], align_corners=True)
            out[scene, r] = F.grid_sample(bev[scene : scene + 1], grid, align_corners=True)[0]
    return out


def _sample_positions(
    rois: Tensor, origin: tuple[float, float], cell: tuple[float, float], grid_size: int, faithful: bool
) -> tuple[Tensor, Tensor]:
    """Columns x and rows y of the samples in cells of the map, both (B, R, G, G), by the formulas at the top of this file."""
    ticks = torch.linspace(-1, 1, grid_size, dtype=rois.dtype, device=rois.device) if grid_size > 1 else rois.new_zeros(1)
    u, v = ticks[None, :], ticks[:, None]
    cx, cy, half_length, half_width, yaw = (
        t[..., None, None]
        for t in ((rois[..., 0] - origin[0]), (rois[..., 1] - origin[1]), rois[..., 3] / 2, rois[..., 4] / 2, rois[..., 6])
    )
    cos, sin = torch.cos(yaw), torch.sin(yaw)
    if faithful:
        dx, dy = half_length * (u * cos - v * sin), half_width * (u * sin + v * cos)
    else:
        dx, dy = half_length * u * cos - half_width * v * sin, half_length * u * sin + half_width * v * cos
    return (cx + dx) / cell[0], (cy + dy) / cell[1]
