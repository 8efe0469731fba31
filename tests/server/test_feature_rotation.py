"""F-RoT in our reading: a pasted object's cells, keypoints and box turn together, and nothing else is touched."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from upcycle3d.core.cut import CutSpec, VoxelGrid
from upcycle3d.core.features import Keypoints
from upcycle3d.ops.iou3d import iou_bev
from upcycle3d.perception.models.footprint import footprint
from upcycle3d.perception.server.feature_gt import FeatureObject
from upcycle3d.perception.server.feature_rotation import rotate_object, rotate_objects
from upcycle3d.perception.server.upcycle_config import FeatureGtConfig

GRID = VoxelGrid(range=(0.0, -8.0, -1.0, 16.0, 8.0, 3.0), voxel_size=(0.125, 0.125, 0.125))
SPEC = CutSpec(layer="cut", channels=2, stride=(16, 8, 8), shape=(2, 16, 16), grid=GRID)  # cells of 1 m, centers at i + 1/16
CONFIG = FeatureGtConfig(max_objects=(5,))


def item(
    x: float = 8.0625, y: float = 0.0625, yaw: float = 0.0, size: tuple[float, float, float] = (3.5, 1.5, 1.5)
) -> FeatureObject:
    """An object that owns all cells of its footprint; features grow along x (channel 0) and are 1 (channel 1)."""
    box = torch.tensor([x, y, 0.0, *size, yaw])
    cells = footprint(box[None], SPEC)[0].nonzero()
    coords = torch.cat([torch.nn.functional.pad(cells, (1, 0), value=z) for z in (0, 1)]).int()
    features = torch.stack([coords[:, 2].float() + 1, torch.ones(len(coords))], 1)
    return FeatureObject(box=box, class_index=0, num_points=9, coords=coords, features=features)


def test_no_turn_changes_nothing():
    before = item()
    after = rotate_object(before, 0.0, SPEC, CONFIG)
    order = lambda o: {tuple(c): f for c, f in zip(o.coords.tolist(), o.features.tolist(), strict=True)}  # noqa: E731
    assert order(after).keys() == order(before).keys()
    for cell, feature in order(before).items():
        assert order(after)[cell] == pytest.approx(feature, abs=1e-5)
    assert torch.equal(after.box, before.box)


def test_a_quarter_turn_about_a_cells_center_is_exact():
    before, after = item(), rotate_object(item(), math.pi / 2, SPEC, CONFIG)
    expected = {}
    for (z, y, x), f in zip(before.coords.tolist(), before.features.tolist(), strict=True):
        expected[(z, 8 + (x - 8), 8 - (y - 8))] = f  # (dx, dy) -> (-dy, dx) about cell (8, 8)
    found = {tuple(c): f for c, f in zip(after.coords.tolist(), after.features.tolist(), strict=True)}
    assert found.keys() == expected.keys()
    for cell, feature in expected.items():
        assert found[cell] == pytest.approx(feature, abs=1e-4)
    assert after.box[6].item() == pytest.approx(math.pi / 2)
    assert set(map(tuple, after.coords[:, 1:].tolist())) <= set(
        map(tuple, footprint(after.box[None], SPEC)[0].nonzero().tolist())
    )


def test_keypoints_turn_with_the_box_and_nothing_moves_up_or_down():
    xyz = torch.tensor([[9.0625, 0.0625, 0.3], [8.0625, 1.0625, -0.2]])
    before = replace(item(), keypoints=Keypoints(xyz=xyz, features=torch.eye(2), starts=(0, 2)))
    after = rotate_object(before, math.pi / 2, SPEC, CONFIG).keypoints
    assert torch.allclose(after.xyz, torch.tensor([[8.0625, 1.0625, 0.3], [7.0625, 0.0625, -0.2]]), atol=1e-5)
    assert torch.equal(after.features, torch.eye(2))


def test_at_the_border_cells_that_leave_the_map_are_lost_and_none_comes_from_nowhere():
    for x, y in ((0.2, 0.0), (15.9, 7.9), (8.0, -7.9)):
        for angle in (0.4, -1.3, math.pi):
            after = rotate_object(item(x, y), angle, SPEC, CONFIG)
            assert bool(((after.coords >= 0) & (after.coords < torch.tensor(SPEC.shape))).all())
            assert len(after.coords.unique(dim=0)) == len(after.coords) == len(after.features)
            assert after.features.isfinite().all()


def test_an_object_that_would_meet_another_stays_as_it_is():
    objects = [item(5.0, 0.0), item(5.0, 1.55)]  # side by side, 5 cm apart: any real turn would meet
    rng = np.random.default_rng(0)
    same = rotate_objects(objects, torch.zeros(0, 7), SPEC, CONFIG, limit=math.pi / 16, rng=rng)
    boxes = torch.stack([o.box for o in same])
    assert (iou_bev(boxes, boxes) - torch.eye(2)).abs().max() < 1e-5
    alone = rotate_objects(objects[:1], torch.zeros(0, 7), SPEC, CONFIG, limit=math.pi / 16, rng=rng)
    assert 0 < abs(alone[0].box[6].item()) <= math.pi / 16
    blocked = rotate_objects(objects[:1], objects[1].box[None], SPEC, CONFIG, limit=math.pi / 16, rng=rng)
    assert float(iou_bev(blocked[0].box[None], objects[1].box[None]).sum()) == 0
