"""How much the place of the cut matters: the occupancy attack on every stage of SECOND-IoU, fp16, without a defence.

    python benchmarks/studies/cut_depth.py --detector runs/source --attacker data/mine:train --victims data/mine:val

A stage of the sparse backbone gives the cells and features after it; a block of the BEV network gives a map in which every place has
features, so that no list of cells is sent. The attacker trains on each stage afresh. docs/results.md has the numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch

from upcycle3d.core.cut import CutSpec
from upcycle3d.core.features import CutFeatures, SparseVoxels
from upcycle3d.core.structures import PointCloud
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.encoders.encoder import Encoder
from upcycle3d.perception.models.encoders.second import SecondEncoder
from upcycle3d.perception.privacy.attacks.occupancy_decoder import DecoderSize
from upcycle3d.perception.privacy.frames import AuditFrame, audit_frames
from upcycle3d.perception.recipes.audit_cells import AttackName, measure_rebuild
from upcycle3d.perception.training.detector_files import load_detector

STAGES = ("conv2", "conv3", "conv4", "conv_out", "bev_block_1", "bev_block_2")


class Stage(Encoder):
    """The vehicle half of a detector that is cut at another place."""

    def __init__(self, detector: Detector, stage: str) -> None:
        super().__init__()
        self.detector, self.stage = detector, stage
        self.spec = detector.spec
        with torch.no_grad():
            empty = PointCloud(
                xyz=torch.zeros(0, 3),
                features=torch.zeros(0, len(detector.point_features)),
                feature_names=detector.point_features,
            )
            self.spec = self([empty]).spec

    def voxelize(self, points: Sequence[PointCloud]) -> SparseVoxels:
        """As the detector's own encoder."""
        return self.detector.encoder.voxelize(points)

    def features(self, points: Sequence[PointCloud], voxels: SparseVoxels) -> CutFeatures:
        """Features after the stage."""
        number = STAGES.index(self.stage)
        if number < 4:
            found = cast(SecondEncoder, self.detector.encoder).sparse_backbone.stages(voxels)[number + 1]
            stride = [(2, 2, 2), (4, 4, 4), (8, 8, 8), (16, 8, 8)][number]
        else:
            found = self._dense(self.detector.encoder.features(points, voxels), number - 3)
            stride = (16 * self.detector.spec.shape[0], *(8 * (number - 3),) * 2)
        spec = CutSpec(layer=self.stage, channels=found.features.shape[1], stride=stride, shape=found.shape, grid=self.spec.grid)
        return CutFeatures(voxels=found, spec=spec)

    def _dense(self, features: CutFeatures, blocks: int) -> SparseVoxels:
        bev = features.voxels.dense().flatten(1, 2)
        for block in self.detector.decoder.bev_backbone.blocks[:blocks]:
            bev = block(bev)
        count, channels, height, width = bev.shape
        axes = [torch.arange(n, dtype=torch.int32) for n in (count, 1, height, width)]
        coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 4)
        values = bev.permute(0, 2, 3, 1).reshape(-1, channels)
        return SparseVoxels(features=values, coords=coords, shape=(1, height, width), batch_size=count)


def frames_of(split: DataSplit, most: int, encoder: Encoder) -> list[AuditFrame]:
    """Frames of a split, evenly spread, at most `most`."""
    frames = split.open()
    rows = np.linspace(0, len(frames) - 1, min(most, len(frames))).astype(int)
    return audit_frames((frames[int(row)] for row in rows), encoder, "fp16")


def main() -> None:
    """Train an attack for each stage and print its scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", type=Path, required=True, help="run folder or file of a SECOND-IoU")
    parser.add_argument("--attacker", required=True, help="DIR:SPLIT")
    parser.add_argument("--victims", required=True, help="DIR:SPLIT")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--attack", choices=["occupancy", "coordinates"], default="occupancy")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    detector = load_detector(options.detector).eval()
    for stage in options.stages:
        encoder = Stage(detector, stage).eval()
        attacker = frames_of(DataSplit.parse(options.attacker), 150, encoder)
        victims = frames_of(DataSplit.parse(options.victims), 25, encoder)
        found = measure_rebuild(
            cast(AttackName, options.attack),
            attacker,
            victims,
            detector=detector,
            steps=options.steps,
            size=DecoderSize(),
            seed=options.seed,
        )
        scores, cells = found.matched, np.mean([len(frame.upload.voxels.coords) for frame in victims])
        print(
            f"{stage:12} {cells:7.0f} cells x {encoder.spec.channels:3d}  F@0.2 {scores.scene.f_20cm}  best {found.best.scene.f_20cm}  "
            f"above road {scores.background_above_road.f_20cm}  {found.bits_per_voxel:.2f} bits  {found.training_seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
