"""A detector whose encoder carries defences: the detector's own configuration and the defences beside it."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import require
from .decoders.pv_rcnn import PvRcnnConfig
from .decoders.second_iou import SecondIouConfig
from .defences.table import DefenceConfig
from .detector import Detector
from .encoders.defended import DefendedEncoder, DefendedEncoderConfig
from .pv_rcnn import PvRcnnDetectorConfig
from .second_iou import SecondIouDetectorConfig


@dataclass(frozen=True, kw_only=True)
class DefendedDetectorConfig:
    """Configuration of a detector whose uploads pass defences. Field names are stored in detector files."""

    detector: SecondIouDetectorConfig | PvRcnnDetectorConfig
    """The detector without defences."""
    defences: tuple[DefenceConfig, ...]
    """The defences, the first one next to the encoder."""

    @property
    def label(self) -> str:
        """Name of this kind of detector in messages and reports."""
        return self.detector.label

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in label order."""
        return self.detector.class_names

    @property
    def encoder(self) -> DefendedEncoderConfig:
        """The vehicle half with its defences."""
        return DefendedEncoderConfig(encoder=self.detector.encoder, defences=self.defences)

    @property
    def decoder(self) -> SecondIouConfig | PvRcnnConfig:
        """The server half."""
        return self.detector.decoder

    def build(self) -> Detector:
        """Make the detector with fresh weights.

        Returns:
            The detector, in training mode.
        """
        inner = self.detector.build()
        return Detector(self.encoder.build(), inner.decoder, self.class_names, self.label, self)


def defended(detector: Detector, defences: tuple[DefenceConfig, ...]) -> Detector:
    """Give the encoder of a detector defences, with fresh weights of their own. The detector's weights are kept.

    Args:
        detector: A detector without defences that `config.build()` made.
        defences: The defences, the first one next to the encoder.

    Returns:
        A new detector in evaluation mode, on the CPU.

    Raises:
        InvalidInput: The detector carries defences already, or has no configuration.
    """
    config = detector.config
    require(
        isinstance(config, SecondIouDetectorConfig | PvRcnnDetectorConfig),
        f"defences are given to a SECOND-IoU or PV-RCNN detector without any, found {type(config).__name__}",
    )
    assert isinstance(config, SecondIouDetectorConfig | PvRcnnDetectorConfig)
    made = DefendedDetectorConfig(detector=config, defences=defences).build()
    assert isinstance(made.encoder, DefendedEncoder)
    made.encoder.encoder.load_state_dict(detector.encoder.state_dict())
    made.decoder.load_state_dict(detector.decoder.state_dict())
    made.trained_on = detector.trained_on
    return made.eval()
