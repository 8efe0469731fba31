"""The methods that ``upcycle --method`` offers: what differs between them, and nothing else.

All start from one checkpoint and share steps, labelled batches, teacher and thresholds, so that a difference in their results is
a difference of the method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .feature_augmentation import (
    SceneAugmentation,
    add_noise,
    drop_cells,
    drop_channels,
    flip_x,
    flip_y,
    rotate_free,
    rotate_quarter,
    scale_map,
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What one method does with each part of a step.

    trains: "nothing" (the checkpoint is the result), "decoder" (the encoder is frozen) or "all".
    labelled: whose labels the labelled half of a batch comes from; "target" only for the oracles.
    unlabelled: what joins the batch with teacher boxes: stored "smashed" scenes, or "raw" scans, which a fleet would have to upload.
    trusted: teacher boxes count as the truth for every head (plain pseudo labels) instead of being routed (hybrid).
    f_gt: paste labelled objects' features into unlabelled scenes. rotate_pasted: turn each by up to so much (rad). augmentation: changes each unlabelled scene.
    cut_mix: mix pairs of unlabelled scenes. self_training: ST3D instead of this trainer, on raw scans without labelled data.
    """

    summary: str
    trains: Literal["nothing", "decoder", "all"] = "decoder"
    labeled: Literal["source", "target"] = "source"
    unlabeled: Literal["none", "smashed", "raw"] = "smashed"
    trusted: bool = False
    f_gt: bool = False
    rotate_pasted: float = 0.0
    augmentation: SceneAugmentation | None = None
    cut_mix: bool = False
    self_training: bool = False


METHODS: dict[str, Method] = {
    "source_only": Method(summary="the checkpoint as it is", trains="nothing", unlabeled="none"),
    "source_continued": Method(summary="the same extra steps on labelled data alone", unlabeled="none"),
    "pseudo_label": Method(summary="teacher boxes supervise every head, no F-GT", trusted=True),
    "upcycling": Method(summary="hybrid pseudo labels and F-GT", f_gt=True),
    "hybrid": Method(summary="hybrid pseudo labels, no F-GT"),
    "f_gt_trusted": Method(summary="F-GT, teacher boxes supervise every head", trusted=True, f_gt=True),
    "f_rot": Method(
        summary="UpCycling with the pasted objects turned (our reading of F-RoT)", f_gt=True, rotate_pasted=math.pi / 16
    ),
    "noise": Method(summary="hybrid labels, Gaussian noise on features", augmentation=add_noise),
    "channel_dropout": Method(summary="hybrid labels, channels dropped", augmentation=drop_channels),
    "cell_dropout": Method(summary="hybrid labels, cells dropped", augmentation=drop_cells),
    "flip_x": Method(summary="hybrid labels, front-back flip of features", augmentation=flip_x),
    "flip_y": Method(summary="hybrid labels, left-right flip of features", augmentation=flip_y),
    "rotate_90": Method(summary="hybrid labels, quarter turns of features", augmentation=rotate_quarter),
    "rotate": Method(summary="hybrid labels, free rotation of features", augmentation=rotate_free),
    "scale": Method(summary="hybrid labels, scaled feature map", augmentation=scale_map),
    "cut_mix": Method(summary="hybrid labels, halves of two scenes", cut_mix=True),
    "mean_teacher": Method(summary="raw scans, teacher boxes supervise every head", unlabeled="raw", trains="all", trusted=True),
    "iou_match": Method(summary="raw scans, hybrid pseudo labels (as 3DIoUMatch)", unlabeled="raw", trains="all"),
    "st3d": Method(
        summary="ST3D: self-training on raw scans alone", unlabeled="raw", trains="all", trusted=True, self_training=True
    ),
    "oracle_frozen": Method(summary="source encoder, decoder trained on target labels", labeled="target", unlabeled="none"),
    "oracle_full": Method(summary="everything trained on target labels", trains="all", labeled="target", unlabeled="none"),
}
