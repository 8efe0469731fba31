"""Every setting of the server's training, with the text that `upcycle3d upcycle --help` prints.

The settings hold for all methods alike, so that a comparison of methods compares nothing else. What differs between methods
stands in `methods.py`. Presets choose values (`recipes/presets.py`); the command line overrides each field by its path, for
example `--preset.upcycle.f-gt.max-objects 12`. Read next: `trainer.py`, which uses them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import InvalidInput, require_counts, require_numbers
from ...datasets.object_sizes import check_scales, check_shift
from ..training.loop import LoopConfig


@dataclass(frozen=True, kw_only=True)
class ScoreThresholds:
    """The scores from which a teacher's box of one class becomes a pseudo label.

    Both scores are checked, as in 3DIoUMatch (Wang et al., CVPR 2021). The band of ignored boxes below the thresholds comes from
    ST3D (Yang et al., CVPR 2021).
    """

    iou_score: float
    """Minimum predicted IoU of a pseudo label, 0..1. Raise it when the logged precision is low, lower it when recall is low."""

    class_score: float
    """Minimum score of the classifier for a pseudo label, 0..1; 0 ignores the classifier."""

    ignore: float
    """Boxes with a predicted IoU from here up to `iou_score` are ignored: neither object nor background. Not above `iou_score`."""

    def __post_init__(self) -> None:
        if not 0 <= self.ignore <= self.iou_score <= 1:
            raise InvalidInput(
                f"score thresholds need 0 <= ignore <= iou_score <= 1, found ignore {self.ignore} and iou_score {self.iou_score}"
            )


@dataclass(frozen=True, kw_only=True)
class FeatureGtConfig:
    """Which objects F-GT cuts out of labeled scenes, and how many it pastes into unlabeled ones (`feature_gt.py`)."""

    max_objects: tuple[int, ...]
    """How many objects F-GT pastes: one number per class, in the detector's order of classes; 0 pastes none.
    Each unlabeled scene is filled up to this number of objects of the class, pseudo labels included.
    Objects that would overlap another box are left out, so a scene may hold fewer."""

    min_points: int = 5
    """Minimum number of LiDAR points in a labeled object that may be pasted. Raise it when pasted objects are too faint."""

    margin_cells: float = 1.0
    """Cells added on each side of the box when an object's cells are cut out and replaced.
    The strided convolutions spread an object by less than one cell, so 1 takes all of it."""

    keypoint_margin: float = 0.2
    """Meters added to each full size of the box (half on each side) when an object's keypoints are cut out and replaced.
    Only PV-RCNN has keypoints. The default is the margin with which its keypoint head decides what lies in an object."""

    clearance: float = 0.0
    """Meters around a pasted object in which no other box may lie. Pasting clears `margin_cells` beside the box, which may take a strip of
    a neighbor; about the width of a cell keeps every neighbor whole, at the price of fewer pasted objects."""

    size_shift: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Meters added to length, width and height of labeled objects before they are encoded and cut out: three numbers for all classes, or
    three for each class. The labeled half of a batch is resized too.
    Set it when the fleet's objects are known to have another mean size (statistical normalization)."""

    object_scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest factor by which each object is resized at random, after the shift, before it is cut out. (1, 1) resizes none.
    The labeled half of a batch is resized alike. Set it when the sizes of the fleet's objects are not known."""

    side_scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest further factor of each side of such an object alone."""

    def __post_init__(self) -> None:
        check_shift(self.size_shift)
        check_scales(self.object_scale, self.side_scale)
        require_numbers("FeatureGtConfig", least=0.0, most=100.0, clearance=self.clearance)

    @property
    def scales_objects(self) -> bool:
        """Whether objects are resized at random."""
        return (self.object_scale, self.side_scale) != ((1.0, 1.0), (1.0, 1.0))

    def cutting(self) -> dict[str, float | list[float]]:
        """Return the settings that decide which features a database of objects holds, as JSON values; its file records them."""
        scales = {"object_scale": list(self.object_scale), "side_scale": list(self.side_scale)} if self.scales_objects else {}
        return {
            "min_points": self.min_points,
            "margin_cells": self.margin_cells,
            "keypoint_margin": self.keypoint_margin,
            "size_shift": list(self.size_shift),
            **scales,
        }


@dataclass(frozen=True, kw_only=True)
class SelfTrainingConfig:
    """Settings of ST3D (`self_training.py`); only `--method st3d` reads them.

    The defaults are those of its release for SECOND-IoU from Waymo to KITTI, where `relabel_steps` is 2 of 30 epochs.
    """

    relabel_steps: int = 100
    """Steps between two rounds of labels. Each round runs the detector on every scan, so small values are slow."""

    ensemble: bool = True
    """Merge the labels of a round with those of the round before (memory ensemble). False takes the newest labels alone."""

    match_iou: float = 0.1
    """BEV IoU from which an old and a new box of one class are the same object."""

    ignore_after: int = 2
    """Rounds in a row without a match after which an old box is ignored instead of being a label."""

    remove_after: int = 3
    """Rounds in a row without a match after which an old box is forgotten."""

    object_scale: tuple[float, float] = (0.95, 1.05)
    """Lowest and highest factor by which each labeled object is resized at random, at the start of training."""

    growth: float = 1.1
    """Factor by which the ranges of augmentation grow at each fraction in `growth_at`. 1 keeps them as they are."""

    growth_at: tuple[float, ...] = (1 / 6, 1 / 3, 2 / 3, 5 / 6)
    """Fractions of training (0..1) at which the ranges of augmentation grow."""


@dataclass(frozen=True, kw_only=True)
class SizeEstimateConfig:
    """How the sizes of the fleet's objects are estimated (`size_estimate.py`); only `--method upcycling_calibrated` reads it."""

    rounds: int = 2
    """How often sizes are estimated, each time with a student of a short training on objects of all sizes around the last estimate."""
    round_share: float = 0.25
    """Steps of each such short training, as a share of the steps of the run; they come on top of these."""
    draws: int = 6
    """How often each labeled frame is looked at, each time with other sizes."""
    frames: int = 150
    """Labeled frames that are looked at, at most, spread over the split."""
    scenes: int = 300
    """Scenes of the fleet that are looked at, at most, spread over the store."""
    common: float = 0.25
    """Largest logarithm of the factor that is common to the three sides of an object; 0.25 is a factor of 0.78 to 1.28."""
    own: float = 0.12
    """Largest logarithm of the further factor that each side has of its own."""
    iou_score: float = 0.4
    """Detections with a lower predicted IoU are left out."""
    patch: float = 1.1
    """Size of the patch of the map that is read, in units of the mean labeled object. What lies around an object says nothing of its size."""
    ridge: float = 0.1
    """Strength of the ridge regression, in units of the mean squared length of a patch."""
    fewest: int = 40
    """Objects that both sides must show. With fewer, sizes stay as they are."""
    least_error: float = 0.03
    """Error in meters that is assumed at least, however small the bootstrap's is: the sensor and the place add their own."""

    def __post_init__(self) -> None:
        require_counts(
            "SizeEstimateConfig",
            most=1_000_000,
            rounds=self.rounds,
            draws=self.draws,
            frames=self.frames,
            scenes=self.scenes,
            fewest=self.fewest,
        )
        require_numbers("SizeEstimateConfig", least=0.0, most=0.7, common=self.common, own=self.own)
        require_numbers("SizeEstimateConfig", least=0.0, most=1.0, iou_score=self.iou_score, least_error=self.least_error)
        require_numbers("SizeEstimateConfig", least=0.1, most=10.0, patch=self.patch)
        require_numbers("SizeEstimateConfig", least=0.01, most=1.0, round_share=self.round_share)
        require_numbers("SizeEstimateConfig", least=1e-9, most=1e6, ridge=self.ridge)


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """Settings of `upcycle3d upcycle`, the same for every method."""

    loop: LoopConfig
    """Optimizer, number of steps, logging and checkpoints."""

    labeled_batch: int
    """Labeled frames per step."""

    unlabeled_batch: int
    """Unlabeled scenes (or raw scans) per step. Equal to `labeled_batch` in all presets."""

    thresholds: tuple[ScoreThresholds, ...]
    """Scores from which a teacher's box becomes a pseudo label: one entry per class, in the detector's order of classes."""

    f_gt: FeatureGtConfig
    """F-GT: the number of pasted objects (`max_objects`) and how they are cut out."""

    teacher_box_weight: float = 1.0
    """Weight of the box regression losses on the teacher's boxes with hybrid labels.
    Lower it, down to 0, when the teacher finds objects but places their boxes badly; pasted objects then teach the boxes."""

    obstacle_score: float = 0.1
    """No object is pasted over a teacher's box whose predicted IoU is at least this, even if the box is no label.
    There may be an object. Raise it when too few objects are pasted."""

    labeled_as_sent: float = 0.5
    """Share of the labeled scans that pass the encoder's defences as those of the fleet do, 0..1; the others show the decoder everything,
    as on the vehicle that will run it. Only a detector with defences reads it."""

    ema_decay: float = 0.999
    """Upper limit of the EMA decay of the teacher; the decay rises to it as 1 - 1 / (step + 1). Use about 0.99 for a few hundred steps."""

    round_steps: int = 50
    """Steps between two summaries of the pseudo labels in the log."""

    self_training: SelfTrainingConfig = SelfTrainingConfig()
    """Settings of `--method st3d`; the other methods ignore them."""

    sizes: SizeEstimateConfig = SizeEstimateConfig()
    """How `--method upcycling_calibrated` estimates the sizes of the fleet's objects; the other methods ignore it."""
