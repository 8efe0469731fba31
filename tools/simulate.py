"""``upcycle3d simulate``: a simulated LiDAR dataset in a native layout, from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .console import console, print_table, progress_bar, write_json


@dataclass(frozen=True, kw_only=True)
class Simulate:
    """Write a simulated dataset: ray-cast scans, labels, calibration and splits, in the layout the readers know.

    The same domain, seed and frame give the same bytes on any number of processes; a second call completes a first one.
    """

    domain: Literal["kitti", "waymo", "lyft"]
    """which sensor on which streets (docs/simulation.md)"""
    out: Path
    """folder to write; the dataset's root"""
    frames: int = 100
    """number of frames"""
    seed: int = 0
    """everything follows from it"""
    view: Literal["camera", "full"] = "camera"
    """camera: only what a front camera sees (fast); full: the whole turn"""
    layout: Literal["kitti"] = "kitti"
    """native layout of the files"""
    splits: tuple[tuple[str, int], ...] = (("train", 0),)
    """names and sizes of the splits in order, as `train 80 val 20`; a size of 0 takes the rest"""
    workers: int = 2
    """processes"""
    json: Path | None = None
    """also write the result for machines"""


def command(config: Simulate) -> None:
    """Write a simulated LiDAR dataset in a native layout from a seed."""
    from ..datasets.simulation.layout_kitti import write_kitti_layout
    from ..datasets.simulation.places import domain

    sizes, left = {}, config.frames
    for name, size in config.splits:
        sizes[name] = size or left
        left -= sizes[name]
    with progress_bar("simulate", config.frames) as advance:
        write_kitti_layout(
            config.out, domain(config.domain), num_frames=config.frames, seed=config.seed, workers=config.workers,
            view=config.view, splits=sizes, progress=advance,
        )  # fmt: skip
    print_table("simulated dataset", ("domain", "frames", "seed", "splits"), [(config.domain, config.frames, config.seed, sizes)])
    console.print(f"next: upcycle3d prepare kitti {config.out} --out PREPARED")
    write_json(config.json, {"domain": config.domain, "frames": config.frames, "seed": config.seed, "splits": sizes})
