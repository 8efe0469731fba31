"""What PV-RCNN's keypoints cost on a vehicle's CPU: sampling, and set abstraction compared with its matrix products alone.

    python benchmarks/speed/set_abstraction.py [--threads 2] [--repeats 15] [--json FILE]

The scan is a simulated KITTI scan in a front camera's view; the encoder has the reference size with 2,048 keypoints and random weights, in
evaluation mode. "Matrix products" are the multiplications of the perceptrons, once with the numbers of neighbors that occur and once with
the padding of OpenPCDet, where every ball is filled up to its limit. Set abstraction is everything after sampling: ball queries, gathering,
perceptrons, maxima, and the interpolation of the BEV map. The calls take turns.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/decisions.md

import torch
from torch import Tensor

from upcycle3d.core.cut import cell_centers
from upcycle3d.datasets.simulation.places import domain
from upcycle3d.datasets.simulation.simulate import simulate_frame
from upcycle3d.ops.ball_query import ball_query
from upcycle3d.ops.farthest_point import farthest_point_sample
from upcycle3d.perception.models.encoders.pv_rcnn import PvRcnnEncoder
from upcycle3d.perception.recipes.architectures import KITTI_PV_RCNN_PUBLISHED_DETECTOR
from upcycle3d.perception.recipes.speed import machine, measure_in_turns
from upcycle3d.tools.console import print_table, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    encoder = PvRcnnEncoder(KITTI_PV_RCNN_PUBLISHED_DETECTOR.encoder).eval()
    points = [simulate_frame(domain("kitti"), seed=0, index=0, view="camera").frame.points]
    with torch.inference_mode():
        voxels = encoder.voxelize(points)
        stages, raw = encoder.second.sparse_backbone.stages(voxels), encoder.raw_source(points)
        centers, starts = cell_centers(voxels.coords[:, 1:], encoder.spec.grid), voxels.starts()
        xyz, key_starts = encoder.sample(raw, voxels)
        sources = encoder.sources(raw, stages)
        occurring, padded, rows = [], [], []
        for abstraction, source in sources:
            balls = ball_query(xyz, key_starts, source.xyz, source.starts, abstraction.config.radii, abstraction.config.limits)
            for mlp, near, limit in zip(abstraction.mlps, balls, abstraction.config.limits, strict=True):
                first, second = (mlp[k].weight.flatten(1).T.contiguous() for k in (0, 3))  # type: ignore[index,union-attr,operator]
                wide = [len(source.xyz), len(xyz), len(near.index) + 1]
                occurring += [(torch.rand(wide[0], len(first)), first), (torch.rand(wide[1], 3), first[:3])]
                occurring += [(torch.rand(wide[2], len(second)), second)]
                padded += [(torch.rand(len(xyz) * limit, len(w)), w) for w in (first, second)]
            rows.append(
                (len(source.xyz), *(f"{len(b.index) / len(xyz):.1f} of {n}" for b, n in zip(balls, abstraction.config.limits)))
            )

        def products(pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
            def run() -> None:
                for left, right in pairs:
                    left @ right

            return run

        times = measure_in_turns(
            {
                "farthest point sampling": lambda: farthest_point_sample(centers, starts, encoder.config.keypoints),
                "sparse backbone": lambda: encoder.second.sparse_backbone.stages(voxels),
                "set abstraction": lambda: encoder.gather(xyz, key_starts, raw, stages),
                "of it ball queries": lambda: [
                    ball_query(xyz, key_starts, s.xyz, s.starts, a.config.radii, a.config.limits) for a, s in sources
                ],
                "matrix products at the sizes that occur": products(occurring),
                "matrix products with the reference's padding": products(padded),
            },
            arguments.repeats,
        )
    found = {name: time.median_ms for name, time in times.items()}
    print_table("sources of 2,048 keypoints", ("points", "neighbors, small ball", "large ball"), rows)
    print_table("milliseconds, median", ("what", "ms"), [(name, f"{ms:.1f}") for name, ms in found.items()])
    ratios = {name: found["set abstraction"] / found[name] for name in list(found)[-2:]}
    for name, ratio in ratios.items():
        print(f"set abstraction is {ratio:.2f} times the {name}")
    print(f"{len(points[0])} points, {len(voxels.coords)} voxels, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}")
    write_json(arguments.json, {"ms": found, "ratio": ratios, "environment": machine()})


if __name__ == "__main__":
    main()
