"""The attack on attributes finds what was planted in the features of made-up uploads, and nothing where nothing was planted."""

import math
from dataclasses import replace

import pytest
import torch

from upcycle3d.core.cut import CutSpec, KeypointSpec, VoxelGrid
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures, Keypoints, SparseVoxels
from upcycle3d.core.structures import Labels, PointCloud
from upcycle3d.perception.privacy.attacks.attributes import attack_attributes
from upcycle3d.perception.privacy.frames import AuditFrame

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = VoxelGrid(range=(0.0, -8.0, -1.0, 16.0, 8.0, 3.0), voxel_size=(0.2, 0.2, 0.2))
SPEC = CutSpec(layer="made up", channels=6, stride=(20, 4, 4), shape=(1, 20, 20), grid=GRID)
CLASSES = ("Car", "Pedestrian")
PLANTED, NOISE, EMPTY = "planted", "noise", "empty"


def frame(seed: int, kind: str, *, keypoints: bool = False) -> AuditFrame:
    """Eight objects of one size each on their own cells. Planted features are (class, length, width, height, intensity of the cell, 1)."""
    g = torch.Generator().manual_seed(seed)
    spots = torch.randperm(25, generator=g)[:8]
    xy = torch.stack([1.6 + 3.2 * (spots // 5), -6.4 + 3.2 * (spots % 5)], 1).float() + torch.rand(8, 2, generator=g) * 0.2
    classes = torch.randint(2, (8,), generator=g)
    size = 0.6 + 0.6 * torch.rand(8, 3, generator=g)
    boxes = torch.cat([xy, torch.full((8, 1), 0.5), size, torch.zeros(8, 1)], 1)
    inside = ((torch.rand(8, 12, 3, generator=g) - 0.5) * 0.5 + boxes[:, None, :3]).flatten(
        0, 1
    )  # says nothing of class and size
    road = torch.rand(200, 3, generator=g) * torch.tensor([15.9, 15.9, 0.05]) + torch.tensor([0.0, -8.0, -0.5])
    xyz = torch.cat([inside, road])
    shine = torch.rand(20, 20, generator=g)
    x0, y0 = SPEC.position(0.0, 0.0)
    column, row = (((xyz[:, :2] - torch.tensor([x0, y0])) / 0.8).round().long().clamp(0, 19)).unbind(1)
    features = torch.randn(20, 20, 6, generator=g)
    if kind == PLANTED:
        distance = torch.cdist(torch.cartesian_prod(y0 + 0.8 * torch.arange(20), x0 + 0.8 * torch.arange(20)).flip(1), xy)
        near = distance.argmin(1)
        features = torch.cat([classes[near, None].float(), size[near], shine.flatten()[:, None], torch.ones(400, 1)], 1).view(
            20, 20, 6
        )
    cells = torch.cartesian_prod(torch.arange(20), torch.arange(20))
    if kind == EMPTY:
        cells, features = cells[:0], features.new_zeros(0, 6)
    coords = torch.nn.functional.pad(cells, (2, 0)).to(torch.int32)
    voxels = SparseVoxels(features=features.reshape(-1, 6), coords=coords, shape=SPEC.shape, batch_size=1)
    upload = CutFeatures(voxels=voxels, spec=SPEC)
    if keypoints:
        near = torch.cdist(xyz[:, :2], xy).argmin(1)
        told = size[near] if kind == PLANTED else torch.randn(len(near), 3, generator=g)
        if kind == EMPTY:
            xyz_k, told = xyz[:0], told[:0]
        else:
            xyz_k = xyz
        upload = CutFeatures(
            voxels=replace(voxels, features=torch.zeros_like(voxels.features)),
            spec=replace(SPEC, keypoints=KeypointSpec(count=400, channels=3)),
            keypoints=Keypoints(xyz=xyz_k, features=told, starts=(0, len(xyz_k))),
        )
    scan = PointCloud(xyz=xyz, features=shine[row, column][:, None])
    return AuditFrame(id=str(seed), upload=upload, scan=scan, labels=Labels.make(boxes, classes))


def leak(kind: str, *, known_frames: int = 12, unseen_frames: int = 8, **options: bool):
    seeds = (range(known_frames), range(100, 100 + unseen_frames))
    known, unseen = ([frame(s, kind, **options) for s in part] for part in seeds)
    return attack_attributes(known, unseen, class_names=CLASSES)


@pytest.fixture(scope="module")
def planted():
    return leak(PLANTED)


@pytest.fixture(scope="module")
def noise():
    return leak(NOISE)


def test_planted_attributes_are_found(planted):
    assert planted.classes.accuracy.upload > 0.95
    assert planted.intensity.r2.upload > 0.7  # the map is read between cells, where the planted intensity jumps
    assert all(s.error.upload < 0.4 * s.guess and s.correlation.upload > 0.9 for s in planted.sizes)


def test_features_of_noise_give_no_attribute(noise):
    assert abs(noise.classes.accuracy.upload - 0.5) < 0.2
    assert abs(noise.intensity.r2.upload) < 0.1
    assert all(s.error.upload > 0.9 * s.guess and abs(s.correlation.upload) < 0.4 for s in noise.sizes)


def test_rows_that_do_not_see_the_features_stay_at_chance(planted):
    """The planted values are in the features only, so place and coordinates must not give them."""
    for row in (planted.classes.accuracy.nothing, planted.classes.accuracy.coordinates):
        assert abs(row - 0.5) < 0.2
    assert abs(planted.intensity.r2.coordinates) < 0.1
    assert all(s.error.coordinates > 0.9 * s.guess for s in planted.sizes)


def test_the_upper_bound_of_intensity_is_the_mean_of_the_voxel(planted):
    """All points of a cell have one intensity here, and a voxel may reach into the next cell by half a voxel only."""
    assert planted.intensity.r2.raw > 0.9


def test_counts_are_those_of_the_unseen_frames(planted):
    assert (planted.classes.frames, sum(planted.classes.objects), planted.intensity.points) == (8, 64, 8 * 150)
    assert sum(s.objects for s in planted.sizes) == 3 * 64


def test_keypoints_are_read():
    assert all(s.error.upload < 0.6 * s.guess for s in leak(PLANTED, keypoints=True).sizes)


@pytest.mark.parametrize("keypoints", [False, True])
def test_uploads_without_any_cell_are_scored(keypoints):
    found = leak(EMPTY, known_frames=8, unseen_frames=6, keypoints=keypoints)
    assert abs(found.classes.accuracy.upload - 0.5) < 0.2
    assert math.isfinite(found.intensity.r2.upload)


def test_the_same_seed_gives_the_same_leak():
    first, again = (leak(NOISE, known_frames=6, unseen_frames=2) for _ in range(2))
    assert first == again


def test_frames_without_labels_are_refused():
    bare = replace(frame(0, NOISE), labels=None)
    with pytest.raises(InvalidInput, match="no labels"):
        attack_attributes([bare], [bare], class_names=CLASSES)
