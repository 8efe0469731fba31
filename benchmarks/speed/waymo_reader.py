"""How fast Waymo frames become points, from v2 tables of the real size, on one core.

    OMP_NUM_THREADS=1 python benchmarks/speed/waymo_reader.py [--frames 12]

Prints CPU milliseconds per frame for reading the tables and for making points, and frames per second of both. In order of time: "TOP",
simulated frames of 64 x 2650 pixels with pixel poses and two returns, the second filled to an eighth, as in real data, with one frame per
row group; "five lasers", the same with four short-range lasers of 200 x 600 pixels, a tenth filled; "large groups", the same in row groups
of 256 rows, like Waymo's own files.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from upcycle3d.datasets.simulation.layout_waymo import waymo_frame, write_segment
from upcycle3d.datasets.simulation.places import WAYMO
from upcycle3d.datasets.simulation.simulate import simulate_frame
from upcycle3d.datasets.waymo_geometry import LaserScan, WaymoFrame, frame_points
from upcycle3d.datasets.waymo_parquet import SegmentReader, find_frames


def real_size(index: int) -> WaymoFrame:
    made = simulate_frame(WAYMO, seed=0, index=index, view="full")
    frame = waymo_frame(made, WAYMO.sensor, segment="s", index=index)
    (top,) = frame.lasers
    rng = np.random.default_rng(index)
    second = top.returns[0].copy()
    second[rng.random(second.shape[:2]) > 1 / 8] = -1
    assert top.pixel_poses is not None
    poses = top.pixel_poses + rng.normal(0, 1e-3, (1, second.shape[1], 6)).astype(np.float32)  # a pose a column, as in real data
    return replace(frame, lasers=(replace(top, returns=(top.returns[0], second), pixel_poses=poses),))


def with_side_lasers(frame: WaymoFrame) -> WaymoFrame:
    rng = np.random.default_rng(frame.timestamp % 1000)
    sides: list[LaserScan] = []
    for name in (2, 3, 4, 5):
        images = rng.random((2, 200, 600, 4), np.float32) * 20
        images[..., 3] = -1
        images[rng.random((2, 200, 600)) > 0.1] = -1
        side = replace(frame.lasers[0], name=name, returns=tuple(images), pixel_poses=None)
        sides.append(replace(side, inclinations=None, inclination_range=(-1.57, 0.52)))
    return replace(frame, lasers=(*frame.lasers, *sides))


def measure(name: str, root: Path) -> None:
    reader = SegmentReader(root, "s")
    read = made = count = 0.0
    places = find_frames(root, "s")
    start = time.perf_counter()
    for place in places:
        begin = time.process_time()
        frame = reader.frame(place.timestamp)
        middle = time.process_time()
        count += len(frame_points(frame))
        read, made = read + middle - begin, made + time.process_time() - middle
    wall = time.perf_counter() - start
    n = len(places)
    print(
        f"{name:14} {count / n:9.0f} points  {1e3 * read / n:6.1f} ms read  {1e3 * made / n:6.1f} ms points  "
        f"{n / (read + made):6.1f} frames/s of CPU  {n / wall:6.1f} frames/s of wall time",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=12)
    frames = parser.parse_args().frames
    torch.set_num_threads(1)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tops = [real_size(i) for i in range(frames)]
        write_segment(root, "s", tops)
        measure("TOP", root)
        write_segment(root, "s", map(with_side_lasers, tops))
        measure("five lasers", root)
        for component in ("lidar", "lidar_pose"):
            path = root / component / "s.parquet"
            pq.write_table(pq.read_table(path), path, row_group_size=256)
        measure("large groups", root)


if __name__ == "__main__":
    main()
