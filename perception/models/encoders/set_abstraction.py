"""Set abstraction: what a few points know about their surroundings, from the features of other points near them.

    for each radius    neighbors of every center ─ (offset, features) ─ shared two-layer perceptron ─ maximum

Source: Qi et al., PointNet++ (2017), section 3.2; OpenPCDet `pointnet2_stack/pointnet2_modules.py` (`StackSAModuleMSG`), whose
weights load by name. Three of its habits are kept because its weights depend on them: a ball takes its first n neighbors in row
order; an empty ball is a neighbor of zeros; in batch statistics a ball of fewer than n neighbors counts its first one for the
rest, and an empty one its zeros n times. Here it is computed without that padding: every neighbor once, with its weight in the
statistics. The encoder gathers keypoints this way, the decoder the grid points of a region. `ops/ball_query.py` finds neighbors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ....core.errors import require, require_counts
from ....ops.ball_query import Neighbors, ball_query
from ....ops.neighbor_mlp import neighbor_mlp_max
from ....ops.segment_max import segment_max


@dataclass(frozen=True, kw_only=True)
class SetAbstractionConfig:
    """Balls of several radii around a center, and the perceptron that reads the points in them."""

    channels: tuple[int, int]
    """Channels of the perceptron's two layers, the same for all radii."""
    radii: tuple[float, ...]
    """Radius of each ball in meters. Objects of about this size are told apart."""
    limits: tuple[int, ...]
    """Maximum number of neighbors in each ball."""

    def __post_init__(self) -> None:
        require_counts("SetAbstractionConfig", channels=self.channels, limits=self.limits)
        require(
            len(self.radii) == len(self.limits) and 1 <= len(self.radii) <= 64,
            f"SetAbstractionConfig needs one limit for each of 1..64 radii, found {len(self.limits)} for {len(self.radii)}",
        )
        require(
            all(0 < radius < math.inf for radius in self.radii),
            f"SetAbstractionConfig.radii must be positive and finite, found {self.radii}",
        )

    @property
    def out_channels(self) -> int:
        """Channels of the result, over all radii."""
        return len(self.radii) * self.channels[1]


class SetAbstraction(nn.Module):
    """Computes the features of centers from the points around them."""

    def __init__(self, in_channels: int, config: SetAbstractionConfig) -> None:
        """Make the layers with fresh weights.

        Args:
            in_channels: channels of the points.
            config: radii, limits and channels.
        """
        super().__init__()
        self.config = config
        c1, c2 = config.channels
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 + in_channels, c1, 1, bias=False), nn.BatchNorm2d(c1), nn.ReLU(),
                nn.Conv2d(c1, c2, 1, bias=False), nn.BatchNorm2d(c2), nn.ReLU(),
            )
            for _ in config.radii
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(
        self, centers: Tensor, center_starts: Sequence[int], points: Tensor, point_starts: Sequence[int], features: Tensor
    ) -> Tensor:
        """Gather features around centers.

        Args:
            centers: (Q, 3) in meters, the scenes in order.
            center_starts: B + 1 bounds of the scenes in the rows of `centers`.
            points: (N, 3) in meters, the scenes in order.
            point_starts: B + 1 bounds of the scenes in the rows of `points`.
            features: (N, in_channels) features of the points.

        Returns:
            (Q, out_channels) features, those of the first radius first.
        """
        balls = ball_query(centers, center_starts, points, point_starts, self.config.radii, self.config.limits)
        # Coordinates are tens of meters and offsets centimeters: half precision would lose the offsets.
        with torch.autocast(centers.device.type, enabled=False):
            rows = torch.cat([points, features.float()], 1)
            pooled = [
                _pool(cast(nn.Sequential, mlp), rows, centers, near, limit)
                for mlp, near, limit in zip(self.mlps, balls, self.config.limits, strict=True)
            ]
        return torch.cat(pooled, 1)


def _pool(mlp: nn.Sequential, rows: Tensor, centers: Tensor, near: Neighbors, limit: int) -> Tensor:
    """One ball size. The first layer is linear, so it is applied to points and centers (N + Q rows) and subtracted, not to every pair."""
    first, second = (cast(nn.Conv2d, mlp[k]).weight.flatten(1) for k in (0, 3))
    norms = cast(nn.BatchNorm2d, mlp[1]), cast(nn.BatchNorm2d, mlp[4])
    counts = near.starts.diff()
    if mlp.training:
        return _pool_training(rows @ first.T, centers @ first[:, :3].T, near, second, norms, limit)
    # Batch norm with running statistics is a scale, which goes into the weights, and a shift.
    (scale, shift), (last_scale, last_shift) = (_as_affine(norm) for norm in norms)
    first, second = first * scale[:, None], second * last_scale[:, None]
    best = neighbor_mlp_max(rows @ first.T, centers @ first[:, :3].T - shift, near.index, near.starts, second)
    empty = nn.functional.relu(shift) @ second.T
    return nn.functional.relu(torch.where(counts[:, None] > 0, best, empty) + last_shift)


def _pool_training(
    at_points: Tensor,
    at_centers: Tensor,
    near: Neighbors,
    second: Tensor,
    norms: tuple[nn.BatchNorm2d, nn.BatchNorm2d],
    limit: int,
) -> Tensor:
    # One more row of zeros on both sides, and one more pair of the two: the input of an empty ball.
    counts = near.starts.diff()
    center = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    pairs = nn.functional.pad(at_points, (0, 0, 0, 1))[nn.functional.pad(near.index, (0, 1), value=len(at_points))]
    pairs = pairs - nn.functional.pad(at_centers, (0, 0, 0, 1))[nn.functional.pad(center, (0, 1), value=len(at_centers))]
    weight = _multiplicity(near, counts, limit)
    hidden = nn.functional.relu(_normalize(pairs, norms[0], weight), inplace=True)
    out = _normalize(hidden @ second.T, norms[1], weight)
    best = torch.where(counts[:, None] > 0, segment_max(out[:-1], near.starts), out[-1:])
    return nn.functional.relu(best)  # after the maximum: the same, on fewer rows


def _as_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of batch norm with running statistics."""
    scale = norm.weight * (cast(Tensor, norm.running_var) + norm.eps).rsqrt()
    return scale, norm.bias - cast(Tensor, norm.running_mean) * scale


def _multiplicity(near: Neighbors, counts: Tensor, limit: int) -> Tensor:
    """(P + 1,) how often OpenPCDet, which pads, has each pair; the last entry is that of all empty balls together."""
    weight = counts.new_ones(len(near.index) + 1, dtype=torch.float32)
    full = counts > 0
    weight[near.starts[:-1][full]] += (limit - counts[full]).float()
    weight[-1] = limit * (~full).sum()
    return weight


def _normalize(x: Tensor, norm: nn.BatchNorm2d, weight: Tensor) -> Tensor:
    """Batch norm of rows (P, C) with statistics weighted by `weight` (P,); it moves the running ones."""
    total = float(weight.sum())
    if total < 2:  # batch statistics of fewer than two rows do not exist
        scale, shift = _as_affine(norm)
        return torch.addcmul(shift, x, scale)
    mean = (weight @ x) / total
    centered = x - mean
    variance = (weight @ centered.square()) / total
    with torch.no_grad():
        momentum = cast(float, norm.momentum)
        cast(Tensor, norm.running_mean).lerp_(mean, momentum)
        cast(Tensor, norm.running_var).lerp_(variance * (total / (total - 1)), momentum)
        cast(Tensor, norm.num_batches_tracked).add_(1)
    return torch.addcmul(norm.bias, centered, norm.weight * (variance + norm.eps).rsqrt())
