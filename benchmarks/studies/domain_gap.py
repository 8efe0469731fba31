"""The gap between two simulated domains by cause: source models are scored on hybrids of source and target.

    python benchmarks/studies/domain_gap.py --source waymo --target kitti --detectors RUN RUN --frames 60 --out runs/gap

Each hybrid takes one property from the target: its beams, its object sizes, its noise, its whole sensor, or its whole place.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from upcycle3d.datasets.kitti import KittiDataset
from upcycle3d.datasets.simulation.layout_kitti import write_kitti_layout
from upcycle3d.datasets.simulation.places import Domain, domain
from upcycle3d.perception.evaluation.detect import evaluate_detector
from upcycle3d.perception.evaluation.kitti import LOOSE, OFFICIAL
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.tools.console import print_table, write_json


def hybrids(source: Domain, target: Domain) -> dict[str, Domain]:
    """Source, target and what lies between; every hybrid has a name of its own."""
    a, b = source.sensor, target.sensor
    sensors = {
        "target's beams": replace(a, elevations=b.elevations, azimuths=b.azimuths),
        "target's noise": replace(
            a, range_noise=b.range_noise, jitter=b.jitter, dropout=b.dropout, reach=b.reach, max_range=b.max_range
        ),
        "target's height": replace(a, height=b.height),
        "target's sensor": b,
    }
    return {
        "source": source,
        **{name: replace(source, name=name, sensor=sensor) for name, sensor in sensors.items()},
        "target's object sizes": replace(source, name="sizes", place=replace(source.place, sizes=target.place.sizes)),
        "target's place": replace(source, name="place", place=target.place),
        "target": target,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="waymo")
    parser.add_argument("--target", default="kitti")
    parser.add_argument("--detectors", type=Path, nargs="+", required=True)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    detectors = [load_detector(path) for path in arguments.detectors]
    rows, found = [], {}
    for number, (name, where) in enumerate(hybrids(domain(arguments.source), domain(arguments.target)).items()):
        root = arguments.out / f"data{number}"
        write_kitti_layout(
            root, where, num_frames=arguments.frames, seed=arguments.seed, view="camera", splits={"val": arguments.frames}
        )
        ids = [f"{i:06d}" for i in range(arguments.frames)]
        frames = KittiDataset(root, ids, classes=detectors[0].class_names, z_shift=where.sensor.height)
        cells = []
        for overlaps in (OFFICIAL, LOOSE):
            cars = [
                evaluate_detector(d, frames, frames.kitti_objects, min_overlaps=overlaps)[0].classes["Car"] for d in detectors
            ]
            for metric in ("box_3d", "bev"):
                values = [getattr(c, metric).r40[1] for c in cars]
                found[f"{name}/{metric}/{'0.7' if overlaps is OFFICIAL else '0.5'}"] = values
                cells.append(f"{statistics.fmean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.1f}")
        rows.append((name, *cells))
        print(rows[-1], flush=True)
    title = (
        f"Car AP, moderate, R40, of {len(detectors)} detectors trained on {arguments.source}; hybrids towards {arguments.target}"
    )
    print_table(title, ("scored on", "3D 0.7", "BEV 0.7", "3D 0.5", "BEV 0.5"), rows)
    write_json(arguments.out / "summary.json", found)


if __name__ == "__main__":
    main()
