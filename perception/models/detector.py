"""A detector is an encoder (the vehicle half) and a decoder (the server half), nothing more.

Everything else in the project (supervised loop, semi-supervised trainer, extractor, evaluation) uses the five methods below and
does not know which detector it serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import nn

from ...core.cut import CutSpec
from ...core.features import CutFeatures
from ...core.structures import Labels, LossTerms, PointCloud, Predictions


class Encoder(Protocol):
    """The vehicle half: point clouds to features at the cut."""

    spec: CutSpec

    def __call__(self, points: Sequence[PointCloud]) -> CutFeatures: ...


class Decoder(Protocol):
    """The server half. Its outputs are its own type; only its own ``loss`` and ``predict`` look inside."""

    def __call__(self, split: CutFeatures, labels: Sequence[Labels] | None = None) -> Any: ...

    def loss(self, outputs: Any, labels: Sequence[Labels]) -> LossTerms: ...

    def predict(self, outputs: Any) -> list[Predictions]: ...


class Detector(nn.Module):
    """``decode(encode(points))`` is the whole network."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, class_names: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder, self.decoder, self.class_names = encoder, decoder, class_names
        self.encoder_frozen = False

    def freeze_encoder(self) -> Detector:
        """Fix the vehicle half: no gradient, and batch-norm statistics stay in whatever mode the detector is put."""
        self.encoder_frozen = True
        self.encoder.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Detector:
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        return self

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, points: Sequence[PointCloud]) -> CutFeatures:
        """Features at the cut of a batch of scans, on the device of the weights."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
            return self.encoder([p.to(self._device) for p in points])

    def decode(self, split: CutFeatures, labels: Sequence[Labels] | None = None) -> Any:
        """Raw outputs of a batch; ``labels`` only steer which regions a second stage trains on."""
        return self.decoder(split, None if labels is None else [scene.to(self._device) for scene in labels])

    def loss(self, outputs: Any, labels: Sequence[Labels]) -> LossTerms:
        """Loss terms of raw outputs against labels."""
        return cast(Decoder, self.decoder).loss(outputs, [scene.to(self._device) for scene in labels])

    def predict(self, outputs: Any) -> list[Predictions]:
        """Detections of every scene, best first."""
        return cast(Decoder, self.decoder).predict(outputs)

    @property
    def spec(self) -> CutSpec:
        """Where the network is cut."""
        return cast(Encoder, self.encoder).spec

    @torch.no_grad()
    def detect(self, points: Sequence[PointCloud]) -> list[Predictions]:
        """Detections of a batch of scans; the detector must be in evaluation mode."""
        return self.predict(self.decode(self.encode(points)))

    forward = detect
