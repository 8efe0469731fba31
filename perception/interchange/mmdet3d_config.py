"""Translates a configuration of mmdetection3d: its SECOND and PV-RCNN become our detectors, the rest is listed.

mmdetection3d counts the classes in another order, keeps a box by the center of its bottom face, and begins the first half turn of the
direction classifier elsewhere. Heights of anchors mean the lower face in both, and boxes are coded alike (the code of the height is taken
between centers in both), so weights need no change for that. Read next: `mmdet3d_weights.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...core.cut import VoxelGrid
from ...core.errors import InvalidInput
from ...core.foreign_text import shown
from ..models.anchors import AnchorClass
from ..models.decoders.bev import BevBackboneConfig, DenseLossWeights
from ..models.detectors import DetectorConfig
from ..models.encoders.second import SecondEncoderConfig
from ..models.encoders.set_abstraction import SetAbstractionConfig
from ..models.post_processing import FinalNms, ProposalNms
from ..models.pv_rcnn import PvRcnnDetectorConfig
from ..models.second_iou import SecondIouDetectorConfig
from ..models.targets import RoiSampling
from .settings import LeftOver, ReadConfig, Settings

_WHY: Mapping[str, str] = {
    "": "how data is read and training runs; `prepare` and `train` have options of their own",
    "model.train_cfg": "how anchors and regions learn; what is not listed as an option of the detector is built in here",
}
_PER_CLASS = LeftOver(
    setting="model.test_cfg (suppression)",
    value="each class by itself",
    why="here boxes of all classes suppress each other: where boxes of two classes overlap, the better one stays",
)


def mmdet3d_classes(values: Mapping[str, Any], meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Find the classes in the order in which weights count them.

    Args:
        values: the configuration.
        meta: what the checkpoint stores beside the weights.

    Returns:
        The names; empty where neither says them.
    """
    described = meta.get("dataset_meta")
    places = [described if isinstance(described, Mapping) else {}, meta, values, values.get("metainfo", {})]
    for place in places:
        for name in ("classes", "CLASSES", "class_names"):
            found = place.get(name) if isinstance(place, Mapping) else None
            if isinstance(found, list | tuple) and found and all(isinstance(entry, str) for entry in found):
                return tuple(found)
    return ()


def read_mmdet3d_config(values: Mapping[str, Any], source: str, classes: Sequence[str], base: DetectorConfig) -> ReadConfig:
    """Translate a configuration of mmdetection3d 1.x.

    Args:
        values: the settings, from `config_files.py`.
        source: where they come from, for messages.
        classes: the classes in the order of the weights.
        base: a detector of the same kind; what the settings do not say stays as it is there, and so does the order of its classes.

    Returns:
        The detector and what has no counterpart.

    Raises:
        InvalidInput: The settings describe a detector that cannot be built here, or one of another kind than `base`.
    """
    settings = Settings(values, source)
    kind = settings.take("model.type", str)
    if kind == "VoxelNet":
        if not isinstance(base, SecondIouDetectorConfig):
            raise InvalidInput(f"{source} describes SECOND; choose a preset of SECOND-IoU, such as kitti_second_iou")
        detector: DetectorConfig = _second(settings, classes, base)
    elif kind == "PointVoxelRCNN":
        if not isinstance(base, PvRcnnDetectorConfig):
            raise InvalidInput(f"{source} describes PV-RCNN; choose a preset of it as published, such as kitti_pv_rcnn_published")
        detector = _pv_rcnn(settings, classes, base)
    else:
        raise InvalidInput(f"{source} describes a {shown(kind)}; VoxelNet (SECOND) and PointVoxelRCNN (PV-RCNN) can be imported")
    left_over = (_PER_CLASS, *settings.left_over("model", _WHY)) if kind == "VoxelNet" else settings.left_over("model", _WHY)
    return ReadConfig(detector=detector, left_over=left_over, without_iou_head=kind == "VoxelNet")


def _encoder(settings: Settings, base: SecondEncoderConfig) -> SecondEncoderConfig:
    """Grid, limits and widths of the sparse backbone."""
    settings.expect("model.voxel_encoder.type", "HardSimpleVFE", why="voxels hold the mean of their points here")
    at = "model.middle_encoder"
    settings.expect(f"{at}.type", "SparseEncoder", why="there is this sparse backbone alone")
    settings.expect(f"{at}.block_type", "conv_module", why="the sparse backbone has plain layers")
    settings.expect(f"{at}.order", ["conv", "norm", "act"], why="norms follow convolutions")
    _check_paddings(settings, f"{at}.encoder_paddings")
    widths = settings.take(f"{at}.encoder_channels", list, [[16], [32, 32, 32], [64, 64, 64], [64, 64, 64]])
    first = settings.take(f"{at}.base_channels", int, 16)
    if [len(stage) for stage in widths] != [1, 3, 3, 3] or any(set(s) != {s[0]} for s in widths) or widths[0][0] != first:
        raise InvalidInput(
            f"{at}.encoder_channels in {settings.source} is {widths}; stages of 1, 3, 3 and 3 equal layers are supported"
        )
    layer = "model.data_preprocessor.voxel_layer" if settings.has("model.data_preprocessor.voxel_layer") else "model.voxel_layer"
    limits = settings.take(f"{layer}.max_voxels", list)
    x0, y0, z0, x1, y1, z1 = settings.numbers(f"{layer}.point_cloud_range", 6)
    dx, dy, dz = settings.numbers(f"{layer}.voxel_size", 3)
    encoder = SecondEncoderConfig(
        grid=VoxelGrid(range=(x0, y0, z0, x1, y1, z1), voxel_size=(dx, dy, dz)),
        point_features=base.point_features,
        max_points_per_voxel=settings.take(f"{layer}.max_num_points", int),
        max_voxels=int(limits[-1]),
        channels=(first, *(int(stage[0]) for stage in widths[1:]), settings.take(f"{at}.output_channels", int, 128)),  # type: ignore[arg-type]
    )
    columns = settings.take(f"{at}.in_channels", int)
    if columns != 3 + len(base.point_features):
        raise InvalidInput(
            f"{settings.source} reads {columns} values per point, and the preset {3 + len(base.point_features)} (x, y, z and its point "
            "features); name the others with --preset.detector.encoder.point-features (…encoder.voxels… for PV-RCNN)"
        )
    z, y, x = encoder.grid.shape
    settings.expect(f"{at}.sparse_shape", [z + 1, y, x], why=f"a grid of {z} x {y} x {x} voxels needs {[z + 1, y, x]}")
    return encoder


def _check_paddings(settings: Settings, path: str) -> None:
    """Only the padding of the first layer of a stage changes anything: the others keep their cells."""
    if not settings.has(path):
        return
    given = settings.take(path, list)
    first = [[p, p, p] if isinstance(p, int) else list(p) for p in (stage[0] for stage in given)]
    if first[1:] != [[1, 1, 1], [1, 1, 1], [0, 1, 1]]:
        raise InvalidInput(f"{path} in {settings.source} is {given}; strided layers are padded by 1, 1 and (0, 1, 1) here")


def _bev(settings: Settings) -> BevBackboneConfig:
    settings.expect("model.backbone.type", "SECOND", why="there is this 2D backbone alone")
    settings.expect("model.neck.type", "SECONDFPN", why="there is this 2D backbone alone")
    settings.expect("model.neck.use_conv_for_no_stride", False, why="blocks are joined by transposed convolutions")
    for path in ("model.backbone.layer_strides", "model.neck.upsample_strides"):
        settings.expect(path, [1, 2], why="the 2D backbone has two blocks of strides 1 and 2")
    pairs = [("model.backbone.layer_nums"), ("model.backbone.out_channels"), ("model.neck.out_channels")]
    layers, channels, up = (tuple(int(v) for v in settings.numbers(path, 2)) for path in pairs)
    return BevBackboneConfig(layers=layers, channels=channels, up_channels=up)  # type: ignore[arg-type]


def _anchors(settings: Settings, head: str, assigner: str, classes: Sequence[str], grid: VoxelGrid) -> tuple[AnchorClass, ...]:
    """The classes with their anchors, in the order of the weights."""
    settings.expect(f"{head}.use_direction_classifier", True, why="the anchor head has a direction classifier")
    settings.expect(f"{head}.diff_rad_by_sin", True, why="yaw is learned as a sine")
    settings.expect(f"{head}.bbox_coder.type", "DeltaXYZWLHRBBoxCoder", why="boxes are coded as residuals")
    settings.expect(f"{head}.loss_cls.use_sigmoid", True, why="each class has a score of its own")
    made = f"{head}.anchor_generator"
    settings.expect(f"{made}.type", "Anchor3DRangeGenerator", why="anchors are spread from one end of the range to the other")
    settings.expect(f"{made}.rotations", [0, 1.57], why="anchors have the yaws 0 and 1.57")
    settings.expect(f"{made}.size_per_range", True, why="every class has one anchor")
    settings.expect(f"{head}.num_classes", len(classes), why=f"there are the classes {', '.join(classes)}")
    sizes, ranges = settings.take(f"{made}.sizes", list), settings.take(f"{made}.ranges", list)
    ranges = ranges * len(sizes) if len(ranges) == 1 else ranges
    limits = settings.take(assigner, list) if settings.is_list(assigner) else [settings.take(assigner, dict)]
    limits = limits * len(sizes) if len(limits) == 1 else limits
    if not len(sizes) == len(ranges) == len(limits) == len(classes):
        raise InvalidInput(f"{settings.source} has {len(sizes)} anchors for {len(classes)} classes; every class needs one")
    x0, y0, _, x1, y1, _ = grid.range
    found = []
    for name, (length, width, height), reach, limit in zip(classes, sizes, ranges, limits, strict=True):
        if max(abs(a - b) for a, b in zip((reach[0], reach[1], reach[3], reach[4]), (x0, y0, x1, y1), strict=True)) > 1e-6:
            raise InvalidInput(
                f"{made}.ranges in {settings.source} is not the range of the points; such anchors cannot be placed here"
            )
        if name.lower() == "car" and length < width:
            raise InvalidInput(
                f"{settings.source} writes a car's width before its length, as mmdetection3d before 1.0 did; its weights turn the other way round and cannot be imported"
            )
        found.append(
            AnchorClass(
                name=name,
                size=(float(length), float(width), float(height)),
                bottom_z=float(reach[2]),
                matched=float(limit["pos_iou_thr"]),
                unmatched=float(limit["neg_iou_thr"]),
            )
        )
    return tuple(found)


def _in_order_of(anchors: tuple[AnchorClass, ...], base: DetectorConfig) -> tuple[AnchorClass, ...]:
    """The anchors in the order and under the names of the base's classes, where these are the same classes."""
    by_name = {anchor.name.lower(): anchor for anchor in anchors}
    if sorted(by_name) != sorted(name.lower() for name in base.class_names):
        return anchors
    return tuple(replace(by_name[name.lower()], name=name) for name in base.class_names)


def _head(settings: Settings, head: str) -> tuple[float, DenseLossWeights]:
    """Where the first half turn begins, and the weights of the losses."""
    turn = settings.take(f"{head}.dir_offset", float, -math.pi / 2)
    turn -= math.pi * settings.take(f"{head}.dir_limit_offset", float, 0.0)
    weights = DenseLossWeights(
        box=settings.take(f"{head}.loss_bbox.loss_weight", float, 2.0),
        direction=settings.take(f"{head}.loss_dir.loss_weight", float, 0.2),
    )
    return turn, weights


def _second(settings: Settings, classes: Sequence[str], base: SecondIouDetectorConfig) -> SecondIouDetectorConfig:
    encoder, head, test = _encoder(settings, base.encoder), "model.bbox_head", "model.test_cfg"
    settings.expect(f"{head}.type", "Anchor3DHead", why="there is one anchor head for all classes")
    anchors = _anchors(settings, head, "model.train_cfg.assigner", classes, encoder.grid)
    turn, weights = _head(settings, head)
    settings.expect(f"{test}.use_rotate_nms", True, why="suppression is by rotated overlap")
    pre, post = settings.take(f"{test}.nms_pre", int), settings.take(f"{test}.max_num", int)
    iou, score = settings.take(f"{test}.nms_thr", float), settings.take(f"{test}.score_thr", float)
    decoder = replace(
        base.decoder,
        anchors=_in_order_of(anchors, base),
        bev=_bev(settings),
        direction_offset=turn,
        dense_weights=weights,
        ranked_by="class",
        test_proposals=ProposalNms(pre=pre, iou=iou, post=post),
        final=FinalNms(score=score, iou=iou, pre=pre, post=post),
    )
    return SecondIouDetectorConfig(encoder=encoder, decoder=decoder)


def _balls(settings: Settings, at: str) -> SetAbstractionConfig:
    settings.expect(f"{at}.use_xyz", True, why="neighbors carry their offsets")
    settings.expect(f"{at}.pool_mod", "max", why="the largest value of a ball is taken")
    mlps, radii = settings.take(f"{at}.mlp_channels", list), settings.take(f"{at}.radius", list)
    if not mlps or len(mlps) != len(radii) or any(tuple(mlp) != tuple(mlps[0]) or len(mlp) != 2 for mlp in mlps):
        raise InvalidInput(f"{at} in {settings.source} has {len(radii)} radii; each needs two layers of the same widths")
    a, b = mlps[0]
    return SetAbstractionConfig(
        channels=(int(a), int(b)), radii=tuple(map(float, radii)), limits=tuple(settings.take(f"{at}.sample_nums", list))
    )


def _pv_rcnn(settings: Settings, classes: Sequence[str], base: PvRcnnDetectorConfig) -> PvRcnnDetectorConfig:
    points, head, roi = "model.points_encoder", "model.rpn_head", "model.roi_head"
    voxels = _encoder(settings, base.encoder.voxels)
    anchors = _anchors(settings, head, "model.train_cfg.rpn.assigner", classes, voxels.grid)
    turn, weights = _head(settings, head)
    settings.expect(f"{points}.type", "VoxelSetAbstraction", why="keypoints gather from stages of the backbone")
    settings.expect(f"{roi}.bbox_head.class_agnostic", True, why="regions are refined alike in all classes")
    stages: dict[int, SetAbstractionConfig] = {}
    for index, scale in enumerate(settings.names(f"{points}.voxel_sa_cfgs_list", "scale_factor")):
        stages[int(scale)] = _balls(settings, f"{points}.voxel_sa_cfgs_list.{index}")
    widths = [
        settings.take(f"{roi}.bbox_head.{name}", list, [256, 256])
        for name in ("shared_fc_channels", "reg_channels", "cls_channels")
    ]
    seg = settings.take(f"{roi}.semantic_head.mlp_channels", list, [256, 256])
    if any(width != [widths[0][0]] * 2 for width in widths) or seg != [seg[0]] * 2:
        raise InvalidInput(
            f"{settings.source} has heads with layers of several widths; the two layers of a head have one width here"
        )
    encoder = replace(
        base.encoder,
        voxels=voxels,
        keypoints=settings.take(f"{points}.num_keypoints", int),
        keypoint_source="voxel_centers"
        if settings.take(f"{points}.voxel_center_as_source", bool, False)
        else base.encoder.keypoint_source,
        raw_points=_balls(settings, f"{points}.rawpoints_sa_cfgs")
        if settings.has(f"{points}.rawpoints_sa_cfgs.radius")
        else None,
        conv1=stages.get(1),
        conv2=stages.get(2),
        conv3=stages.get(4),
        conv4=stages.get(8),
    )
    decoder = replace(
        base.decoder,
        anchors=_in_order_of(anchors, base),
        bev=_bev(settings),
        direction_offset=turn,
        dense_weights=weights,
        fused_channels=settings.take(f"{points}.fused_out_channel", int, 128),
        keypoint_channels=seg[0],
        grid_size=settings.take(f"{roi}.bbox_roi_extractor.grid_size", int, 6),
        grid_pooling=_balls(settings, f"{roi}.bbox_roi_extractor.roi_layer"),
        head_channels=widths[0][0],
        dropout=settings.take(f"{roi}.bbox_head.dropout_ratio", float, 0.3),
        train_proposals=_proposals(settings, "model.train_cfg.rpn_proposal"),
        test_proposals=_proposals(settings, "model.test_cfg.rpn"),
        roi_sampling=_sampling(settings, "model.train_cfg.rcnn.sampler"),
        quality_target=(
            settings.take("model.train_cfg.rcnn.cls_neg_thr", float),
            settings.take("model.train_cfg.rcnn.cls_pos_thr", float),
        ),
        final=replace(
            base.decoder.final,
            score=settings.take("model.test_cfg.rcnn.score_thr", float),
            iou=settings.take("model.test_cfg.rcnn.nms_thr", float),
        ),
    )
    return PvRcnnDetectorConfig(encoder=encoder, decoder=decoder)


def _proposals(settings: Settings, at: str) -> ProposalNms:
    settings.expect(f"{at}.use_rotate_nms", True, why="suppression is by rotated overlap")
    return ProposalNms(
        pre=settings.take(f"{at}.nms_pre", int),
        iou=settings.take(f"{at}.nms_thr", float),
        post=settings.take(f"{at}.nms_post", int),
    )


def _sampling(settings: Settings, at: str) -> RoiSampling:
    settings.expect(f"{at}.type", "IoUNegPiecewiseSampler", why="regions are sampled by overlap")
    hard, _ = settings.numbers(f"{at}.neg_piece_fractions", 2)
    foreground, easy = settings.numbers(f"{at}.neg_iou_piece_thrs", 2)
    return RoiSampling(
        count=settings.take(f"{at}.num", int),
        foreground_share=settings.take(f"{at}.pos_fraction", float),
        foreground_iou=foreground,
        easy_background_iou=easy,
        hard_background_share=hard,
    )
