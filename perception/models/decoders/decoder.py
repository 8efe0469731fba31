"""What every decoder offers: the contract between the server half and everything that uses it.

`models/detector.py` joins a decoder with an encoder; `second_iou.py` is the decoder to read first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ....core.errors import InvalidInput
from ....core.features import CutFeatures
from ....core.structures import Labels, LossTerms, Predictions
from .regions import ScoredProposals
from .scene_decision import SceneDecision


class Decoder(nn.Module, ABC):
    """The server half of a detector: features at the cut in, raw outputs out.

    Raw outputs are the decoder's own type; nothing but its `loss` and `predict` looks inside.
    """

    openpcdet_parts: ClassVar[Mapping[str, str]] = {}
    """Submodules of this half, each with its name in OpenPCDet's weights. Empty for a decoder that OpenPCDet does not have."""
    openpcdet_optional: ClassVar[str | None] = None
    """OpenPCDet's name of a part that published weights may lack: the IoU head that SECOND-IoU adds to SECOND."""

    class_parts: tuple[str, ...] = ()
    """Submodules whose weights belong to certain classes: with other classes they start fresh (`training/starting_weights.py`)."""

    branch_parts: ClassVar[tuple[str, ...]] = ()
    """Chains of layers that read score and box of a region from its features, where mixtures may take the place of FFNs (`mixture.py`)."""
    wide_parts: ClassVar[tuple[str, ...]] = ()
    """Chains before them, with a very wide first layer. They get mixtures only where somebody asks for it."""
    grid_points: int = 1
    """Places of the grid in a region; the input of `wide_parts` has, channel by channel, one value for each."""
    scene_decision: SceneDecision | None = None
    """Where mixtures find the decision of their scene; None without such mixtures."""

    @abstractmethod
    def forward(self, features: CutFeatures, labels: Sequence[Labels] | None = None) -> Any:
        """Compute the raw outputs of a batch.

        Args:
            features: features at the cut, on the device of the weights.
            labels: one per scene in training, None otherwise. They only choose which proposals a second stage trains on.

        Returns:
            Raw outputs for `loss` and `predict`.
        """

    @abstractmethod
    def loss(self, outputs: Any, labels: Sequence[Labels]) -> LossTerms:
        """Compare raw outputs with labels.

        Args:
            outputs: what `forward` returned.
            labels: one per scene, on the device of the outputs.

        Returns:
            Named loss terms, already weighted.
        """

    @abstractmethod
    def predict(self, outputs: Any) -> list[Predictions]:
        """Turn raw outputs into detections.

        Args:
            outputs: what `forward` returned without labels.

        Returns:
            The detections of every scene, best first.
        """

    def proposals(self, features: CutFeatures) -> list[ScoredProposals]:
        """Score every proposal of the first stage with the second stage, before the final suppression.

        Args:
            features: features at the cut, on the device of the weights.

        Returns:
            The scored proposals of every scene.

        Raises:
            InvalidInput: The decoder has no second stage.
        """
        raise InvalidInput(f"{type(self).__name__} has no second stage that scores proposals; use a two-stage detector")

    def region_features(self, features: CutFeatures, regions: Sequence[Tensor]) -> Tensor:
        """Compute what the second stage knows about given regions: the input of `branch_parts`.

        Args:
            features: features at the cut, on the device of the weights.
            regions: (R, 7) boxes of each scene.

        Returns:
            (N, C) features of all regions, scene by scene.

        Raises:
            InvalidInput: The decoder has no second stage.
        """
        raise InvalidInput(f"{type(self).__name__} has no second stage that looks at regions; use a two-stage detector")

    def bev_map(self, features: CutFeatures) -> Tensor:
        """Compute the map in bird's-eye view that the heads read.

        Args:
            features: features at the cut, on the device of the weights.

        Returns:
            (B, C, H, W) map with one cell for each cell of the cut; H runs along y, W along x.

        Raises:
            InvalidInput: The decoder has no such map.
        """
        raise InvalidInput(f"{type(self).__name__} has no map in bird's-eye view that could be looked at; use another detector")

    def note_regions(self, valid: Tensor) -> None:
        """Say which regions the second stage will get. A decoder with a second stage calls it before each pass of the region head.

        Args:
            valid: (B, R) bool; the valid regions pass the head scene by scene.
        """
        if self.scene_decision is not None:
            self.scene_decision.note_regions(valid)

    def log_values(self) -> Mapping[str, float]:
        """Numbers about the training so far, which are logged beside the losses.

        Returns:
            Numbers by name; empty for most decoders.
        """
        return {}
