"""Scenes and shards made by hand, for the tests of ingest and store: `upload(folder, [scene(0), scene(1)])` is one shard."""

import secrets
from dataclasses import replace
from pathlib import Path

import torch

from upcycle3d.core.cut import CutSpec, KeypointSpec, VoxelGrid
from upcycle3d.core.smashed_scene import SmashedScene
from upcycle3d.perception.server.ingest import ingest
from upcycle3d.perception.server.ingest_report import IngestReport
from upcycle3d.perception.wire.shards import ShardWriter

GRID = VoxelGrid(range=(0.0, -8.0, -2.0, 16.0, 8.0, 2.0), voxel_size=(0.5, 0.5, 0.5))
SPEC = CutSpec(layer="backbone.out", channels=4, stride=(4, 1, 1), shape=(2, 32, 32), grid=GRID)
KEYPOINT_SPEC = replace(SPEC, keypoints=KeypointSpec(count=12, channels=3))
OTHER_SPEC = CutSpec(layer="backbone.early", channels=4, stride=(2, 1, 1), shape=(2, 32, 32), grid=GRID)
ENCODER, OTHER_ENCODER = "ab" * 32, "cd" * 32


def scene(seed: int, voxels: int = 30, codec: str = "int8", fingerprint: str = ENCODER, spec: CutSpec = SPEC) -> SmashedScene:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(2048, generator=generator)[:voxels].sort().values
    coords = torch.stack([index // 1024, index // 32 % 32, index % 32], 1).to(torch.int32)
    features = torch.randn(voxels, 4, generator=generator).relu()
    return SmashedScene(
        spec=spec, coords=coords, features=features, codec=codec, encoder_fingerprint=fingerprint, scene_id=secrets.token_hex(16)
    )


def keypoint_scene(seed: int, keypoints: int) -> SmashedScene:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(8 * 32 * 32, generator=generator)[:keypoints]
    cells = torch.stack([index // 1024, index // 32 % 32, index % 32], 1).to(torch.int32)
    features = torch.randn(keypoints, 3, generator=generator)
    return replace(scene(seed), spec=KEYPOINT_SPEC, keypoint_cells=cells, keypoint_features=features)


def upload(folder: Path, scenes: list[SmashedScene]) -> Path:
    """One shard of ``scenes`` in ``folder``; its manifest."""
    first = scenes[0]
    with ShardWriter(folder, spec=first.spec, fingerprint=first.encoder_fingerprint, codec=first.codec) as writer:
        for s in scenes:
            writer.add(s)
    return writer.shards[0]


def ingest_all(incoming: Path, store: Path, **options: bool) -> IngestReport:
    """Ingest everything that lies in a folder, for the encoder and cut of these scenes."""
    return ingest(incoming, store, expected_fingerprint=ENCODER, expected_spec=SPEC, **options)
