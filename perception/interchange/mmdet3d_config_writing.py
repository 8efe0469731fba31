"""Writes the configuration of mmdetection3d that goes with exported weights: the shape of its own files, with the numbers of a detector.

`mmdet3d_config.py` reads it back to an equal detector, and `exporting.py` says in sentences what no setting there can say.
"""

from __future__ import annotations

from collections.abc import Sequence
from pprint import pformat
from typing import Any

from ...core.cut import CutSpec, VoxelGrid
from ..models.anchors import ANCHOR_YAWS, AnchorClass
from ..models.decoders.bev import BevBackboneConfig
from ..models.decoders.pv_rcnn import PvRcnnConfig
from ..models.decoders.pv_rcnn_loss import RING
from ..models.decoders.second_iou import SecondIouConfig
from ..models.encoders.pv_rcnn import PvRcnnEncoderConfig
from ..models.encoders.second import SecondEncoderConfig
from ..models.encoders.set_abstraction import SetAbstractionConfig
from ..models.post_processing import ProposalNms
from ..models.pv_rcnn import PvRcnnDetectorConfig
from ..models.second_iou import SecondIouDetectorConfig

_CODER = {"type": "DeltaXYZWLHRBBoxCoder"}
_BOX_LOSS = {"type": "mmdet.SmoothL1Loss", "beta": 1 / 9}
_FOCAL_LOSS = {"type": "mmdet.FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0}


def mmdet3d_settings(
    config: SecondIouDetectorConfig | PvRcnnDetectorConfig, spec: CutSpec, classes: Sequence[str]
) -> dict[str, Any]:
    """Describe a detector in the words of mmdetection3d 1.x.

    Args:
        config: the detector. mmdetection3d has SECOND alone, so an IoU head is not described.
        spec: its cut.
        classes: its classes in the order in which the exported weights count them.

    Returns:
        The settings of its Python file, plain values. Data and schedule are not among them.
    """
    by_name = {anchor.name.lower(): anchor for anchor in config.decoder.anchors}
    anchors = [by_name[name.lower()] for name in classes]
    if isinstance(config, PvRcnnDetectorConfig):
        model = _shared("PointVoxelRCNN", config.encoder.voxels, config.decoder.bev, spec) | _pv_rcnn(config, spec, anchors)
        model["middle_encoder"]["return_middle_feats"] = True
    else:
        model = _shared("VoxelNet", config.encoder, config.decoder.bev, spec) | _second(config, spec.grid, anchors)
    return {
        "default_scope": "mmdet3d",
        "class_names": list(classes),
        "metainfo": {"classes": list(classes)},
        "point_cloud_range": list(spec.grid.range),
        "voxel_size": list(spec.grid.voxel_size),
        "model": model,
    }


def python_text(settings: dict[str, Any]) -> str:
    """Write settings as a Python file of assignments.

    Args:
        settings: plain values by name.

    Returns:
        The text. `config_files.python_config` and mmengine's `Config` read the same values from it.
    """
    return "\n".join(f"{name} = {pformat(value, width=110, sort_dicts=False)}" for name, value in settings.items()) + "\n"


def _shared(kind: str, encoder: SecondEncoderConfig, bev: BevBackboneConfig, spec: CutSpec) -> dict[str, Any]:
    """Voxels, sparse backbone and 2D backbone, which both detectors have."""
    grid, (first, second, third, fourth, last) = encoder.grid, encoder.channels
    z, y, x = grid.shape
    layer = {
        "max_num_points": encoder.max_points_per_voxel,
        "point_cloud_range": list(grid.range),
        "voxel_size": list(grid.voxel_size),
        "max_voxels": (encoder.max_voxels, encoder.max_voxels),
    }
    return {
        "type": kind,
        "data_preprocessor": {"type": "Det3DDataPreprocessor", "voxel": True, "voxel_layer": layer},
        "voxel_encoder": {"type": "HardSimpleVFE", "num_features": 3 + len(encoder.point_features)},
        "middle_encoder": {
            "type": "SparseEncoder",
            "in_channels": 3 + len(encoder.point_features),
            "sparse_shape": [z + 1, y, x],
            "order": ("conv", "norm", "act"),
            "base_channels": first,
            "encoder_channels": ((first,), (second,) * 3, (third,) * 3, (fourth,) * 3),
            "encoder_paddings": ((1,), (1, 1, 1), (1, 1, 1), ((0, 1, 1), 1, 1)),
            "output_channels": last,
        },
        "backbone": {
            "type": "SECOND",
            "in_channels": _map_channels(spec),
            "layer_nums": list(bev.layers),
            "layer_strides": [1, 2],
            "out_channels": list(bev.channels),
        },
        "neck": {
            "type": "SECONDFPN",
            "in_channels": list(bev.channels),
            "upsample_strides": [1, 2],
            "out_channels": list(bev.up_channels),
        },
    }


def _map_channels(spec: CutSpec) -> int:
    return spec.channels * spec.shape[0]


def _anchor_head(
    kind: str, grid: VoxelGrid, decoder: SecondIouConfig | PvRcnnConfig, anchors: Sequence[AnchorClass]
) -> dict[str, Any]:
    x0, y0, _, x1, y1, _ = grid.range
    channels = sum(decoder.bev.up_channels)
    return {
        "type": kind,
        "num_classes": len(anchors),
        "in_channels": channels,
        "feat_channels": channels,
        "use_direction_classifier": True,
        "dir_offset": decoder.direction_offset,
        "dir_limit_offset": 0,
        "anchor_generator": {
            "type": "Anchor3DRangeGenerator",
            "ranges": [[x0, y0, anchor.bottom_z, x1, y1, anchor.bottom_z] for anchor in anchors],
            "sizes": [list(anchor.size) for anchor in anchors],
            "rotations": list(ANCHOR_YAWS),
            "reshape_out": False,
        },
        "diff_rad_by_sin": True,
        "bbox_coder": _CODER.copy(),
        "loss_cls": _FOCAL_LOSS.copy(),
        "loss_bbox": {**_BOX_LOSS, "loss_weight": decoder.dense_weights.box},
        "loss_dir": {"type": "mmdet.CrossEntropyLoss", "use_sigmoid": False, "loss_weight": decoder.dense_weights.direction},
    }


def _assigner(overlap: dict[str, Any], matched: float, unmatched: float) -> dict[str, Any]:
    return {
        "type": "Max3DIoUAssigner",
        "iou_calculator": overlap,
        "pos_iou_thr": matched,
        "neg_iou_thr": unmatched,
        "min_pos_iou": unmatched,
        "ignore_iof_thr": -1,
    }


def _anchor_training(anchors: Sequence[AnchorClass]) -> dict[str, Any]:
    nearest = {"type": "BboxOverlapsNearest3D"}
    assigners = [_assigner(nearest.copy(), anchor.matched, anchor.unmatched) for anchor in anchors]
    return {"assigner": assigners, "allowed_border": 0, "pos_weight": -1, "debug": False}


def _second(config: SecondIouDetectorConfig, grid: VoxelGrid, anchors: Sequence[AnchorClass]) -> dict[str, Any]:
    final = config.decoder.final
    return {
        "bbox_head": _anchor_head("Anchor3DHead", grid, config.decoder, anchors),
        "train_cfg": _anchor_training(anchors),
        "test_cfg": {
            "use_rotate_nms": True,
            "nms_across_levels": False,
            "nms_thr": final.iou,
            "score_thr": final.score,
            "min_bbox_size": 0,
            "nms_pre": final.pre,
            "max_num": final.post,
        },
    }


def _balls(balls: SetAbstractionConfig, in_channels: int) -> dict[str, Any]:
    return {
        "type": "StackedSAModuleMSG",
        "in_channels": in_channels,
        "radius": balls.radii,
        "sample_nums": balls.limits,
        "mlp_channels": tuple(balls.channels for _ in balls.radii),
        "use_xyz": True,
        "pool_mod": "max",
    }


def _keypoints(encoder: PvRcnnEncoderConfig, spec: CutSpec, fused_channels: int) -> dict[str, Any]:
    stages = [
        {**_balls(balls, encoder.voxels.channels[k]), "scale_factor": 2**k}
        for k, balls in enumerate(encoder.stages)
        if balls is not None
    ]
    raw = (
        {}
        if encoder.raw_points is None
        else {"rawpoints_sa_cfgs": _balls(encoder.raw_points, len(encoder.voxels.point_features))}
    )
    return {
        "type": "VoxelSetAbstraction",
        "num_keypoints": encoder.keypoints,
        "fused_out_channel": fused_channels,
        "voxel_size": list(encoder.grid.voxel_size),
        "point_cloud_range": list(encoder.grid.range),
        "voxel_sa_cfgs_list": stages,
        **raw,
        "bev_feat_channel": _map_channels(spec),
        "bev_scale_factor": 8,
        "voxel_center_as_source": encoder.keypoint_source == "voxel_centers",
    }


def _pv_rcnn(config: PvRcnnDetectorConfig, spec: CutSpec, anchors: Sequence[AnchorClass]) -> dict[str, Any]:
    decoder, encoder = config.decoder, config.encoder
    gathered = _map_channels(spec) + sum(b.out_channels for b in (encoder.raw_points, *encoder.stages) if b is not None)
    return {
        "points_encoder": _keypoints(encoder, spec, decoder.fused_channels),
        "rpn_head": {
            **_anchor_head("PartA2RPNHead", spec.grid, decoder, anchors),
            "assigner_per_size": True,
            "assign_per_class": True,
        },
        "roi_head": {
            "type": "PVRCNNRoiHead",
            "num_classes": len(anchors),
            "semantic_head": {
                "type": "ForegroundSegmentationHead",
                "in_channels": gathered,
                "mlp_channels": (decoder.keypoint_channels,) * 2,
                "extra_width": RING / 2,
                "loss_seg": {**_FOCAL_LOSS, "reduction": "sum", "activated": True},
            },
            "bbox_roi_extractor": {
                "type": "Batch3DRoIGridExtractor",
                "grid_size": decoder.grid_size,
                "roi_layer": _balls(decoder.grid_pooling, decoder.fused_channels),
            },
            "bbox_head": _region_head(decoder, len(anchors)),
        },
        "train_cfg": {
            "rpn": _anchor_training(anchors),
            "rpn_proposal": _proposals(decoder.train_proposals),
            "rcnn": _region_training(decoder, len(anchors)),
        },
        "test_cfg": {
            "rpn": _proposals(decoder.test_proposals),
            "rcnn": {
                "use_rotate_nms": True,
                "use_raw_score": True,
                "nms_thr": decoder.final.iou,
                "score_thr": decoder.final.score,
            },
        },
    }


def _region_head(decoder: PvRcnnConfig, classes: int) -> dict[str, Any]:
    widths = (decoder.head_channels,) * 2
    return {
        "type": "PVRCNNBBoxHead",
        "in_channels": decoder.grid_pooling.out_channels,
        "grid_size": decoder.grid_size,
        "num_classes": classes,
        "class_agnostic": True,
        "shared_fc_channels": widths,
        "reg_channels": widths,
        "cls_channels": widths,
        "dropout_ratio": decoder.dropout,
        "with_corner_loss": True,
        "bbox_coder": _CODER.copy(),
        "loss_bbox": {**_BOX_LOSS, "reduction": "sum", "loss_weight": 1.0},
        "loss_cls": {"type": "mmdet.CrossEntropyLoss", "use_sigmoid": True, "reduction": "sum", "loss_weight": 1.0},
    }


def _proposals(nms: ProposalNms) -> dict[str, Any]:
    return {
        "nms_pre": nms.pre,
        "nms_post": nms.post,
        "max_num": nms.post,
        "nms_thr": nms.iou,
        "score_thr": 0,
        "use_rotate_nms": True,
    }


def _region_training(decoder: PvRcnnConfig, classes: int) -> dict[str, Any]:
    sampling, (low, high) = decoder.roi_sampling, decoder.quality_target
    overlap = {"type": "BboxOverlaps3D", "coordinate": "lidar"}
    assigners = [_assigner(overlap.copy(), sampling.foreground_iou, sampling.foreground_iou) for _ in range(classes)]
    return {
        "assigner": assigners,
        "sampler": {
            "type": "IoUNegPiecewiseSampler",
            "num": sampling.count,
            "pos_fraction": sampling.foreground_share,
            "neg_piece_fractions": [sampling.hard_background_share, 1 - sampling.hard_background_share],
            "neg_iou_piece_thrs": [sampling.foreground_iou, sampling.easy_background_iou],
            "neg_pos_ub": -1,
            "add_gt_as_proposals": False,
            "return_iou": True,
        },
        "cls_pos_thr": high,
        "cls_neg_thr": low,
    }
