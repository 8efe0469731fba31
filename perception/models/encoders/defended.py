"""An encoder that carries defences: what leaves the vehicle is not all that the network computes.

    points ── encoder ─┬─ compute ───────────────────────────────────── features that the vehicle's own decoder reads
                       └─ send 1 ─ send 2 ─ … ─ upload ─ … ─ restore 2 ─ restore 1 ── features that the server's decoder reads

The defences are part of the configuration and of the weights, so the encoder file holds them and the encoder fingerprint covers
them: a store refuses scenes that passed other defences, and labeled scans on the server pass the same ones, as many of them as
`UpcycleConfig.labeled_as_sent` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn

from ....core.cut import CutSpec, VoxelGrid
from ....core.errors import require
from ....core.features import CutFeatures, SparseVoxels
from ....core.structures import PointCloud
from ..defences.defence import Defence
from ..defences.table import DefenceConfig, describe_defences
from .encoder import Encoder
from .pv_rcnn import PvRcnnEncoderConfig
from .second import SecondEncoderConfig


@dataclass(frozen=True, kw_only=True)
class DefendedEncoderConfig:
    """An encoder and its defences, in the order in which features pass them."""

    encoder: SecondEncoderConfig | PvRcnnEncoderConfig
    """The encoder."""
    defences: tuple[DefenceConfig, ...]
    """The defences, the first one next to the encoder."""

    def __post_init__(self) -> None:
        require(1 <= len(self.defences) <= 16, f"a defended encoder has 1 to 16 defences, found {len(self.defences)}")

    @property
    def grid(self) -> VoxelGrid:
        """Space and voxel size of the input."""
        return self.encoder.grid

    @property
    def voxels(self) -> SecondEncoderConfig:
        """The sparse backbone of the encoder."""
        return self.encoder.voxels if isinstance(self.encoder, PvRcnnEncoderConfig) else self.encoder

    def build(self) -> DefendedEncoder:
        """Make the encoder with fresh weights.

        Returns:
            The encoder, in training mode.
        """
        return DefendedEncoder(self)


class DefendedEncoder(Encoder):
    """An encoder and its defences. Never rename this class or its modules: fingerprints and files hold the names."""

    config: DefendedEncoderConfig
    """The configuration that built this encoder."""

    def __init__(self, config: DefendedEncoderConfig) -> None:
        """Make the layers with fresh weights.

        Args:
            config: The encoder and its defences.

        Raises:
            InvalidInput: A defence does not fit the cut.
        """
        super().__init__()
        self.config = config
        self.encoder = cast(Encoder, config.encoder.build())
        self.spec = self.encoder.spec
        self.defences = nn.ModuleList()
        spec = self.spec
        for defence in config.defences:
            built = defence.build(spec)
            self.defences.append(built)
            spec = built.upload_spec

    @property
    def upload_spec(self) -> CutSpec:
        """The shape of what leaves the vehicle."""
        return self.stages[-1].upload_spec

    @property
    def defended(self) -> bool:
        """True: defences stand between network and upload."""
        return True

    @property
    def sends_everywhere(self) -> bool:
        """False where a defence leaves places out."""
        return all(defence.sends_everywhere for defence in self.stages)

    @property
    def sends_fine_balls(self) -> bool:
        """As the encoder without defences; noise makes the points less certain."""
        return self.encoder.sends_fine_balls

    @property
    def stages(self) -> list[Defence]:
        """The defences in order."""
        return [cast(Defence, defence) for defence in self.defences]

    def voxelize(self, points: Sequence[PointCloud]) -> SparseVoxels:
        """Sort the points of a batch into voxels, as the encoder does.

        Args:
            points: One scan per scene, in the shifted frame.

        Returns:
            The occupied voxels.
        """
        return self.encoder.voxelize(points)

    def features(self, points: Sequence[PointCloud], voxels: SparseVoxels) -> CutFeatures:
        """Compute the features that the vehicle's own decoder reads: no cell is left out, and no noise is added.

        Args:
            points: The scans that `voxels` were made from.
            voxels: What `voxelize` returned.

        Returns:
            Features at the cut.
        """
        found = self.encoder.features(points, voxels)
        for defence in self.stages:
            found = defence.compute(found)
            if defence.upload_spec != defence.spec:
                break  # later defences work on other channels, and only on what is sent
        return found

    def before_defences(self, points: Sequence[PointCloud], voxels: SparseVoxels) -> CutFeatures:
        """Compute the features that the defences are given.

        Args:
            points: The scans that `voxels` were made from.
            voxels: What `voxelize` returned.

        Returns:
            Features with the shape `spec`.
        """
        return self.encoder.features(points, voxels)

    def after_defences(self, features: CutFeatures, rng: np.random.Generator | None = None) -> CutFeatures:
        """Compute what leaves the vehicle.

        Args:
            features: What `before_defences` returned.
            rng: Where the defences draw random numbers from; None draws a seed from torch's global generator.

        Returns:
            Features with the shape `upload_spec`.
        """
        rng = seeded_by_torch() if rng is None else rng
        scenes = [features.scene(index) for index in range(features.batch_size)]
        for defence in self.stages:
            scenes = [defence.send(scene, rng) for scene in scenes]
        return CutFeatures.collate(scenes)

    def restore(self, uploaded: CutFeatures) -> CutFeatures:
        """Turn what was sent into features for the decoder.

        Args:
            uploaded: Features with the shape `upload_spec`.

        Returns:
            Features with the shape `spec`.
        """
        for defence in reversed(self.stages):
            uploaded = defence.restore(uploaded)
        return uploaded


def seeded_by_torch() -> np.random.Generator:
    """Make a generator that repeats when torch's global generator does, as the training loop sees to for every step.

    Returns:
        The generator.
    """
    return np.random.default_rng(int(torch.randint(1 << 62, ()).item()))


def defences_of(encoder: nn.Module) -> str:
    """Say which defences an encoder carries.

    Args:
        encoder: Any encoder.

    Returns:
        The defences with all settings; `none` for an encoder without defences.
    """
    return describe_defences(encoder.config.defences) if isinstance(encoder, DefendedEncoder) else "none"
