"""What configurations of detectors share that are made of a dense one: the halves stay, and layers of the server half are other ones.

Read next: `upcycled.py` and `narrow.py`, the two that there are.
"""

from __future__ import annotations

from dataclasses import dataclass

from .decoders.pv_rcnn import PvRcnnConfig
from .decoders.second_iou import SecondIouConfig
from .defended import DefendedDetectorConfig
from .encoders.defended import DefendedEncoderConfig
from .encoders.pv_rcnn import PvRcnnEncoderConfig
from .encoders.second import SecondEncoderConfig
from .pv_rcnn import PvRcnnDetectorConfig
from .second_iou import SecondIouDetectorConfig

DenseDetectorConfig = SecondIouDetectorConfig | PvRcnnDetectorConfig | DefendedDetectorConfig
"""Configuration of a detector from which others are made."""


@dataclass(frozen=True, kw_only=True)
class DerivedDetectorConfig:
    """The dense detector of a configuration, and what it still says about the detector that is made of it."""

    detector: DenseDetectorConfig
    """The dense detector. Its encoder is that of the new one, so smashed scenes fit both."""

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
        """The server half of the dense detector."""
        return self.detector.decoder
