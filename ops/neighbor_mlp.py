"""The heart of set abstraction without gradient: a two-layer perceptron on every neighbor of a center, and their maximum.

    out[q] = max over neighbors j of  second @ relu(points[j] - centers[q])

Points and centers are what a linear first layer makes of them. Written as gathering, subtraction, product and maximum, the pairs
pass through memory five times: the arithmetic is a sixth of the time (`benchmarks/speed/set_abstraction.py`). In the kernel a pair never
leaves the first cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import InvalidInput
from ..core.tensor_value import shape_of
from .cpu.neighbor_mlp import CENTERS_PER_TASK, pool
from .dispatch import dispatch
from .segment_max import segment_max
from .threads import in_threads


def neighbor_mlp_max(points: Tensor, centers: Tensor, index: Tensor, starts: Tensor, second: Tensor) -> Tensor:
    """Compute the formula at the top of this file for every center. A center without neighbors gets 0.

    It is differentiable by way of the reference. The compiled kernel serves float32 on the CPU where no gradient is asked for.

    Args:
        points: (N, C1) first-layer values of the points.
        centers: (Q, C1) first-layer values of the centers.
        index: (P,) int64 rows of the neighbors in `points`, from `ball_query`.
        starts: (Q + 1,) int64 bounds of the centers in `index`, from `ball_query`.
        second: (C2, C1) weight of the second layer.

    Returns:
        (Q, C2) maxima.

    Raises:
        InvalidInput: Shapes, types or bounds that do not fit together.
    """
    _check(points, centers, index, starts, second)
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (points, centers, second))
    cpu = None if needs_gradient or points.dtype != torch.float32 else _neighbor_mlp_on_cpu
    tensors = (points, centers, index, starts, second)
    return dispatch(tensors, neighbor_mlp_max_reference, cpu=cpu)(*tensors)


def neighbor_mlp_max_reference(points: Tensor, centers: Tensor, index: Tensor, starts: Tensor, second: Tensor) -> Tensor:
    """Compute `neighbor_mlp_max` step by step in torch, on any device, differentiated by autograd.

    Args:
        points: (N, C1) first-layer values of the points.
        centers: (Q, C1) first-layer values of the centers.
        index: (P,) int64 rows of the neighbors.
        starts: (Q + 1,) int64 bounds of the centers in `index`.
        second: (C2, C1) weight of the second layer.

    Returns:
        (Q, C2) maxima.
    """
    _check(points, centers, index, starts, second)
    center = torch.repeat_interleave(torch.arange(len(centers), device=starts.device), starts.diff())
    hidden = torch.relu(points[index] - centers[center])
    return segment_max(hidden @ second.T, starts)


def _neighbor_mlp_on_cpu(points: Tensor, centers: Tensor, index: Tensor, starts: Tensor, second: Tensor) -> Tensor:
    out = torch.empty(len(centers), len(second))
    tables = [t.detach() for t in (points, centers, second)]
    if points.shape[1] % 4:  # the kernel takes four channels at a time
        tables = [F.pad(t, (0, -points.shape[1] % 4)) for t in tables]
    arrays: list[Any] = [t.contiguous().numpy() for t in (*tables[:2], index, starts, tables[2].T)]
    in_threads(pool, -(-len(centers) // CENTERS_PER_TASK), *arrays, out.numpy())
    return out


def _check(points: Tensor, centers: Tensor, index: Tensor, starts: Tensor, second: Tensor) -> None:
    channels = points.shape[-1]
    fits = (
        points.ndim == centers.ndim == second.ndim == 2
        and centers.shape[1] == second.shape[1] == channels
        and index.ndim == starts.ndim == 1
        and len(starts) == len(centers) + 1
        and index.dtype == starts.dtype == torch.int64
    )
    if not fits:
        shapes = ", ".join(shape_of(t) for t in (points, centers, index, starts, second))
        raise InvalidInput(
            "neighbor_mlp_max expects points (N, C1), centers (Q, C1), int64 index (P,), int64 starts (Q + 1,) and second (C2, C1), "
            f"found {shapes}"
        )
    ends = starts[[0, -1]].tolist()
    if ends != [0, len(index)] or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(points)):
        raise InvalidInput(
            f"neighbor_mlp_max: starts must run from 0 to {len(index)}, the number of neighbors, found {ends[0]} to {ends[1]}; "
            f"and the index must hold rows of points, 0..{len(points) - 1}"
        )
