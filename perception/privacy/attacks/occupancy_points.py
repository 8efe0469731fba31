"""Which points to claim, given how likely each voxel is: the last step of the occupancy attack.

The likeliest voxels alone are a poor scan: they crowd where the network is sure and leave out where it knows that something is near but not
in which voxel. So points are ordered by what they add. A point is worth the chance that a true point is within reach of it, and the true
points within its reach that no earlier point has found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....core.compiled import compiled
from ....ops.rulebook import submanifold_rulebook
from .occupancy_tree import OccupancyTree


def neighbors(nodes: Tensor, tree: OccupancyTree, reach: float) -> Tensor:
    """Find the voxels around each voxel.

    Args:
        nodes: (M, 4) int32 scene, z, y, x of voxels, in ascending order.
        tree: The tree they belong to.
        reach: Largest distance between two centers in meters.

    Returns:
        (M, K) int64 rows of `nodes`, the voxel itself among them; -1 where there is none.
    """
    size = torch.tensor(tree.grid.voxel_size).flip(0)
    z, y, x = (int(reach / s + 1e-3) for s in size.tolist())
    scenes = int(nodes[-1, 0]) + 1 if len(nodes) else 1
    pairs = submanifold_rulebook(nodes, tree.shape(0), scenes, (2 * z + 1, 2 * y + 1, 2 * x + 1))
    steps = torch.cartesian_prod(*(torch.arange(-r, r + 1) for r in (z, y, x)))
    within = ((steps * size).norm(dim=1) <= reach + 1e-4).nonzero()[:, 0]
    found = torch.full((len(within), len(nodes)), -1)
    for row, k in zip(found, within.tolist(), strict=True):
        here = slice(pairs.starts[k], pairs.starts[k + 1])
        row[pairs.pairs_out[here].long()] = pairs.pairs_in[here].long()
    return found.t().contiguous()


def worth_of_points(probability: Tensor, points: Tensor, near: Tensor, *, recall_weight: float = 1.0, rounds: int = 16) -> Tensor:
    """Order voxels so that the first ones make a good scan together.

    In each round every voxel that is worth more than all voxels around it is taken, and what is within its reach counts as found.

    Args:
        probability: (M,) how likely each voxel holds a point.
        points: (M,) how many points it holds if it holds one.
        near: (M, K) what is within reach of each voxel, from `neighbors`.
        recall_weight: How much newly found points count compared with the chance to be right.
        rounds: Largest number of rounds; what is left then is worth what it would be worth in the next round.

    Returns:
        (M,) worth. The chance to be right counts at most 1. The newly found points count in parts of the mean number of points in a
        voxel.
    """
    if not len(probability):
        return probability
    table = near.numpy()
    chance, count = probability.double().numpy(), points.double().numpy()
    certain = np.append(np.log1p(-np.minimum(chance, 0.999)), 0)  # -1 finds the last entry, nothing
    waiting = np.arange(len(chance))
    right = 1 - np.exp(_sums(certain, table, waiting))
    missing = np.append(chance * count * recall_weight * chance.sum() / max(float((chance * count).sum()), 1e-9), 0)
    worth, most = right.copy(), missing.sum() * 0.01
    rival = np.full(len(chance) + 1, -np.inf)  # the worth of what waits
    for _ in range(rounds):
        gain = _sums(missing, table, waiting)
        worth[waiting] = right[waiting] + gain
        waiting = waiting[gain > 0]
        if missing.sum() <= most:
            break
        rival[waiting] = worth[waiting]
        first = _are_first(rival, table, waiting)
        missing[table[waiting[first]]] = 0.0
        rival.fill(-np.inf)
        waiting = waiting[~first]
    return torch.from_numpy(worth).to(probability)


@compiled()
def _sums(values: NDArray[Any], near: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """For each of the rows, the sum of the values that are near."""
    out = np.empty(len(rows))
    for i, row in enumerate(rows):
        total = 0.0
        for k in near[row]:
            total += values[k]
        out[i] = total
    return out


@compiled()
def _are_first(worth: NDArray[Any], near: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """For each of the rows, whether no near one is worth more; of equal ones the last is the first."""
    out = np.empty(len(rows), np.bool_)
    for i, row in enumerate(rows):
        own = worth[row]
        out[i] = True
        for k in near[row]:
            if worth[k] > own or (worth[k] == own and k > row):
                out[i] = False
                break
    return out
