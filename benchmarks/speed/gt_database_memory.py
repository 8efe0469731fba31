"""Whether the memory of the GT database's build grows with the number of scans.

    python benchmarks/speed/gt_database_memory.py [--frames 500] [--json FILE]

The scans are full turns of 110,000 to 130,000 random points with 40 boxes that hold up to 2,000 points each. Twenty different ones are
prepared and read again and again under other ids. Growth is resident memory at the end compared with after the first eight scans.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from upcycle3d.core.frame import Frame
from upcycle3d.core.structures import Labels, PointCloud
from upcycle3d.datasets.fingerprint import split_fingerprint
from upcycle3d.datasets.gt_database import build_gt_database
from upcycle3d.datasets.prepare import prepare
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.perception.training.environment import describe_environment
from upcycle3d.tools.console import print_table, write_json

DIFFERENT = 20
WARM_UP = 8


@dataclass(frozen=True)
class FullTurns:
    """Random full turns with boxes."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Frame:
        generator = torch.Generator().manual_seed(index)
        rows = int(torch.randint(110_000, 130_000, (1,), generator=generator))
        boxes = torch.cat(
            [
                torch.rand(40, 2, generator=generator) * 100 - 50,
                torch.rand(40, 1, generator=generator) * 2 - 1,
                torch.rand(40, 3, generator=generator) * torch.tensor([3.0, 1.0, 1.0]) + torch.tensor([3.0, 1.5, 1.5]),
                torch.rand(40, 1, generator=generator) * 6 - 3,
            ],
            1,
        )
        inside = torch.randint(0, 40, (rows // 3,), generator=generator) ** 2 // 40  # most points lie in the first boxes
        near = boxes[inside, :3] + (torch.rand(rows // 3, 3, generator=generator) - 0.5) * 1.5
        far = torch.randn(rows - rows // 3, 3, generator=generator) * torch.tensor([40.0, 40.0, 2.0])
        points = PointCloud(xyz=torch.cat([near, far]), features=torch.rand(rows, 1, generator=generator))
        return Frame(id=f"{index:06d}", points=points, labels=Labels.make(boxes, torch.arange(40) % 3))


@dataclass
class Repeated:
    """The frames of a prepared dataset again and again, each time with another id; it notes the resident memory."""

    frames: PreparedDataset
    count: int
    megabytes: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Frame:
        self.megabytes.append(resident_megabytes())
        return replace(self.frames[index % len(self.frames)], id=f"{index:06d}")


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=500)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ("Car", "Pedestrian", "Cyclist")
    with tempfile.TemporaryDirectory() as folder:
        ids = [f"{i:06d}" for i in range(DIFFERENT)]
        prepare(FullTurns(DIFFERENT), ids, Path(folder) / "data", splits={"train": ids}, classes=names, workers=1)
        frames = PreparedDataset(Path(folder) / "data", "train")
        source = Repeated(frames, options.frames)
        labels = (frames.labels(i % DIFFERENT) for i in range(options.frames))
        fingerprint = split_fingerprint([f"{i:06d}" for i in range(options.frames)], labels, classes=names)
        start = time.perf_counter()
        database = build_gt_database(source, Path(folder) / "gt", class_names=names, fingerprint=fingerprint)
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in (Path(folder) / "gt").glob("objects-*")) / 1e6
    grown = source.megabytes[-1] - source.megabytes[WARM_UP]
    rows = [
        ("scans", options.frames),
        ("objects", len(database)),
        ("megabytes of objects", round(size)),
        ("seconds", round(seconds, 1)),
        ("growth in megabytes", round(grown, 1)),
        ("growth after the first half in megabytes", round(source.megabytes[-1] - source.megabytes[options.frames // 2], 1)),
    ]
    print_table("build of a GT database", ("what", "value"), rows)
    if options.json:
        write_json(options.json, {**dict(rows), "environment": describe_environment(command=[], seed=0)})


if __name__ == "__main__":
    main()
