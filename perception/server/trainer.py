"""The server's step: learn from a few labelled raw scenes and many unlabelled smashed ones, for any detector.

    labelled frames ── encoder (frozen) ── codec round trip ──────────────┐
                                                                          ├─ one batch ─ student ─ losses
    smashed scenes ─┬─ teacher (EMA) ─ boxes ─ hybrid labels ─┐           │
                    └─────────────────── F-GT paste ──────────┴───────────┘

The two halves go through the student together, so that batch norm sees the mixture it will keep statistics of. The methods that
UpCycling is compared with differ in what ``methods.Method`` says; some learn from raw unlabelled scans, seen by the teacher as they
came and by the student moved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ...core.errors import InvalidInput
from ...core.features import CutFeatures
from ...core.structures import Boxes3D, Frame, Labels, LossTerms, Predictions, labels_of
from ...datasets.augment import Movement
from ...datasets.batches import UnlabeledBatches, UnlabeledScan, epoch_indices
from ..models.detector import Detector
from ..training.ema import make_teacher, update_ema
from ..training.loop import run_steps
from ..training.run_folder import RunFolder
from .feature_augmentation import cut_mix
from .feature_gt import ObjectDatabase, paste_objects, sample_objects
from .feature_rotation import rotate_objects
from .methods import Method
from .pseudo_labels import labels_in_range, pseudo_label_quality, teacher_labels
from .self_training import self_train
from .store import SmashedStore, collate_scenes, quantize_features
from .upcycle_config import UpcycleConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class UpcycleBatch:
    """One step's input: labelled frames, and by method smashed scenes with their ids, raw unlabelled scans, or neither."""

    frames: tuple[Frame, ...]
    smashed: CutFeatures | None = None
    raw: tuple[UnlabeledScan, ...] = ()
    scene_ids: tuple[str, ...] = ()


@dataclass
class _Round:
    """Pseudo labels since the last summary, with the truth where it is known."""

    pseudo: list[Labels] = field(default_factory=list)
    judged: list[tuple[Labels, Labels]] = field(default_factory=list)  # labels with their truth
    pasted: int = 0


def upcycle(
    detector: Detector,
    *,
    method: Method,
    labeled: Callable[[int], tuple[Frame, ...]],
    store: SmashedStore | None,
    pasted_objects: ObjectDatabase | None,
    config: UpcycleConfig,
    scans: UnlabeledBatches | None = None,
    codec: str = "fp16",
    truth: Mapping[str, Labels] | None = None,
    run: RunFolder | None = None,
    after_step: Callable[[int, Detector], None] | None = None,
    workers: int = 0,
    progress: bool = True,
) -> Detector:
    """Train ``detector`` in place by ``method`` and return its EMA teacher, a detector too.

    labelled: the labelled frames of a step (``datasets.batches.LabeledBatches``); for the oracles those of the target.
    store: verified smashed scenes; pasted_objects: F-GT's database, cut from the labelled split by the same encoder.
    scans: the raw unlabelled scans, for the methods that need them.
    truth: labels by scene id (of raw scans: by frame id), only to log how good pseudo labels are; nothing of it reaches training.
    after_step(step, student): called after each 0-based step, to look at the student; it must leave it in training mode.
    Raises InvalidInput if the method needs scenes or a database that are missing, and NonFiniteLoss from the loop.
    """
    if method.unlabeled == "raw" and scans is None:
        raise InvalidInput("this method learns from raw unlabelled scans and has none; give the fleet's prepared dataset")
    if method.unlabeled == "smashed" and (store is None or len(store) == 0):
        raise InvalidInput(
            "this method learns from smashed scenes and the store is empty; run `upcycle3d extract` and `ingest` first"
        )
    if method.f_gt and (pasted_objects is None or len(pasted_objects) == 0):
        raise InvalidInput("F-GT needs a feature database with objects; the labelled split has none with enough points")
    if method.self_training and scans is not None:
        return self_train(
            detector,
            scans,
            config=config.self_training,
            thresholds=config.thresholds,
            batch_size=config.labeled_batch + config.unlabeled_batch,  # as many scenes a step as the other methods
            loop=config.loop,
            ema_decay=config.ema_decay,
            run=run,
            after_step=after_step,
            progress=progress,
        )
    if method.trains != "all":
        detector.freeze_encoder()
    teacher = make_teacher(detector)
    if method.trains == "nothing":
        return teacher
    detector.train()
    seed, this_round = config.loop.seed, _Round()

    def batch_at(step: int) -> UpcycleBatch:
        frames = labeled(step)
        if method.unlabeled == "raw" and scans is not None:
            raw = scans(step)
            return UpcycleBatch(frames=frames, raw=raw, scene_ids=tuple(scan.frame.id for scan in raw))
        if method.unlabeled == "none" or store is None:
            return UpcycleBatch(frames=frames)
        scenes = [store[i] for i in epoch_indices(len(store), config.unlabeled_batch, step, seed)]
        return UpcycleBatch(frames=frames, smashed=collate_scenes(scenes), scene_ids=tuple(s.scene_id for s in scenes))

    def loss(batch: UpcycleBatch, step: int) -> LossTerms:
        split = detector.encode([f.points for f in batch.frames])
        labels = labels_of(batch.frames)
        if method.trains != "all":
            split = quantize_features(split, codec)
        if batch.scene_ids:
            scenes, pseudo = _unlabeled(batch, np.random.default_rng([seed, step, 1]))
            split = CutFeatures.collate([split, *scenes])
            labels += pseudo
        return detector.loss(detector.decode(split, labels), labels)

    def _unlabeled(batch: UpcycleBatch, rng: np.random.Generator) -> tuple[list[CutFeatures], list[Labels]]:
        with torch.no_grad():
            clean = (
                teacher.encode([scan.frame.points for scan in batch.raw])
                if batch.smashed is None
                else batch.smashed.to(next(teacher.parameters()).device)
            )
            predictions = teacher.predict(teacher.decode(clean))
        weight = config.teacher_box_weight
        pseudo = [teacher_labels(p, config.thresholds, trusted=method.trusted, box_weight=weight) for p in predictions]
        this_round.pseudo += pseudo
        if truth is not None:
            grid = clean.spec.grid
            known = [(p, truth[i]) for p, i in zip(pseudo, batch.scene_ids, strict=True) if i in truth]
            this_round.judged += [(p.to("cpu"), labels_in_range(t, grid)) for p, t in known]
        if batch.smashed is None:  # the student sees each raw scan moved, and the teacher's boxes move along
            moved = detector.encode([scan.moved().points for scan in batch.raw])
            return [moved], [
                labels_in_range(_moved(p, s.movement), clean.spec.grid) for p, s in zip(pseudo, batch.raw, strict=True)
            ]
        scenes = [clean.scene(i) for i in range(clean.batch_size)]
        changed = [_change(*pair, rng) for pair in zip(scenes, pseudo, predictions, strict=True)]
        if method.cut_mix:
            order = rng.permutation(len(changed))
            pairs = [(changed[i], changed[j]) for i, j in enumerate(order)]
            changed = [cut_mix(a, labels_a, b, labels_b, rng) for (a, labels_a), (b, labels_b) in pairs]
        return [s for s, _ in changed], [p for _, p in changed]

    def _change(scene: CutFeatures, labels: Labels, found: Predictions, rng: np.random.Generator) -> tuple[CutFeatures, Labels]:
        if method.f_gt and pasted_objects is not None:
            obstacles = Boxes3D(data=found.boxes.data[found.iou_scores >= config.obstacle_score])
            objects = sample_objects(pasted_objects, labels, obstacles, config.f_gt, rng)
            if method.rotate_pasted:
                blocked = torch.cat([labels.boxes.data, obstacles.data])
                objects = rotate_objects(objects, blocked, scene.spec, config.f_gt, limit=method.rotate_pasted, rng=rng)
            this_round.pasted += len(objects)
            scene, labels = paste_objects(scene, labels, objects, config.f_gt, rng)
        return method.augmentation(scene, labels, rng) if method.augmentation else (scene, labels)

    def finish_step(step: int) -> None:
        update_ema(teacher, detector, step, config.ema_decay)
        if method.unlabeled != "none" and (step + 1) % config.round_steps == 0:
            _log_round(this_round, step, run)
        if after_step is not None:
            after_step(step, detector)

    run_steps(
        modules={"student": detector, "teacher": teacher},
        trainable=[p for p in detector.parameters() if p.requires_grad],
        batches=batch_at,
        loss=loss,
        after_step=finish_step,
        config=config.loop,
        run=run,
        frame_ids=lambda batch: [*(f.id for f in batch.frames), *batch.scene_ids],
        workers=workers,
        progress=progress,
    )
    detector.eval()
    return teacher


def _moved(labels: Labels, movement: Movement) -> Labels:
    return replace(labels, boxes=Boxes3D(data=movement.boxes(labels.boxes.data)))


def _log_round(this_round: _Round, step: int, run: RunFolder | None) -> None:
    scenes = max(len(this_round.pseudo), 1)
    used = sum(int((p.weight > 0).sum()) for p in this_round.pseudo)
    values = {
        "labels_per_scene": used / scenes,
        "ignored_per_scene": sum(len(p) for p in this_round.pseudo) / scenes - used / scenes,
        "pasted_per_scene": this_round.pasted / scenes,
    }
    if this_round.judged:
        quality = pseudo_label_quality(*zip(*this_round.judged, strict=True))
        values |= {
            "precision_50": quality.precision_50, "precision_70": quality.precision_70,
            "recall_50": quality.recall_50, "recall_70": quality.recall_70, "mean_iou": quality.mean_iou,
        }  # fmt: skip
    if run is not None:
        run.log(step, values, kind="pseudo_labels")
    log.info("pseudo labels until step %d: %s", step, ", ".join(f"{k} {v:.3f}" for k, v in values.items()))
    this_round.pseudo, this_round.judged, this_round.pasted = [], [], 0
