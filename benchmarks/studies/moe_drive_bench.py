"""Not a script: detectors, drives and decisions of one seed that `moe_drive.py` compares.

Frames, the trained base detector and all arms are kept in a folder, so a study may be stopped and started again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_domain_bench import DOMAINS, Bench, Made, StudyPlan

from upcycle3d.core.frame import Frame
from upcycle3d.core.structures import PointCloud
from upcycle3d.datasets.simulation.drive import SimulatedDrive
from upcycle3d.perception.evaluation.kitti import LOOSE
from upcycle3d.perception.evaluation.protocols import LabeledDetections, detect_labeled, score_cross_dataset
from upcycle3d.perception.evaluation.score import kitti_scores
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.moe.carving.splits import pooled_units, random_units, readme_split
from upcycle3d.perception.moe.driving.carved_folder import is_carved_detector, open_carved_detector, write_carved_detector
from upcycle3d.perception.moe.driving.channel_carving import (
    ChannelActivity,
    ChannelCarving,
    masked_detector,
    measure_channels,
    narrow_detector,
    unmasked_detector,
)
from upcycle3d.perception.moe.driving.context_gate import (
    ContextGate,
    DriveState,
    Hysteresis,
    decide,
    fit_context_gate,
)
from upcycle3d.perception.moe.driving.drive_runtime import ContextDrive, DriveConfig, DriveReport, PlainDrive
from upcycle3d.perception.moe.driving.recovery import RecoveryConfig, recover
from upcycle3d.perception.moe.driving.scan_descriptor import ScanDescriptorConfig, describe_scan

CONTEXTS = tuple(DOMAINS)
RULES = {
    "hysteresis": Hysteresis(frames=3, margin=math.inf),
    "margin": Hysteresis(frames=3, margin=6.0),
    "no_hysteresis": Hysteresis(frames=1),
}
"""How slowly decisions change: always three frames in a row; or one frame at odds of 400 to 1; or at once."""


@dataclass(frozen=True, kw_only=True)
class DrivePlan(StudyPlan):
    """Numbers that decide every result of the study, besides the seed."""

    detector: str = "second_iou"
    """Key of `PRESETS`."""
    fleet: int = 2
    """Frames of each domain that this study does not use."""
    base_steps: int = 300
    """Steps of the dense detector, on all contexts."""
    recover_steps: int = 140
    """Steps of recovery of every arm."""
    measured: int = 30
    """Frames of each context from which activity is measured."""
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of the channels that are kept."""
    main: float = 0.5
    """The ratio of the drives and of the random control."""
    segments: int = 14
    """Segments of a drive; contexts change from each to the next."""
    segment: int = 8
    """Frames of a segment."""
    after: int = 3
    """Frames that count as those after a switch."""
    replayed: int = 56
    """Frames of the drive that every arm of the runtime replays."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Drive:
    """A drive through several contexts."""

    frames: tuple[Frame, ...]
    """Its labeled frames, in the shifted frame."""
    contexts: tuple[int, ...]
    """True context of each."""

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int, /) -> Frame:
        return self.frames[index]

    def after_switch(self, count: int) -> tuple[bool, ...]:
        """Say which frames are among the first ones after a change of the context."""
        changes = [i for i in range(1, len(self)) if self.contexts[i] != self.contexts[i - 1]]
        return tuple(any(c <= i < c + count for c in changes) for i in range(len(self)))


def arm_name(method: str, ratio: float) -> str:
    """Name of an arm, such as `readme_50`."""
    return f"{method}_{round(100 * ratio)}"


def chosen(tables: Sequence[LabeledDetections], decisions: Sequence[int]) -> LabeledDetections:
    """The detections of the context that was decided for each frame."""
    found = tuple(tables[context].predictions[i] for i, context in enumerate(decisions))
    return replace(tables[0], predictions=found)


def some(found: LabeledDetections, wanted: Sequence[bool]) -> LabeledDetections:
    """The frames that are wanted."""
    rows = [i for i, keep in enumerate(wanted) if keep]
    return replace(
        found,
        ids=tuple(found.ids[i] for i in rows),
        labels=tuple(found.labels[i] for i in rows),
        predictions=tuple(found.predictions[i] for i in rows),
    )


def scores(found: LabeledDetections) -> dict[str, float]:
    """AP by the rules of ST3D: KITTI's, 3D and BEV, R40, at both minimum overlaps, without a camera."""
    return dict(kitti_scores(score_cross_dataset(found), score_cross_dataset(found, min_overlaps=LOOSE)))


class DriveArms:
    """The arms of one seed."""

    def __init__(self, bench: Bench, plan: DrivePlan) -> None:
        self.bench, self.plan = bench, plan
        self.recovery = RecoveryConfig(steps=plan.recover_steps, lr=plan.lr, seed=bench.seed)

    # ---- detectors

    @cached_property
    def base(self) -> Detector:
        """The dense detector, trained on all contexts."""
        return self.bench.kept("base", self._train_base).detector

    def _train_base(self) -> tuple[Detector, int]:
        detector, steps = self.bench.preset.detector.build(), self.plan.base_steps
        return self.bench.train_all(detector, self.bench.labeled(CONTEXTS), steps, lr=0.003), steps

    @cached_property
    def activity(self) -> ChannelActivity:
        """How active the channels of the base are in each context."""
        return measure_channels(self.base, {c: self.bench.features(self.base, c, self.plan.measured) for c in CONTEXTS})

    def carving(self, method: str, ratio: float) -> ChannelCarving:
        """Which units serve which context."""
        if method == "random":
            return random_units(self.activity, ratio, seed=self.bench.seed)
        return {"readme": readme_split, "pooled": pooled_units}[method](self.activity, ratio)

    def trained(self, method: str, ratio: float = 1.0) -> Made:
        """An arm after its recovery: `dense`, `pooled` (narrow), or `readme` and `random` as dense weights that hold all contexts."""
        base, labeled = self.base, [self.bench.labeled([context], batch=1) for context in CONTEXTS]

        def make() -> tuple[Detector, int]:
            if method == "dense":
                arm = unmasked_detector(base)
            elif method == "pooled":
                arm = narrow_detector(base, self.carving("pooled", ratio), 0)
            else:
                arm = masked_detector(base, self.carving(method, ratio))
            recover(arm, labeled, self.recovery)
            return (arm if method in ("dense", "pooled") else unmasked_detector(arm)), self.plan.recover_steps

        return self.bench.kept("dense" if method == "dense" else arm_name(method, ratio), make)

    def narrow(self, method: str, ratio: float) -> list[Detector]:
        """The detector of each context."""
        weights, carving = self.trained(method, ratio).detector, self.carving(method, ratio)
        return [narrow_detector(weights, carving, number) for number in range(carving.experts)]

    # ---- the gate

    @cached_property
    def gate(self) -> ContextGate:
        """Fitted to the training scans, which are not augmented."""
        heights = [self.bench.split(c, "train").open().rig.z_shift for c in CONTEXTS]
        config = ScanDescriptorConfig(sensor_height=sum(heights) / len(heights))
        scans = {c: [describe_scan(f.points, config) for _, f in self.bench.scans([c])] for c in CONTEXTS}
        return fit_context_gate(scans, config)

    def best(self, points: PointCloud) -> int:
        """The context of one scan alone."""
        return int(self.gate.logits(describe_scan(points, self.gate.descriptor)).argmax())

    def decisions(self, drive: Drive, rule: Hysteresis) -> tuple[int, ...]:
        """What the gate decides on a drive."""
        state, found = DriveState(), []
        for frame in drive.frames:
            state = decide(self.gate, rule, state, frame.points)
            assert state.context is not None
            found.append(state.context)
        return tuple(found)

    # ---- drives

    @cached_property
    def drive(self) -> Drive:
        """A drive of simulated streets: each segment is one street of another context than the one before."""
        plan, frames, contexts = self.plan, [], []
        rigs = {c: self.bench.split(c, "val").open().rig for c in CONTEXTS}
        for number in range(plan.segments):
            context = (number * (1 + self.bench.seed % 2) + number // len(CONTEXTS)) % len(CONTEXTS)
            if contexts and context == contexts[-1]:
                context = (context + 1) % len(CONTEXTS)
            name = CONTEXTS[context]
            street = SimulatedDrive(
                domain=DOMAINS[name],
                seed=7000 + self.bench.seed,
                street=number,
                num_frames=plan.segment,
                classes=self.base.class_names,
            )
            for i in range(plan.segment):
                frame, rig = street[i], rigs[name]
                assert frame.labels is not None
                labels = replace(frame.labels, boxes=rig.from_sensor(frame.labels.boxes))
                frames.append(replace(frame, points=rig.from_sensor(frame.points), labels=labels, rig=rig))
                contexts.append(context)
        return Drive(frames=tuple(frames), contexts=tuple(contexts))

    def tables(self, detectors: Sequence[Detector], frames: Any) -> list[LabeledDetections]:
        """What each detector finds in the same frames."""
        return [detect_labeled(one, frames, label_classes=self.base.class_names) for one in detectors]

    # ---- the vehicle

    def carved_folder(self) -> Path:
        """The carved detector of the main ratio as files."""
        folder, ratio = self.bench.folder / "carved", self.plan.main
        if not is_carved_detector(folder):
            weights, carving = self.trained("readme", ratio).detector, self.carving("readme", ratio)
            write_carved_detector(folder, weights, carving, self.gate, hysteresis=RULES["hysteresis"])
        return folder

    def replay(self, contexts: int, *, shift: int | None = None, **config: Any) -> DriveReport:
        """Drive with memory for some contexts; `shift` gives the true context (0) or a wrong one."""
        opened = open_carved_detector(self.carved_folder())
        vehicle = ContextDrive(opened, DriveConfig(budget=contexts * opened.context_bytes, **config))
        for frame, true in list(zip(self.drive.frames, self.drive.contexts))[: self.plan.replayed]:
            vehicle.step(frame.points, given=None if shift is None else (true + shift) % len(CONTEXTS))
        return vehicle.close()

    def replay_plain(self, detector: Detector) -> DriveReport:
        """Drive one detector without contexts."""
        vehicle = PlainDrive(detector)
        for frame in self.drive.frames[: self.plan.replayed]:
            vehicle.step(frame.points)
        return vehicle.close()


def report_json(report: DriveReport) -> dict[str, Any]:
    """A report as plain numbers; spreads without values are left out."""
    told = asdict(report)
    for name in ("frame", "gate", "stall", "switch_stall"):
        if not told[name]["count"]:
            told[name] = {"count": 0}
    return told


def cpu_seconds(began: float) -> float:
    """CPU seconds of this process since a moment."""
    return time.process_time() - began
