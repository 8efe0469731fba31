"""SECOND-IoU on one page: the encoder's settings, the decoder's settings, and the detector made of both."""

from __future__ import annotations

from dataclasses import dataclass

from .decoders.second_iou import SecondIouConfig, SecondIouDecoder
from .detector import Detector
from .encoders.second import SecondEncoder, SecondEncoderConfig


@dataclass(frozen=True, kw_only=True)
class SecondIouDetectorConfig:
    """A SECOND-IoU detector. The classes are those of the anchors, in their order."""

    encoder: SecondEncoderConfig
    decoder: SecondIouConfig = SecondIouConfig()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in label order."""
        return tuple(a.name for a in self.decoder.anchors)


def second_iou(config: SecondIouDetectorConfig) -> Detector:
    """A freshly initialised SECOND-IoU."""
    encoder = SecondEncoder(config.encoder)
    return Detector(encoder, SecondIouDecoder(encoder.spec, config.decoder), config.class_names)
