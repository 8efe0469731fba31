"""SECOND-IoU on one page: the encoder's settings, the decoder's settings, and the detector made of both.

The halves are in `encoders/second.py` and `decoders/second_iou.py`; sizes to train are in `recipes/architectures.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .decoders.second_iou import SecondIouConfig, SecondIouDecoder
from .detector import Detector
from .encoders.second import SecondEncoderConfig


@dataclass(frozen=True, kw_only=True)
class SecondIouDetectorConfig:
    """Configuration of a SECOND-IoU detector. Field names are stored in detector files."""

    label: ClassVar[str] = "SECOND-IoU"
    """Name of this kind of detector in messages and reports."""
    encoder: SecondEncoderConfig
    """The vehicle half: grid, point features and the sparse backbone."""
    decoder: SecondIouConfig = SecondIouConfig()
    """The server half: anchors, which name the classes, and the two stages."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in label order, which is the order of the anchors."""
        return tuple(a.name for a in self.decoder.anchors)

    def build(self) -> Detector:
        """Make a SECOND-IoU detector with fresh weights, drawn from torch's global generator.

        Returns:
            The detector, in training mode.
        """
        encoder = self.encoder.build()
        decoder = SecondIouDecoder(encoder.spec, self.decoder)
        return Detector(encoder, decoder, self.class_names, self.label, self)
