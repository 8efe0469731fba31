"""Presets for scans of a full turn: their range goes all around, and real full turns stay below their voxel limit."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from upcycle3d.core.ledger_rules import CELLS_WARNING, judge
from upcycle3d.core.structures import PointCloud
from upcycle3d.ops.voxelize import voxelize
from upcycle3d.perception.models.encoders.scan_survey import measure_scan
from upcycle3d.perception.recipes.presets import PRESETS

FULL_TURN = sorted(name for name in PRESETS if name.startswith("full_turn"))
KITTI, NUSCENES = 1.73, 1.84  # mounting heights in meters


def real_full_turns() -> list[Tensor]:
    """(N, 3) points with the road at z = 0, of the real full turns of KITTI and nuScenes."""
    what = "real full turns stay below the voxel limit"
    kitti = sorted(tiny.shared("data/kitti/training/velodyne", what).glob("*.bin"))
    nuscenes = sorted(tiny.shared("data/nuscenes/samples/LIDAR_TOP", what).glob("*.bin"))
    return [*read(kitti, 4, KITTI), *read(nuscenes, 5, NUSCENES)]


def read(files: Sequence[Path], columns: int, height: float) -> list[Tensor]:
    scans = [torch.from_numpy(np.fromfile(file, np.float32).reshape(-1, columns)[:, :3]) for file in files]
    return [scan + torch.tensor([0, 0, height]) for scan in scans]


@pytest.mark.parametrize("name", FULL_TURN)
def test_a_full_turn_preset_sees_the_same_in_every_direction_with_the_road_at_zero(name):
    x0, y0, z0, x1, y1, z1 = PRESETS[name].detector.encoder.grid.range
    assert (x0, y0) == (-x1, -y1)
    assert x1 == y1 >= 50
    assert z0 < 0 < z1


@pytest.mark.parametrize("name", [n for n in FULL_TURN if "pv_rcnn" not in n])
def test_real_full_turns_lose_no_voxel_to_the_limit_of_a_full_turn_preset(name):
    encoder = PRESETS[name].detector.encoder.build()
    for scan in real_full_turns():
        cloud = PointCloud(xyz=scan, features=torch.zeros(len(scan), 0), feature_names=())
        _, ledger = measure_scan(cloud, encoder)
        assert ledger.cells_over_limit <= CELLS_WARNING * ledger.cells
        assert ledger.cells < 0.75 * encoder.config.max_voxels  # the margin for other sensors
        assert not judge(ledger)


def test_a_real_full_turn_over_the_limit_loses_every_sector_and_range_ring_alike():
    scan = next(iter(real_full_turns()))
    grid = {"point_range": (-51.2, -51.2, -1, 51.2, 51.2, 3), "voxel_size": (0.128, 0.128, 0.1), "max_points": 5}
    everything, kept = (voxelize(scan, max_voxels=limit, **grid) for limit in (10**6, 16_000))
    share = kept.counts.cells_over_limit / kept.counts.cells
    assert share > 0.5

    def groups(voxels: Tensor) -> Tensor:
        y, x = voxels[:, 1] - 399.5, voxels[:, 2] - 399.5
        sector = ((torch.atan2(y, x) + torch.pi) / (torch.pi / 6)).long().clamp(0, 11)
        ring = (torch.hypot(x, y) * 0.128 / 10).long().clamp(0, 6)
        return torch.cat([torch.bincount(sector, minlength=12), torch.bincount(ring, minlength=7)])

    before, after = groups(everything.coords), groups(kept.coords)
    deviation = (after - (1 - share) * before).abs() / (share * (1 - share) * before).clamp(min=1).sqrt()
    assert deviation.max() < 4
    in_file_order = groups(everything.coords[:16_000])
    assert ((in_file_order - (1 - share) * before).abs() / (share * (1 - share) * before).clamp(min=1).sqrt()).max() > 30
