"""The learned obfuscator: a small network between encoder and upload, and its counterpart on the server.

On the vehicle it maps the features of each cell to a few bounded channels and adds noise; on the server it maps them back to what the
decoder reads. It is trained against an attacker that rebuilds the scan from what is sent, and for the detector that reads what is
restored (`perception/privacy/obfuscator_training.py`). An attacker who trains afresh does better than the one it was trained against,
so only a fresh one tells what it is worth: `upcycle3d audit` trains one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ....core.cut import CutSpec, KeypointSpec
from ....core.errors import require_counts, require_numbers
from ....core.features import CutFeatures
from .defence import Defence, normal


@dataclass(frozen=True, kw_only=True)
class ObfuscatorConfig:
    """Sizes of the obfuscator."""

    channels: int = 16
    """Channels of a cell that are sent."""

    keypoint_channels: int = 16
    """Channels of a keypoint that are sent. Only PV-RCNN has keypoints."""

    hidden: int = 64
    """Channels of the hidden layers on both sides."""

    sigma: float = 0.2
    """Standard deviation of the noise; what is sent lies in -1..1 before it."""

    def __post_init__(self) -> None:
        require_counts(
            "ObfuscatorConfig",
            most=1 << 16,
            channels=self.channels,
            keypoint_channels=self.keypoint_channels,
            hidden=self.hidden,
        )
        require_numbers("ObfuscatorConfig", least=0, most=10, sigma=self.sigma)

    def build(self, spec: CutSpec) -> Obfuscator:
        """Make the defence with fresh weights.

        Args:
            spec: The cut.

        Returns:
            The defence.
        """
        return Obfuscator(spec, self)


class Obfuscator(Defence):
    """Sends a learned, noisy form of the features."""

    def __init__(self, spec: CutSpec, config: ObfuscatorConfig) -> None:
        """Make the two networks, and two more for keypoints where the cut has them.

        Args:
            spec: The cut.
            config: Sizes.
        """
        super().__init__(spec)
        self.config = config
        self.sender = _perceptron(spec.channels, config.hidden, config.channels)
        self.receiver = _perceptron(config.channels, config.hidden, spec.channels)
        of_keypoints = spec.keypoints.channels if spec.keypoints else 0
        self.keypoint_sender = _perceptron(of_keypoints, config.hidden, config.keypoint_channels) if of_keypoints else None
        self.keypoint_receiver = _perceptron(config.keypoint_channels, config.hidden, of_keypoints) if of_keypoints else None

    @property
    def upload_spec(self) -> CutSpec:
        """The cut with the channels that are sent."""
        keypoints: KeypointSpec | None = self.spec.keypoints
        if keypoints is not None:
            keypoints = replace(keypoints, channels=self.config.keypoint_channels)
        return replace(self.spec, channels=self.config.channels, keypoints=keypoints)

    def send(self, features: CutFeatures, rng: np.random.Generator) -> CutFeatures:
        """Map the features and add noise. Differentiable.

        Args:
            features: One scene, or a batch in training.
            rng: Draws the noise.

        Returns:
            The same cells and keypoints with other channels.
        """
        sent = self.mapped(features)
        voxels = replace(sent.voxels, features=self._noisy(sent.voxels.features, rng))
        keypoints = sent.keypoints
        if keypoints is not None:
            keypoints = replace(keypoints, features=self._noisy(keypoints.features, rng))
        return replace(sent, voxels=voxels, keypoints=keypoints)

    def restore(self, uploaded: CutFeatures) -> CutFeatures:
        """Map what was sent to features for the decoder. Differentiable.

        Args:
            uploaded: A batch that was sent.

        Returns:
            The same cells and keypoints with all channels; features are not negative, as those of the encoder.
        """
        voxels = replace(uploaded.voxels, features=torch.relu(self.receiver(uploaded.voxels.features)))
        keypoints = uploaded.keypoints
        if keypoints is not None and self.keypoint_receiver is not None:
            keypoints = replace(keypoints, features=torch.relu(self.keypoint_receiver(keypoints.features)))
        return CutFeatures(voxels=voxels, spec=self.spec, keypoints=keypoints)

    def compute(self, features: CutFeatures) -> CutFeatures:
        """Send and restore without noise.

        Args:
            features: A batch.

        Returns:
            What the decoder reads on the vehicle.
        """
        return self.restore(self.mapped(features))

    def mapped(self, features: CutFeatures) -> CutFeatures:
        """Compute what is sent, before the noise. Differentiable.

        Args:
            features: A batch.

        Returns:
            The same cells and keypoints with other channels, in -1..1.
        """
        voxels = replace(features.voxels, features=torch.tanh(self.sender(features.voxels.features)))
        keypoints = features.keypoints
        if keypoints is not None and self.keypoint_sender is not None:
            keypoints = replace(keypoints, features=torch.tanh(self.keypoint_sender(keypoints.features)))
        return CutFeatures(voxels=voxels, spec=self.upload_spec, keypoints=keypoints)

    def _noisy(self, values: Tensor, rng: np.random.Generator) -> Tensor:
        return values + self.config.sigma * normal(rng, tuple(values.shape), values)


def _perceptron(channels: int, hidden: int, out: int) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, out))
    for layer in (layers[0], layers[2]):
        nn.init.zeros_(cast(nn.Linear, layer).bias)
    return layers
