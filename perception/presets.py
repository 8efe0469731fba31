"""Named configurations, as Python values: pick one by name on the command line, override any field with a dotted option.

The reference settings follow OpenPCDet and ST3D (upcycling.md sections 5.3, 5.7, 5.8); the small ones keep their structure at a size
that two CPU cores train in minutes.
"""

from __future__ import annotations

from dataclasses import dataclass

from .models.anchors import KITTI_ANCHORS
from .models.decoders.second_iou import SecondIouConfig
from .models.encoders.second import SecondEncoderConfig
from .models.second_iou import SecondIouDetectorConfig
from .structures import VoxelGrid


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A detector with the way it is trained and upcycled."""

    detector: SecondIouDetectorConfig


KITTI_SECOND_IOU = Preset(
    detector=SecondIouDetectorConfig(
        encoder=SecondEncoderConfig(grid=VoxelGrid(range=(0.0, -40.0, -3.0, 70.4, 40.0, 1.0), voxel_size=(0.05, 0.05, 0.1))),
        decoder=SecondIouConfig(anchors=KITTI_ANCHORS),
    )
)
