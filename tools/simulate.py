"""`upcycle3d simulate`: a simulated LiDAR dataset in the layout of KITTI, Waymo or Lyft, from a seed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..core.errors import InvalidInput
from .console import console, print_table, progress_bar, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class Simulate:
    """Write a simulated dataset: ray-cast scans, labels, calibration and splits, in a layout that the readers know.

    The same domain, seed and frame give the same bytes with any number of processes. A second call completes an interrupted one.
    """

    domain: Literal["kitti", "waymo", "lyft", "compact", "large"]
    """Sensor and streets (docs/simulation.md)."""
    out: Path
    """Folder to write, the root of the dataset."""
    frames: int = 100
    """Number of frames."""
    seed: int = 0
    """Everything follows from it."""
    view: Literal["camera", "full"] = "camera"
    """`camera`: only what a front camera sees, which is fast; `full`: the whole turn."""
    layout: Literal["kitti", "waymo", "lyft"] = "kitti"
    """Layout of the files. `waymo` (v2 tables) and `lyft` need `--view full`, because their labels go all around."""
    splits: tuple[tuple[str, int], ...] = (("train", 0),)
    """Names and sizes of the splits in order, such as `train 80 val 20`. One size may be 0: it takes the rest."""
    workers: int = 2
    """Processes. The bytes do not depend on their number."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


def command(config: Simulate) -> None:
    """Write a simulated LiDAR dataset from a seed."""
    from ..datasets.simulation.layout_kitti import write_kitti_layout
    from ..datasets.simulation.layout_lyft import write_lyft_layout
    from ..datasets.simulation.layout_waymo import write_waymo_layout
    from ..datasets.simulation.places import domain

    sizes = split_sizes(config.splits, config.frames)
    place = domain(config.domain)
    with progress_bar("simulate", config.frames) as advance:
        write = {"kitti": write_kitti_layout, "waymo": write_waymo_layout, "lyft": write_lyft_layout}[config.layout]
        write(
            config.out, place, num_frames=config.frames, seed=config.seed, workers=config.workers,
            view=config.view, splits=sizes, progress=advance,
        )  # fmt: skip
    print_table("simulated dataset", ("domain", "frames", "seed", "splits"), [(config.domain, config.frames, config.seed, sizes)])
    height = 0.0 if config.layout == "waymo" else place.sensor.height  # Waymo's origin lies on the road
    # Vans: KITTI's reader knows them by itself, Lyft's must be told, Waymo does not tell them from cars.
    options = {"kitti": "", "waymo": " --class-map Vehicle Car", "lyft": " --neighbors other_vehicle Car"}[config.layout]
    next_step = f"prepare {config.layout} {config.out} --out PREPARED --classes Car --z-shift {height:g}{options}"
    console.print(f"next: upcycle3d {next_step}", soft_wrap=True)
    if height:
        console.print(
            "this is right for presets that expect the road at z = 0, such as small (docs/presets.md); for presets that expect unshifted "
            "scans, such as kitti_small, prepare without --z-shift",
            soft_wrap=True,
        )
    write_json(config.json, {"domain": config.domain, "frames": config.frames, "seed": config.seed, "splits": sizes})


def split_sizes(splits: Sequence[tuple[str, int]], frames: int) -> dict[str, int]:
    """Replace the one size of 0 by the number of frames that the other splits leave.

    Args:
        splits: Name and size of each split.
        frames: Number of frames.

    Returns:
        Size by name.

    Raises:
        InvalidInput: A name stands twice, a size is negative, more than one size is 0, or the sizes are too large.
    """
    asked = " ".join(f"{name} {size}" for name, size in splits)
    sizes = dict(splits)
    rest = frames - sum(sizes.values())
    open_ended = [name for name, size in sizes.items() if size == 0]
    if len(sizes) < len(splits) or min(sizes.values(), default=0) < 0 or len(open_ended) > 1:
        raise InvalidInput(
            f"--splits {asked}: give each name once and no negative size; only one size may be 0 (it takes the rest)"
        )
    if rest < len(open_ended):
        raise InvalidInput(f"--splits {asked}: {frames} frames are not enough; raise --frames, or make the splits smaller")
    return {name: size or rest for name, size in sizes.items()}


if __name__ == "__main__":
    sys.exit(run_command(command))
