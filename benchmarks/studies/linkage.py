"""Which rule of sampling keeps neighbors in time from being found, on simulated drives of a moving vehicle.

    python benchmarks/studies/linkage.py --detector examples/detector.safetensors --gaps 0 20 50 100

A drive is a street of 390 m at 10 m/s and 10 scans per second. Each rule leaves at least `gap` scans out between two uploads, and at most
twice as many, as `extract --sample-gap` does; `extract --sample fleet` is 100. For each rule there are as many drives as give about
`--scenes` uploads, in one pile of random order. docs/results.md has the numbers.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch

from upcycle3d.core.features import CutFeatures
from upcycle3d.core.rig import RigSpec
from upcycle3d.datasets.simulation.drive import SimulatedDrive
from upcycle3d.datasets.simulation.places import domain
from upcycle3d.perception.models.encoders.encoder import Encoder
from upcycle3d.perception.privacy.attacks.linkage import attack_linkage
from upcycle3d.perception.privacy.linkage_metrics import Rate
from upcycle3d.perception.server.store import quantize_features
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.perception.vehicle.scan_choice import choose_scans
from upcycle3d.perception.wire.sampling import SceneSampling


@torch.no_grad()
def uploads_of(encoder: Encoder, name: str, gap: int, scenes: int, seed: int) -> tuple[list[CutFeatures], list[str], list[int]]:
    """Drive until there are enough uploads: these, their drives and their places in them."""
    where, chance = domain(name), random.Random(seed)
    rig = RigSpec() if encoder.trained_on is None else encoder.trained_on.rig
    found: tuple[list[CutFeatures], list[str], list[int]] = ([], [], [])
    street = 0
    while len(found[0]) < scenes:
        drive = SimulatedDrive(domain=where, seed=seed, street=street, num_frames=391 if gap else 60)
        names = [str(index) for index in range(len(drive))]
        for index, chosen in choose_scans(names, SceneSampling(gap=gap), rng=chance).items():
            if chosen:
                scan = rig.from_sensor(drive[int(index)].points)
                sent = encoder.upload([scan], encoder.voxelize([scan]), np.random.default_rng(seed))
                found[0].append(quantize_features(sent, "int8"))
                found[1].append(f"{street:04d}")
                found[2].append(int(index))
        street += 1
    return found


def main() -> None:
    """Attack the uploads of each rule and print what was found, beside chance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", type=Path, required=True, help="run folder, detector or encoder file")
    parser.add_argument("--domain", choices=["kitti", "waymo", "lyft"], default="kitti")
    parser.add_argument("--gaps", type=int, nargs="+", default=[0, 20, 50, 100])
    parser.add_argument("--scenes", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    encoder = load_detector(options.detector).eval().encoder

    def text(rate: Rate) -> str:
        return f"{rate.found:.3f} ({rate.chance:.3f}, x{rate.times_chance:.1f})"

    for gap in options.gaps:
        uploads, drives, positions = uploads_of(encoder, options.domain, gap, options.scenes, options.seed)
        rows = np.random.default_rng(options.seed).permutation(len(uploads)).tolist()
        uploads, drives, positions = [uploads[r] for r in rows], [drives[r] for r in rows], [positions[r] for r in rows]
        best = attack_linkage(uploads, drives, positions)
        tau = f"{np.mean(best.tau):.2f} ({np.mean(best.tau_chance):.2f})" if best.tau else "-"
        print(
            f"gap {gap:3d}: {len(uploads)} uploads of {len(set(drives))} drives; neighbor in the pile {text(best.neighbor)}, "
            f"in the drive {text(best.neighbor_in_drive)}, same drive {text(best.same_drive)}, |tau| {tau}",
            flush=True,
        )


if __name__ == "__main__":
    main()
