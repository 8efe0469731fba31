"""Named configurations: a command takes one by name and overrides any field with a dotted option.

A preset is a detector of `architectures.py` together with how it is trained on labels and upcycled on smashed scenes. The full-size
presets follow published configurations: OpenPCDet for KITTI and Waymo, ST3D across datasets, and 3DIoUMatch for the batches of the
semi-supervised steps. Results exist for the small presets only (docs/results.md).

Read next: `assembly.py`, which makes batches and databases from a preset and folders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ...core.errors import InvalidInput
from ...datasets.augment import AugmentationRanges
from ..models.detectors import DetectorConfig
from ..server.upcycle_config import FeatureGtConfig, ScoreThresholds, UpcycleConfig
from ..training.loop import LoopConfig
from ..training.optim import OneCycle
from ..training.supervised import SupervisedConfig
from . import architectures


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A detector, its supervised training, and its training on smashed scenes.

    Raises:
        InvalidInput: A setting with one entry per class has another number of entries than the detector has classes.
    """

    detector: DetectorConfig
    """Architecture of the detector. A trained detector keeps it, so later commands must name the same preset."""
    train: SupervisedConfig
    """Supervised training on labeled frames. Its augmentation also applies to the labeled half of `upcycle`."""
    upcycle: UpcycleConfig
    """Training of the server half on labeled frames and smashed scenes."""

    def __post_init__(self) -> None:
        names = self.detector.class_names
        lengths = {
            "upcycle.thresholds": len(self.upcycle.thresholds),
            "upcycle.f_gt.max_objects": len(self.upcycle.f_gt.max_objects),
        }
        if self.train.gt_sampling:  # an empty tuple switches GT sampling off
            lengths["train.gt_sampling"] = len(self.train.gt_sampling)
        for field, length in lengths.items():
            if length != len(names):
                raise InvalidInput(
                    f"{field} needs one entry for each of the {len(names)} classes {', '.join(names)}; found {length}"
                )


def _loop(lr: float, steps: int, *, weight_decay: float = 0.01, amp: bool = False, checkpoint_every: int = 1000) -> LoopConfig:
    optim = OneCycle(lr=lr, total_steps=steps, weight_decay=weight_decay)
    log_every = 50 if steps >= 10_000 else 10
    return LoopConfig(seed=0, optim=optim, checkpoint_every=checkpoint_every, log_every=log_every, amp="bf16" if amp else "off")


# ---- KITTI: OpenPCDet's schedule, 80 epochs of 3,712 frames, with batches of 4 (SECOND-IoU) and 2 (PV-RCNN)

_THREE_CLASSES = (
    ScoreThresholds(iou_score=0.5, class_score=0.4, ignore=0.2),
    ScoreThresholds(iou_score=0.25, class_score=0.4, ignore=0.2),
    ScoreThresholds(iou_score=0.25, class_score=0.4, ignore=0.2),
)
KITTI_SECOND_IOU = Preset(
    detector=architectures.KITTI_SECOND_IOU_DETECTOR,
    train=SupervisedConfig(
        loop=_loop(0.003, 74_240, amp=True), batch_size=4, augmentation=AugmentationRanges(), gt_sampling=(20, 15, 15)
    ),
    upcycle=UpcycleConfig(
        loop=_loop(0.003, 20_000, amp=True),
        labeled_batch=2,
        unlabeled_batch=2,
        thresholds=_THREE_CLASSES,
        f_gt=FeatureGtConfig(max_objects=(15, 10, 10)),
    ),
)
KITTI_PV_RCNN = Preset(
    detector=architectures.KITTI_PV_RCNN_DETECTOR,
    train=replace(KITTI_SECOND_IOU.train, loop=_loop(0.01, 148_480, amp=True), batch_size=2),
    # One labeled and one unlabeled scene, like 3DIoUMatch's pv_rcnn_ssl configuration.
    upcycle=replace(KITTI_SECOND_IOU.upcycle, loop=_loop(0.01, 40_000, amp=True), labeled_batch=1, unlabeled_batch=1),
)

# ---- across datasets: ST3D's settings for Waymo -> KITTI and Waymo -> Lyft

CROSS_DATASET_SECOND_IOU = Preset(
    detector=architectures.CROSS_DATASET_SECOND_IOU_DETECTOR,
    train=SupervisedConfig(loop=_loop(0.003, 600_000, amp=True), batch_size=4, augmentation=AugmentationRanges(flip_x=0.5)),
    upcycle=UpcycleConfig(
        loop=_loop(0.0015, 28_000, amp=True),
        labeled_batch=2,
        unlabeled_batch=2,
        thresholds=(ScoreThresholds(iou_score=0.6, class_score=0.0, ignore=0.2),),
        f_gt=FeatureGtConfig(max_objects=(15,)),
    ),
)
CROSS_DATASET_PV_RCNN = Preset(
    detector=architectures.CROSS_DATASET_PV_RCNN_DETECTOR,
    train=replace(CROSS_DATASET_SECOND_IOU.train, loop=_loop(0.01, 1_200_000, weight_decay=0.001, amp=True), batch_size=2),
    upcycle=replace(
        CROSS_DATASET_SECOND_IOU.upcycle,
        loop=_loop(0.0015, 56_000, weight_decay=0.001, amp=True),
        labeled_batch=1,
        unlabeled_batch=1,
        thresholds=(ScoreThresholds(iou_score=0.6, class_score=0.0, ignore=0.25),),
    ),
)

# ---- Waymo: OpenPCDet's schedule, 30 epochs of a fifth of the frames, with batches of 2

WAYMO_PV_RCNN = Preset(
    detector=architectures.WAYMO_PV_RCNN_DETECTOR,
    train=SupervisedConfig(
        loop=_loop(0.01, 474_000, weight_decay=0.001, amp=True),
        batch_size=2,
        augmentation=AugmentationRanges(flip_x=0.5),
        gt_sampling=(15, 10, 10),
    ),
    upcycle=replace(KITTI_PV_RCNN.upcycle, loop=_loop(0.01, 40_000, weight_decay=0.001, amp=True)),
)

# PV-RCNN as published, for published weights. Single points can be computed from its uploads (docs/privacy.md).
KITTI_PV_RCNN_PUBLISHED = replace(KITTI_PV_RCNN, detector=architectures.KITTI_PV_RCNN_PUBLISHED_DETECTOR)
WAYMO_PV_RCNN_PUBLISHED = replace(WAYMO_PV_RCNN, detector=architectures.WAYMO_PV_RCNN_PUBLISHED_DETECTOR)
CROSS_DATASET_PV_RCNN_PUBLISHED = replace(CROSS_DATASET_PV_RCNN, detector=architectures.CROSS_DATASET_PV_RCNN_PUBLISHED_DETECTOR)

# ---- for two CPU cores, minutes per training

SMALL = Preset(
    detector=architectures.SMALL_SECOND_IOU_DETECTOR,
    train=SupervisedConfig(
        loop=_loop(0.003, 400, checkpoint_every=100),
        batch_size=2,
        augmentation=AugmentationRanges(yaw=(-math.pi / 8, math.pi / 8)),
        gt_sampling=(8,),
    ),
    # These values were chosen on simulated Waymo -> Lyft, seed 0 (docs/results.md), and then frozen.
    upcycle=UpcycleConfig(
        loop=_loop(0.0007, 400, checkpoint_every=100),
        labeled_batch=2,
        unlabeled_batch=2,
        thresholds=(ScoreThresholds(iou_score=0.5, class_score=0.3, ignore=0.25),),
        f_gt=FeatureGtConfig(max_objects=(16,)),
        # This small teacher places about 60 % of its boxes with an IoU of 0.7: enough to say that a car is there, not where its sides are.
        teacher_box_weight=0.0,
        ema_decay=0.99,
        round_steps=20,
    ),
)
SMALL_PV_RCNN = replace(SMALL, detector=architectures.SMALL_PV_RCNN_DETECTOR)

# Cars, pedestrians and cyclists, for adaptation to other categories (docs/adapt.md). Its `upcycle` settings were never tried.
SMALL_THREE_CLASSES = Preset(
    detector=architectures.SMALL_THREE_CLASSES_DETECTOR,
    train=replace(SMALL.train, loop=_loop(0.003, 1500, checkpoint_every=100), gt_sampling=(6, 10, 6)),
    upcycle=replace(SMALL.upcycle, thresholds=SMALL.upcycle.thresholds * 3, f_gt=FeatureGtConfig(max_objects=(12, 8, 8))),
)

# Real KITTI on two CPU cores.
KITTI_SMALL = Preset(
    detector=architectures.KITTI_SMALL_SECOND_IOU_DETECTOR,
    train=SupervisedConfig(
        loop=_loop(0.003, 400, checkpoint_every=100),
        batch_size=2,
        augmentation=AugmentationRanges(),
        gt_sampling=(10,),
    ),
    upcycle=replace(SMALL.upcycle, loop=_loop(0.0007, 200, checkpoint_every=100), f_gt=FeatureGtConfig(max_objects=(12,))),
)
KITTI_SMALL_PV_RCNN = replace(KITTI_SMALL, detector=architectures.KITTI_SMALL_PV_RCNN_DETECTOR)

# ---- scans of a full turn

FULL_TURN_SMALL = Preset(
    detector=architectures.FULL_TURN_SMALL_DETECTOR,
    train=replace(SMALL.train, augmentation=AugmentationRanges(flip_x=0.5), gt_sampling=(15,)),
    upcycle=replace(SMALL.upcycle, f_gt=FeatureGtConfig(max_objects=(24,))),
)
FULL_TURN_SMALL_PV_RCNN = replace(FULL_TURN_SMALL, detector=architectures.FULL_TURN_SMALL_PV_RCNN_DETECTOR)
FULL_TURN_SECOND_IOU = Preset(
    detector=architectures.FULL_TURN_SECOND_IOU_DETECTOR,
    train=replace(KITTI_SECOND_IOU.train, augmentation=AugmentationRanges(flip_x=0.5)),
    upcycle=KITTI_SECOND_IOU.upcycle,
)

# The small presets with fewer steps, for `upcycle3d demo`.
DEMO = replace(
    SMALL,
    train=replace(SMALL.train, loop=_loop(0.003, 300, checkpoint_every=100)),
    upcycle=replace(SMALL.upcycle, loop=_loop(0.0007, 140, checkpoint_every=100)),
)
DEMO_PV_RCNN = replace(DEMO, detector=SMALL_PV_RCNN.detector)

PRESETS = {
    "small": SMALL,
    "small_pv_rcnn": SMALL_PV_RCNN,
    "small_three_classes": SMALL_THREE_CLASSES,
    "kitti_small": KITTI_SMALL,
    "kitti_small_pv_rcnn": KITTI_SMALL_PV_RCNN,
    "full_turn_small": FULL_TURN_SMALL,
    "full_turn_small_pv_rcnn": FULL_TURN_SMALL_PV_RCNN,
    "full_turn_second_iou": FULL_TURN_SECOND_IOU,
    "kitti_second_iou": KITTI_SECOND_IOU,
    "kitti_pv_rcnn": KITTI_PV_RCNN,
    "waymo_pv_rcnn": WAYMO_PV_RCNN,
    "cross_dataset_second_iou": CROSS_DATASET_SECOND_IOU,
    "cross_dataset_pv_rcnn": CROSS_DATASET_PV_RCNN,
    "kitti_pv_rcnn_published": KITTI_PV_RCNN_PUBLISHED,
    "waymo_pv_rcnn_published": WAYMO_PV_RCNN_PUBLISHED,
    "cross_dataset_pv_rcnn_published": CROSS_DATASET_PV_RCNN_PUBLISHED,
}
