"""Attacks that read no feature: floor and ceiling of every table. Oracles: places computed by hand, and counting in numpy."""

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures, SparseVoxels
from upcycle3d.perception.privacy.attacks.coordinates import CellCenters, MeanOccupancy, occupied_voxels, voxel_centers
from upcycle3d.perception.privacy.frames import AuditFrame, audit_frames

pytestmark = pytest.mark.usefixtures("one_thread")


def upload_of(cells: list[list[int]]) -> CutFeatures:
    coords = torch.tensor(cells, dtype=torch.int32).view(-1, 4)
    voxels = SparseVoxels(features=torch.zeros(len(coords), 4), coords=coords, shape=tiny.CUT.shape, batch_size=1)
    return CutFeatures(voxels=voxels, spec=tiny.CUT)


def test_cell_centers_lie_where_the_receptive_fields_do():
    rebuilt = CellCenters().rebuild(upload_of([[0, 0, 0, 0], [0, 1, 2, 3]]))
    # voxels of 0.5 m, stride 1 in BEV and 4 in z, the grid starts at (0, -8, -2)
    assert rebuilt.xyz.tolist() == [[0.25, -7.75, -1.0], [1.75, -6.75, 1.0]]


def test_no_cell_gives_no_point():
    assert CellCenters().rebuild(upload_of([])).xyz.shape == (0, 3)


def test_keypoints_come_before_cells():
    frame = audit_frames([tiny.frame_with_car(0)], tiny.pv_rcnn().eval().encoder, "fp16")[0]
    rebuilt = CellCenters().rebuild(frame.upload)
    assert frame.upload.keypoints is not None
    count = len(frame.upload.keypoints.xyz)
    assert torch.equal(rebuilt.xyz[:count], frame.upload.keypoints.xyz)
    assert rebuilt.score[:count].min() > rebuilt.score[count:].max()


def test_voxel_centers_are_the_occupied_voxels():
    scan = tiny.scan_with_car()
    size, start = np.array(tiny.GRID.voxel_size), np.array(tiny.GRID.range[:3])
    expected = {tuple(np.floor((p - start) / size).astype(int)[::-1]) for p in scan.xyz.double().numpy()}
    voxels = occupied_voxels(scan, tiny.GRID)
    # a point on the border of two voxels may be rounded to either side
    assert len({tuple(v) for v in voxels.tolist()} ^ expected) <= 2
    centers = voxel_centers(scan, tiny.GRID)
    assert len(centers.xyz) == len(voxels)
    gaps = torch.cdist(scan.xyz, centers.xyz).min(1).values
    assert gaps.max() <= 0.1 * 3**0.5 / 2 + 1e-4


def test_a_point_on_the_far_side_stays_in_the_grid():
    edge = torch.tensor(
        [[np.nextafter(np.float32(12.8), np.float32(0)), np.nextafter(np.float32(6.4), np.float32(0)), 2.9999998]]
    )
    assert occupied_voxels(tiny.cloud(edge), tiny.GRID).tolist() == [[39, 127, 127]]


def test_mean_occupancy_knows_what_is_always_there():
    wall = torch.tensor([[5.05, 0.05, 0.05], [5.05, 0.15, 0.05]])
    frames = []
    for k in range(4):
        own = torch.tensor([[1.05 + k, -3.0, 1.0]])
        frames.append(AuditFrame(id=str(k), upload=upload_of([]), scan=tiny.cloud(torch.cat([wall, own]))))
    attack = MeanOccupancy(blur=0.0)
    with pytest.raises(InvalidInput, match="not trained"):
        attack.rebuild(upload_of([]))
    attack.train(frames)
    rebuilt = attack.rebuild(upload_of([]))
    # The voxels are 0.5 m wide, so both points of the wall are in one; it is mirrored, and on the other side is nothing.
    likely = rebuilt.xyz[rebuilt.score > 0.4]
    assert sorted(likely.tolist()) == [[5.25, -0.25, 0.25], [5.25, 0.25, 0.25]]
    assert rebuilt.score.max() == pytest.approx(0.5)
    with pytest.raises(InvalidInput, match="at least one frame"):
        MeanOccupancy().train([])
