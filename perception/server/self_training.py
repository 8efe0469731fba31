"""ST3D: self-training on raw target scans alone, the raw-level method that UpCycling's domain adaptation is measured against.

    every ``relabel_steps``:  detector ─ boxes of all scans ─ memory ensemble with the labels so far ─ labels
    between:                  labels ─ objects resized, scene moved (further and further) ─ detector

No labelled source data is used, and every scan has to be uploaded. Source: Yang et al., ST3D, CVPR 2021; numbers from its release
(``self_training_utils.py``, ``memory_ensemble_utils.py``): labels from a predicted overlap of 0.6, boxes between the two thresholds ignored,
an old box that the detector misses twice is ignored and after the third time removed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...core.structures import Frame, Labels, LossTerms, Predictions, labels_of
from ...core.tensor_file import read_tensors, write_tensors
from ...datasets.augment import AugmentationRanges, labeled_example
from ...datasets.batches import UnlabeledBatches, epoch_indices
from ...ops.iou3d import iou_bev
from ..models.detector import Detector
from ..training.ema import make_teacher, update_ema
from ..training.loop import LoopConfig, run_steps
from ..training.run_folder import RunFolder
from .pseudo_labels import apply_thresholds
from .upcycle_config import ScoreThresholds, SelfTrainingConfig


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """Labels of one scan: boxes (N, 7), classes (N,), scores (N,), positive (N,) bool or else ignored, missed (N,) rounds in a row."""

    boxes: Tensor
    classes: Tensor
    scores: Tensor
    positive: Tensor
    missed: Tensor

    def labels(self) -> Labels:
        """What the detector is trained on: positive boxes as the truth, the others ignored."""
        return Labels.make(self.boxes, self.classes, weight=self.positive.float())

    def select(self, rows: Tensor) -> Remembered:
        """The labels of a mask or an index."""
        return Remembered(**{name: getattr(self, name)[rows] for name in _COLUMNS})


_COLUMNS = ("boxes", "classes", "scores", "positive", "missed")


def remember(found: Predictions, thresholds: Sequence[ScoreThresholds]) -> Remembered:
    """A round's own labels of one scan: positive from the label thresholds on, ignored from the ignore threshold on."""
    positive, keep = apply_thresholds(found, thresholds)
    return Remembered(
        boxes=found.boxes.data[keep],
        classes=found.classes[keep],
        scores=found.iou_scores[keep],
        positive=positive[keep],
        missed=torch.zeros(int(keep.sum()), dtype=torch.int64),
    )


def ensemble(old: Remembered, new: Remembered, config: SelfTrainingConfig) -> Remembered:
    """Memory ensemble (ST3D, section 3.3.2): of two boxes of one object the higher score; an old box that finds none waits a while."""
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
    kept = Remembered(**merged, classes=new.classes, missed=torch.zeros_like(new.missed))
    waiting = replace(old, missed=old.missed + 1).select(~seen)
    waiting = waiting.select(waiting.missed < config.remove_after)
    waiting = replace(waiting, positive=waiting.positive & (waiting.missed < config.ignore_after))
    return Remembered(**{name: torch.cat([getattr(kept, name), getattr(waiting, name)]) for name in _COLUMNS})


@dataclass
class LabelMemory:
    """Labels of every scan, round by round, kept in files so that a resumed run goes on with the same ones."""

    folder: Path | None
    rounds: dict[int, list[Remembered]] = field(default_factory=dict)

    def get(self, number: int) -> list[Remembered] | None:
        """The labels of a round, from memory or from its file; None before it was made."""
        if number not in self.rounds and self.folder is not None and self._path(number).exists():
            sizes, *whole = read_tensors(self._path(number)).named("sizes", *_COLUMNS)
            columns = {name: column.split(sizes.tolist()) for name, column in zip(_COLUMNS, whole, strict=True)}
            self.rounds = {number: [Remembered(**{n: columns[n][i] for n in _COLUMNS}) for i in range(len(sizes))]}
        return self.rounds.get(number)

    def put(self, number: int, labels: list[Remembered]) -> None:
        """Keep the labels of a round; those of the round before are no longer needed in memory."""
        self.rounds = {number: labels}
        if self.folder is not None:
            tensors = {name: torch.cat([getattr(r, name) for r in labels]) for name in _COLUMNS}
            tensors["sizes"] = torch.tensor([len(r.boxes) for r in labels])
            write_tensors(self._path(number), tensors)

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"round_{number:04d}.safetensors"


def grown(ranges: AugmentationRanges, config: SelfTrainingConfig, done: float) -> AugmentationRanges:
    """The ranges of augmentation when ``done`` (0..1) of training is over: the curriculum of ST3D, section 3.4."""
    factor = config.growth ** sum(done >= at for at in config.growth_at)

    def around_one(limits: tuple[float, float]) -> tuple[float, float]:
        return (1 - (1 - limits[0]) * factor, 1 + (limits[1] - 1) * factor)

    yaw = (ranges.yaw[0] * factor, ranges.yaw[1] * factor)
    return replace(ranges, yaw=yaw, scale=around_one(ranges.scale), object_scale=around_one(config.object_scale))


def self_train(
    detector: Detector,
    scans: UnlabeledBatches,
    *,
    config: SelfTrainingConfig,
    thresholds: Sequence[ScoreThresholds],
    batch_size: int,
    loop: LoopConfig,
    ema_decay: float = 0.999,
    run: RunFolder | None = None,
    after_step: Callable[[int, Detector], None] | None = None,
    progress: bool = True,
) -> Detector:
    """Train all of ``detector`` in place on its own labels of ``scans``, and return its EMA for comparison (ST3D has none).

    batch_size: scans a step. The labels of a round are made when its first step is due, by the network as it is then.
    """
    frames, teacher = scans.frames, make_teacher(detector)
    memory = LabelMemory(run.path / "pseudo_labels" if run is not None and run.writable else None)
    keep_range = detector.spec.grid.range

    def labels_at(step: int) -> list[Remembered]:
        number = step // config.relabel_steps
        found = memory.get(number)
        if found is None:
            before = memory.get(number - 1) if number else None
            found = _label_all(detector, scans, thresholds)
            if before is not None and config.ensemble:
                found = [ensemble(old, new, config) for old, new in zip(before, found, strict=True)]
            memory.put(number, found)
            if run is not None:
                run.log(step, {"labels_per_scene": sum(int(r.positive.sum()) for r in found) / len(found)}, kind="pseudo_labels")
        return found

    def batch_at(step: int) -> tuple[Frame, ...]:
        labels, rng = labels_at(step), np.random.default_rng([scans.seed, step, 3])
        ranges = grown(scans.augmentation, config, step / loop.total_steps)
        rows = epoch_indices(len(frames), batch_size, step, scans.seed)
        examples = [replace(frames[i], labels=labels[i].labels()) for i in rows]
        return tuple(labeled_example(e, rng, ranges, None, keep_range) for e in examples)

    def loss(batch: tuple[Frame, ...], step: int) -> LossTerms:
        labels = labels_of(batch)
        return detector.loss(detector.decode(detector.encode([f.points for f in batch]), labels), labels)

    def finish_step(step: int) -> None:
        update_ema(teacher, detector, step, ema_decay)
        if after_step is not None:
            after_step(step, detector)

    detector.train()
    run_steps(
        modules={"student": detector, "teacher": teacher},
        trainable=[p for p in detector.parameters() if p.requires_grad],
        batches=batch_at,
        loss=loss,
        after_step=finish_step,
        config=loop,
        run=run,
        frame_ids=lambda batch: [f.id for f in batch],
        progress=progress,
    )
    detector.eval()
    return teacher


def _label_all(detector: Detector, scans: UnlabeledBatches, thresholds: Sequence[ScoreThresholds]) -> list[Remembered]:
    """Labels of every scan by the detector as it is, scan by scan, in evaluation mode."""
    detector.eval()
    with torch.no_grad():
        found = [detector.detect([scans.frames[i].points])[0].to("cpu") for i in range(len(scans.frames))]
    detector.train()
    return [remember(p, thresholds) for p in found]
