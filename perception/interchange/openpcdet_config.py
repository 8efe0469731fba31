"""Translates a configuration of OpenPCDet: SECOND, SECOND-IoU and PV-RCNN become our detectors, the rest is listed.

Read next: `config_files.py`, which reads the YAML, and `settings.py`, which knows what was not used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...core.cut import VoxelGrid
from ...core.errors import InvalidInput
from ..models.anchors import AnchorClass
from ..models.decoders.bev import BevBackboneConfig, DenseLossWeights
from ..models.decoders.second_iou import SecondIouConfig
from ..models.detectors import DetectorConfig
from ..models.encoders.second import SecondEncoderConfig
from ..models.encoders.set_abstraction import SetAbstractionConfig
from ..models.post_processing import FinalNms, ProposalNms
from ..models.pv_rcnn import PvRcnnDetectorConfig
from ..models.second_iou import SecondIouDetectorConfig
from ..models.targets import RoiSampling
from .config_files import read_yaml_config
from .settings import ReadConfig, Settings

_STAGES = ("raw_points", "x_conv1", "x_conv2", "x_conv3", "x_conv4")
_WHY: Mapping[str, str] = {
    "": "how training runs; `train` has options of its own",
    "OPTIMIZATION": "weights bring no schedule; the options --train.loop of `train` set one",
    "DATA_CONFIG": "how data is found and read; `prepare` reads it here",
    "DATA_CONFIG.DATA_AUGMENTOR": "augmentation of training; the options --train.augmentation of `train` set it",
    "DATA_CONFIG.DATA_PROCESSOR": "steps of the data loader that are always done here, or never",
    "MODEL.POST_PROCESSING": "evaluation; `evaluate` chooses its protocol and overlaps",
    "MODEL.DENSE_HEAD.LOSS_CONFIG": "weights of losses that are 1 here",
    "MODEL.DENSE_HEAD.TARGET_ASSIGNER_CONFIG": "how anchors learn: always by axis-aligned overlap per class here",
    "MODEL.ROI_HEAD.LOSS_CONFIG": "losses of the second stage, which follow OpenPCDet's own defaults here",
    "MODEL.ROI_HEAD.TARGET_CONFIG": "sampling of the second stage, where OpenPCDet's own default is built in",
    "MODEL.POINT_HEAD": "losses of the keypoint head, which follow OpenPCDet's own defaults here",
}


def read_openpcdet_config(path: str | Path, base: DetectorConfig) -> ReadConfig:
    """Read a configuration of OpenPCDet.

    Args:
        path: the `.yaml` that the weights were trained with.
        base: a detector of the same kind; what the file does not say stays as it is there.

    Returns:
        The detector and what has no counterpart.

    Raises:
        InvalidInput: The file cannot be read, describes a detector that cannot be built here, or one of another kind than `base`.

    Example:
        ```python
        read = read_openpcdet_config("tools/cfgs/kitti_models/second.yaml", KITTI_SECOND_IOU_DETECTOR)
        detector = read.detector.build()
        ```
    """
    settings = Settings(read_yaml_config(path), str(path))
    name = settings.take("MODEL.NAME", str)
    voxels = _encoder(settings)
    if name in ("SECONDNet", "SECONDNetIoU"):
        if not isinstance(base, SecondIouDetectorConfig):
            raise InvalidInput(f"{path} describes {name}; choose a preset of SECOND-IoU, such as kitti_second_iou")
        decoder = _second(settings, base.decoder, second=name == "SECONDNet")
        detector: DetectorConfig = SecondIouDetectorConfig(
            encoder=replace(voxels, channels=base.encoder.channels), decoder=decoder
        )
    elif name == "PVRCNN":
        if not isinstance(base, PvRcnnDetectorConfig):
            raise InvalidInput(f"{path} describes PV-RCNN; choose a preset of it as published, such as kitti_pv_rcnn_published")
        detector = _pv_rcnn(settings, base, replace(voxels, channels=base.encoder.voxels.channels))
    else:
        raise InvalidInput(f"{path} describes {name}; SECONDNet, SECONDNetIoU and PVRCNN can be imported")
    return ReadConfig(detector=detector, left_over=settings.left_over("MODEL", _WHY), without_iou_head=name == "SECONDNet")


def _encoder(settings: Settings) -> SecondEncoderConfig:
    """Grid, point features and limits of the voxels."""
    settings.expect("MODEL.VFE.NAME", "MeanVFE", why="voxels hold the mean of their points here")
    settings.expect("MODEL.BACKBONE_3D.NAME", "VoxelBackBone8x", why="there is this sparse backbone alone")
    settings.expect("MODEL.MAP_TO_BEV.NAME", "HeightCompression", why="columns of cells become channels here")
    steps = settings.names("DATA_CONFIG.DATA_PROCESSOR", "NAME")
    at = next((i for i, name in enumerate(steps) if name == "transform_points_to_voxels"), None)
    if at is None:
        raise InvalidInput(f"{settings.source} makes no voxels (transform_points_to_voxels); such a detector cannot be imported")
    voxels = f"DATA_CONFIG.DATA_PROCESSOR.{at}"
    settings.take(f"{voxels}.NAME", str)
    used = settings.take("DATA_CONFIG.POINT_FEATURE_ENCODING.used_feature_list", list)
    if used[:3] != ["x", "y", "z"]:
        raise InvalidInput(f"{settings.source} reads the point features {used}; x, y, z must come first")
    return SecondEncoderConfig(
        grid=VoxelGrid(
            range=_six(settings.numbers("DATA_CONFIG.POINT_CLOUD_RANGE", 6)),
            voxel_size=_three(settings.numbers(f"{voxels}.VOXEL_SIZE", 3)),
        ),
        point_features=tuple(str(name) for name in used[3:]),
        max_points_per_voxel=settings.take(f"{voxels}.MAX_POINTS_PER_VOXEL", int),
        max_voxels=settings.take(f"{voxels}.MAX_NUMBER_OF_VOXELS.test", int),
    )


def _six(values: tuple[float, ...]) -> tuple[float, float, float, float, float, float]:
    a, b, c, d, e, f = values
    return a, b, c, d, e, f


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    a, b, c = values
    return a, b, c


def _two(values: list[int] | tuple[float, ...]) -> tuple[int, int]:
    a, b = values
    return int(a), int(b)


def _bev(settings: Settings) -> BevBackboneConfig:
    head = "MODEL.BACKBONE_2D"
    settings.expect(f"{head}.NAME", "BaseBEVBackbone", why="there is this 2D backbone alone")
    settings.expect(f"{head}.LAYER_STRIDES", [1, 2], why="the 2D backbone has two blocks of strides 1 and 2")
    settings.expect(f"{head}.UPSAMPLE_STRIDES", [1, 2], why="the 2D backbone has two blocks of strides 1 and 2")
    return BevBackboneConfig(
        layers=_two(settings.numbers(f"{head}.LAYER_NUMS", 2)),
        channels=_two(settings.numbers(f"{head}.NUM_FILTERS", 2)),
        up_channels=_two(settings.numbers(f"{head}.NUM_UPSAMPLE_FILTERS", 2)),
    )


def _anchors(settings: Settings) -> tuple[tuple[AnchorClass, ...], float, DenseLossWeights]:
    """The classes with their anchors, where the direction classifier's first half turn begins, and the weights of the losses."""
    head = "MODEL.DENSE_HEAD"
    settings.expect(f"{head}.NAME", "AnchorHeadSingle", why="there is one anchor head for all classes")
    settings.expect(f"{head}.CLASS_AGNOSTIC", False, why="the anchor head tells classes apart")
    settings.expect(f"{head}.USE_DIRECTION_CLASSIFIER", True, why="the anchor head has a direction classifier")
    settings.expect(f"{head}.NUM_DIR_BINS", 2, why="the direction classifier tells two half turns apart")
    coder = f"{head}.TARGET_ASSIGNER_CONFIG.BOX_CODER"
    settings.expect(coder, "ResidualCoder", why="boxes are coded as residuals")
    turn = settings.take(f"{head}.DIR_OFFSET", float) - math.pi * settings.take(f"{head}.DIR_LIMIT_OFFSET", float, 0.0)
    names = settings.take("CLASS_NAMES", list)
    given = [_anchor(settings, head, i, str(name)) for i, name in enumerate(names)]
    if settings.has(f"{head}.ANCHOR_GENERATOR_CONFIG.{len(names)}") or [a.name for a in given] != names:
        raise InvalidInput(f"{settings.source} must have one anchor for each of CLASS_NAMES {names}, in their order")
    losses = f"{head}.LOSS_CONFIG.LOSS_WEIGHTS"
    weights = DenseLossWeights(
        box=settings.take(f"{losses}.loc_weight", float, 2.0), direction=settings.take(f"{losses}.dir_weight", float, 0.2)
    )
    return tuple(given), turn, weights


def _anchor(settings: Settings, head: str, index: int, name: str) -> AnchorClass:
    """The anchor of a class. Older configurations do not name it and keep the overlaps elsewhere."""
    at = f"{head}.ANCHOR_GENERATOR_CONFIG.{index}"
    limits = f"{head}.TARGET_ASSIGNER_CONFIG"
    if settings.has(f"{limits}.MATCHED_THRESHOLDS"):
        matched, unmatched = f"{limits}.MATCHED_THRESHOLDS.{index}", f"{limits}.UNMATCHED_THRESHOLDS.{index}"
    else:
        matched, unmatched = f"{at}.matched_threshold", f"{at}.unmatched_threshold"
    settings.expect(f"{at}.anchor_rotations", [0, 1.57], why="anchors have the yaws 0 and 1.57")
    settings.expect(f"{at}.align_center", False, why="anchors are spread from one end of the range to the other")
    settings.expect(f"{at}.feature_map_stride", 8, why="anchors stand on cells of 8 x 8 voxels")
    (bottom,) = settings.numbers(f"{at}.anchor_bottom_heights", 1)
    if len(settings.take(f"{at}.anchor_sizes", list)) != 1:
        raise InvalidInput(f"{at}.anchor_sizes in {settings.source} must be one size; a class has one anchor here")
    return AnchorClass(
        name=settings.take(f"{at}.class_name", str, name),
        size=_three(settings.numbers(f"{at}.anchor_sizes.0", 3)),
        bottom_z=bottom,
        matched=settings.take(matched, float),
        unmatched=settings.take(unmatched, float),
    )


def _final(settings: Settings) -> FinalNms:
    at = "MODEL.POST_PROCESSING"
    settings.expect(f"{at}.NMS_CONFIG.MULTI_CLASSES_NMS", False, why="boxes of all classes suppress each other")
    settings.expect(f"{at}.NMS_CONFIG.NMS_TYPE", "nms_gpu", why="suppression is by rotated overlap")
    return FinalNms(
        score=settings.take(f"{at}.SCORE_THRESH", float),
        iou=settings.take(f"{at}.NMS_CONFIG.NMS_THRESH", float),
        pre=settings.take(f"{at}.NMS_CONFIG.NMS_PRE_MAXSIZE", int),
        post=settings.take(f"{at}.NMS_CONFIG.NMS_POST_MAXSIZE", int),
    )


def _proposals(settings: Settings, at: str) -> ProposalNms:
    settings.expect(f"{at}.MULTI_CLASSES_NMS", False, why="proposals of all classes suppress each other")
    settings.expect(f"{at}.NMS_TYPE", "nms_gpu", why="suppression is by rotated overlap")
    return ProposalNms(
        pre=settings.take(f"{at}.NMS_PRE_MAXSIZE", int),
        iou=settings.take(f"{at}.NMS_THRESH", float),
        post=settings.take(f"{at}.NMS_POST_MAXSIZE", int),
    )


def _sampling(settings: Settings) -> tuple[RoiSampling, tuple[float, float]]:
    at = "MODEL.ROI_HEAD.TARGET_CONFIG"
    settings.expect(f"{at}.CLS_SCORE_TYPE", "roi_iou", why="the second stage learns the overlap")
    sampling = RoiSampling(
        count=settings.take(f"{at}.ROI_PER_IMAGE", int),
        foreground_share=settings.take(f"{at}.FG_RATIO", float),
        foreground_iou=settings.take(f"{at}.REG_FG_THRESH", float),
        easy_background_iou=settings.take(f"{at}.CLS_BG_THRESH_LO", float),
        hard_background_share=settings.take(f"{at}.HARD_BG_RATIO", float),
    )
    return sampling, (settings.take(f"{at}.CLS_BG_THRESH", float), settings.take(f"{at}.CLS_FG_THRESH", float))


def _second(settings: Settings, base: SecondIouConfig, *, second: bool) -> SecondIouConfig:
    anchors, turn, weights = _anchors(settings)
    final = _final(settings)
    config = replace(base, anchors=anchors, direction_offset=turn, dense_weights=weights, bev=_bev(settings), final=final)
    if second:  # one suppression, by the score of the class
        return replace(config, ranked_by="class", test_proposals=ProposalNms(pre=final.pre, iou=final.iou, post=final.post))
    head = "MODEL.ROI_HEAD"
    settings.expect(f"{head}.NAME", "SECONDHead", why="the second stage of SECOND-IoU is this one")
    settings.expect(f"{head}.CLASS_AGNOSTIC", True, why="the IoU head serves all classes")
    first, last = _two(settings.numbers(f"{head}.SHARED_FC", 2))
    if {first, last, *settings.take(f"{head}.IOU_FC", list)} != {first}:
        raise InvalidInput(f"{head} in {settings.source} has layers of several widths; all layers of the IoU head have one here")
    sampling, target = _sampling(settings)
    return replace(
        config,
        head_channels=first,
        pool_size=settings.take(f"{head}.ROI_GRID_POOL.GRID_SIZE", int),
        dropout=settings.take(f"{head}.DP_RATIO", float),
        train_proposals=_proposals(settings, f"{head}.NMS_CONFIG.TRAIN"),
        test_proposals=_proposals(settings, f"{head}.NMS_CONFIG.TEST"),
        roi_sampling=sampling,
        iou_target=target,
        iou_weight=settings.take(f"{head}.LOSS_CONFIG.LOSS_WEIGHTS.rcnn_iou_weight", float, 1.0),
    )


def _balls(settings: Settings, at: str) -> SetAbstractionConfig:
    mlps = settings.take(f"{at}.MLPS", list)
    radii = settings.take(f"{at}.POOL_RADIUS", list)
    if not mlps or any(mlp != mlps[0] for mlp in mlps) or len(mlps[0]) != 2 or len(mlps) != len(radii):
        raise InvalidInput(f"{at}.MLPS in {settings.source} is {mlps}; every radius needs two layers of the same widths")
    return SetAbstractionConfig(
        channels=_two(mlps[0]), radii=tuple(map(float, radii)), limits=tuple(settings.take(f"{at}.NSAMPLE", list))
    )


def _pv_rcnn(settings: Settings, base: PvRcnnDetectorConfig, voxels: SecondEncoderConfig) -> PvRcnnDetectorConfig:
    anchors, turn, weights = _anchors(settings)
    pfe, head = "MODEL.PFE", "MODEL.ROI_HEAD"
    settings.expect(f"{pfe}.NAME", "VoxelSetAbstraction", why="keypoints gather from stages of the backbone")
    settings.expect(f"{pfe}.SAMPLE_METHOD", "FPS", why="keypoints are sampled by distance")
    settings.expect(f"{head}.NAME", "PVRCNNHead", why="the second stage of PV-RCNN is this one")
    settings.expect("MODEL.POINT_HEAD.NAME", "PointHeadSimple", why="the keypoint head is this one")
    settings.expect(
        "MODEL.POINT_HEAD.USE_POINT_FEATURES_BEFORE_FUSION", True, why="the keypoint head reads features before fusion"
    )
    sources = settings.take(f"{pfe}.FEATURES_SOURCE", list)
    if unknown := sorted(set(sources) - {"bev", *_STAGES}):
        raise InvalidInput(f"{pfe}.FEATURES_SOURCE in {settings.source} names {unknown}, which keypoints cannot gather from here")
    balls = {name: _balls(settings, f"{pfe}.SA_LAYER.{name}") if name in sources else None for name in _STAGES}
    widths = _two(settings.numbers("MODEL.POINT_HEAD.CLS_FC", 2))
    layers = [settings.take(f"{head}.{name}", list) for name in ("SHARED_FC", "CLS_FC", "REG_FC")]
    if widths[0] != widths[1] or any(layer != [layers[0][0]] * 2 for layer in layers):
        raise InvalidInput(
            f"{settings.source} has heads with layers of several widths; the two layers of a head have one width here"
        )
    if "bev" not in sources:
        raise InvalidInput(
            f"{pfe}.FEATURES_SOURCE in {settings.source} leaves out bev; keypoints carry the BEV map under them here"
        )
    settings.expect(f"{pfe}.POINT_SOURCE", "raw_points", "voxel_centers", why="keypoints are points or centers of voxels")
    from_voxels = settings.take(f"{pfe}.POINT_SOURCE", str, "raw_points") == "voxel_centers"
    encoder = replace(
        base.encoder,
        voxels=voxels,
        keypoints=settings.take(f"{pfe}.NUM_KEYPOINTS", int),
        keypoint_source="voxel_centers" if from_voxels else base.encoder.keypoint_source,
        raw_points=balls["raw_points"],
        conv1=balls["x_conv1"],
        conv2=balls["x_conv2"],
        conv3=balls["x_conv3"],
        conv4=balls["x_conv4"],
    )
    sampling, target = _sampling(settings)
    decoder = replace(
        base.decoder,
        anchors=anchors,
        direction_offset=turn,
        dense_weights=weights,
        bev=_bev(settings),
        fused_channels=settings.take(f"{pfe}.NUM_OUTPUT_FEATURES", int),
        keypoint_channels=widths[0],
        grid_size=settings.take(f"{head}.ROI_GRID_POOL.GRID_SIZE", int),
        grid_pooling=_balls(settings, f"{head}.ROI_GRID_POOL"),
        head_channels=layers[0][0],
        dropout=settings.take(f"{head}.DP_RATIO", float),
        train_proposals=_proposals(settings, f"{head}.NMS_CONFIG.TRAIN"),
        test_proposals=_proposals(settings, f"{head}.NMS_CONFIG.TEST"),
        roi_sampling=sampling,
        quality_target=target,
        final=_final(settings),
    )
    return PvRcnnDetectorConfig(encoder=encoder, decoder=decoder)
