"""Measures speed: calls in turns, a training step of a detector, and an extraction.

Read next: `operator_speed.py` for the single operators. The commands are `upcycle3d bench ops`, `bench step` and `bench extract`.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...core.config_json import Json
from ...core.frame import Frame, labels_of
from ...core.rig import RigSpec
from ...core.structures import PointCloud
from ...datasets.simulation.places import domain
from ...datasets.simulation.simulate import SimulatedDataset, View, simulate_frame
from ..models.detector import Detector
from ..training.detector_files import load_detector
from ..training.environment import describe_environment
from ..vehicle.extractor import Extractor
from ..wire.codec import encode_scene
from .presets import PRESETS

WARM_UP = 2
"""Rounds that are not counted: they compile kernels and fill caches."""


@dataclass(frozen=True, kw_only=True)
class CallTime:
    """How long a call takes."""

    median_ms: float
    """Median wall time in milliseconds. On a busy machine it grows with the load of others."""
    median_cpu_ms: float
    """Median processor time of all threads together in milliseconds. It hardly depends on the load of others."""


def measure_in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, CallTime]:
    """Measure several calls one after the other, round by round, so that a busy machine slows all of them alike.

    Args:
        calls: Calls by name.
        repeats: Rounds that are counted, after `WARM_UP` rounds that are not.

    Returns:
        Times by name.
    """
    wall: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + WARM_UP):
        for name, call in calls.items():
            start, start_processor = time.perf_counter(), time.process_time()
            call()
            if turn >= WARM_UP:
                wall[name].append(1e3 * (time.perf_counter() - start))
                processor[name].append(1e3 * (time.process_time() - start_processor))
    return {n: CallTime(median_ms=statistics.median(wall[n]), median_cpu_ms=statistics.median(processor[n])) for n in calls}


def cpu_name() -> str:
    """The model of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def machine() -> dict[str, Json]:
    """What speed depends on: processor, load, threads and versions."""
    described = describe_environment(command=sys.orig_argv, seed=0)
    return {"cpu": cpu_name(), "load": round(os.getloadavg()[0], 2), **{k: v for k, v in described.items() if k != "seed"}}


def detectors_to_measure(folders: Sequence[Path], presets: Sequence[str]) -> dict[str, Detector]:
    """Load trained detectors and build untrained ones.

    Args:
        folders: Run folders, or detector files.
        presets: Names of presets. Their detectors have random weights, which changes how well features compress.

    Returns:
        Detectors by the name that a table shows.
    """
    torch.manual_seed(0)
    found = {f"{name} (random weights)": PRESETS[name].detector.build() for name in presets}
    return found | {str(folder): load_detector(folder) for folder in folders}


def rig_for(detector: Detector, dataset: str) -> RigSpec:
    """The rig under which a detector sees a simulated domain's scans as it was trained.

    Args:
        detector: The detector. Its range tells whether the road is at z = 0, or below the sensor as in KITTI's own frame.
        dataset: Name of the simulated domain.

    Returns:
        A rig with the sensor's mounting height, or without one.
    """
    road_at_zero = detector.encoder.spec.grid.range[2] > -3
    return RigSpec(z_shift=domain(dataset).sensor.height if road_at_zero else 0.0)


def simulated_scans(dataset: str, count: int, *, view: View = "camera") -> list[PointCloud]:
    """Scans of a simulated domain.

    Args:
        dataset: Name of the domain.
        count: Number of scans.
        view: `camera` for what a front camera sees, `full` for the whole turn.

    Returns:
        Scans in the sensor frame.
    """
    return [simulate_frame(domain(dataset), seed=5, index=i, view=view).frame.points for i in range(count)]


# ---- a training step


def training_step(detector: Detector, frames: Sequence[Frame]) -> Callable[[], None]:
    """A supervised training step: encode, decode, losses, backward, AdamW.

    Args:
        detector: It is put into training mode, and each call changes its weights.
        frames: Labeled frames of the batch, in the detector's frame.

    Returns:
        The step, to be called and timed.
    """
    detector.train()
    labels = labels_of(frames)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        outputs = detector.decode(detector.encode([frame.points for frame in frames]), labels)
        detector.loss(outputs, labels).total().backward()
        optimizer.step()

    return step


def training_frames(detector: Detector, dataset: str, count: int) -> list[Frame]:
    """Labeled frames of a simulated domain for `training_step`.

    Args:
        detector: Its classes are labeled, and its rig is applied. A detector whose range goes on behind the sensor gets scans of a full
            turn, any other one what a front camera sees.
        dataset: Name of the domain.
        count: Number of frames.

    Returns:
        Frames in the detector's frame.
    """
    view: View = "full" if detector.encoder.spec.grid.range[0] < 0 else "camera"
    data = SimulatedDataset(domain=domain(dataset), num_frames=count, seed=0, view=view, classes=detector.class_names)
    return [_shifted(data[i], rig_for(detector, dataset)) for i in range(count)]


def _shifted(frame: Frame, rig: RigSpec) -> Frame:
    labels = frame.labels
    if labels is not None:
        labels = replace(labels, boxes=rig.from_sensor(labels.boxes))
    return replace(frame, points=rig.from_sensor(frame.points), labels=labels, rig=rig)


# ---- an extraction


@dataclass(frozen=True, kw_only=True)
class ExtractionSpeed:
    """What it costs a vehicle to smash a scan: means over scans for sizes, medians for times."""

    cells: float
    """Occupied cells at the cut."""
    keypoints: float
    """Keypoints; 0 for a detector without them."""
    bytes_per_scene: float
    """Bytes of an encoded scene, compressed, without its share of the shard's index."""
    raw_bytes_per_scan: float
    """Bytes of a scan as float32 x, y, z and its point features."""
    voxelize_ms: float
    """Milliseconds for rig and voxels."""
    backbone_ms: float
    """Milliseconds for the features at the cut."""
    codec_ms: float
    """Milliseconds for quantization and compression."""


def extraction_speed(detector: Detector, scans: Sequence[PointCloud], rig: RigSpec, codec: str) -> ExtractionSpeed:
    """Smash scans on this machine and measure it.

    Args:
        detector: Its encoder runs.
        scans: Scans in the sensor frame. The first one is smashed twice, to warm up.
        rig: Rig of the vehicle.
        codec: `fp16` or `int8`.

    Returns:
        Sizes and times.
    """
    extractor = Extractor(detector.encoder, rig, codec)
    encode_scene(extractor.smash(scans[0])[0])
    scenes, times, sizes, codec_ms = [], [], [], []
    for scan in scans:
        scene, stages = extractor.smash(scan)
        start = time.perf_counter()
        sizes.append(len(encode_scene(scene)))
        codec_ms.append(1e3 * (time.perf_counter() - start))
        scenes.append(scene)
        times.append(stages)
    return ExtractionSpeed(
        cells=statistics.fmean(len(scene.coords) for scene in scenes),
        keypoints=statistics.fmean(len(scene.keypoint_cells) for scene in scenes),
        bytes_per_scene=statistics.fmean(sizes),
        raw_bytes_per_scan=statistics.fmean(4 * len(scan) * (3 + scan.features.shape[1]) for scan in scans),
        voxelize_ms=statistics.median(t.voxelize_ms for t in times),
        backbone_ms=statistics.median(t.backbone_ms for t in times),
        codec_ms=statistics.median(codec_ms),
    )
