"""Which frames make up the batch of a step: a pure function of (seed, step), so that a resumed run sees what it would have seen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..core.errors import InvalidInput
from ..core.structures import Frame
from .augment import AugmentationRanges, Compose, labeled_example, sample_augmentation
from .frame_source import FrameSource
from .gt_database import GtSampler


def epoch_indices(length: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Rows of ``length`` items for batch ``step``: every epoch is a new permutation, and batches run over epoch ends."""
    if length == 0:
        raise InvalidInput("cannot draw a batch from an empty split; check the split's name and what prepare left out")
    rows: list[int] = []
    position = step * batch_size
    while len(rows) < batch_size:
        epoch, offset = divmod(position, length)
        order = np.random.default_rng([seed, epoch]).permutation(length)
        taken = order[offset : offset + batch_size - len(rows)]
        rows += taken.tolist()
        position += len(taken)
    return rows


@dataclass(frozen=True, kw_only=True)
class LabeledBatches:
    """Augmented labelled frames of every step. Calling it with a step gives that step's frames.

    keep_range: (6,) m; boxes whose centre leaves it after augmentation are dropped.
    """

    frames: FrameSource
    batch_size: int
    seed: int
    augmentation: AugmentationRanges
    keep_range: tuple[float, float, float, float, float, float]
    gt_sampler: GtSampler | None = None

    def __call__(self, step: int) -> tuple[Frame, ...]:
        rng = np.random.default_rng([self.seed, step])
        rows = epoch_indices(len(self.frames), self.batch_size, step, self.seed)
        return tuple(labeled_example(self.frames[i], rng, self.augmentation, self.gt_sampler, self.keep_range) for i in rows)


@dataclass(frozen=True, kw_only=True)
class UnlabeledScan:
    """A raw scan as it came, without labels, and the movement under which the student sees it; its teacher sees it as it came."""

    frame: Frame
    movement: Compose

    def moved(self) -> Frame:
        """What the student sees."""
        return self.movement.frame(self.frame)


@dataclass(frozen=True, kw_only=True)
class UnlabeledBatches:
    """Raw unlabelled scans of every step, for the methods that UpCycling does without. Whatever labels the frames have are dropped."""

    frames: FrameSource
    batch_size: int
    seed: int
    augmentation: AugmentationRanges

    def __call__(self, step: int) -> tuple[UnlabeledScan, ...]:
        rng = np.random.default_rng([self.seed, step, 2])
        rows = epoch_indices(len(self.frames), self.batch_size, step, self.seed)
        bare = [replace(self.frames[i], labels=None) for i in rows]
        return tuple(UnlabeledScan(frame=f, movement=sample_augmentation(rng, self.augmentation)) for f in bare)
