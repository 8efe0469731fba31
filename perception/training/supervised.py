"""Supervised training of a whole detector on labelled frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...core.structures import Frame, LossTerms, labels_of
from ...datasets.augment import AugmentationRanges
from ..models.detector import Detector
from .distributed import DistributedContext
from .loop import LoopConfig, TrainResult, run_steps
from .run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """loop: steps and optimiser. batch_size: frames a step. gt_sampling: objects of each class a scene is filled up to (none: ())."""

    loop: LoopConfig
    batch_size: int
    augmentation: AugmentationRanges
    gt_sampling: tuple[int, ...] = ()


def train_supervised(
    detector: Detector,
    labeled: Callable[[int], tuple[Frame, ...]],
    config: LoopConfig,
    *,
    run: RunFolder | None = None,
    workers: int = 0,
    context: DistributedContext | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train ``detector`` in place. labelled: the frames of a step (``datasets.batches.LabeledBatches``), of this rank."""

    def loss(frames: tuple[Frame, ...], step: int) -> LossTerms:
        labels = labels_of(frames)
        return detector.loss(detector.decode(detector.encode([f.points for f in frames]), labels), labels)

    detector.train()
    result = run_steps(
        modules={"student": detector},
        trainable=[p for p in detector.parameters() if p.requires_grad],
        batches=labeled,
        loss=loss,
        config=config,
        run=run,
        frame_ids=lambda frames: [f.id for f in frames],
        workers=workers,
        context=context,
        progress=progress,
    )
    detector.eval()
    return result
