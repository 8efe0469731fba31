"""Supervised training of a whole detector on labeled frames.

Read next: `loop.py`, which repeats the steps, and `datasets/batches.py`, which makes the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...core.frame import Frame, labels_of
from ...core.structures import LossTerms
from ...datasets.augment import AugmentationRanges
from ..models.detector import Detector
from .distributed import DistributedContext
from .loop import LoopConfig, TrainResult, run_steps
from .run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """How a detector is trained on labeled frames."""

    loop: LoopConfig
    """Steps, optimizer, logging and checkpoints."""

    batch_size: int
    """Frames per step. Lower it when the GPU has too little memory, and the learning rate with it."""

    augmentation: AugmentationRanges
    """How far frames are turned, scaled and flipped."""

    gt_sampling: tuple[int, ...] = ()
    """Number of objects that each scene is filled up to by pasting objects of other frames (GT sampling), one number per class
    in label order. Empty switches it off."""


def train_supervised(
    detector: Detector,
    labeled: Callable[[int], tuple[Frame, ...]],
    config: LoopConfig,
    *,
    run: RunFolder | None = None,
    workers: int = 0,
    context: DistributedContext | None = None,
    after_step: Callable[[int], None] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train a detector in place; it is in evaluation mode afterwards.

    Args:
        detector: The detector, on the device where it trains.
        labeled: `labeled(step)` gives the frames of a 0-based step, of this rank; usually `datasets.batches.LabeledBatches`.
        config: Seed, schedule, clipping, and how often to log and save.
        run: Where metrics and checkpoints go, and where a resumed run continues. None keeps nothing.
        workers: Processes that make batches ahead; the result does not depend on their number.
        context: This process among the others; None for a single process.
        after_step: Called with each 0-based step that is done, to look at the detector. It must leave it in training mode.
        progress: Whether progress is printed.

    Returns:
        Steps, duration and the last losses.

    Raises:
        InvalidInput: A frame has no labels, or the run does not fit the detector.
        NonFiniteLoss: A loss or gradient is not finite; the last good weights are saved.
        Interrupted: Ctrl-C or SIGTERM; the last step is saved.

    Example:
        ```python
        detector = PRESETS["small"].detector.build()
        train_supervised(detector, batches, PRESETS["small"].train.loop)
        ```
    """

    def loss(frames: tuple[Frame, ...], step: int) -> LossTerms:
        labels = labels_of(frames)
        return detector.loss(detector.decode(detector.encode([f.points for f in frames]), labels), labels)

    def finish(step: int) -> Mapping[str, float]:
        if after_step is not None:
            after_step(step)
        return detector.decoder.log_values()

    detector.train()
    result = run_steps(
        modules={"student": detector},
        trainable=[p for p in detector.parameters() if p.requires_grad],
        batches=labeled,
        loss=loss,
        after_step=finish,
        config=config,
        run=run,
        frame_ids=lambda frames: [f.id for f in frames],
        workers=workers,
        context=context,
        progress=progress,
    )
    detector.eval()
    return result
