"""Farthest point sampling: a few points of a scan that cover it evenly, the keypoints of PV-RCNN.

The first pick is a scene's first point; each further pick is the point farthest from all earlier ones (float32 squared distance;
of equal distances the lowest row). So the picks of 100 are the first 100 picks of 200.

How the CPU does it. A pick changes the distance only of points nearer to it than to any earlier pick: hardly any, after the first
few picks. The points are sorted by place and cut into short blocks with a bounding box each; a block whose box is farther from the
pick than its points are from the earlier ones is left out. The result is that of the full search bit for bit: rounding is
monotone, so the rounded distance of a box is never above the rounded distance of a point in it.

Source: Qi et al., "PointNet++", NIPS 2017, section 3.2; OpenPCDet, `sampling_gpu.cu` (there ties go by thread order, and a scene
with too few points repeats them). The blocks: Han et al., "QuickFPS", IEEE TCAD 2023, with a grid instead of a k-d tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InvalidInput
from .checks import check_points, check_row_bounds, float32_array
from .cpu.farthest_point import sample_scene
from .dispatch import dispatch
from .threads import in_threads


def farthest_point_sample(points: Tensor, starts: Sequence[int], count: int) -> tuple[Tensor, tuple[int, ...]]:
    """Pick points of each scene by farthest point sampling. It gives no gradient.

    Args:
        points: (N, 3) x, y, z in meters, scene by scene; repeated points are legal.
        starts: B + 1 row bounds of the scenes; scenes without points are legal.
        count: Number of picks per scene. A scene with fewer points gives each of them once.

    Returns:
        rows: (K,) int64 rows of `points`, scene by scene in the order of picking, no row twice.
        out_starts: B + 1 bounds of the scenes in `rows`.

    Raises:
        InvalidInput: A wrong shape, bounds that do not fit, a count below 1, or non-finite points.

    Example:
        >>> points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [9, 0, 0], [5, 0, 0]])
        >>> farthest_point_sample(points, (0, 4), 3)
        (tensor([0, 2, 3]), (0, 3))
    """
    return dispatch((points,), farthest_point_sample_reference, cpu=_sample_on_cpu)(points, starts, count)


def farthest_point_sample_reference(points: Tensor, starts: Sequence[int], count: int) -> tuple[Tensor, tuple[int, ...]]:
    """Compute `farthest_point_sample` in plain torch, on any device, all scenes at once; on the CPU it gives the same rows.

    Args:
        points: (N, 3) points.
        starts: B + 1 row bounds of the scenes.
        count: Number of picks per scene.

    Returns:
        rows: (K,) int64 rows of `points`.
        out_starts: B + 1 bounds of the scenes in `rows`.
    """
    out_starts = _check(points, starts, count)
    sizes = [end - start for start, end in pairwise(starts)]
    picks = max((end - start for start, end in pairwise(out_starts)), default=0)
    if picks == 0:
        return torch.empty(0, dtype=torch.int64, device=points.device), out_starts
    padded = points.new_zeros(len(sizes), max(sizes), 3, dtype=torch.float32)
    nearest = padded.new_full(padded.shape[:2], -torch.inf)  # squared distance to the nearest pick; -inf: no point here
    for scene, size in enumerate(sizes):
        padded[scene, :size] = points.detach()[starts[scene] : starts[scene + 1]]
        nearest[scene, :size] = torch.inf
    scenes = torch.arange(len(sizes), device=points.device)
    pick, picked = torch.zeros_like(scenes), []
    for _ in range(picks):
        picked.append(pick)
        dx, dy, dz = (padded - padded[scenes, pick][:, None]).unbind(2)
        nearest = torch.minimum(nearest, dx * dx + dy * dy + dz * dz)
        nearest[scenes, pick] = -1
        pick = nearest.argmax(1)
    bounds = zip(torch.stack(picked, 1), starts, pairwise(out_starts))
    return torch.cat([start + rows[: high - low] for rows, start, (low, high) in bounds]), out_starts


def _sample_on_cpu(points: Tensor, starts: Sequence[int], count: int) -> tuple[Tensor, tuple[int, ...]]:
    out_starts = _check(points, starts, count)
    array = float32_array(points)
    rows = np.empty(out_starts[-1], np.int64)
    in_threads(sample_scene, len(starts) - 1, array, np.array(starts, np.int64), np.array(out_starts, np.int64), rows)
    return torch.from_numpy(rows), out_starts


def _check(points: Tensor, starts: Sequence[int], count: int) -> tuple[int, ...]:
    """Check the arguments, and give the bounds of the scenes in the result."""
    check_points("farthest_point_sample: points", points)
    check_row_bounds("farthest_point_sample", starts, len(points))
    if count < 1:
        raise InvalidInput(f"farthest_point_sample: count must be positive, found {count}")
    return tuple(accumulate((min(count, end - start) for start, end in pairwise(starts)), initial=0))
