"""Which frames make up the batch of a step: a pure function of seed and step, so a run that is resumed sees the same batches.

Read next: `augment.py`, which moves the frames; `perception/training/supervised.py` and `perception/server/trainer.py`, which train
on these batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..core.errors import InvalidInput
from ..core.frame import Frame
from .augment import AugmentationRanges, Compose, labeled_example, sample_augmentation
from .frame_source import FrameSource
from .gt_sampling import GtSampler


def epoch_indices(length: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Choose the items of a batch. Every epoch is a new permutation, and a batch may run over the end of an epoch.

    Args:
        length: Number of items.
        batch_size: Items per batch.
        step: Number of the batch, from 0.
        seed: Seed of the permutations.

    Returns:
        `batch_size` positions in 0..length-1.

    Raises:
        InvalidInput: There is no item.
    """
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
    """Batches of augmented labeled frames. Calling it with a step gives that step's frames."""

    frames: FrameSource
    """Labeled frames."""
    batch_size: int
    """Frames per batch."""
    seed: int
    """Seed of the order and of the augmentation."""
    augmentation: AugmentationRanges
    """How far scenes are moved."""
    keep_range: tuple[float, float, float, float, float, float]
    """x0, y0, z0, x1, y1, z1 in m. Boxes whose center leaves it in BEV after augmentation are dropped."""
    gt_sampler: GtSampler | None = None
    """Pastes objects of other scenes; None pastes none."""

    def __call__(self, step: int) -> tuple[Frame, ...]:
        rng = np.random.default_rng([self.seed, step])
        rows = epoch_indices(len(self.frames), self.batch_size, step, self.seed)
        return tuple(labeled_example(self.frames[i], rng, self.augmentation, self.gt_sampler, self.keep_range) for i in rows)


@dataclass(frozen=True, kw_only=True)
class SharedBatches:
    """Batches that take a fixed share of their frames from a second split: few frames that matter as much as many others.

    All frames of the training are counted. Those of the second split are spread evenly, so each batch has its share, rounded, and over the
    training the share is exact.
    """

    first: LabeledBatches
    """Frames one at a time (`batch_size` 1)."""
    second: LabeledBatches
    """Frames of the second split, one at a time."""
    batch_size: int
    """Frames per batch, of both splits together."""
    share: float
    """Share of the frames that come from `second`, 0..1."""

    def __post_init__(self) -> None:
        if self.first.batch_size != 1 or self.second.batch_size != 1:
            raise InvalidInput(
                f"SharedBatches takes frames one at a time; make both parts with batch_size=1, found {self.first.batch_size} and "
                f"{self.second.batch_size}"
            )
        if self.batch_size < 1 or not 0 <= self.share <= 1:
            raise InvalidInput(
                f"SharedBatches needs a batch of at least 1 and a share in 0..1, found {self.batch_size} and {self.share}"
            )

    def __call__(self, step: int) -> tuple[Frame, ...]:
        frames: list[Frame] = []
        for number in range(step * self.batch_size, (step + 1) * self.batch_size):
            before, after = (int(count * self.share) for count in (number, number + 1))
            frames += self.second(before) if after > before else self.first(number - before)
        return tuple(frames)


@dataclass(frozen=True, kw_only=True)
class UnlabeledScan:
    """A raw scan without labels. The teacher sees it unmoved, the student sees it moved."""

    frame: Frame
    """The scan as it was recorded."""
    movement: Compose
    """How the student's view differs; its inverse brings boxes of the student back."""

    def moved(self) -> Frame:
        """Return the frame that the student sees."""
        return self.movement.frame(self.frame)


@dataclass(frozen=True, kw_only=True)
class UnlabeledBatches:
    """Batches of raw unlabeled scans. Only the baselines that train on raw scans use them; UpCycling does not.

    Labels of the frames, if any, are removed.
    """

    frames: FrameSource
    """The fleet's frames."""
    batch_size: int
    """Scans per batch."""
    seed: int
    """Seed of the order and of the movements; the movements differ from those of `LabeledBatches` with the same seed."""
    augmentation: AugmentationRanges
    """How far the student's view is moved."""

    def __call__(self, step: int) -> tuple[UnlabeledScan, ...]:
        rng = np.random.default_rng([self.seed, step, 2])
        rows = epoch_indices(len(self.frames), self.batch_size, step, self.seed)
        bare = [replace(self.frames[i], labels=None) for i in rows]
        return tuple(UnlabeledScan(frame=f, movement=sample_augmentation(rng, self.augmentation)) for f in bare)
