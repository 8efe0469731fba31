"""Named configurations, as Python values: pick one by name on the command line, override any field with a dotted option.

The reference settings follow OpenPCDet and ST3D (upcycling.md sections 5.3, 5.7, 5.8); the small ones keep their structure at a size
that two CPU cores train in minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..datasets.augment import AugmentationRanges
from .features import VoxelGrid
from .models.anchors import KITTI_ANCHORS, AnchorClass
from .models.decoders.bev import BevBackboneConfig
from .models.decoders.second_iou import SecondIouConfig
from .models.encoders.second import SecondEncoderConfig
from .models.post_processing import FinalNms, ProposalNms
from .models.second_iou import SecondIouDetectorConfig
from .models.targets import RoiSampling
from .server.feature_gt import FeatureGtConfig
from .server.pseudo_labels import ScoreThresholds
from .server.trainer import UpcycleConfig
from .structures import InvalidInput
from .training.loop import LoopConfig
from .training.optim import OneCycle
from .training.supervised import SupervisedConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A detector with the way it is trained on labels and upcycled on smashed scenes."""

    detector: SecondIouDetectorConfig
    train: SupervisedConfig
    upcycle: UpcycleConfig

    def __post_init__(self) -> None:
        names = self.detector.class_names
        lengths = {
            "upcycle.thresholds": len(self.upcycle.thresholds),
            "upcycle.f_gt.max_objects": len(self.upcycle.f_gt.max_objects),
        }
        if self.train.gt_sampling:  # an empty one means no GT sampling
            lengths["train.gt_sampling"] = len(self.train.gt_sampling)
        for field, length in lengths.items():
            if length != len(names):
                raise InvalidInput(f"{field} needs one entry per class {names}, found {length}")


def _loop(lr: float, steps: int, *, amp: bool = False, checkpoint_every: int = 1000) -> LoopConfig:
    optim = OneCycle(lr=lr, total_steps=steps, weight_decay=0.01)
    log_every = 50 if steps >= 10_000 else 10
    return LoopConfig(seed=0, optim=optim, checkpoint_every=checkpoint_every, log_every=log_every, amp="bf16" if amp else "off")


# OpenPCDet's kitti_models/second_iou.yaml: 80 epochs of 3,712 frames at batch 4.
KITTI_SECOND_IOU = Preset(
    detector=SecondIouDetectorConfig(
        encoder=SecondEncoderConfig(grid=VoxelGrid(range=(0.0, -40.0, -3.0, 70.4, 40.0, 1.0), voxel_size=(0.05, 0.05, 0.1))),
        decoder=SecondIouConfig(anchors=KITTI_ANCHORS),
    ),
    train=SupervisedConfig(
        loop=_loop(0.003, 74_240, amp=True), batch_size=4, augmentation=AugmentationRanges(), gt_sampling=(20, 15, 15)
    ),
    upcycle=UpcycleConfig(
        loop=_loop(0.003, 20_000, amp=True),
        labelled_batch=2,
        unlabelled_batch=2,
        thresholds=(
            ScoreThresholds(iou_score=0.5, class_score=0.4, ignore=0.2),
            ScoreThresholds(iou_score=0.25, class_score=0.4, ignore=0.2),
            ScoreThresholds(iou_score=0.25, class_score=0.4, ignore=0.2),
        ),
        f_gt=FeatureGtConfig(max_objects=(15, 10, 10)),
    ),
)

# ST3D's Waymo -> KITTI and Lyft setting: x, y, z only, z shifted so that the road is at 0, one class.
CROSS_DATASET_SECOND_IOU = Preset(
    detector=SecondIouDetectorConfig(
        encoder=SecondEncoderConfig(
            grid=VoxelGrid(range=(-75.2, -75.2, -2.0, 75.2, 75.2, 4.0), voxel_size=(0.1, 0.1, 0.15)),
            point_features=(),
            max_voxels=90_000,
        ),
        decoder=SecondIouConfig(
            anchors=(AnchorClass(name="Car", size=(4.2, 2.0, 1.6), bottom_z=0.0, matched=0.55, unmatched=0.40),),
            iou_target=(0.0, 1.0),
        ),
    ),
    train=SupervisedConfig(loop=_loop(0.003, 600_000, amp=True), batch_size=4, augmentation=AugmentationRanges(flip_x=0.5)),
    upcycle=UpcycleConfig(
        loop=_loop(0.0015, 28_000, amp=True),
        labelled_batch=2,
        unlabelled_batch=2,
        thresholds=(ScoreThresholds(iou_score=0.6, class_score=0.0, ignore=0.2),),
        f_gt=FeatureGtConfig(max_objects=(15,)),
    ),
)


def _small_decoder(anchor: AnchorClass) -> SecondIouConfig:
    return SecondIouConfig(
        anchors=(anchor,),
        bev=BevBackboneConfig(layers=(2, 2), channels=(48, 64), up_channels=(64, 64)),
        head_channels=96,
        pool_size=5,
        train_proposals=ProposalNms(pre=1024, iou=0.8, post=160),
        test_proposals=ProposalNms(pre=512, iou=0.7, post=80),
        roi_sampling=RoiSampling(count=64),
        iou_target=(0.0, 1.0),
        final=FinalNms(score=0.05),
    )


# Two CPU cores, minutes: the camera's view of 51 m, 0.1 m voxels, 64 x 64 cells at the cut, one class, the road at z = 0.
SMALL = Preset(
    detector=SecondIouDetectorConfig(
        encoder=SecondEncoderConfig(
            grid=VoxelGrid(range=(0.0, -25.6, -1.0, 51.2, 25.6, 3.0), voxel_size=(0.1, 0.1, 0.1)),
            point_features=(),
            max_voxels=16_000,
            channels=(8, 16, 32, 32, 64),
        ),
        decoder=_small_decoder(AnchorClass(name="Car", size=(4.2, 2.0, 1.6), bottom_z=0.0, matched=0.55, unmatched=0.40)),
    ),
    train=SupervisedConfig(
        loop=_loop(0.003, 400, checkpoint_every=100),
        batch_size=2,
        augmentation=AugmentationRanges(yaw=(-math.pi / 8, math.pi / 8)),
        gt_sampling=(8,),
    ),
    # Chosen on simulated Waymo -> Lyft, seed 0 (docs/results.md), then frozen.
    upcycle=UpcycleConfig(
        loop=_loop(0.0007, 400, checkpoint_every=100),
        labelled_batch=2,
        unlabelled_batch=2,
        thresholds=(ScoreThresholds(iou_score=0.5, class_score=0.3, ignore=0.25),),
        f_gt=FeatureGtConfig(max_objects=(16,)),
        # A teacher this small places 60 % of its boxes to IoU 0.7: good enough to say that a car is there, not where its sides are.
        teacher_box_weight=0.0,
        ema_decay=0.99,
        round_steps=20,
    ),
)

# Real KITTI on two CPU cores: 0.1 m voxels, 64 m ahead, a narrow network, cars only, intensity used, no z shift.
KITTI_SMALL = Preset(
    detector=SecondIouDetectorConfig(
        encoder=replace(
            SMALL.detector.encoder,
            grid=VoxelGrid(range=(0.0, -25.6, -3.0, 64.0, 25.6, 1.0), voxel_size=(0.1, 0.1, 0.1)),
            point_features=("intensity",),
        ),
        decoder=_small_decoder(replace(KITTI_ANCHORS[0], matched=0.55, unmatched=0.40)),
    ),
    train=SupervisedConfig(
        loop=_loop(0.003, 400, checkpoint_every=100),
        batch_size=2,
        augmentation=AugmentationRanges(),
        gt_sampling=(10,),
    ),
    upcycle=replace(SMALL.upcycle, loop=_loop(0.0007, 200, checkpoint_every=100), f_gt=FeatureGtConfig(max_objects=(12,))),
)

# The demo: the small preset with fewer steps.
DEMO = replace(
    SMALL,
    train=replace(SMALL.train, loop=_loop(0.003, 260, checkpoint_every=100)),
    upcycle=replace(SMALL.upcycle, loop=_loop(0.0007, 140, checkpoint_every=100)),
)

PRESETS = {
    "small": SMALL,
    "kitti_small": KITTI_SMALL,
    "kitti_second_iou": KITTI_SECOND_IOU,
    "cross_dataset_second_iou": CROSS_DATASET_SECOND_IOU,
}
