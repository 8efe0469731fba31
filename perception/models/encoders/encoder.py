"""What every encoder offers: the contract between the vehicle half and everything that uses it.

A detector, an extractor and the encoder file work with this class and do not know which encoder they hold. The encoders
that there are stand in `table.py`; `second.py` is the one to read first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
from torch import nn

from ....core.cut import CutSpec
from ....core.features import CutFeatures, SparseVoxels
from ....core.structures import PointCloud
from ....core.trained_on import TrainedOn

ADDED_LATER: Mapping[str, bool] = {"added_later": True}
"""Metadata of a field that a configuration did not have in version 0.1. At its default the encoder is the one of before, so the
fingerprint leaves it out then. Write `field(default=…, metadata=ADDED_LATER)`."""


class EncoderFactory(Protocol):
    """The configuration of an encoder: a frozen dataclass of plain values that can build it."""

    def build(self) -> Encoder:
        """Make an encoder with fresh weights.

        Returns:
            The encoder, in training mode, with this configuration as its `config`.
        """
        ...


class Encoder(nn.Module, ABC):
    """The vehicle half of a detector: point clouds in, features at the cut out.

    A subclass sets `spec` and `config` when it is made and implements the two stages. The encoder fingerprint hashes the
    name of the subclass, `spec`, `config` and all weights, so renaming any of them makes stored scenes unreadable.
    """

    spec: CutSpec
    """Where the network is cut, and the shape of what is there."""
    config: EncoderFactory
    """The configuration that built this encoder."""
    trained_on: TrainedOn | None = None
    """What the training knew about its data; its file keeps it. It is no part of the fingerprint. None where nobody knows."""
    openpcdet_parts: ClassVar[Mapping[str, str]] = {}
    """Submodules of this half, each with its name in OpenPCDet's weights. Empty for an encoder that OpenPCDet does not have."""

    @abstractmethod
    def voxelize(self, points: Sequence[PointCloud]) -> SparseVoxels:
        """Sort the points of a batch into voxels.

        Args:
            points: one scan per scene, in the shifted frame (after the rig), on the device of the weights.

        Returns:
            The occupied voxels of the input grid with the features that the network reads. An encoder that says in `counts` what became
            of the points lets commands report what lies outside the range or over the voxel limit.

        Raises:
            InvalidInput: There is no scan, or a scan lacks point features that the encoder reads.
        """

    @abstractmethod
    def features(self, points: Sequence[PointCloud], voxels: SparseVoxels) -> CutFeatures:
        """Compute the features at the cut from the voxels of a batch.

        Args:
            points: the scans that `voxels` were made from. Only an encoder with keypoints looks at them again.
            voxels: what `voxelize` returned for `points`.

        Returns:
            Features at the cut, differentiable, one scene per scan.
        """

    @property
    def upload_spec(self) -> CutSpec:
        """The shape of what leaves a vehicle. It is `spec` unless a defence changes the channels."""
        return self.spec

    @property
    def defended(self) -> bool:
        """Whether what leaves a vehicle is not what the network computes."""
        return False

    @property
    def sends_everywhere(self) -> bool:
        """False where a defence leaves whole places out, so that an empty cell of an upload does not mean that nothing is there."""
        return True

    @property
    def sends_fine_balls(self) -> bool:
        """Whether what is sent was gathered in balls of raw points or of fine voxels, from which single points can be computed."""
        return False

    def upload(self, points: Sequence[PointCloud], voxels: SparseVoxels, rng: np.random.Generator | None = None) -> CutFeatures:
        """Compute what leaves a vehicle, before the codec: the features at the cut, unless the encoder carries a defence.

        Args:
            points: the scans that `voxels` were made from.
            voxels: what `voxelize` returned for `points`.
            rng: where random defences draw from. A vehicle seeds it with numbers that nobody else knows. None draws a seed from torch's
                global generator, as a training does.

        Returns:
            Features with the shape `upload_spec`.
        """
        return self.after_defences(self.before_defences(points, voxels), rng)

    def before_defences(self, points: Sequence[PointCloud], voxels: SparseVoxels) -> CutFeatures:
        """Compute what an upload is made of: every cell at the cut, before a defence leaves any of them out.

        Args:
            points: one scan per scene, as for `voxelize`.
            voxels: what `voxelize` returned.

        Returns:
            Features with the shape `spec`.
        """
        return self.features(points, voxels)

    def after_defences(self, features: CutFeatures, rng: np.random.Generator | None = None) -> CutFeatures:
        """Compute what leaves a vehicle of the features at the cut.

        Args:
            features: what `before_defences` returned.
            rng: where random defences draw from, as for `upload`.

        Returns:
            Features with the shape `upload_spec`; the same where the encoder carries no defence.
        """
        return features

    def restore(self, uploaded: CutFeatures) -> CutFeatures:
        """Turn what a vehicle sent into features that the decoder reads: the server's half of a defence.

        Args:
            uploaded: features with the shape `upload_spec`.

        Returns:
            Features with the shape `spec`, differentiable.
        """
        return uploaded

    def forward(self, points: Sequence[PointCloud]) -> CutFeatures:
        """Run both stages.

        Args:
            points: one scan per scene, as for `voxelize`.

        Returns:
            Features at the cut.
        """
        return self.features(points, self.voxelize(points))
