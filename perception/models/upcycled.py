"""A detector with an upcycled head: the dense detector's own configuration and the structure of its mixtures beside it."""

from __future__ import annotations

from dataclasses import dataclass

from .decoders.mixture import HeadMixtureConfig, MixtureDecoder
from .decoders.pv_rcnn import PvRcnnConfig
from .decoders.second_iou import SecondIouConfig
from .defended import DefendedDetectorConfig
from .detector import Detector
from .encoders.defended import DefendedEncoderConfig
from .encoders.pv_rcnn import PvRcnnEncoderConfig
from .encoders.second import SecondEncoderConfig
from .pv_rcnn import PvRcnnDetectorConfig
from .second_iou import SecondIouDetectorConfig


@dataclass(frozen=True, kw_only=True)
class UpcycledDetectorConfig:
    """Configuration of a detector with an upcycled head. Field names are stored in detector files."""

    detector: SecondIouDetectorConfig | PvRcnnDetectorConfig | DefendedDetectorConfig
    """The dense detector. Its encoder is that of the upcycled one, so smashed scenes fit both."""
    head: HeadMixtureConfig
    """The mixtures."""

    @property
    def label(self) -> str:
        """Name of this kind of detector in messages and reports."""
        return f"{self.detector.label} with {len(self.head.experts)} experts"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in label order."""
        return self.detector.class_names

    @property
    def encoder(self) -> SecondEncoderConfig | PvRcnnEncoderConfig | DefendedEncoderConfig:
        """The vehicle half."""
        return self.detector.encoder

    @property
    def decoder(self) -> SecondIouConfig | PvRcnnConfig:
        """The server half without its mixtures."""
        return self.detector.decoder

    def build(self) -> Detector:
        """Make the detector with fresh weights.

        Returns:
            The detector, in training mode.
        """
        inner = self.detector.build()
        decoder = MixtureDecoder(inner.decoder, inner.spec, self.head)
        return Detector(inner.encoder, decoder, self.class_names, self.label, self)
