"""How fast simulated Waymo tables are prepared, what a second start reuses, and whether memory grows while reading back.

    python benchmarks/speed/prepare.py [--frames 40] [--json FILE]

Memory is the growth of resident memory while every frame of a prepared dataset of random points (160,000 per frame) is read once, after
the first eight frames, for a dataset and for one that is four times as large.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from upcycle3d.core.frame import Frame
from upcycle3d.core.structures import Labels, PointCloud
from upcycle3d.datasets.prepare import prepare
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.datasets.simulation.layout_waymo import write_waymo_layout
from upcycle3d.datasets.simulation.places import WAYMO
from upcycle3d.datasets.waymo import WaymoDataset
from upcycle3d.datasets.waymo_places import find_waymo_frames, find_waymo_splits
from upcycle3d.perception.training.environment import describe_environment
from upcycle3d.tools.console import print_table, write_json


@dataclass(frozen=True)
class RandomFrames:
    """Frames of random points, as large as Waymo's."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Frame:
        generator = torch.Generator().manual_seed(index)
        points = PointCloud(xyz=torch.randn(160_000, 3, generator=generator), features=torch.zeros(160_000, 1))
        return Frame(id=f"{index:06d}", points=points, labels=Labels.make(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64)))


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def growth(folder: Path, frames: int) -> tuple[float, float]:
    """(megabytes on disk, megabytes by which resident memory grows)."""
    source = RandomFrames(frames)
    ids = tuple(f"{i:06d}" for i in range(frames))
    prepare(source, ids, folder, splits={"train": ids}, classes=("Car",), workers=1)
    data = PreparedDataset(folder, "train")
    for i in range(8):
        data[i]
    before = most = resident_megabytes()
    for i in range(len(data)):
        data[i]
        most = max(most, resident_megabytes())
    return sum(p.stat().st_size for p in folder.rglob("*.f32")) / 1e6, most - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_waymo_layout(root / "raw", WAYMO, num_frames=arguments.frames, seed=0, splits={"train": arguments.frames})
        places = find_waymo_frames(root / "raw", find_waymo_splits(root / "raw")["train"])
        listed = [place for part in places.values() for place in part]
        ids = tuple(place.id for place in listed)
        source = WaymoDataset(listed, classes=("Vehicle", "Pedestrian", "Cyclist"))
        for workers in (1, 2):
            start = time.perf_counter()
            out = root / f"prepared{workers}"
            splits = {"train": ids}
            prepare(source, ids, out, splits=splits, classes=source.classes, workers=workers, chunk_frames=5)
            rate = len(ids) / (time.perf_counter() - start)
            rows.append((f"prepare, {workers} workers", f"{rate:.1f} frames/s"))
        for part in sorted((out / "parts").glob("*.parquet"))[::2]:
            part.unlink()  # as if killed half way
        start = time.perf_counter()
        report = prepare(source, ids, out, splits=splits, classes=source.classes, workers=2, chunk_frames=5)
        seconds = time.perf_counter() - start
        rows.append(("started again half way", f"{report.reused_frames} of {report.frames} frames reused, {seconds:.1f} s"))
        for frames in (25, 100):
            disk, grown = growth(root / f"random{frames}", frames)
            rows.append((f"reading {frames} frames ({disk:.0f} MB)", f"{grown:.0f} MB more resident memory"))
    print_table("preparing", ("what", "result"), rows)
    print(f"load {os.getloadavg()[0]:.1f}")
    environment = describe_environment(command=["benchmarks/speed/prepare.py"], seed=0)
    write_json(arguments.json, {"rows": rows, "environment": environment})


if __name__ == "__main__":
    main()
