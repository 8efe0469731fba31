"""Gives the encoder of a trained detector defences, and fits them to labeled frames: `upcycle3d defend`.

The detector's own weights do not change. The result is a run folder whose encoder file goes to the fleet in place of the old one.

Read next: `perception/models/encoders/defended.py` (what is sent), `perception/training/objectness.py` (the region upload's head).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from ...core.errors import InvalidInput, require, require_counts
from ...core.features import CutFeatures
from ...core.files import write_atomically
from ...core.frame import Frame
from ...datasets.augment import AugmentationRanges, labeled_example
from ...datasets.prepared import PreparedDataset
from ..models.defences.bottleneck import Bottleneck
from ..models.defences.defence import Defence
from ..models.defences.noise import NoisyFeatures
from ..models.defences.obfuscator import Obfuscator
from ..models.defences.region import RegionUpload
from ..models.defences.table import DefenceConfig, describe_defences
from ..models.defended import defended
from ..models.detector import Detector
from ..models.encoders.defended import DefendedEncoder
from ..privacy.obfuscator_training import ObfuscatorReport, ObfuscatorTraining, train_obfuscator
from ..training.detector_files import DETECTOR_FILE, load_detector, save_run_detector
from ..training.objectness import LabeledScene, ObjectnessReport, train_objectness
from .job_inputs import Data, check_path, find_data

REPORT_FILE = "defences.json"
"""What `defend` writes beside the detector: the defences, and what they keep."""


@dataclass(frozen=True, kw_only=True)
class DefendOutcome:
    """What giving defences to a detector did."""

    detector: Detector
    """The detector with defences, in evaluation mode, on the CPU."""
    frames: int
    """Labeled frames that the defences were fitted to."""
    cells: float
    """Mean number of cells of a scene without defences."""
    cells_sent: float
    """Mean number of cells of a scene with them."""
    fitted: FitReport
    """How the defences that learn were fitted."""


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """How the defences that learn were fitted."""

    objectness: ObjectnessReport | None = None
    """What the objectness head of a region upload keeps of frames it did not learn from; None without one."""
    obfuscator: ObfuscatorReport | None = None
    """How the training of a learned obfuscator ended; None without one."""


def defend_detector(
    detector: str | Path,
    data: Data,
    out: str | Path,
    defences: Sequence[DefenceConfig],
    *,
    steps: int = 400,
    training: ObfuscatorTraining | None = None,
    augmented: int = 2,
    most_frames: int = 300,
    seed: int = 0,
) -> DefendOutcome:
    """Give a trained detector defences, fit them, and write the result as a run folder.

    Args:
        detector: Run folder or file of a detector without defences.
        data: Labeled frames, `DIR[:SPLIT]`; `train` where no split is named.
        out: Folder to write; it must not hold a detector.
        defences: The defences, the first one next to the encoder.
        steps: Optimizer steps of an objectness head.
        training: How a learned obfuscator is trained; None takes the defaults.
        augmented: Flipped, turned and scaled copies of each labeled frame that the head learns from, besides the frame itself.
        most_frames: Frames that are read at most.
        seed: Decides which frames are read and every random draw.

    Returns:
        The detector and what its defences keep.

    Raises:
        InvalidInput: The detector carries defences already or cannot have these, `out` holds a detector, a number is outside its limits,
            or the frames have no labels or hold too few objects.

    Example:
        outcome = defend_detector("runs/source", "data/kitti:train", "runs/defended", [RegionConfig(), NoiseConfig(sigma=0.1)])
        print(outcome.cells_sent / outcome.cells)
    """
    out = check_path(out, "out", "the run folder to write")
    if (out / DETECTOR_FILE).exists():
        raise InvalidInput(f"{out} holds a {DETECTOR_FILE} already; choose another folder")
    require_counts("defend", most=10_000_000, steps=steps, most_frames=most_frames)
    torch.manual_seed(seed)
    guarded = fresh_defences(load_detector(detector), defences)
    frames = find_data(data, "train").open()
    frames.check_labeled()
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(frames))[:most_frames]).tolist()
    encoder = cast(DefendedEncoder, guarded.encoder)
    scenes = _scenes(encoder, frames, rows, augmented, rng)
    fitted = fit_defences(guarded, scenes, steps=steps, training=training or ObfuscatorTraining(), seed=seed)
    plain = [_encoded(encoder, frames[row]) for row in rows[:20]]
    sent = [_through(encoder.stages, scene, rng) for scene in plain]
    save_run_detector(out, guarded)
    outcome = DefendOutcome(
        detector=guarded,
        frames=len(rows),
        cells=_mean_cells(plain),
        cells_sent=_mean_cells(sent),
        fitted=fitted,
    )
    record = {
        "defences": describe_defences(defences),
        "frames": outcome.frames,
        "cells": outcome.cells,
        "cells_sent": outcome.cells_sent,
        "objectness": fitted.objectness and asdict(fitted.objectness),
        "obfuscator": fitted.obfuscator and asdict(fitted.obfuscator),
    }
    write_atomically(out / REPORT_FILE, (json.dumps(record, indent=1) + "\n").encode())
    return outcome


def fresh_defences(detector: Detector, defences: Sequence[DefenceConfig]) -> Detector:
    """Give a detector defences that are not fitted yet, and refuse those that no fitting could make work. It takes no time.

    Args:
        detector: A detector without defences.
        defences: The defences, the first one next to the encoder.

    Returns:
        A new detector in evaluation mode, on the CPU.

    Raises:
        InvalidInput: The detector carries defences already, there is no defence or more than 16, one sends more channels than it is given,
            or a learned obfuscator stands behind a defence that changes the channels.
    """
    made = defended(detector, tuple(defences))
    _check_obfuscators(made)
    return made


def _check_obfuscators(detector: Detector) -> None:
    """The receiver of an obfuscator is trained for the decoder, so it must be given what the decoder reads."""
    stages = cast(DefendedEncoder, detector.encoder).stages
    late = [stage for stage in stages if isinstance(stage, Obfuscator) and stage.spec != detector.spec]
    require(
        not late,
        "a learned obfuscator must stand before defences that change the channels (bottleneck, another obfuscator), because it is trained "
        f"for the channels that the decoder reads; found {describe_defences(cast(DefendedEncoder, detector.encoder).config.defences)}. "
        "Put it before them",
    )


def fit_defences(
    detector: Detector, scenes: Sequence[LabeledScene], *, steps: int, training: ObfuscatorTraining, seed: int
) -> FitReport:
    """Fit every defence of a detector to labeled scenes, in place: each sees what the ones before it send.

    Args:
        detector: The detector with fresh defences.
        scenes: Scenes as its encoder computes them without defences.
        steps: Optimizer steps of an objectness head.
        training: How a learned obfuscator is trained.
        seed: Every random draw.

    Returns:
        How the defences that learn were fitted.

    Raises:
        InvalidInput: A learned obfuscator stands behind a defence that changes the channels.
    """
    _check_obfuscators(detector)
    report, rng = FitReport(), np.random.default_rng([seed, 1])
    for defence in cast(DefendedEncoder, detector.encoder).stages:
        if isinstance(defence, RegionUpload):
            report = replace(report, objectness=train_objectness(defence, scenes, steps=steps, seed=seed))
        elif isinstance(defence, NoisyFeatures | Bottleneck):
            defence.measure(CutFeatures.collate([scene.features for scene in scenes[:50]]))
        elif isinstance(defence, Obfuscator):
            pairs = [(scene.features, scene.scan) for scene in scenes]
            report = replace(report, obfuscator=train_obfuscator(defence, detector, pairs, training, seed=seed))
        scenes = [replace(scene, features=_through([defence], scene.features, rng)) for scene in scenes]
    return report


def _scenes(
    encoder: DefendedEncoder, frames: PreparedDataset, rows: list[int], augmented: int, rng: np.random.Generator
) -> list[LabeledScene]:
    """Augmented copies first, then the frames as they are, so that the threshold is set on the latter."""
    ranges, keep = AugmentationRanges(), encoder.spec.grid.range
    read = [frame for row in rows if (frame := frames[row]).labels is not None]
    copies = [labeled_example(frame, rng, ranges, None, keep) for _ in range(augmented) for frame in read]
    return [_labeled(encoder, frame) for frame in (*copies, *read)]


def _labeled(encoder: DefendedEncoder, frame: Frame) -> LabeledScene:
    assert frame.labels is not None
    return LabeledScene(features=_encoded(encoder, frame), labels=frame.labels, scan=frame.points)


@torch.no_grad()
def _encoded(encoder: DefendedEncoder, frame: Frame) -> CutFeatures:
    return encoder.encoder([frame.points])


@torch.no_grad()
def _through(stages: Sequence[Defence], scene: CutFeatures, rng: np.random.Generator) -> CutFeatures:
    for defence in stages:
        scene = defence.send(scene, rng)
    return scene


def _mean_cells(scenes: Sequence[CutFeatures]) -> float:
    return float(np.mean([len(scene.voxels.coords) for scene in scenes]))
