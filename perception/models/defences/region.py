"""Region upload: only the surroundings of what may be an object, and a random share of the background, leave the vehicle.

A small network on the BEV map at the cut, the objectness head, scores every cell. Cells near a score above a threshold are sent; the
threshold is low, so that doubtful objects are sent too. Random blocks of background are added, because a decoder that never sees
background from the fleet learns nothing about its own false alarms there. Far from the domain of its training the head misses
objects, and the vehicle's blind spots become the server's: look at the recall that `upcycle3d defend` prints.

What is left out is background, and the few objects that the head misses. The other objects are sent as they are: this defence
protects no object and nobody in it.

`perception/training/objectness.py` trains the head and calibrates the threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core.cut import CutSpec
from ....core.errors import require_counts, require_numbers
from ....core.features import CutFeatures
from .defence import Defence, bev_cells, keep_cells, uniform


@dataclass(frozen=True, kw_only=True)
class RegionConfig:
    """Which cells are sent."""

    margin_cells: int = 0
    """Cells that are sent around every cell with a score above the threshold. Raise it when objects are cut off. The head itself learns to
    name cells within half a meter of an object."""

    recall: float = 0.95
    """Share of the labeled objects that the calibrated threshold keeps at least one cell of, 0..1. Raise it when the fleet drives
    elsewhere than the labeled frames; more background is sent then."""

    background_share: float = 0.02
    """Share of the background that is sent anyway, as random blocks, 0..1."""

    background_block: int = 4
    """Cells along each side of a block of background."""

    hidden: int = 32
    """Channels of the objectness head."""

    def __post_init__(self) -> None:
        require_counts("RegionConfig", least=0, most=1000, margin_cells=self.margin_cells)
        require_counts("RegionConfig", most=1000, background_block=self.background_block, hidden=self.hidden)
        require_numbers("RegionConfig", least=0, most=1, recall=self.recall, background_share=self.background_share)

    def build(self, spec: CutSpec) -> RegionUpload:
        """Make the defence with fresh weights; its threshold is 0 until it is calibrated, so it sends everything.

        Args:
            spec: The cut.

        Returns:
            The defence.
        """
        return RegionUpload(spec, self)


class RegionUpload(Defence):
    """Sends the cells near possible objects, and a random share of the others."""

    sends_everywhere = False

    def __init__(self, spec: CutSpec, config: RegionConfig) -> None:
        """Make the objectness head.

        Args:
            spec: The cut.
            config: Sizes and shares.
        """
        super().__init__(spec)
        self.config = config
        self.head = nn.Sequential(
            nn.Conv2d(spec.channels * spec.shape[0], config.hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(config.hidden, config.hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(config.hidden, 1, 1),
        )
        nn.init.constant_(cast(Tensor, cast(nn.Conv2d, self.head[4]).bias), -4.0)  # few cells hold an object
        self.threshold: Tensor
        self.register_buffer("threshold", torch.zeros(()))

    def scores(self, features: CutFeatures) -> Tensor:
        """Score the cells of the BEV map.

        Args:
            features: A batch at the cut.

        Returns:
            (B, H, W) logits.
        """
        return cast(Tensor, self.head(features.voxels.dense().flatten(1, 2)))[:, 0]

    def regions(self, features: CutFeatures) -> Tensor:
        """Find the cells near possible objects.

        Args:
            features: A batch at the cut.

        Returns:
            (B, H, W) bool.
        """
        found = (self.scores(features).sigmoid() >= self.threshold).float()
        size = 2 * self.config.margin_cells + 1
        return F.max_pool2d(found[:, None], size, stride=1, padding=self.config.margin_cells)[:, 0] > 0

    def send(self, features: CutFeatures, rng: np.random.Generator) -> CutFeatures:
        """Select the cells and keypoints that are sent. What is kept stays differentiable, the choice is not.

        Args:
            features: One scene.
            rng: Draws the blocks of background.

        Returns:
            Fewer cells and keypoints of the scene, unchanged.
        """
        with torch.no_grad():
            kept = self.regions(features)[0]
            kept = kept | self._background(kept, rng)
        coords = features.voxels.coords.long()
        points = None
        if features.keypoints is not None:
            row, column = bev_cells(features.keypoints, self.spec).unbind(1)
            points = kept[row, column]
        return keep_cells(features, kept[coords[:, 2], coords[:, 3]], points)

    def _background(self, kept: Tensor, rng: np.random.Generator) -> Tensor:
        """(H, W) bool, random blocks of a grid that begins at a random place."""
        block, (height, width) = self.config.background_block, kept.shape
        down, right = (int(v) for v in rng.integers(0, block, 2))
        rows, columns = (height + down) // block + 1, (width + right) // block + 1
        chosen = uniform(rng, (rows, columns), kept) < self.config.background_share
        wide = chosen.repeat_interleave(block, 0).repeat_interleave(block, 1)
        return wide[down : down + height, right : right + width]
