"""Carves a trained detector by driving context, from run folder and frames to a folder that drives and serves: `upcycle3d moe carve`.

Pooled pruning of the same width is made beside it and gets the same recovery: it is the baseline that a carving must beat.
Read next: `perception/moe/driving/channel_carving.py`, and `carved_folder.py` there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...core.errors import InvalidInput, require, require_counts, require_numbers
from ...core.features import CutFeatures
from ...core.frame import Frame
from ...core.new_folder import require_empty
from ...datasets.augment import AugmentationRanges
from ...datasets.batches import LabeledBatches
from ...datasets.data_split import DataSplit
from ...datasets.frame_source import FrameSource
from ...datasets.prepared import PreparedDataset
from ..evaluation.score import Protocol, Scores, score_detector
from ..models.decoders.mixture import RegionMixtures
from ..models.derived import DenseDetectorConfig
from ..models.detector import Detector
from ..moe.carving.splits import pooled_units, readme_split
from ..moe.detectors.calibrate import cluster_scenes
from ..moe.driving.carved_folder import CarvedDetectorDescription, require_context_names, write_carved_detector
from ..moe.driving.channel_carving import (
    ChannelActivity,
    ChannelCarving,
    decoder_multiply_adds,
    masked_detector,
    measure_channels,
    narrow_detector,
)
from ..moe.driving.context_gate import ContextGate, Hysteresis, fit_context_gate
from ..moe.driving.recovery import RecoveryConfig, recover
from ..moe.driving.scan_descriptor import ScanDescriptorConfig, describe_scan
from ..training.detector_files import load_detector


@dataclass(frozen=True, kw_only=True)
class ContextCarvingConfig:
    """How a detector is carved."""

    ratio: float = 0.5
    """Share of the units of each carved layer that a context keeps."""
    regions: RegionMixtures = "all"
    """Which chains of the region head are carved."""
    bev_blocks: tuple[int, ...] = (0, 1)
    """Which blocks of the BEV backbone are carved."""
    frames: int = 64
    """Frames of each context, spread evenly, from which activity and gate are measured."""
    groups: int | None = None
    """Number of contexts to find among all frames by what their scans look like; None takes the given contexts."""
    recovery: RecoveryConfig | None = None
    """Training of the decoder on the labels of the frames; None keeps the dense detector's weights."""
    hysteresis: Hysteresis = Hysteresis()
    """How slowly decisions change on a drive."""
    protocol: Protocol = "cross_dataset"
    """Rules by which validation frames are scored; `cross_dataset` fits every dataset."""
    seed: int = 0
    """Decides groups and the order of frames."""

    def __post_init__(self) -> None:
        require_numbers("ContextCarvingConfig", least=1e-6, most=1.0, ratio=self.ratio)
        require_counts("ContextCarvingConfig", most=10**7, frames=self.frames)
        if self.groups is not None:
            require_counts("ContextCarvingConfig", groups=self.groups)


@dataclass(frozen=True, kw_only=True, eq=False)
class ContextCarvingRun:
    """What was made, and how good it is."""

    description: CarvedDetectorDescription
    """What was written."""
    carving: ChannelCarving
    """Which units serve which context."""
    activity: ChannelActivity
    """What the units were chosen by."""
    frames: Mapping[str, int]
    """Number of frames that were measured of each context."""
    parameters: Mapping[str, int]
    """Parameters of the decoder: `dense`, and `carved` for one context."""
    multiply_adds: Mapping[str, int]
    """Multiply-adds of the decoder for one frame of the first context, by the same names."""
    scores: Mapping[str, Mapping[str, Scores]]
    """Scores of each context that has validation frames: `dense`, `pooled`, `carved` with its own units, and `worst` of the other
    contexts' units."""
    gate: Mapping[str, float]
    """Share of the validation scans of each context that the gate knows, without hysteresis."""


@dataclass(frozen=True, kw_only=True)
class ChosenFrames:
    """Some frames of several sources, as one source."""

    rows: tuple[tuple[FrameSource, int], ...]
    """Source and place of each frame."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> Frame:
        source, place = self.rows[index]
        return source[place]

    def __iter__(self) -> Iterator[Frame]:
        return (source[place] for source, place in self.rows)


def carve_contexts(
    detector: str | Path,
    contexts: Mapping[str, DataSplit],
    out: str | Path,
    config: ContextCarvingConfig,
    *,
    validation: Mapping[str, DataSplit] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> ContextCarvingRun:
    """Carve a detector and write the result.

    Args:
        detector: Run folder or file of a dense detector.
        contexts: Frames of each context. Without a recovery they need no labels.
        out: Folder to write; it must not exist, or be empty.
        config: How it is carved.
        validation: Labeled frames by context, to score on.
        say: Is told what is done.

    Returns:
        What was made.

    Raises:
        InvalidInput: The detector is not dense, frames do not suit it, contexts do not fit together, or the folder holds something.
    """
    require_empty(Path(out))
    tests = dict(validation or {})
    if config.groups is None:
        require(
            len(contexts) > 1, f"a carving by context needs two contexts or more, found {list(contexts)}; or let it find groups"
        )
        require_context_names(tuple(contexts))
        unknown = sorted(set(tests) - set(contexts))
        require(not unknown, f"there is no context {unknown[:3]} to validate; there are {', '.join(contexts)}")
    else:
        require(not tests, "contexts that are found have no validation frames of their own; score the written detectors instead")
    dense = load_detector(detector)
    if not isinstance(dense.config, DenseDetectorConfig):
        raise InvalidInput(f"{detector} holds a {dense.label}; only a dense detector can be carved")
    opened = {name: split.open() for name, split in contexts.items()}
    for frames in (*opened.values(), *(split.open() for split in tests.values())):
        _check_frames(frames, dense, labeled=config.recovery is not None)
    descriptor = _descriptor(list(opened.values()))
    sources: dict[str, FrameSource] = dict(opened)
    if config.groups is not None:
        sources = _groups(list(opened.values()), descriptor, config)
    chosen = {name: _spread(source, config.frames) for name, source in sources.items()}
    say(f"measuring {', '.join(f'{name} ({len(rows)} frames)' for name, rows in chosen.items())}")
    activity = measure_channels(
        dense, {n: _features(dense, rows) for n, rows in chosen.items()}, regions=config.regions, bev_blocks=config.bev_blocks
    )
    carving, pooled = readme_split(activity, config.ratio), pooled_units(activity, config.ratio)
    gate = fit_context_gate({n: [describe_scan(f.points, descriptor) for f in rows] for n, rows in chosen.items()}, descriptor)
    carved, pruned = dense, narrow_detector(dense, pooled, 0)
    if config.recovery is not None:
        batches = [_batches(source, dense, config.seed) for source in sources.values()]
        carved = masked_detector(dense, carving)
        for name, arm in (("the carved detector", carved), ("pooled pruning", pruned)):
            say(f"training {name} for {config.recovery.steps} steps")
            recover(arm, batches, config.recovery)
    scores = _scores(dense, pruned, carved, carving, tests, config.protocol)
    accuracy = {name: _accuracy(gate, name, split.open()) for name, split in tests.items()}
    note = f"carved out of {detector}" + ("" if config.recovery is None else f", {config.recovery.steps} steps of recovery")
    description = write_carved_detector(out, carved, carving, gate, hysteresis=config.hysteresis, note=note)
    sizes = {"dense": dense, "carved": narrow_detector(dense, carving, 0)}
    scene = next(_features(dense, next(iter(chosen.values()))))
    return ContextCarvingRun(
        description=description,
        carving=carving,
        activity=activity,
        frames={name: len(rows) for name, rows in chosen.items()},
        parameters={name: sum(p.numel() for p in one.decoder.parameters()) for name, one in sizes.items()},
        multiply_adds={name: decoder_multiply_adds(one, scene) for name, one in sizes.items()},
        scores=scores,
        gate=accuracy,
    )


def _check_frames(frames: PreparedDataset, dense: Detector, *, labeled: bool) -> None:
    lacks = sorted(set(dense.point_features) - set(frames.feature_names))
    require(not lacks, f"the scans of {frames.root} lack {', '.join(lacks)}, which the detector reads")
    if labeled:
        frames.check_labeled()
        if [n.casefold() for n in frames.classes] != [n.casefold() for n in dense.class_names]:
            raise InvalidInput(
                f"{frames.root} was prepared for the classes {', '.join(frames.classes)}, and the detector finds "
                f"{', '.join(dense.class_names)}; prepare it for these, or carve without --steps"
            )


def _descriptor(frames: Sequence[PreparedDataset]) -> ScanDescriptorConfig:
    """Count intensities where every scan has them, and see elevations from the mean height of the sensors."""
    borders = ScanDescriptorConfig()
    intensities = borders.intensities if all("intensity" in one.feature_names for one in frames) else ()
    height = float(np.mean([one.rig.z_shift for one in frames]))
    return ScanDescriptorConfig(intensities=intensities, sensor_height=height)


def _groups(
    frames: Sequence[FrameSource], descriptor: ScanDescriptorConfig, config: ContextCarvingConfig
) -> dict[str, FrameSource]:
    """Divide all frames into groups whose scans look alike."""
    assert config.groups is not None
    rows = [(source, place) for source in frames for place in range(len(source))]
    require(len(rows) >= config.groups, f"{len(rows)} frames cannot make {config.groups} groups; give more frames")
    values = torch.stack([describe_scan(source[place].points, descriptor).values for source, place in rows])
    group = cluster_scenes(values.float(), config.groups, seed=config.seed).tolist()
    return {
        f"group{number}": ChosenFrames(rows=tuple(row for row, g in zip(rows, group) if g == number))
        for number in range(config.groups)
    }


def _spread(source: FrameSource, most: int) -> ChosenFrames:
    """Frames spread evenly over a source."""
    places = np.linspace(0, len(source) - 1, min(most, len(source))).round().astype(int).tolist()
    return ChosenFrames(rows=tuple((source, place) for place in places))


@torch.no_grad()
def _features(detector: Detector, frames: ChosenFrames) -> Iterator[CutFeatures]:
    for frame in frames:
        yield detector.encode([frame.points])


def _batches(source: FrameSource, dense: Detector, seed: int) -> LabeledBatches:
    return LabeledBatches(
        frames=source, batch_size=1, seed=seed, augmentation=AugmentationRanges(), keep_range=dense.spec.grid.range
    )


def _scores(
    dense: Detector,
    pruned: Detector,
    carved: Detector,
    carving: ChannelCarving,
    tests: Mapping[str, DataSplit],
    protocol: Protocol,
) -> dict[str, dict[str, Scores]]:
    """Scores of every arm on every context's frames. The worst of the other contexts is the one with the smallest first number."""

    def score(detector: Detector, frames: PreparedDataset) -> Scores:
        return score_detector(detector, frames, protocol).headline()

    found: dict[str, dict[str, Scores]] = {}
    for name, split in tests.items():
        frames = split.open()
        by_context = [score(narrow_detector(carved, carving, number), frames) for number in range(carving.experts)]
        own = carving.number(name)
        others = [one for number, one in enumerate(by_context) if number != own]
        found[name] = {
            "dense": score(dense, frames),
            "pooled": score(pruned, frames),
            "carved": by_context[own],
            "worst": min(others, key=lambda one: next(iter(one.values()), 0.0)),
        }
    return found


def _accuracy(gate: ContextGate, name: str, frames: FrameSource) -> float:
    """Share of the scans of a context that the gate knows, each one alone."""
    wanted = gate.contexts.index(name)
    best = [int(gate.logits(describe_scan(frames[i].points, gate.descriptor)).argmax()) for i in range(len(frames))]
    return best.count(wanted) / max(1, len(best))
