"""Bytes of a smashed scene beside its raw scan: both detectors, both codecs, on simulated or given scans.

    python benchmarks/upload.py --presets small small_pv_rcnn kitti_second_iou kitti_pv_rcnn
    python benchmarks/upload.py --detectors runs/waymo_kitti/seed10/plain/source_run runs/waymo_kitti_pv/seed10/plain/source_run --domain waymo

Presets have random weights: their features compress otherwise than trained ones. The raw scan is counted as float32 x, y, z and the
features it has; a scene as encoded (zstd), without its share of the tar.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/decisions.md

import torch
from torch import nn

from upcycle3d.core.point_files import read_points
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import PointCloud
from upcycle3d.datasets.simulation.places import domain
from upcycle3d.datasets.simulation.simulate import simulate_frame
from upcycle3d.perception.recipes.presets import PRESETS
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.perception.vehicle.extractor import Extractor
from upcycle3d.perception.wire.codec import CODECS, encode_scene
from upcycle3d.tools.console import print_table, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=[], choices=sorted(PRESETS))
    parser.add_argument("--detectors", type=Path, nargs="+", default=[], help="run folders of trained detectors")
    parser.add_argument("--domain", default="kitti", help="whose simulated scans")
    parser.add_argument("--view", default="camera", choices=("camera", "full"))
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--scans", type=Path, nargs="+", default=[], help="KITTI .bin files instead of simulated scans")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    where = domain(arguments.domain)
    scans: list[PointCloud] = [read_points(path) for path in arguments.scans] or [
        simulate_frame(where, seed=5, index=i, view=arguments.view).frame.points for i in range(arguments.frames)
    ]
    torch.manual_seed(0)
    encoders: dict[str, nn.Module] = {f"{n} (random weights)": PRESETS[n].detector.build().encoder for n in arguments.presets}
    encoders |= {str(path): load_detector(path).encoder for path in arguments.detectors}
    raw = statistics.fmean(len(s) * 4 * (3 + s.features.shape[1]) for s in scans)
    rows, found = [], {}
    for name, encoder in encoders.items():
        grid = encoder.spec.grid  # type: ignore[union-attr]
        shift = where.sensor.height if not arguments.scans and grid.range[2] > -3 else 0.0  # presets with the road at z = 0
        for codec in CODECS:
            extractor = Extractor(encoder, RigSpec(z_shift=shift), codec)
            scenes = [extractor.smash(scan)[0] for scan in scans]
            size = statistics.fmean(len(encode_scene(scene)) for scene in scenes)
            cells = statistics.fmean(len(scene.coords) for scene in scenes)
            keypoints = statistics.fmean(len(scene.keypoint_cells) for scene in scenes)
            found[f"{name}/{codec}"] = size
            rows.append((name, codec, f"{cells:.0f}", f"{keypoints:.0f}", f"{size / 1000:.0f}", f"{size / raw:.2f}"))
    title = f"kB a scene, mean of {len(scans)} scans; a raw scan has {raw / 1000:.0f} kB"
    print_table(title, ("encoder", "codec", "cells", "keypoints", "kB", "of the raw scan"), rows)
    write_json(arguments.json, {"raw_bytes": raw, "bytes": found})


if __name__ == "__main__":
    main()
