"""Fewer channels: features are projected on their main directions before they leave, and spread out again on the server.

It saves bytes. It is no protection: what the decoder needs and what an attacker needs are the same directions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ....core.cut import CutSpec
from ....core.errors import require, require_counts
from ....core.features import CutFeatures
from .defence import Defence


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    """How many channels are sent."""

    channels: int = 16
    """Channels of a cell that are sent."""

    keypoint_channels: int = 64
    """Channels of a keypoint that are sent. Only PV-RCNN has keypoints."""

    def __post_init__(self) -> None:
        require_counts("BottleneckConfig", most=1 << 16, channels=self.channels, keypoint_channels=self.keypoint_channels)

    def build(self, spec: CutSpec) -> Bottleneck:
        """Make the defence; its directions are the first channels until they are measured.

        Args:
            spec: The cut.

        Returns:
            The defence.

        Raises:
            InvalidInput: More channels would be sent than there are.
        """
        return Bottleneck(spec, self)


class Bottleneck(Defence):
    """Sends the features along a few directions."""

    def __init__(self, spec: CutSpec, config: BottleneckConfig) -> None:
        """Make room for the directions.

        Args:
            spec: The cut.
            config: Numbers of channels.

        Raises:
            InvalidInput: More channels would be sent than there are.
        """
        super().__init__(spec)
        self.config = config
        of_keypoints = spec.keypoints.channels if spec.keypoints else 0
        sent = config.keypoint_channels if spec.keypoints else 0
        require(
            config.channels <= spec.channels and sent <= of_keypoints,
            f"a bottleneck sends at most as many channels as there are ({spec.channels} of cells, {of_keypoints} of keypoints), found "
            f"{config.channels} and {sent}",
        )
        self.directions: Tensor
        self.keypoint_directions: Tensor
        self.register_buffer("directions", torch.eye(spec.channels)[: config.channels].contiguous())
        self.register_buffer("keypoint_directions", torch.eye(of_keypoints)[:sent].contiguous())

    @property
    def upload_spec(self) -> CutSpec:
        """The cut with fewer channels."""
        keypoints = self.spec.keypoints
        if keypoints is not None:
            keypoints = replace(keypoints, channels=self.config.keypoint_channels)
        return replace(self.spec, channels=self.config.channels, keypoints=keypoints)

    @torch.no_grad()
    def measure(self, features: CutFeatures) -> None:
        """Find the main directions of typical features, in place. They pass through 0, so that an empty cell stays empty.

        Args:
            features: A batch of typical scenes.
        """
        self.directions.copy_(_main_directions(features.voxels.features, self.config.channels))
        if features.keypoints is not None:
            self.keypoint_directions.copy_(_main_directions(features.keypoints.features, self.config.keypoint_channels))

    def send(self, features: CutFeatures, rng: np.random.Generator) -> CutFeatures:
        """Project the features.

        Args:
            features: One scene.
            rng: Not used.

        Returns:
            The same cells and keypoints with fewer channels.
        """
        return self._along(features, self.directions.T, self.keypoint_directions.T, self.upload_spec)

    def restore(self, uploaded: CutFeatures) -> CutFeatures:
        """Spread the features out again.

        Args:
            uploaded: A batch that was sent.

        Returns:
            The same cells and keypoints with all channels.
        """
        return self._along(uploaded, self.directions, self.keypoint_directions, self.spec)

    def compute(self, features: CutFeatures) -> CutFeatures:
        """Keep what the sent channels can express.

        Args:
            features: A batch.

        Returns:
            The features that the server would see.
        """
        return self.restore(self._along(features, self.directions.T, self.keypoint_directions.T, self.upload_spec))

    @staticmethod
    def _along(features: CutFeatures, matrix: Tensor, keypoint_matrix: Tensor, spec: CutSpec) -> CutFeatures:
        voxels = replace(features.voxels, features=features.voxels.features @ matrix)
        keypoints = features.keypoints
        if keypoints is not None:
            keypoints = replace(keypoints, features=keypoints.features @ keypoint_matrix)
        return CutFeatures(voxels=voxels, spec=spec, keypoints=keypoints)


def _main_directions(values: Tensor, count: int) -> Tensor:
    """(count, C) orthonormal rows, the directions with the largest sum of squares first."""
    _, vectors = torch.linalg.eigh((values.T @ values).double())
    return vectors.flip(1)[:, :count].T.float()
