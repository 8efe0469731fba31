"""What Gaussian noise on features proves: a bound on how well an unbiased attacker places the points of a scan.

    mean points of the input voxels ── encoder ── defences before the noise ── features f ── + noise of known spread ── sent

The Fisher information that the noisy features hold about the mean points is J^T S^-1 J, with the Jacobian J of f and the covariance S of
the noise. Its trace over the number of coordinates is dFIL (Maeng et al., NeurIPS 2023, after Hannun et al., 2021): the mean squared
error of an unbiased estimate of the coordinates is at least 1 / dFIL (Cramér and Rao). The trace is estimated by products with random
signs, so that no Jacobian is stored.

The bound takes the list of sent cells and the choice of a region upload as known to the attacker for free, and says nothing about what
they tell. It does not hold for biased attackers, who know typical streets, as every trained network does. A large bound is therefore
no proof that nothing can be rebuilt; a small one says that the noise proves nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ...core.errors import require_counts
from ...core.features import CutFeatures
from ...core.structures import PointCloud
from ..models.defences.bottleneck import Bottleneck
from ..models.defences.cells import DropCells
from ..models.defences.noise import NoisyFeatures
from ..models.defences.obfuscator import Obfuscator
from ..models.defences.region import RegionUpload
from ..models.encoders.defended import DefendedEncoder
from ..models.encoders.encoder import Encoder
from ..models.encoders.pv_rcnn import PvRcnnEncoder


def noise_bound(encoder: Encoder, scan: PointCloud, *, probes: int = 4, seed: int = 0) -> float | None:
    """Compute the least error with which an unbiased attacker places the mean points of the input voxels of one scan.

    Args:
        encoder: An encoder in evaluation mode.
        scan: One scan in the shifted frame.
        probes: Random vectors that estimate the trace. Its relative error is a few percent with four.
        seed: Draws them, and the choices of random defences.

    Returns:
        Root of the mean squared error per coordinate in meters, over the voxels that reach something that was sent; infinity where none
        does. None where nothing is proven: no Gaussian noise is added, a defence before it is not differentiable, or raw points
        reach keypoints around the voxels.
    """
    require_counts("noise_bound", most=10_000, probes=probes)
    if not isinstance(encoder, DefendedEncoder) or _reads_raw_points(encoder.encoder):
        return None
    with torch.enable_grad():
        voxels = encoder.voxelize([scan])
        means = voxels.features.detach().requires_grad_(True)
        features = encoder.encoder.features([scan], replace(voxels, features=means))
        scaled = _in_units_of_noise(encoder, features, np.random.default_rng(seed))
        if scaled is None:
            return None
        generator = torch.Generator().manual_seed(seed)
        squares = torch.zeros(len(means), 3, dtype=torch.float64)
        for number in range(probes if scaled.numel() else 0):
            signs = torch.randint(0, 2, scaled.shape, generator=generator).to(scaled) * 2 - 1
            (gradient,) = torch.autograd.grad(scaled, means, signs, retain_graph=number + 1 < probes)
            squares += gradient[:, :3].double().square() / probes
    reached = squares.sum(1) > 0
    if not bool(reached.any()):
        return math.inf
    return float((3 * reached.sum() / squares.sum()).sqrt())


def _reads_raw_points(encoder: Encoder) -> bool:
    return isinstance(encoder, PvRcnnEncoder) and encoder.config.raw_points is not None


def _in_units_of_noise(encoder: DefendedEncoder, features: CutFeatures, rng: np.random.Generator) -> Tensor | None:
    """All values that are sent, before the noise, divided by its standard deviation; None without noise."""
    for stage in encoder.stages:
        if isinstance(stage, NoisyFeatures):
            if stage.config.sigma == 0:
                return None
            return _flat(features, stage.config.sigma * stage.spread, stage.config.sigma * stage.keypoint_spread)
        if isinstance(stage, Obfuscator):
            if stage.config.sigma == 0:
                return None
            one = torch.ones(())
            return _flat(stage.mapped(features), stage.config.sigma * one, stage.config.sigma * one)
        if not isinstance(stage, RegionUpload | DropCells | Bottleneck):
            return None
        features = stage.send(features, rng)
    return None


def _flat(features: CutFeatures, spread: Tensor, keypoint_spread: Tensor) -> Tensor:
    parts = [(features.voxels.features / spread).flatten()]
    if features.keypoints is not None:
        parts.append((features.keypoints.features / keypoint_spread).flatten())
    return cast(Tensor, torch.cat(parts))
