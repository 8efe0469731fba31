"""PV-RCNN on one page: the encoder's settings, the decoder's settings, and the detector made of both.

The halves are in `encoders/pv_rcnn.py` and `decoders/pv_rcnn.py`; sizes to train are in `recipes/architectures.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.errors import require
from .decoders.pv_rcnn import PvRcnnConfig, PvRcnnDecoder
from .detector import Detector
from .encoders.pv_rcnn import PvRcnnEncoderConfig


@dataclass(frozen=True, kw_only=True)
class PvRcnnDetectorConfig:
    """Configuration of a PV-RCNN detector. Field names are stored in detector files."""

    label: ClassVar[str] = "PV-RCNN"
    """Name of this kind of detector in messages and reports."""
    encoder: PvRcnnEncoderConfig
    """The vehicle half: the sparse backbone and the keypoints."""
    decoder: PvRcnnConfig = PvRcnnConfig()
    """The server half: anchors, which name the classes, and the two stages."""

    def __post_init__(self) -> None:
        require(
            self.encoder.bev_map != self.decoder.bev_map,
            f"keypoints need the BEV map from one side: encoder.bev_map and decoder.bev_map are both {self.encoder.bev_map}; change one",
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in label order, which is the order of the anchors."""
        return tuple(a.name for a in self.decoder.anchors)

    def build(self) -> Detector:
        """Make a PV-RCNN detector with fresh weights, drawn from torch's global generator.

        Returns:
            The detector, in training mode.
        """
        encoder = self.encoder.build()
        decoder = PvRcnnDecoder(encoder.spec, self.decoder)
        return Detector(encoder, decoder, self.class_names, self.label, self)
