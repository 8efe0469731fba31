"""ST3D: self-training on raw target scans alone, a method on raw scans that UpCycling's domain adaptation is compared with.

    every `relabel_steps`:  detector ─ boxes of all scans ─ memory ensemble with the labels so far ─ labels
    in between:             labels ─ objects resized, scene moved (further and further) ─ detector

It uses no labeled source data, and every scan has to be uploaded. Source: Yang et al., ST3D, CVPR 2021; the behavior follows its
release (`self_training_utils.py`, `memory_ensemble_utils.py`): a predicted IoU of 0.6 makes a label, boxes between the two
thresholds are ignored, an old box that the detector misses twice in a row is ignored, and after the third time it is removed.

Read next: `pseudo_labels.py`, whose thresholds it shares; `trainer.py` for the other methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...core.frame import Frame, labels_of
from ...core.structures import Labels, LossTerms, Predictions
from ...core.tensor_file import TensorFileKind, read_tensors, write_tensors
from ...datasets.augment import AugmentationRanges, labeled_example
from ...datasets.batches import UnlabeledBatches, epoch_indices
from ...ops.iou3d import iou_bev
from ..models.detector import Detector, unwatched
from ..training.distributed import DistributedContext
from ..training.ema import make_teacher, update_ema
from ..training.loop import run_steps
from ..training.run_folder import RunFolder
from .pseudo_labels import apply_thresholds
from .upcycle_config import ScoreThresholds, SelfTrainingConfig, UpcycleConfig


@dataclass(frozen=True, kw_only=True)
class ScanLabels:
    """Pseudo labels of one scan, with what the memory ensemble has to know about them."""

    boxes: Tensor
    """(N, 7) boxes in the frame of the scan."""

    classes: Tensor
    """(N,) int64 class of each box."""

    scores: Tensor
    """(N,) predicted IoU of each box, 0..1."""

    positive: Tensor
    """(N,) bool, True for a label and False for an ignored box."""

    missed: Tensor
    """(N,) int64, rounds in a row in which the detector found no such box."""

    def labels(self) -> Labels:
        """Return the training labels: positive boxes as the truth, the others ignored."""
        return Labels.make(self.boxes, self.classes, weight=self.positive.float())

    def select(self, rows: Tensor) -> ScanLabels:
        """Keep some of the labels.

        Args:
            rows: Boolean mask (N,) or index.

        Returns:
            The labels of the mask or index, in that order.
        """
        return ScanLabels(**{name: getattr(self, name)[rows] for name in _COLUMNS})


_KIND = TensorFileKind(
    name="round of pseudo labels",
    format="upcycle3d pseudo labels 2",
    advice="remove the file, and the round is made again from the detector as it is then; or start the run in a new folder",
    earlier=(None,),
)
_COLUMNS = ("boxes", "classes", "scores", "positive", "missed")


def scan_labels(found: Predictions, thresholds: Sequence[ScoreThresholds]) -> ScanLabels:
    """Make the labels that a scan has from one round alone.

    Args:
        found: What the detector found in the scan.
        thresholds: One entry per class.

    Returns:
        Positive labels from the label thresholds on, ignored boxes from the ignore threshold on.
    """
    positive, keep = apply_thresholds(found, thresholds)
    return ScanLabels(
        boxes=found.boxes.data[keep],
        classes=found.classes[keep],
        scores=found.iou_scores[keep],
        positive=positive[keep],
        missed=torch.zeros(int(keep.sum()), dtype=torch.int64),
    )


def memory_ensemble(old: ScanLabels, new: ScanLabels, config: SelfTrainingConfig) -> ScanLabels:
    """Merge the labels of two rounds (ST3D, section 3.3.2).

    Of two boxes of one object the one with the higher score stays. An old box that the new round does not have is kept for some
    rounds: first as a label, then ignored.

    Args:
        old: Labels of the scan so far.
        new: Labels of the newest round.
        config: `match_iou`, `ignore_after` and `remove_after` are used.

    Returns:
        As many labels as `new` has, then the old ones that are still waiting.
    """
    overlap = iou_bev(new.boxes, old.boxes) * (new.classes[:, None] == old.classes[None])
    if len(old.boxes) and len(new.boxes):
        best, partner = overlap.max(1)
        old_is_better = (best >= config.match_iou) & (old.scores[partner] > new.scores)
        seen = overlap.amax(0) >= config.match_iou
    else:
        partner = torch.zeros(len(new.boxes), dtype=torch.int64)
        old_is_better = torch.zeros(len(new.boxes), dtype=torch.bool)
        seen = torch.zeros(len(old.boxes), dtype=torch.bool)
    merged = {}
    for name in ("boxes", "scores", "positive"):
        column = getattr(new, name).clone()
        column[old_is_better] = getattr(old, name)[partner[old_is_better]]
        merged[name] = column
    kept = ScanLabels(**merged, classes=new.classes, missed=torch.zeros_like(new.missed))
    waiting = replace(old, missed=old.missed + 1).select(~seen)
    waiting = waiting.select(waiting.missed < config.remove_after)
    waiting = replace(waiting, positive=waiting.positive & (waiting.missed < config.ignore_after))
    return ScanLabels(**{name: torch.cat([getattr(kept, name), getattr(waiting, name)]) for name in _COLUMNS})


@dataclass
class LabelMemory:
    """Labels of every scan, round by round, kept in files so that a resumed training goes on with the same ones."""

    folder: Path | None
    """Folder of one file per round; None keeps the newest round in memory only."""

    writes: bool = True
    """Whether this process writes the files; of several processes only one does, and all read them."""

    rounds: dict[int, list[ScanLabels]] = field(default_factory=dict)
    """The labels of every scan by round; only the newest round that was asked for is held."""

    def get(self, number: int) -> list[ScanLabels] | None:
        """Look up the labels of a round, in memory or in its file.

        Args:
            number: The round, from 0.

        Returns:
            The labels of every scan, or None before the round was made.
        """
        if number not in self.rounds and self.folder is not None and self._path(self.folder, number).exists():
            sizes, *whole = read_tensors(self._path(self.folder, number), _KIND).named("sizes", *_COLUMNS)
            columns = {name: column.split(sizes.tolist()) for name, column in zip(_COLUMNS, whole, strict=True)}
            self.rounds = {number: [ScanLabels(**{n: columns[n][i] for n in _COLUMNS}) for i in range(len(sizes))]}
        return self.rounds.get(number)

    def put(self, number: int, labels: list[ScanLabels]) -> None:
        """Keep the labels of a round, and drop those of other rounds from memory.

        Args:
            number: The round, from 0.
            labels: The labels of every scan.
        """
        self.rounds = {number: labels}
        if self.folder is not None and self.writes:
            tensors = {name: torch.cat([getattr(r, name) for r in labels]) for name in _COLUMNS}
            tensors["sizes"] = torch.tensor([len(r.boxes) for r in labels])
            write_tensors(self._path(self.folder, number), tensors, kind=_KIND)

    @staticmethod
    def _path(folder: Path, number: int) -> Path:
        return folder / f"round_{number:04d}.safetensors"


def widened_ranges(ranges: AugmentationRanges, config: SelfTrainingConfig, done: float) -> AugmentationRanges:
    """Widen the ranges of augmentation as training goes on (the curriculum of ST3D, section 3.4).

    Args:
        ranges: Ranges at the start. `yaw` and `scale` are widened.
        config: `growth`, `growth_at` and `object_scale` are used.
        done: Fraction of training that is over, 0..1.

    Returns:
        Ranges for this part of training, with the widened `object_scale` of `config`.
    """
    factor = config.growth ** sum(done >= at for at in config.growth_at)

    def around_one(limits: tuple[float, float]) -> tuple[float, float]:
        return (1 - (1 - limits[0]) * factor, 1 + (limits[1] - 1) * factor)

    yaw = (ranges.yaw[0] * factor, ranges.yaw[1] * factor)
    return replace(ranges, yaw=yaw, scale=around_one(ranges.scale), object_scale=around_one(config.object_scale))


class SelfTrainingStep:
    """One step of ST3D in three methods: `batch`, `loss` and `finish`. `self_train` gives them to the training loop."""

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        scans: UnlabeledBatches,
        *,
        config: UpcycleConfig,
        run: RunFolder | None = None,
        after_step: Callable[[int, Detector], None] | None = None,
        context: DistributedContext | None = None,
    ) -> None:
        """Keep what every step needs.

        Args:
            student: The network in training. It makes its own labels.
            teacher: Its EMA, for comparison only.
            scans: All raw scans, with the ranges of augmentation at the start. Their batch size is not used.
            config: `self_training`, `thresholds`, `loop` and `ema_decay`. The two halves of a batch of other methods together are the
                number of scans per step.
            run: Run folder that keeps the labels of every round.
            after_step: Called with the step and the student when a step is done.
            context: This process among the others. Every process labels all scans, and trains on its own part of a step.
        """
        self.context = context or DistributedContext()
        self.student, self.teacher, self.scans, self.config = student, teacher, scans, config
        self.run, self.after_step = run, after_step
        self.memory = LabelMemory(None if run is None else run.path / "pseudo_labels", writes=run is not None and run.writable)

    def batch(self, step: int) -> tuple[Frame, ...]:
        """Read and augment the scans of a step, with their labels of the round. Makes the round's labels when they are due.

        Args:
            step: 0-based step.

        Returns:
            Frames labeled by the student as it was at the start of the round.
        """
        scans, config = self.scans, self.config
        part = step * self.context.world_size + self.context.rank
        labels, rng = self.round_labels(step), np.random.default_rng([scans.seed, part, 3])
        ranges = widened_ranges(scans.augmentation, config.self_training, step / config.loop.total_steps)
        rows = epoch_indices(len(scans.frames), config.labeled_batch + config.unlabeled_batch, part, scans.seed)
        examples = [replace(scans.frames[i], labels=labels[i].labels()) for i in rows]
        return tuple(labeled_example(e, rng, ranges, None, self.student.spec.grid.range) for e in examples)

    def round_labels(self, step: int) -> list[ScanLabels]:
        """Get the labels of the round that a step belongs to; the first step of a round makes them, with the student as it is.

        Args:
            step: 0-based step.

        Returns:
            The labels of every scan.
        """
        config = self.config.self_training
        number = step // config.relabel_steps
        found = self.memory.get(number)
        if found is None:
            before = self.memory.get(number - 1) if number else None
            found = self._label_all()
            if before is not None and config.ensemble:
                found = [memory_ensemble(old, new, config) for old, new in zip(before, found, strict=True)]
            self.memory.put(number, found)
            if self.run is not None and self.run.writable:
                labels_per_scene = sum(int(r.positive.sum()) for r in found) / len(found)
                self.run.log(step, {"labels_per_scene": labels_per_scene}, kind="pseudo_labels")
        return found

    def _label_all(self) -> list[ScanLabels]:
        """Label every scan with the student as it is, one by one, in evaluation mode."""
        frames = self.scans.frames
        self.student.eval()
        with unwatched(self.student):  # the job has compared the split
            found = [self.student.detect([frames[i].points])[0].to("cpu") for i in range(len(frames))]
        self.student.train()
        return [scan_labels(p, self.config.thresholds) for p in found]

    def loss(self, batch: tuple[Frame, ...], step: int) -> LossTerms:
        """Compute the losses of a batch.

        Args:
            batch: What `batch` read for this step.
            step: 0-based step.

        Returns:
            Weighted loss terms.
        """
        labels = labels_of(batch)
        features = self.student.encode([f.points for f in batch])
        return self.student.loss(self.student.decode(features, labels), labels)

    def finish(self, step: int) -> None:
        """Update the EMA after the student's optimizer step.

        Args:
            step: The 0-based step that is done.
        """
        update_ema(self.teacher, self.student, step, self.config.ema_decay)
        if self.after_step is not None:
            self.after_step(step, self.student)


def self_train(
    detector: Detector,
    scans: UnlabeledBatches,
    *,
    config: UpcycleConfig,
    run: RunFolder | None = None,
    after_step: Callable[[int, Detector], None] | None = None,
    context: DistributedContext | None = None,
    progress: bool = True,
) -> Detector:
    """Train a whole detector on its own labels of raw scans.

    Batches are made in this process, because a new round of labels needs the student as it is at that step.

    Args:
        detector: The source model. It is trained in place.
        scans: All raw scans of the fleet; labels of their frames are not used.
        config: `self_training`, `thresholds`, `loop`, `ema_decay` and the sizes of the batch.
        run: Run folder for metrics, checkpoints and the labels of every round. A training that was stopped goes on.
        after_step: Called with each 0-based step and the student; it must leave the student in training mode.
        context: This process among the others; None for a single process.
        progress: Whether to print progress.

    Returns:
        The EMA of the detector, for comparison with other methods; ST3D itself has none.
    """
    teacher = make_teacher(detector)
    step = SelfTrainingStep(detector, teacher, scans, config=config, run=run, after_step=after_step, context=context)
    detector.train()
    run_steps(
        modules={"student": detector, "teacher": teacher},
        trainable=[p for p in detector.parameters() if p.requires_grad],
        batches=step.batch,
        loss=step.loss,
        after_step=step.finish,
        config=config.loop,
        run=run,
        frame_ids=lambda batch: [f.id for f in batch],
        context=context,
        progress=progress,
    )
    detector.eval()
    return teacher
