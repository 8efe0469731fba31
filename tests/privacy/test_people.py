"""The attack on people finds persons and heights that were planted in an upload, and none in noise."""

from dataclasses import replace

import pytest
import torch

from upcycle3d.core.cut import CutSpec, VoxelGrid
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures, SparseVoxels
from upcycle3d.core.structures import Labels, PointCloud
from upcycle3d.perception.privacy.attacks.people import attack_people
from upcycle3d.perception.privacy.frames import AuditFrame, Rebuilt

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = VoxelGrid(range=(0.0, -6.4, -0.4, 12.8, 6.4, 2.8), voxel_size=(0.1, 0.1, 0.1))
SPEC = CutSpec(layer="made up", channels=4, stride=(32, 8, 8), shape=(1, 16, 16), grid=GRID)


def frame(seed: int, *, planted: bool) -> AuditFrame:
    """Three persons and an empty road. Planted features are (is a person here, offset x, offset y, height) of every cell."""
    g = torch.Generator().manual_seed(seed)
    spots = torch.randperm(16, generator=g)[:3]
    xy = torch.stack([1.6 + 3.2 * (spots // 4), -4.8 + 3.2 * (spots % 4)], 1).float() + torch.rand(3, 2, generator=g) - 0.5
    height = 1.5 + 0.5 * torch.rand(3, 1, generator=g)
    boxes = torch.cat([xy, height / 2, torch.full((3, 2), 0.6), height, torch.zeros(3, 1)], 1)
    body = torch.cat(
        [
            (torch.rand(3, 80, 2, generator=g) - 0.5) * 0.4,
            torch.linspace(0, 1, 80).expand(3, 80)[..., None] * height[:, None] - height[:, None] / 2,
        ],
        2,
    )
    road = torch.rand(300, 3, generator=g) * torch.tensor([12.8, 12.8, 0.05]) + torch.tensor([0.0, -6.4, 0.0])
    xyz = torch.cat([(body + boxes[:, None, :3]).flatten(0, 1), road])
    x0, y0 = SPEC.position(0.0, 0.0)
    centers = torch.cartesian_prod(y0 + 0.8 * torch.arange(16), x0 + 0.8 * torch.arange(16)).flip(1)
    features = torch.randn(256, 4, generator=g)
    if planted:
        distance, owner = torch.cdist(centers, xy).min(1)
        there = (distance < 1.2).float()[:, None]
        features = torch.cat([there, there * (xy[owner] - centers), there * height[owner]], 1)
    coords = torch.nn.functional.pad(torch.cartesian_prod(torch.arange(16), torch.arange(16)), (2, 0)).to(torch.int32)
    upload = CutFeatures(voxels=SparseVoxels(features=features, coords=coords, shape=SPEC.shape, batch_size=1), spec=SPEC)
    scan = PointCloud(xyz=xyz, features=torch.zeros(len(xyz), 1))
    return AuditFrame(id=str(seed), upload=upload, scan=scan, labels=Labels.make(boxes, torch.ones(3, dtype=torch.int64)))


class Perfect:
    """Knows the scan of every upload."""

    def __init__(self, frames):
        self.scans = {f.upload.voxels.features.sum().item(): f.scan.xyz for f in frames}

    def train(self, frames): ...

    def rebuild(self, upload):
        xyz = self.scans[upload.voxels.features.sum().item()]
        return Rebuilt(xyz=xyz, score=torch.ones(len(xyz)))


class Nothing(Perfect):
    """Rebuilds no point."""

    def rebuild(self, upload):
        return Rebuilt(xyz=torch.zeros(0, 3), score=torch.zeros(0))


def frames(*, planted: bool):
    return [frame(s, planted=planted) for s in range(24)], [frame(s, planted=planted) for s in range(100, 108)]


@pytest.fixture(scope="module")
def planted():
    known, unseen = frames(planted=True)
    return attack_people(known, unseen, person=1, rebuild=Perfect([*known, *unseen]), steps=150)


@pytest.fixture(scope="module")
def noise():
    known, unseen = frames(planted=False)
    return attack_people(known, unseen, person=1, rebuild=Nothing([]), steps=60)


def test_planted_persons_and_heights_are_found(planted):
    assert planted.upload.average_precision > 0.9
    assert planted.upload.recall > 0.85
    assert planted.upload.precision > 0.85
    assert planted.upload.height_error < 0.4 * planted.upload.height_guess
    assert planted.upload.height_correlation > 0.9


def test_persons_are_found_in_the_raw_scan(planted):
    assert planted.raw.average_precision > 0.9
    assert planted.raw.height_error < 0.5 * planted.raw.height_guess


def test_a_perfect_rebuild_scores_as_the_raw_scan(planted):
    assert planted.rebuilt == planted.raw


def test_cells_everywhere_tell_nothing_without_features(planted):
    assert planted.coordinates.average_precision < 0.3
    assert planted.nothing.average_precision < 0.3


def test_noise_gives_no_person(noise):
    assert noise.upload.average_precision < 0.3


def test_an_empty_rebuilt_scan_gives_no_person(noise):
    assert noise.rebuilt is not None
    assert noise.rebuilt.average_precision < 0.3


def test_counts(planted):
    assert (planted.people, planted.frames) == (24, 8)
    assert 8 < planted.height_spread < 20  # uniform over 50 cm has 14 cm


def test_uploads_without_any_cell_are_scored():
    def emptied(f: AuditFrame) -> AuditFrame:
        v = f.upload.voxels
        return replace(f, upload=replace(f.upload, voxels=replace(v, features=v.features[:0], coords=v.coords[:0])))

    known, unseen = ([emptied(f) for f in part] for part in frames(planted=True))
    assert attack_people(known, unseen, person=1, steps=10).upload.average_precision < 0.3


def test_frames_without_people_are_refused():
    known, unseen = frames(planted=False)
    with pytest.raises(InvalidInput, match="at least 10 people"):
        attack_people(known, unseen, person=0)
