"""Gaussian noise on the features, and what it is worth as a bound.

Noise is the one defence here for which bounds can be proven: no unbiased attacker estimates the values of the input voxels with a smaller
mean squared error than the Fisher information of the noisy features allows (Hannun et al. 2021; dFIL, Maeng et al., NeurIPS 2023);
`perception/privacy/noise_bound.py` computes that bound. It says nothing about the list of cells, which is sent exactly, and nothing about
biased attackers who know typical streets; an uncertainty of centimeters does not hide a wall.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ....core.cut import CutSpec
from ....core.errors import require_counts, require_numbers
from ....core.features import CutFeatures
from .defence import Defence, normal


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Adds Gaussian noise."""

    sigma: float = 0.5
    """Standard deviation of the noise, as a multiple of that of each channel."""

    def __post_init__(self) -> None:
        require_numbers("NoiseConfig", least=0, most=1000, sigma=self.sigma)

    def build(self, spec: CutSpec) -> NoisyFeatures:
        """Make the defence; the spread of the channels is 1 until it is measured.

        Args:
            spec: The cut.

        Returns:
            The defence.
        """
        return NoisyFeatures(spec, self)


class NoisyFeatures(Defence):
    """Adds noise to the features of cells and keypoints."""

    def __init__(self, spec: CutSpec, config: NoiseConfig) -> None:
        """Keep the settings.

        Args:
            spec: The cut.
            config: The size of the noise.
        """
        super().__init__(spec)
        self.config = config
        self.spread: Tensor
        self.keypoint_spread: Tensor
        self.register_buffer("spread", torch.ones(spec.channels))
        self.register_buffer("keypoint_spread", torch.ones(spec.keypoints.channels if spec.keypoints else 0))

    @torch.no_grad()
    def measure(self, features: CutFeatures) -> None:
        """Measure the spread of each channel, in place.

        Args:
            features: A batch of typical scenes.
        """
        self.spread.copy_(_spread(features.voxels.features))
        if features.keypoints is not None:
            self.keypoint_spread.copy_(_spread(features.keypoints.features))

    def send(self, features: CutFeatures, rng: np.random.Generator) -> CutFeatures:
        """Add noise.

        Args:
            features: One scene.
            rng: Draws the noise.

        Returns:
            The same cells and keypoints with noisy features.
        """
        values = features.voxels.features
        noisy = values + self.config.sigma * self.spread * normal(rng, tuple(values.shape), values)
        keypoints = features.keypoints
        if keypoints is not None:
            noise = normal(rng, tuple(keypoints.features.shape), values)
            keypoints = replace(keypoints, features=keypoints.features + self.config.sigma * self.keypoint_spread * noise)
        return replace(features, voxels=replace(features.voxels, features=noisy), keypoints=keypoints)


@dataclass(frozen=True, kw_only=True)
class RoundingConfig:
    """Rounds features to few levels."""

    levels: int = 16
    """Levels per channel and scene; 256 is what int8 has."""

    def __post_init__(self) -> None:
        require_counts("RoundingConfig", least=2, most=256, levels=self.levels)

    def build(self, spec: CutSpec) -> RoundedFeatures:
        """Make the defence.

        Args:
            spec: The cut.

        Returns:
            The defence.
        """
        return RoundedFeatures(spec, self)


class RoundedFeatures(Defence):
    """Rounds each channel of a scene to a few levels between its lowest and highest value. Fewer levels also compress better."""

    def __init__(self, spec: CutSpec, config: RoundingConfig) -> None:
        """Keep the settings.

        Args:
            spec: The cut.
            config: Number of levels.
        """
        super().__init__(spec)
        self.config = config

    def send(self, features: CutFeatures, rng: np.random.Generator) -> CutFeatures:
        """Round the features.

        Args:
            features: One scene.
            rng: Not used.

        Returns:
            The same cells and keypoints with rounded features.
        """
        voxels = replace(features.voxels, features=self._rounded(features.voxels.features))
        keypoints = features.keypoints
        if keypoints is not None:
            keypoints = replace(keypoints, features=self._rounded(keypoints.features))
        return replace(features, voxels=voxels, keypoints=keypoints)

    def _rounded(self, values: Tensor) -> Tensor:
        if not len(values):
            return values
        low = values.amin(0)
        step = (values.amax(0) - low) / (self.config.levels - 1)
        safe = torch.where(step > 0, step, 1)
        return ((values - low) / safe).round() * step + low


def _spread(values: Tensor) -> Tensor:
    """(C,) standard deviation of each channel; a dead channel counts as the mean of the others, so that it gets noise too."""
    if len(values) < 2:
        return torch.ones_like(values[:1].sum(0))
    spread = values.std(0)
    alive = spread > 1e-6
    return torch.where(alive, spread, spread[alive].mean() if bool(alive.any()) else torch.ones_like(spread))
