"""The server's training: a detector learns from a few labeled frames and many unlabeled smashed scenes.

    labeled frames ── encoder (frozen) ── codec round trip ───────────────┐
                                                                          ├─ one batch ─ student ─ losses
    smashed scenes ─┬─ teacher (EMA) ─ boxes ─ hybrid labels ─┐           │
                    └─────────────────── F-GT paste ──────────┴───────────┘

Both halves go through the student together, so that batch norm sees the mixture whose statistics it keeps. The methods that UpCycling
is compared with differ in their `Method`. Some train on raw unlabeled scans, which the teacher sees as they came and the student
moved. Nothing here depends on which detector it is.

Read next: `unlabeled_half.py` (pseudo labels and F-GT), `methods.py` (all methods), `upcycle_config.py` (all settings).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ...core.errors import InvalidInput
from ...core.features import CutFeatures
from ...core.frame import Frame, labels_of
from ...core.structures import Labels, LossTerms, PointCloud
from ...datasets.batches import UnlabeledBatches, UnlabeledScan, epoch_indices
from ..models.detector import Detector
from ..training.distributed import DistributedContext
from ..training.ema import make_teacher, update_ema
from ..training.loop import run_steps
from ..training.run_folder import RunFolder
from .feature_gt import ObjectDatabase
from .joined_stores import FleetScenes
from .methods import Method
from .pseudo_label_monitor import PseudoLabelMonitor
from .self_training import self_train
from .store import collate_scenes, quantize_features
from .unlabeled_half import UnlabeledHalf, raw_half, smashed_half
from .upcycle_config import UpcycleConfig
from .uploaded import features_as_uploaded, only_seen

_Given = TypeVar("_Given")


@dataclass(frozen=True, kw_only=True)
class UnlabeledBatch:
    """Unlabeled scenes of one step, as they came."""

    scenes: CutFeatures | tuple[UnlabeledScan, ...]
    """Smashed scenes as one batch on the CPU, or raw scans."""

    ids: tuple[str, ...]
    """Id of each scene, or the frame's id of each scan, in the same order."""


@dataclass(frozen=True, kw_only=True)
class UpcycleBatch:
    """Input of one step."""

    frames: tuple[Frame, ...]
    """Labeled frames, already augmented."""

    unlabeled: UnlabeledBatch | None = None
    """The unlabeled half; None for methods that train on labeled frames alone."""

    def ids(self) -> tuple[str, ...]:
        """Return the ids of all frames and scenes, for messages."""
        return (*(f.id for f in self.frames), *(self.unlabeled.ids if self.unlabeled else ()))


class UpcyclingStep:
    """One training step in three methods: `batch`, `loss` and `finish`. `upcycle` gives them to the training loop.

    Example:
        step = UpcyclingStep(student, teacher, method=method, config=config, labeled=labeled, unlabeled=unlabeled, monitor=monitor)
        step.loss(step.batch(0), 0).total().backward()
    """

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        *,
        method: Method,
        config: UpcycleConfig,
        labeled: Callable[[int], tuple[Frame, ...]],
        unlabeled: Callable[[int], UnlabeledBatch | None],
        monitor: PseudoLabelMonitor,
        pasted_objects: ObjectDatabase | None = None,
        codec: str = "fp16",
        after_step: Callable[[int, Detector], None] | None = None,
        context: DistributedContext | None = None,
    ) -> None:
        """Keep what every step needs.

        Args:
            student: The network in training.
            teacher: Its EMA, in evaluation mode.
            method: What is trained, and what happens to the unlabeled half.
            config: Settings that all methods share.
            labeled: Gives the labeled frames of a step.
            unlabeled: Gives the unlabeled half of a step (`unlabeled_reader`).
            monitor: Collects the pseudo labels for the log.
            pasted_objects: Objects that F-GT pastes; None pastes nothing.
            codec: Codec whose round trip the labeled features pass where the encoder is frozen.
            after_step: Called with the step and the student when a step is done.
            context: This process among the others; each reads, labels and pastes its own part of a step.
        """
        self.context = context or DistributedContext()
        self.student, self.teacher = student, teacher
        self.method, self.config = method, config
        self.labeled, self.unlabeled, self.pasted_objects = labeled, unlabeled, pasted_objects
        self.monitor, self.codec, self.after_step = monitor, codec, after_step

    def batch(self, step: int) -> UpcycleBatch:
        """Read the batch of a step. The loop may call this ahead, in another process.

        Args:
            step: 0-based step.

        Returns:
            Labeled frames and unlabeled scenes of this process, on the CPU.
        """
        part = self._part(step)
        return UpcycleBatch(frames=self.labeled(part), unlabeled=self.unlabeled(part))

    def _part(self, step: int) -> int:
        """Number of this process's part of a step, counted over all steps and processes; the step itself for a single process."""
        return step * self.context.world_size + self.context.rank

    def loss(self, batch: UpcycleBatch, step: int) -> LossTerms:
        """Compute the losses of a batch: both halves through the student at once.

        Args:
            batch: What `batch` read for this step.
            step: 0-based step, from which everything random is drawn.

        Returns:
            Weighted loss terms.
        """
        features, labels = self.labeled_half(batch.frames)
        if batch.unlabeled is not None:
            half = self.unlabeled_half(batch.unlabeled, step)
            self.monitor.add(half, batch.unlabeled.ids)
            features = CutFeatures.collate([features, half.features])
            labels = [*labels, *half.labels]
        return self.student.loss(self.student.decode(features, labels), labels)

    def labeled_half(self, frames: tuple[Frame, ...]) -> tuple[CutFeatures, list[Labels]]:
        """Encode labeled frames as a vehicle would: where the encoder is frozen, their features pass defences and codec too.

        Args:
            frames: Labeled frames.

        Returns:
            Features of all frames, and the labels of each.

        Raises:
            InvalidInput: A frame has no labels.
        """
        labels = labels_of(frames)
        points = [f.points for f in frames]
        if self.method.trains == "all":
            return self.student.encode(points), labels
        if not self.student.encoder.defended:
            return quantize_features(self.student.encode(points), self.codec), labels
        return self._defended_half(points, labels)

    def _defended_half(self, points: list[PointCloud], labels: list[Labels]) -> tuple[CutFeatures, list[Labels]]:
        """Some scans as a vehicle sends them, the others as its own decoder sees them, so that no context is missed."""
        sent = torch.rand(len(points)) < self.config.labeled_as_sent
        scenes, known = [], []
        for scan, truth, as_sent in zip(points, labels, sent.tolist(), strict=True):
            if as_sent:
                scene = features_as_uploaded(self.student, [scan], self.codec)
            else:
                scene = quantize_features(self.student.encode([scan]), self.codec)
            partial = as_sent and not self.student.encoder.sends_everywhere
            scenes.append(scene)
            known.append(only_seen(truth.to(scene.voxels.coords.device), scene) if partial else truth)
        return CutFeatures.collate(scenes), known

    def unlabeled_half(self, unlabeled: UnlabeledBatch, step: int) -> UnlabeledHalf:
        """Make pseudo labels, paste and augment.

        Args:
            unlabeled: Smashed scenes or raw scans.
            step: 0-based step, from which everything random is drawn.

        Returns:
            Features for the student, with labels.
        """
        method, config, scenes = self.method, self.config, unlabeled.scenes
        if isinstance(scenes, CutFeatures):
            rng = np.random.default_rng([config.loop.seed, self._part(step), 1])
            with torch.no_grad():
                scenes = self.teacher.encoder.restore(scenes.to(next(self.teacher.parameters()).device))
            return smashed_half(scenes, self.teacher, method=method, config=config, pasted_objects=self.pasted_objects, rng=rng)
        return raw_half(scenes, self.teacher, self.student, method=method, config=config)

    def finish(self, step: int) -> Mapping[str, float]:
        """Update the teacher after the student's optimizer step, and write what is due into the log.

        Args:
            step: The 0-based step that is done.

        Returns:
            Numbers to log beside the losses of the step.
        """
        update_ema(self.teacher, self.student, step, self.config.ema_decay)
        self.monitor.finish_step(step)
        if self.after_step is not None:
            self.after_step(step, self.student)
        return self.student.decoder.log_values()


def unlabeled_reader(
    method: Method, config: UpcycleConfig, *, store: FleetScenes | None, scans: UnlabeledBatches | None
) -> Callable[[int], UnlabeledBatch | None]:
    """Choose what fills the unlabeled half of every batch, once for the whole training.

    Args:
        method: `unlabeled` decides.
        config: Number of scenes per step, and the seed of their order.
        store: Smashed scenes of the fleet, for methods that use them. Those of joined stores are drawn in proportion to their number.
        scans: Raw scans of the fleet, for methods that use them.

    Returns:
        A function from a 0-based step to its unlabeled scenes; it gives None for methods that use none.

    Raises:
        InvalidInput: The method needs scenes or scans, and there are none.
    """
    if method.unlabeled == "smashed":
        if not store:
            raise InvalidInput(
                "this method trains on smashed scenes and the store is empty; run `upcycle3d extract` and `upcycle3d ingest` first"
            )
        scenes = store

        def read_scenes(step: int) -> UnlabeledBatch:
            rows = epoch_indices(len(scenes), config.unlabeled_batch, step, config.loop.seed)
            read = [scenes.readable(i) for i in rows]
            return UnlabeledBatch(scenes=collate_scenes(read, encoders=scenes.fingerprints), ids=tuple(s.scene_id for s in read))

        return read_scenes
    if method.unlabeled == "raw":
        raw = _given(scans, "this method trains on raw unlabeled scans and has none; give the fleet's prepared dataset")

        def read_scans(step: int) -> UnlabeledBatch:
            read = raw(step)
            return UnlabeledBatch(scenes=read, ids=tuple(scan.frame.id for scan in read))

        return read_scans
    return lambda step: None


def _given(value: _Given | None, message: str) -> _Given:
    """`value`, unless it is missing or empty."""
    if not value:
        raise InvalidInput(message)
    return value


def upcycle(
    detector: Detector,
    *,
    method: Method,
    labeled: Callable[[int], tuple[Frame, ...]],
    store: FleetScenes | None,
    pasted_objects: ObjectDatabase | None,
    config: UpcycleConfig,
    scans: UnlabeledBatches | None = None,
    codec: str = "fp16",
    truth: Mapping[str, Labels] | None = None,
    run: RunFolder | None = None,
    after_step: Callable[[int, Detector], None] | None = None,
    workers: int = 0,
    context: DistributedContext | None = None,
    progress: bool = True,
) -> Detector:
    """Train a detector on labeled frames and unlabeled scenes, by UpCycling or by a method it is compared with.

    Args:
        detector: The source model. It is trained in place and is the student.
        method: An entry of `METHODS`, or your own.
        labeled: Gives the labeled frames of a 0-based step (`datasets.batches.LabeledBatches`). Oracles take the target's frames.
        store: Verified smashed scenes of the fleet, made by this detector's encoder; `JoinedStores` for several kinds of rigs, each of
            which was compared with the encoder. None where the method uses none.
        pasted_objects: Database of labeled objects for F-GT, cut from the labeled split by the same encoder. None without F-GT.
        config: Settings that all methods share.
        scans: Raw scans of the fleet, for the methods that train on them.
        codec: Codec of the stored scenes. Labeled features pass it too where the encoder is frozen.
        truth: True labels by scene id (for raw scans: by frame id). They only measure pseudo labels for the log; none reaches training.
        run: Run folder for metrics and checkpoints. A training that was stopped goes on from its newest checkpoint.
        after_step: Called with each 0-based step and the student, to look at it. It must leave the student in training mode.
        workers: Processes that read batches ahead. The result does not depend on it.
        context: This process among the others; None for a single process. Each process takes its own frames and scenes, so a step of N
            processes learns from N times as many, and student and teacher are equal in all of them.
        progress: Whether to print progress.

    Returns:
        The EMA teacher, in evaluation mode. The result of a method is the student, which is `detector`.

    Raises:
        InvalidInput: The method needs scenes, scans or objects to paste that are missing.
        NonFiniteLoss: A loss became NaN or infinite; the run folder keeps the last good weights.

    Example:
        teacher = upcycle(
            detector, method=METHODS["upcycling"], labeled=labeled_batches, store=SmashedStore("runs/store"),
            pasted_objects=database, config=PRESETS["small"].upcycle,
        )
        mine = replace(METHODS["upcycling"], augmentation=my_augmentation)  # (scene, labels, rng) -> (scene, labels)
    """
    unlabeled = unlabeled_reader(method, config, store=store, scans=scans)
    writes = run if run is not None and run.writable else None
    if method.f_gt:
        _given(pasted_objects, "F-GT needs a database with objects to paste; the labeled split has none with enough points")
    if method.self_training and scans is not None:
        return self_train(detector, scans, config=config, run=run, after_step=after_step, context=context, progress=progress)
    if method.trains != "all":
        detector.freeze_encoder()
    teacher = make_teacher(detector)
    if method.trains == "nothing":
        return teacher
    step = UpcyclingStep(
        detector,
        teacher,
        method=method,
        config=config,
        labeled=labeled,
        unlabeled=unlabeled,
        monitor=PseudoLabelMonitor(every=config.round_steps, truth=truth, run=writes),
        pasted_objects=pasted_objects if method.f_gt else None,
        codec=codec,
        after_step=after_step,
        context=context,
    )
    detector.train()
    run_steps(
        modules={"student": detector, "teacher": teacher},
        trainable=[p for p in detector.parameters() if p.requires_grad],
        batches=step.batch,
        loss=step.loss,
        after_step=step.finish,
        config=config.loop,
        run=run,
        frame_ids=UpcycleBatch.ids,
        workers=workers,
        context=context,
        progress=progress,
    )
    detector.eval()
    return teacher
