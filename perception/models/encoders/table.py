"""The encoders that there are. A new one adds one line here; `models/detectors.py` is the same for whole detectors.

There are two tables because a vehicle knows encoders only: it must not load the server half of any detector.
"""

from __future__ import annotations

from .defended import DefendedEncoderConfig
from .pv_rcnn import PvRcnnEncoderConfig
from .second import SecondEncoderConfig

EncoderConfig = SecondEncoderConfig | PvRcnnEncoderConfig | DefendedEncoderConfig
"""Every configuration that an encoder file may hold. `config.build()` makes the encoder."""
