"""Trains the decoder of a carved, pruned or dense detector on labeled frames of several contexts: the same steps for every arm.

Read next: `perception/recipes/carve_contexts.py`, the whole job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from ....core.errors import require, require_counts, require_numbers
from ....core.frame import Frame, labels_of
from ....core.structures import LossTerms
from ...models.detector import Detector
from ...training.loop import LoopConfig, run_steps
from ...training.optim import OneCycle
from .channel_carving import MaskedChannels, in_contexts

LabeledFrames = Callable[[int], tuple[Frame, ...]]
"""Gives the augmented labeled frame of a step, as a tuple of one: `LabeledBatches` with `batch_size=1`."""


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """How long and how fast a decoder is trained."""

    steps: int = 100
    """Optimizer steps."""
    lr: float = 0.001
    """Highest learning rate of the cycle."""
    batch: int = 2
    """Frames per step. Contexts take turns, so a batch holds several."""
    seed: int = 0
    """Decides dropout."""

    def __post_init__(self) -> None:
        require_counts("RecoveryConfig", most=10**8, steps=self.steps)
        require_counts("RecoveryConfig", batch=self.batch)
        require_numbers("RecoveryConfig", least=1e-12, most=10.0, lr=self.lr)


@dataclass(frozen=True, kw_only=True)
class ContextBatch:
    """The frames of one step."""

    frames: tuple[Frame, ...]
    """Labeled frames."""
    contexts: tuple[int, ...]
    """Number of the context of each."""


def batch_of(contexts: Sequence[LabeledFrames], size: int, step: int) -> ContextBatch:
    """Take frames of all contexts in turn.

    Args:
        contexts: Frames of each context.
        size: Frames per step.
        step: Number of the step.

    Returns:
        The batch, which depends on nothing else.
    """
    places = range(size * step, size * (step + 1))
    frames = tuple(contexts[place % len(contexts)](place // len(contexts))[0] for place in places)
    return ContextBatch(frames=frames, contexts=tuple(place % len(contexts) for place in places))


def recover(detector: Detector, contexts: Sequence[LabeledFrames], config: RecoveryConfig, *, progress: bool = False) -> Detector:
    """Train the decoder with the losses of the detector. The encoder is frozen, so smashed scenes stay valid.

    Args:
        detector: What `masked_detector` or `narrow_detector` made, or a dense detector. It is changed.
        contexts: Frames of each context, in the order of the carving.
        config: How long and how fast.
        progress: Whether progress is printed.

    Returns:
        The detector, in evaluation mode.

    Raises:
        InvalidInput: There is no context.
        NonFiniteLoss: The training diverged.
    """
    require(bool(contexts), "a recovery needs labeled frames of one context or more")
    masked = any(isinstance(module, MaskedChannels) for module in detector.decoder.modules())

    def loss(batch: ContextBatch, step: int) -> LossTerms:
        labels = labels_of(batch.frames)
        features = detector.encode([frame.points for frame in batch.frames])
        with in_contexts(detector, batch.contexts) if masked else nullcontext():
            return detector.loss(detector.decode(features, labels), labels)

    detector.freeze_encoder().train()
    run_steps(
        modules={"student": detector},
        trainable=[p for p in detector.decoder.parameters() if p.requires_grad],
        batches=lambda step: batch_of(contexts, config.batch, step),
        loss=loss,
        config=LoopConfig(
            seed=config.seed, optim=OneCycle(lr=config.lr, total_steps=config.steps), log_every=max(1, config.steps // 4)
        ),
        frame_ids=lambda batch: [frame.id for frame in batch.frames],
        progress=progress,
    )
    return detector.eval()
