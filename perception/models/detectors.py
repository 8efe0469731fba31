"""The detectors that there are. A new one is added here, in ``vehicle/encoder_file.py`` and, for published weights, in ``openpcdet.py``."""

from __future__ import annotations

from .detector import Detector
from .pv_rcnn import PvRcnnDetectorConfig, pv_rcnn
from .second_iou import SecondIouDetectorConfig, second_iou

DetectorConfig = SecondIouDetectorConfig | PvRcnnDetectorConfig


def build_detector(config: DetectorConfig) -> Detector:
    """A freshly initialised detector."""
    return pv_rcnn(config) if isinstance(config, PvRcnnDetectorConfig) else second_iou(config)
