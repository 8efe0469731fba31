"""Which points to claim, given how likely each voxel is: the last step of the occupancy attack.

The likeliest voxels alone are a poor scan: they crowd where the network is sure and leave out where it knows that something is near but not
in which voxel. So points are ordered by what they add. A point is worth the chance that a true point is within reach of it, and the true
points within its reach that no earlier point has found.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    nothing = probability.new_zeros(1)  # the row that -1 finds, the last one
    certain = torch.cat([torch.log1p(-probability.clamp(max=0.999)), nothing])
    right = 1 - certain[near].sum(1).exp()
    weight = recall_weight * probability.sum() / (probability * points).sum().clamp(min=1e-9)
    missing = torch.cat([probability * points * weight, nothing])
    worth, waiting, most = right.clone(), torch.arange(len(right)), missing.sum() * 0.01
    place = torch.full((len(right) + 1,), -1)
    for _ in range(rounds):
        gain = missing[near[waiting]].sum(1)
        worth[waiting] = right[waiting] + gain
        waiting = waiting[gain > 0]
        if missing.sum() <= most:
            break
        place[waiting[worth[waiting].argsort(stable=True)]] = torch.arange(len(waiting))  # unlike `worth` it has no ties
        first = place[waiting] == place[near[waiting]].amax(1)
        missing[near[waiting[first]]] = 0.0
        place.fill_(-1)
        waiting = waiting[~first]
    return worth
