"""Writes the configuration of OpenPCDet that goes with exported weights: the shape of its own files, with the numbers of a detector.

`openpcdet_config.py` reads it back to an equal detector, and `exporting.py` says in sentences what no setting there can say.
"""

from __future__ import annotations

from typing import Any

from ...core.cut import CutSpec
from ..models.anchors import ANCHOR_YAWS
from ..models.decoders.pv_rcnn import PvRcnnConfig
from ..models.decoders.pv_rcnn_loss import RING
from ..models.decoders.second_iou import SecondIouConfig
from ..models.encoders.pv_rcnn import PvRcnnEncoderConfig
from ..models.encoders.second import SecondEncoderConfig
from ..models.encoders.set_abstraction import SetAbstractionConfig
from ..models.post_processing import FinalNms, ProposalNms
from ..models.pv_rcnn import PvRcnnDetectorConfig
from ..models.second_iou import SecondIouDetectorConfig
from ..models.targets import RoiSampling

_CODE = [1.0] * 7
"""Weights of the seven numbers of a box in its loss."""


def openpcdet_settings(config: SecondIouDetectorConfig | PvRcnnDetectorConfig, spec: CutSpec) -> dict[str, Any]:
    """Describe a detector in OpenPCDet's words.

    Args:
        config: the detector. A SECOND-IoU that ranks boxes by class is SECOND there.
        spec: its cut.

    Returns:
        The settings of its YAML, plain values. Data is read by its `CustomDataset`; a schedule (`OPTIMIZATION`) is not among them.
    """
    if isinstance(config, PvRcnnDetectorConfig):
        encoder, name = config.encoder.voxels, "PVRCNN"
        stages = {"PFE": _keypoints(config.encoder, config.decoder), "POINT_HEAD": _point_head(config.decoder)}
        stages |= {"ROI_HEAD": _region_head(config.decoder)}
    else:
        second = config.decoder.ranked_by == "class"
        encoder, name = config.encoder, "SECONDNet" if second else "SECONDNetIoU"
        stages = {} if second else {"ROI_HEAD": _iou_head(config.decoder)}
    bev = config.decoder.bev
    model = {
        "NAME": name,
        "VFE": {"NAME": "MeanVFE"},
        "BACKBONE_3D": {"NAME": "VoxelBackBone8x"},
        "MAP_TO_BEV": {"NAME": "HeightCompression", "NUM_BEV_FEATURES": spec.channels * spec.shape[0]},
        "BACKBONE_2D": {
            "NAME": "BaseBEVBackbone",
            "LAYER_NUMS": list(bev.layers),
            "LAYER_STRIDES": [1, 2],
            "NUM_FILTERS": list(bev.channels),
            "UPSAMPLE_STRIDES": [1, 2],
            "NUM_UPSAMPLE_FILTERS": list(bev.up_channels),
        },
        "DENSE_HEAD": _dense_head(config.decoder),
        **stages,
        "POST_PROCESSING": {
            "RECALL_THRESH_LIST": [0.3, 0.5, 0.7],
            "SCORE_THRESH": config.decoder.final.score,
            "OUTPUT_RAW_SCORE": False,
            "EVAL_METRIC": "kitti",
            "NMS_CONFIG": _nms(config.decoder.final),
        },
    }
    return {"CLASS_NAMES": list(config.class_names), "DATA_CONFIG": _data(encoder, config.class_names), "MODEL": model}


def _data(encoder: SecondEncoderConfig, classes: tuple[str, ...]) -> dict[str, Any]:
    """Where data lies, as `export infos openpcdet` writes it, and how points become voxels."""
    columns = ["x", "y", "z", *encoder.point_features]
    return {
        "DATASET": "CustomDataset",
        "DATA_PATH": "../data/custom",
        "POINT_CLOUD_RANGE": list(encoder.grid.range),
        "MAP_CLASS_TO_KITTI": {name: name for name in classes},
        "DATA_SPLIT": {"train": "train", "test": "val"},
        "INFO_PATH": {"train": ["custom_infos_train.pkl"], "test": ["custom_infos_val.pkl"]},
        "POINT_FEATURE_ENCODING": {
            "encoding_type": "absolute_coordinates_encoding",
            "used_feature_list": columns,
            "src_feature_list": columns.copy(),
        },
        "DATA_AUGMENTOR": {"DISABLE_AUG_LIST": ["placeholder"], "AUG_CONFIG_LIST": []},
        "DATA_PROCESSOR": [
            {"NAME": "mask_points_and_boxes_outside_range", "REMOVE_OUTSIDE_BOXES": True},
            {"NAME": "shuffle_points", "SHUFFLE_ENABLED": {"train": True, "test": False}},
            {
                "NAME": "transform_points_to_voxels",
                "VOXEL_SIZE": list(encoder.grid.voxel_size),
                "MAX_POINTS_PER_VOXEL": encoder.max_points_per_voxel,
                "MAX_NUMBER_OF_VOXELS": {"train": encoder.max_voxels, "test": encoder.max_voxels},
            },
        ],
    }


def _dense_head(decoder: SecondIouConfig | PvRcnnConfig) -> dict[str, Any]:
    anchors = [
        {
            "class_name": anchor.name,
            "anchor_sizes": [list(anchor.size)],
            "anchor_rotations": list(ANCHOR_YAWS),
            "anchor_bottom_heights": [anchor.bottom_z],
            "align_center": False,
            "feature_map_stride": 8,
            "matched_threshold": anchor.matched,
            "unmatched_threshold": anchor.unmatched,
        }
        for anchor in decoder.anchors
    ]
    weights = {"loc_weight": decoder.dense_weights.box, "dir_weight": decoder.dense_weights.direction}
    return {
        "NAME": "AnchorHeadSingle",
        "CLASS_AGNOSTIC": False,
        "USE_DIRECTION_CLASSIFIER": True,
        "DIR_OFFSET": decoder.direction_offset,
        "DIR_LIMIT_OFFSET": 0.0,
        "NUM_DIR_BINS": 2,
        "ANCHOR_GENERATOR_CONFIG": anchors,
        "TARGET_ASSIGNER_CONFIG": {
            "NAME": "AxisAlignedTargetAssigner",
            "POS_FRACTION": -1.0,
            "SAMPLE_SIZE": 512,
            "NORM_BY_NUM_EXAMPLES": False,
            "MATCH_HEIGHT": False,
            "BOX_CODER": "ResidualCoder",
        },
        "LOSS_CONFIG": {"LOSS_WEIGHTS": {"cls_weight": 1.0, **weights, "code_weights": _CODE.copy()}},
    }


def _nms(nms: ProposalNms | FinalNms) -> dict[str, Any]:
    return {
        "NMS_TYPE": "nms_gpu",
        "MULTI_CLASSES_NMS": False,
        "NMS_PRE_MAXSIZE": nms.pre,
        "NMS_POST_MAXSIZE": nms.post,
        "NMS_THRESH": nms.iou,
    }


def _second_stage(decoder: SecondIouConfig | PvRcnnConfig, target: tuple[float, float]) -> dict[str, Any]:
    """What the heads of both detectors have in common."""
    sampling: RoiSampling = decoder.roi_sampling
    return {
        "CLASS_AGNOSTIC": True,
        "SHARED_FC": [decoder.head_channels] * 2,
        "DP_RATIO": decoder.dropout,
        "NMS_CONFIG": {"TRAIN": _nms(decoder.train_proposals), "TEST": _nms(decoder.test_proposals)},
        "TARGET_CONFIG": {
            "BOX_CODER": "ResidualCoder",
            "ROI_PER_IMAGE": sampling.count,
            "FG_RATIO": sampling.foreground_share,
            "SAMPLE_ROI_BY_EACH_CLASS": True,
            "CLS_SCORE_TYPE": "roi_iou",
            "CLS_FG_THRESH": target[1],
            "CLS_BG_THRESH": target[0],
            "CLS_BG_THRESH_LO": sampling.easy_background_iou,
            "HARD_BG_RATIO": sampling.hard_background_share,
            "REG_FG_THRESH": sampling.foreground_iou,
        },
    }


def _iou_head(decoder: SecondIouConfig) -> dict[str, Any]:
    return {
        "NAME": "SECONDHead",
        **_second_stage(decoder, decoder.iou_target),
        "IOU_FC": [decoder.head_channels] * 2,
        "ROI_GRID_POOL": {"GRID_SIZE": decoder.pool_size, "IN_CHANNEL": sum(decoder.bev.up_channels), "DOWNSAMPLE_RATIO": 8},
        "LOSS_CONFIG": {
            "IOU_LOSS": "BinaryCrossEntropy",
            "LOSS_WEIGHTS": {"rcnn_iou_weight": decoder.iou_weight, "code_weights": _CODE.copy()},
        },
    }


def _balls(balls: SetAbstractionConfig) -> dict[str, Any]:
    return {
        "MLPS": [list(balls.channels) for _ in balls.radii],
        "POOL_RADIUS": list(balls.radii),
        "NSAMPLE": list(balls.limits),
    }


def _keypoints(encoder: PvRcnnEncoderConfig, decoder: PvRcnnConfig) -> dict[str, Any]:
    """The stages that keypoints gather from. Which half computes the map under them makes no difference there."""
    layers = {"raw_points": _balls(encoder.raw_points)} if encoder.raw_points is not None else {}
    for k, balls in enumerate(encoder.stages):
        if balls is not None:
            layers[f"x_conv{k + 1}"] = {"DOWNSAMPLE_FACTOR": 2**k, "INPUT_CHANNELS": encoder.voxels.channels[k], **_balls(balls)}
    return {
        "NAME": "VoxelSetAbstraction",
        "POINT_SOURCE": encoder.keypoint_source,
        "NUM_KEYPOINTS": encoder.keypoints,
        "NUM_OUTPUT_FEATURES": decoder.fused_channels,
        "SAMPLE_METHOD": "FPS",
        "FEATURES_SOURCE": ["bev", *layers],
        "SA_LAYER": layers,
    }


def _point_head(decoder: PvRcnnConfig) -> dict[str, Any]:
    return {
        "NAME": "PointHeadSimple",
        "CLS_FC": [decoder.keypoint_channels] * 2,
        "CLASS_AGNOSTIC": True,
        "USE_POINT_FEATURES_BEFORE_FUSION": True,
        "TARGET_CONFIG": {"GT_EXTRA_WIDTH": [RING] * 3},
        "LOSS_CONFIG": {"LOSS_REG": "smooth-l1", "LOSS_WEIGHTS": {"point_cls_weight": 1.0}},
    }


def _region_head(decoder: PvRcnnConfig) -> dict[str, Any]:
    return {
        "NAME": "PVRCNNHead",
        **_second_stage(decoder, decoder.quality_target),
        "CLS_FC": [decoder.head_channels] * 2,
        "REG_FC": [decoder.head_channels] * 2,
        "ROI_GRID_POOL": {"GRID_SIZE": decoder.grid_size, **_balls(decoder.grid_pooling), "POOL_METHOD": "max_pool"},
        "LOSS_CONFIG": {
            "CLS_LOSS": "BinaryCrossEntropy",
            "REG_LOSS": "smooth-l1",
            "CORNER_LOSS_REGULARIZATION": True,
            "LOSS_WEIGHTS": {
                "rcnn_cls_weight": 1.0,
                "rcnn_reg_weight": 1.0,
                "rcnn_corner_weight": 1.0,
                "code_weights": _CODE.copy(),
            },
        },
    }
