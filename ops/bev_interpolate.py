"""Features of the bird's-eye-view (BEV) map at points, read from the sparse voxels: the dense map is never made.

Height compression stacks the levels z of the sparse tensor into channels c * Z + z of a map; PV-RCNN samples that map at its
keypoints, bilinearly. Each sample needs four columns of voxels; most of the map is never read.

OpenPCDet (`bilinear_interpolate_torch`) clamps the four neighbors to the map but leaves the weights as they are. Beyond the first
and last row or column both neighbors are then the same cell with weights that cancel: a sample that lies in the last row or
column, or outside the map, is 0. Published weights were trained with it, so it is kept; here such samples are left out.
There is no compiled kernel: torch's `embedding_bag` does the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.tensor_value import shape_of
from .checks import check_row_bounds
from .dispatch import device_of


def bev_interpolate(
    features: Tensor,
    coords: Tensor,
    shape: tuple[int, int, int],
    positions: Tensor,
    starts: Sequence[int],
    batch_size: int,
) -> Tensor:
    """Sample the height-compressed map bilinearly, in plain torch, on any device.

    It is differentiable in `features`, not in `positions`.

    Args:
        features: (M, C) features of the occupied voxels; an empty voxel is 0.
        coords: (M, 4) integer batch, z, y, x, without repeats.
        shape: Grid cells Z, Y, X.
        positions: (N, 2) column x and row y on the map, in cells: an integer is the place of a cell, no half cell is added.
        starts: B + 1 row bounds of the scenes in `positions`.
        batch_size: Number of scenes B.

    Returns:
        (N, C * Z) samples, channel c * Z + z.

    Raises:
        InvalidInput: Shapes, bounds or devices that do not fit together, coordinates outside the grid, or non-finite positions.
    """
    _check(features, coords, shape, positions, starts, batch_size)
    depth, height, width = shape
    channels = features.shape[1]
    if len(features) == 0 or len(positions) == 0:
        return features.new_zeros(len(positions), channels * depth)
    batch, z, y, x = coords.long().unbind(1)
    row_of_cell = torch.full((batch_size * depth * height * width,), -1, dtype=torch.int32, device=features.device)
    row_of_cell[((batch * depth + z) * height + y) * width + x] = torch.arange(
        len(features), dtype=torch.int32, device=features.device
    )

    corner, weight = positions.detach().floor(), positions.detach().frac()
    inside = ((corner >= 0) & (corner <= corner.new_tensor([width - 2, height - 2]))).all(1)
    column, line = torch.where(inside[:, None], corner, 0).long().unbind(1)
    level = _scene_of_row(starts, positions)[:, None] * depth + torch.arange(depth, device=features.device)
    cell = (level * height + line[:, None]) * width + column[:, None]  # (N, Z)
    step = torch.tensor([0, width, 1, width + 1], device=features.device)
    rows = row_of_cell[torch.where(inside[:, None, None], cell[..., None] + step, 0)]  # (N, Z, 4)
    across, along = torch.stack([1 - weight[:, 0], weight[:, 0]], 1), torch.stack([1 - weight[:, 1], weight[:, 1]], 1)
    weights = (across[:, :, None] * along[:, None]).flatten(1)[:, None].expand(-1, depth, -1)  # (N, Z, 4)

    # Each (sample, level) is a bag of at most four voxels, summed with weights. Half precision is summed in float32.
    dtype = torch.promote_types(features.dtype, torch.float32)
    present = (rows >= 0) & inside[:, None, None]
    counts = present.sum(2).flatten()
    bags = F.embedding_bag(
        rows[present].long(),
        features.to(dtype),
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=weights[present].to(dtype),
    )
    return bags.view(len(positions), depth, channels).transpose(1, 2).flatten(1).to(features.dtype)


def bev_interpolate_reference(
    features: Tensor,
    coords: Tensor,
    shape: tuple[int, int, int],
    positions: Tensor,
    starts: Sequence[int],
    batch_size: int,
) -> Tensor:
    """Compute `bev_interpolate` the way OpenPCDet writes it, on the dense map.

    Args:
        features: (M, C) features of the occupied voxels.
        coords: (M, 4) integer batch, z, y, x.
        shape: Grid cells Z, Y, X.
        positions: (N, 2) column x and row y on the map, in cells.
        starts: B + 1 row bounds of the scenes in `positions`.
        batch_size: Number of scenes B.

    Returns:
        (N, C * Z) samples, channel c * Z + z.
    """
    _check(features, coords, shape, positions, starts, batch_size)
    depth, height, width = shape
    dense = features.new_zeros(batch_size, depth, height, width, features.shape[1])
    dense = dense.index_put(tuple(coords.long().unbind(1)), features)
    bev = dense.permute(0, 2, 3, 4, 1).flatten(3)  # (B, Y, X, C * Z)
    x, y = positions.detach().unbind(1)
    x0, y0 = x.floor().long(), y.floor().long()
    x0, x1 = x0.clamp(0, width - 1), (x0 + 1).clamp(0, width - 1)
    y0, y1 = y0.clamp(0, height - 1), (y0 + 1).clamp(0, height - 1)
    scene = _scene_of_row(starts, positions)
    terms = (
        (bev[scene, y0, x0], (x1 - x) * (y1 - y)),
        (bev[scene, y1, x0], (x1 - x) * (y - y0)),
        (bev[scene, y0, x1], (x - x0) * (y1 - y)),
        (bev[scene, y1, x1], (x - x0) * (y - y0)),
    )
    return sum((value * weight[:, None].to(features.dtype) for value, weight in terms), bev.new_zeros(()))


def _scene_of_row(starts: Sequence[int], positions: Tensor) -> Tensor:
    """(N,) int64, the scene of each position."""
    sizes = torch.tensor([end - start for start, end in pairwise(starts)], device=positions.device, dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(sizes), device=positions.device), sizes)


def _check(
    features: Tensor,
    coords: Tensor,
    shape: tuple[int, int, int],
    positions: Tensor,
    starts: Sequence[int],
    batch_size: int,
) -> None:
    if features.ndim != 2 or coords.shape != (len(features), 4) or coords.is_floating_point():
        raise InvalidInput(
            "bev_interpolate expects features (M, C) and integer coords (M, 4), "
            f"found {shape_of(features)} and {shape_of(coords)}"
        )
    if positions.ndim != 2 or positions.shape[1] != 2 or not positions.is_floating_point():
        raise InvalidInput(f"bev_interpolate expects positions as a floating-point tensor (N, 2), found {shape_of(positions)}")
    device_of(features, coords, positions)
    check_row_bounds("bev_interpolate: positions", starts, len(positions))
    if len(starts) - 1 != batch_size:
        raise InvalidInput(
            f"bev_interpolate: the bounds are those of {len(starts) - 1} scenes, but this is a batch of {batch_size}"
        )
    if not torch.isfinite(positions.detach()).all():
        raise InvalidInput("bev_interpolate: some positions have a NaN or infinite value; remove them first")
    limits = coords.new_tensor([batch_size, *shape])
    if ((coords < 0) | (coords >= limits)).any():
        raise InvalidInput(f"bev_interpolate: some coordinates lie outside {batch_size} scenes of shape {shape} (z, y, x)")
