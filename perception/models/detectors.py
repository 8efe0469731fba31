"""The detectors that there are. A new one adds one line here, and its encoder, if that is new too, one in `encoders/table.py`.

What a new detector brings: an encoder (`encoders/encoder.py` says what it must offer), a decoder (`decoders/decoder.py`), and
a configuration that holds the configurations of both and builds the detector; `second_iou.py` is an example of 40 lines.
"""

from __future__ import annotations

from .defended import DefendedDetectorConfig
from .narrow import NarrowDetectorConfig
from .pv_rcnn import PvRcnnDetectorConfig
from .second_iou import SecondIouDetectorConfig
from .upcycled import UpcycledDetectorConfig

DetectorConfig = (
    SecondIouDetectorConfig | PvRcnnDetectorConfig | DefendedDetectorConfig | UpcycledDetectorConfig | NarrowDetectorConfig
)
"""Every configuration that a preset or a detector file may hold. `config.build()` makes the detector."""
