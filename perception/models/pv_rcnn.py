"""PV-RCNN on one page: the encoder's settings, the decoder's settings, and the detector made of both."""

from __future__ import annotations

from dataclasses import dataclass

from .decoders.pv_rcnn import PvRcnnConfig, PvRcnnDecoder
from .detector import Detector
from .encoders.pv_rcnn import PvRcnnEncoder, PvRcnnEncoderConfig


@dataclass(frozen=True, kw_only=True)
class PvRcnnDetectorConfig:
    """A PV-RCNN detector. The classes are those of the anchors, in their order."""

    encoder: PvRcnnEncoderConfig
    decoder: PvRcnnConfig = PvRcnnConfig()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in label order."""
        return tuple(a.name for a in self.decoder.anchors)


def pv_rcnn(config: PvRcnnDetectorConfig) -> Detector:
    """A freshly initialised PV-RCNN."""
    encoder = PvRcnnEncoder(config.encoder)
    return Detector(encoder, PvRcnnDecoder(encoder.spec, config.decoder), config.class_names)
