"""How many isolated points of a scan does the attack on raw-point balls compute? PV-RCNN as published, fp16 and int8.

    python benchmarks/studies/isolated_points.py --detector RUN --attacker DIR:SPLIT --victims DIR:SPLIT [--frames 10]

A point is isolated where it lies alone in the smaller ball of raw points around a keypoint. "Of two" are points of balls that hold exactly
two. A point counts as computed where an answer that the attack is sure of lies within 1 cm of it. `upcycle3d audit --attacks exact` counts
all points that the same attack computes.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.perception.models.encoders.pv_rcnn import PvRcnnEncoder
from upcycle3d.perception.privacy.attacks.exact_points import ExactPoints
from upcycle3d.perception.privacy.exact_points import EXACT
from upcycle3d.perception.privacy.frames import AuditFrame, audit_frames
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.tools.console import print_table


def points_in_balls_of(size: int, frame: AuditFrame, radius: float) -> Tensor:
    """(N, 3) the points of a scan that lie in a keypoint's ball of exactly `size` points."""
    assert frame.upload.keypoints is not None
    found = set()
    for keypoints in frame.upload.keypoints.xyz.split(256):
        near = torch.cdist(keypoints, frame.scan.xyz, compute_mode="donot_use_mm_for_euclid_dist") < radius
        found |= set(near[near.sum(1) == size].any(0).nonzero()[:, 0].tolist())
    return frame.scan.xyz[sorted(found)]


def frames_of(text: str, most: int, encoder: PvRcnnEncoder, codec: str) -> list[AuditFrame]:
    frames = DataSplit.parse(text).open()
    return audit_frames((frames[i] for i in range(min(most, len(frames)))), encoder, codec)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", required=True)
    parser.add_argument("--attacker", required=True)
    parser.add_argument("--victims", required=True)
    parser.add_argument("--frames", type=int, default=10, help="frames of each split at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    encoder = load_detector(options.detector).eval().encoder
    if not isinstance(encoder, PvRcnnEncoder) or encoder.config.raw_points is None:
        raise SystemExit(f"error: {options.detector} is no PV-RCNN with balls of raw points")
    radius, rows = encoder.config.raw_points.radii[0], []
    for codec in ("fp16", "int8"):
        attack = ExactPoints(encoder, codec)
        attack.train(frames_of(options.attacker, options.frames, encoder, codec))
        counts = {1: [0, 0], 2: [0, 0]}
        victims = frames_of(options.victims, options.frames, encoder, codec)
        for frame in victims:
            claims = attack.rebuild(frame.upload).xyz
            for size, count in counts.items():
                truth = points_in_balls_of(size, frame, radius)
                if len(truth) and len(claims):
                    count[0] += int((torch.cdist(truth.double(), claims.double()).amin(1) <= EXACT).sum())
                count[1] += len(truth)
        rows.append(
            (codec, str(len(victims)), *(f"{right} of {all_} ({right / max(all_, 1):.3f})" for right, all_ in counts.values()))
        )
    print_table("points computed within 1 cm", ("codec", "scans", "isolated points", "points of balls of two"), rows)


if __name__ == "__main__":
    main()
