"""One supervised training step of the small SECOND-IoU and PV-RCNN, side by side, and PV-RCNN's set abstraction apart.

    python benchmarks/training_step.py [--threads 2] [--repeats 15] [--json FILE]

Two simulated frames a step: encode, decode, losses, backward, AdamW. The detectors take turns. Set abstraction of the keypoints is
timed forward and backward on the same frames, from fixed stages of the sparse backbone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/decisions.md

import torch

from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import Boxes3D, Frame, Labels
from upcycle3d.datasets.simulation.places import domain
from upcycle3d.datasets.simulation.simulate import SimulatedDataset
from upcycle3d.perception.models.detectors import DetectorConfig
from upcycle3d.perception.models.encoders.pv_rcnn import PvRcnnEncoder
from upcycle3d.perception.recipes.architectures import SMALL_PV_RCNN_DETECTOR, SMALL_SECOND_IOU_DETECTOR
from upcycle3d.perception.training.environment import describe_environment
from upcycle3d.tools.console import print_table, write_json


def training_step(config: DetectorConfig, frames: list[Frame], labels: list[Labels]) -> Callable[[], None]:
    """A step of a fresh detector on these frames."""
    torch.manual_seed(0)
    detector = config.build().train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        outputs = detector.decode(detector.encode([f.points for f in frames]), labels)
        detector.loss(outputs, labels).total().backward()
        optimizer.step()

    return step


def set_abstraction(frames: list[Frame]) -> Callable[[], None]:
    """Forward and backward of the keypoints' features."""
    encoder = PvRcnnEncoder(SMALL_PV_RCNN_DETECTOR.encoder).train()
    points = [f.points for f in frames]
    with torch.no_grad():
        voxels = encoder.voxelize(points)
        stages, raw = encoder.second.sparse_backbone.stages(voxels), encoder.raw_source(points)
    for stage in stages:
        stage.features.requires_grad_()
    xyz, starts = encoder.sample(raw, voxels)

    def call() -> None:
        encoder.gather(xyz, starts, raw, stages).features.sum().backward()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = domain("waymo")
    data = SimulatedDataset(domain=where, num_frames=2, seed=0, view="camera", classes=("Car",))
    rig = RigSpec(z_shift=where.sensor.height)
    frames = [replace(f, points=rig.from_sensor(f.points)) for f in (data[0], data[1])]
    lift = torch.tensor([0, 0, where.sensor.height, 0, 0, 0, 0])
    labels = [replace(f.labels, boxes=Boxes3D(data=f.labels.boxes.data + lift)) for f in frames if f.labels is not None]
    calls = {
        "SECOND-IoU step": training_step(SMALL_SECOND_IOU_DETECTOR, frames, labels),
        "PV-RCNN step": training_step(SMALL_PV_RCNN_DETECTOR, frames, labels),
        "set abstraction, forward and backward": set_abstraction(frames),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(arguments.repeats + 2):  # two rounds compile and warm up
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if k >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    second, pv, abstraction = (statistics.median(v) for v in times.values())
    print_table("milliseconds, median", ("what", "ms"), [(n, f"{statistics.median(v):.0f}") for n, v in times.items()])
    limit = 2 * second + abstraction
    print(f"PV-RCNN's step is {pv / limit:.2f} of twice SECOND-IoU's plus set abstraction ({pv / second:.2f} of SECOND-IoU's)")
    print(f"{arguments.threads} threads, load {os.getloadavg()[0]:.1f}")
    environment = describe_environment(command=["benchmarks/training_step.py"], seed=0)
    write_json(arguments.json, {"ms": {n: statistics.median(v) for n, v in times.items()}, "environment": environment})


if __name__ == "__main__":
    main()
