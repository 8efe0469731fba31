"""A small detector that is carved by driving context, as a folder to serve, and scans of its contexts: what tests of its serving share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

import tiny
from upcycle3d.core.structures import PointCloud
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.moe.carving.splits import random_units
from upcycle3d.perception.moe.carving.units import Carving
from upcycle3d.perception.moe.driving.carved_folder import write_carved_detector
from upcycle3d.perception.moe.driving.channel_carving import measure_channels
from upcycle3d.perception.moe.driving.context_gate import Hysteresis, fit_context_gate
from upcycle3d.perception.moe.driving.scan_descriptor import ScanDescriptorConfig, describe_scan

CONTEXT_NAMES = ("near", "far")


@dataclass(frozen=True)
class CarvedByContext:
    """A dense detector, its carving, and the folder that serves it."""

    dense: Detector
    carving: Carving
    folder: Path


def scan(context: int, seed: int = 0) -> PointCloud:
    """A scan of one car, with a road of many points (near) or none (far)."""
    frame = tiny.frame_with_car(seed).points
    return frame if context == 0 else frame.select(frame.xyz[:, 2] > 0.06)


def carved_by_context(folder: Path) -> CarvedByContext:
    """Carve a small detector and write what `moe serve` serves."""
    dense, config = tiny.second_iou().eval(), ScanDescriptorConfig()
    with torch.no_grad():
        scenes = {name: [dense.encode([scan(n, s)]) for s in range(2)] for n, name in enumerate(CONTEXT_NAMES)}
    carving = random_units(measure_channels(dense, scenes, least_tokens=1), 0.5, seed=1)
    scans = {name: [describe_scan(scan(n, s), config) for s in range(4)] for n, name in enumerate(CONTEXT_NAMES)}
    told = write_carved_detector(folder, dense, carving, fit_context_gate(scans, config), hysteresis=Hysteresis(), note="a test")
    assert str(told) == "2 contexts (near, far), random, ratio 0.5"
    return CarvedByContext(dense=dense, carving=carving, folder=folder)
