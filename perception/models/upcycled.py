"""A detector with an upcycled head: the dense detector's own configuration and the structure of its mixtures beside it."""

from __future__ import annotations

from dataclasses import dataclass

from .decoders.mixture import HeadMixtureConfig, MixtureDecoder
from .derived import DerivedDetectorConfig
from .detector import Detector


@dataclass(frozen=True, kw_only=True)
class UpcycledDetectorConfig(DerivedDetectorConfig):
    """Configuration of a detector with an upcycled head. Field names are stored in detector files."""

    head: HeadMixtureConfig
    """The mixtures."""

    @property
    def label(self) -> str:
        """Name of this kind of detector in messages and reports."""
        return f"{self.detector.label} with {len(self.head.experts)} experts"

    def build(self) -> Detector:
        """Make the detector with fresh weights.

        Returns:
            The detector, in training mode.
        """
        inner = self.detector.build()
        decoder = MixtureDecoder(inner.decoder, inner.spec, self.head)
        return Detector(inner.encoder, decoder, self.class_names, self.label, self)
