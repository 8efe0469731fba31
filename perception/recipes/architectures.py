"""Detector configurations that the presets train: the sizes of OpenPCDet and ST3D, and small ones.

The small detectors keep the structure of the large ones at a size that two CPU cores train in minutes. SECOND-IoU and PV-RCNN share
the grid, the sparse backbone, the anchors and the BEV layers, so that they can be compared.

Read next: `presets.py`, which adds how each detector is trained.
"""

from __future__ import annotations

from dataclasses import replace

from ...core.cut import VoxelGrid
from ..models.anchors import KITTI_ANCHORS, WAYMO_ANCHORS, AnchorClass
from ..models.decoders.bev import BevBackboneConfig
from ..models.decoders.pv_rcnn import PvRcnnConfig
from ..models.decoders.second_iou import SecondIouConfig
from ..models.encoders.pv_rcnn import PvRcnnEncoderConfig
from ..models.encoders.second import SecondEncoderConfig
from ..models.encoders.set_abstraction import SetAbstractionConfig
from ..models.post_processing import FinalNms, ProposalNms
from ..models.pv_rcnn import PvRcnnDetectorConfig
from ..models.second_iou import SecondIouDetectorConfig
from ..models.targets import RoiSampling

# ---- KITTI, the values of OpenPCDet's tools/cfgs/kitti_models

KITTI_SECOND_IOU_DETECTOR = SecondIouDetectorConfig(
    encoder=SecondEncoderConfig(grid=VoxelGrid(range=(0.0, -40.0, -3.0, 70.4, 40.0, 1.0), voxel_size=(0.05, 0.05, 0.1))),
    decoder=SecondIouConfig(anchors=KITTI_ANCHORS),
)
# OpenPCDet samples keypoints from raw points. Ours are voxel centers, because raw points never leave a vehicle.
KITTI_PV_RCNN_PUBLISHED_DETECTOR = PvRcnnDetectorConfig(encoder=PvRcnnEncoderConfig(voxels=KITTI_SECOND_IOU_DETECTOR.encoder))


def coarse_keypoints(detector: PvRcnnDetectorConfig, stride: int) -> PvRcnnDetectorConfig:
    """Make the upload of a published PV-RCNN give away less, and smaller: the default of every preset (docs/privacy.md).

    Single points can be computed from balls around keypoints that hold raw points or fine voxels, so keypoints gather from the two coarse
    stages alone, and stand for cells of `stride` voxels. The BEV map under keypoints follows from the cells, so the server computes it.

    Args:
        detector: PV-RCNN as published.
        stride: Input voxels along each side of a keypoint's cell; 0.4 m or more give less than the cells of SECOND-IoU.

    Returns:
        The detector; weights of the published one do not fit.
    """
    encoder = replace(detector.encoder, raw_points=None, conv1=None, conv2=None, keypoint_stride=stride, bev_map=False)
    return replace(detector, encoder=encoder, decoder=replace(detector.decoder, bev_map=True))


KITTI_PV_RCNN_DETECTOR = coarse_keypoints(KITTI_PV_RCNN_PUBLISHED_DETECTOR, 8)

# ---- across datasets, the values of ST3D: points have x, y, z only; z is shifted so that the road is at 0; one class; the quality that the
# second stage predicts is the IoU itself

CROSS_DATASET_SECOND_IOU_DETECTOR = SecondIouDetectorConfig(
    encoder=SecondEncoderConfig(
        grid=VoxelGrid(range=(-75.2, -75.2, -2.0, 75.2, 75.2, 4.0), voxel_size=(0.1, 0.1, 0.15)),
        point_features=(),
        max_voxels=90_000,
    ),
    decoder=SecondIouConfig(
        anchors=(AnchorClass(name="Car", size=(4.2, 2.0, 1.6), bottom_z=0.0, matched=0.55, unmatched=0.40),),
        iou_target=(0.0, 1.0),
    ),
)
CROSS_DATASET_PV_RCNN_PUBLISHED_DETECTOR = PvRcnnDetectorConfig(
    encoder=PvRcnnEncoderConfig(voxels=CROSS_DATASET_SECOND_IOU_DETECTOR.encoder, keypoints=4096, conv1=None, conv2=None),
    decoder=PvRcnnConfig(anchors=CROSS_DATASET_SECOND_IOU_DETECTOR.decoder.anchors, quality_target=(0.0, 1.0)),
)
CROSS_DATASET_PV_RCNN_DETECTOR = coarse_keypoints(CROSS_DATASET_PV_RCNN_PUBLISHED_DETECTOR, 4)

# ---- Waymo, the values of OpenPCDet's tools/cfgs/waymo_models

WAYMO_PV_RCNN_PUBLISHED_DETECTOR = PvRcnnDetectorConfig(
    encoder=replace(
        CROSS_DATASET_PV_RCNN_PUBLISHED_DETECTOR.encoder,
        voxels=replace(CROSS_DATASET_SECOND_IOU_DETECTOR.encoder, point_features=("intensity", "elongation"), max_voxels=150_000),
    ),
    decoder=PvRcnnConfig(
        anchors=WAYMO_ANCHORS, test_proposals=ProposalNms(pre=4096, iou=0.85, post=300), final=FinalNms(iou=0.7)
    ),
)
WAYMO_PV_RCNN_DETECTOR = coarse_keypoints(WAYMO_PV_RCNN_PUBLISHED_DETECTOR, 4)

# ---- for two CPU cores: what a front camera sees up to 51 m, voxels of 0.1 m, 64 x 64 cells at the cut, one class, the road at z = 0


def _small_decoder(*anchors: AnchorClass) -> SecondIouConfig:
    return SecondIouConfig(
        anchors=anchors,
        bev=BevBackboneConfig(layers=(2, 2), channels=(48, 64), up_channels=(64, 64)),
        head_channels=96,
        pool_size=5,
        train_proposals=ProposalNms(pre=1024, iou=0.8, post=160),
        test_proposals=ProposalNms(pre=512, iou=0.7, post=80),
        roi_sampling=RoiSampling(count=64),
        iou_target=(0.0, 1.0),
        final=FinalNms(score=0.05),
    )


def _small_pv_rcnn(second: SecondIouDetectorConfig) -> PvRcnnDetectorConfig:
    d = second.decoder
    return PvRcnnDetectorConfig(
        encoder=PvRcnnEncoderConfig(
            voxels=second.encoder,
            keypoints=1024,
            conv1=None,
            conv2=None,
            conv3=SetAbstractionConfig(channels=(32, 32), radii=(0.8, 1.6), limits=(16, 16)),
            conv4=SetAbstractionConfig(channels=(32, 32), radii=(1.6, 3.2), limits=(16, 16)),
        ),
        decoder=PvRcnnConfig(
            anchors=d.anchors,
            bev=d.bev,
            fused_channels=64,
            keypoint_channels=64,
            grid_size=4,
            grid_pooling=SetAbstractionConfig(channels=(32, 32), radii=(0.8, 1.6), limits=(16, 16)),
            head_channels=d.head_channels,
            train_proposals=d.train_proposals,
            test_proposals=d.test_proposals,
            roi_sampling=d.roi_sampling,
            quality_target=d.iou_target,
            final=replace(d.final, iou=0.1),
        ),
    )


SMALL_SECOND_IOU_DETECTOR = SecondIouDetectorConfig(
    encoder=SecondEncoderConfig(
        grid=VoxelGrid(range=(0.0, -25.6, -1.0, 51.2, 25.6, 3.0), voxel_size=(0.1, 0.1, 0.1)),
        point_features=(),
        max_voxels=16_000,
        channels=(8, 16, 32, 32, 64),
    ),
    decoder=_small_decoder(AnchorClass(name="Car", size=(4.2, 2.0, 1.6), bottom_z=0.0, matched=0.55, unmatched=0.40)),
)
SMALL_PV_RCNN_PUBLISHED_DETECTOR = _small_pv_rcnn(SMALL_SECOND_IOU_DETECTOR)
SMALL_PV_RCNN_DETECTOR = coarse_keypoints(SMALL_PV_RCNN_PUBLISHED_DETECTOR, 4)

# Cars, pedestrians and cyclists, up to 32 m ahead. With voxels of 10 cm a cell at the cut is 0.8 m wide, and pedestrians and cyclists look
# alike (docs/adapt.md). So these voxels are finer and the range is shorter. Even then a pedestrian overlaps its best anchor by half at
# most, so an anchor of the two narrow classes becomes positive at a lower IoU than in OpenPCDet.
SMALL_THREE_CLASSES_DETECTOR = replace(
    SMALL_SECOND_IOU_DETECTOR,
    encoder=replace(
        SMALL_SECOND_IOU_DETECTOR.encoder,
        grid=VoxelGrid(range=(0.0, -16.0, -1.0, 32.0, 16.0, 3.0), voxel_size=(0.0625, 0.0625, 0.1)),
        max_voxels=20000,
    ),
    decoder=_small_decoder(
        *SMALL_SECOND_IOU_DETECTOR.decoder.anchors,
        AnchorClass(name="Pedestrian", size=(0.9, 0.8, 1.73), bottom_z=0.0, matched=0.35, unmatched=0.20),
        AnchorClass(name="Cyclist", size=(1.8, 0.8, 1.75), bottom_z=0.0, matched=0.40, unmatched=0.25),
    ),
)

# Real KITTI on two CPU cores: up to 64 m ahead, with intensity, without a z shift.
KITTI_SMALL_SECOND_IOU_DETECTOR = SecondIouDetectorConfig(
    encoder=replace(
        SMALL_SECOND_IOU_DETECTOR.encoder,
        grid=VoxelGrid(range=(0.0, -25.6, -3.0, 64.0, 25.6, 1.0), voxel_size=(0.1, 0.1, 0.1)),
        point_features=("intensity",),
    ),
    decoder=_small_decoder(replace(KITTI_ANCHORS[0], matched=0.55, unmatched=0.40)),
)
KITTI_SMALL_PV_RCNN_DETECTOR = coarse_keypoints(_small_pv_rcnn(KITTI_SMALL_SECOND_IOU_DETECTOR), 4)

# ---- scans of a full turn, in every direction alike, with the road at z = 0. Occupied cells of real full turns (docs/results.md, section 11):
# at most 55,000 of KITTI, 12,000 of nuScenes and 62,000 of Waymo in the small grid; at most 65,000, 16,000 and 76,000 in the large one. The
# limits leave room for other sensors.

FULL_TURN_SMALL_DETECTOR = replace(
    SMALL_SECOND_IOU_DETECTOR,
    encoder=replace(
        SMALL_SECOND_IOU_DETECTOR.encoder,
        # 100 x 100 cells at the cut. Voxels of 0.1 m would make a training step 1.7 times as long.
        grid=VoxelGrid(range=(-51.2, -51.2, -1.0, 51.2, 51.2, 3.0), voxel_size=(0.128, 0.128, 0.1)),
        max_voxels=100_000,
    ),
)
_FULL_TURN_SMALL_PV_RCNN = coarse_keypoints(_small_pv_rcnn(FULL_TURN_SMALL_DETECTOR), 4)
FULL_TURN_SMALL_PV_RCNN_DETECTOR = replace(
    _FULL_TURN_SMALL_PV_RCNN, encoder=replace(_FULL_TURN_SMALL_PV_RCNN.encoder, keypoints=2048)
)

# ST3D's grid, with KITTI's three classes.
FULL_TURN_SECOND_IOU_DETECTOR = replace(
    CROSS_DATASET_SECOND_IOU_DETECTOR,
    encoder=replace(CROSS_DATASET_SECOND_IOU_DETECTOR.encoder, max_voxels=120_000),
    decoder=replace(
        CROSS_DATASET_SECOND_IOU_DETECTOR.decoder, anchors=tuple(replace(anchor, bottom_z=0.0) for anchor in KITTI_ANCHORS)
    ),
)
