"""How fast the simulated LiDAR makes frames, and how similar they are to real ones.

    python benchmarks/speed/simulation.py [--frames 40]
    python benchmarks/speed/simulation.py --compare KITTI [--frames 200]

The first command prints, per domain and view, the CPU time per frame in one process (a busy machine does not change it) and the frames per
second that one and two workers write to disk, including the start of the processes; before that, the wall time of the very first frame
with an empty numba cache. The second command prints the median number of points on a fully visible car by range, simulated and real: the
table of docs/simulation.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from upcycle3d.core.structures import Labels
from upcycle3d.datasets.kitti import KittiDataset
from upcycle3d.datasets.kitti_text import KittiObjects
from upcycle3d.datasets.simulation.layout_kitti import write_kitti_layout
from upcycle3d.datasets.simulation.places import DOMAINS, Domain
from upcycle3d.datasets.simulation.simulate import View, simulate_frame

BINS = ((8, 12), (12, 18), (18, 22), (27, 33), (37, 43), (47, 53))  # m

COLD = """
import time
from upcycle3d.datasets.simulation.places import KITTI
from upcycle3d.datasets.simulation.simulate import simulate_frame
start = time.perf_counter()
simulate_frame(KITTI, seed=0, index=0, view="camera")
print(time.perf_counter() - start)
"""


def cold_compile_seconds() -> float:
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", COLD], env={**os.environ, "NUMBA_CACHE_DIR": cache}, capture_output=True, text=True, check=True
        )
    return float(done.stdout)


def seconds_to_write(domain: Domain, view: View, frames: int, workers: int) -> float:
    with tempfile.TemporaryDirectory() as root:
        start = time.perf_counter()
        write_kitti_layout(Path(root), domain, num_frames=frames, seed=0, workers=workers, view=view)
        return time.perf_counter() - start


def car_counts(cars: Iterable[tuple[KittiObjects, Labels]]) -> list[str]:
    """Per range, the median number of points on fully visible, whole cars, and how many cars that is."""
    ranges, points = [], []
    for objects, labels in cars:
        keep = (labels.classes == 0) & (labels.weight > 0) & (objects.occluded == 0) & (objects.truncated < 0.1)
        ranges.append(labels.boxes.data[keep, :2].norm(dim=1))
        points.append(labels.num_points[keep])
    r, n = torch.cat(ranges), torch.cat(points)
    near = [n[(r >= low) & (r < high)].double() for low, high in BINS]
    return [f"{v.median():.0f} ({len(v)})" if len(v) else "-" for v in near]


def real_cars(root: Path) -> Iterator[tuple[KittiObjects, Labels]]:
    ids = sorted(p.stem for p in (root / "training" / "velodyne_reduced").glob("*.bin"))
    data = KittiDataset(root=root, ids=ids, classes=("Car",))
    for i, name in enumerate(data.ids):
        objects, labels = data.kitti_objects(name), data[i].labels
        assert labels is not None
        yield objects.select(torch.tensor([t in ("Car", "Van") for t in objects.types], dtype=torch.bool)), labels


def simulated_cars(domain: Domain, frames: int) -> Iterator[tuple[KittiObjects, Labels]]:
    for i in range(frames):
        made = simulate_frame(domain, seed=7, index=i, view="camera")
        assert made.frame.labels is not None
        yield made.objects, made.frame.labels


def compare(root: Path, frames: int) -> None:
    print(f"{'':10}" + "".join(f"{f'{low}-{high} m':>14}" for low, high in BINS))
    print(f"{'real KITTI':10}" + "".join(f"{c:>14}" for c in car_counts(real_cars(root))))
    for domain in DOMAINS:
        print(f"{domain.name:10}" + "".join(f"{c:>14}" for c in car_counts(simulated_cars(domain, frames))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=40, help="frames per measurement")
    parser.add_argument("--compare", type=Path, metavar="KITTI_ROOT", help="compare with real scans instead of measuring speed")
    arguments = parser.parse_args()
    frames = arguments.frames
    if arguments.compare is not None:
        compare(arguments.compare, frames)
        return
    torch.set_num_threads(1)
    print(
        f"cold compile and first frame: {cold_compile_seconds():.1f} s; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"
    )
    simulate_frame(DOMAINS[0], seed=0, index=0, view="camera")
    print(f"{'domain':8} {'view':8} {'points':>8} {'CPU ms':>8} {'1 worker':>10} {'2 workers':>10}")
    for domain in DOMAINS:
        for view in ("camera", "full"):
            start = time.process_time()
            points = [len(simulate_frame(domain, seed=0, index=i, view=view).frame.points) for i in range(frames)]
            cpu = (time.process_time() - start) / frames
            one, two = (frames / seconds_to_write(domain, view, frames, workers) for workers in (1, 2))
            print(f"{domain.name:8} {view:8} {sum(points) / frames:8.0f} {cpu * 1e3:8.0f} {one:10.1f} {two:10.1f}", flush=True)


if __name__ == "__main__":
    main()
