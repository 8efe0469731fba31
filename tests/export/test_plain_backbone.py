"""The backbone that is exported computes what the compiled kernels compute, at every stage."""

import pytest
import torch
from torch import nn

import tiny
from upcycle3d.core.features import SparseVoxels
from upcycle3d.perception.export.plain_backbone import PlainBackbone
from upcycle3d.perception.models.encoders.second import SecondEncoder, SparseBackbone

SHAPE = (25, 24, 32)


@pytest.fixture
def backbone() -> SparseBackbone:
    """Layers whose outputs are of the size of 1, with statistics that are not those of a fresh batch norm."""
    torch.manual_seed(0)
    made = SparseBackbone(4, (4, 6, 8, 8, 10))
    for module in made.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.5)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.05, 0.2)
    return made.eval()


def voxels(count: int, seed: int = 1) -> SparseVoxels:
    """Cells in random order, those of the corners among them."""
    generator = torch.Generator().manual_seed(seed)
    depth, height, width = SHAPE
    index = torch.randperm(depth * height * width, generator=generator)[:count]
    if count > 2:
        index[:2] = torch.tensor([0, depth * height * width - 1])
    index = index.unique()[torch.randperm(len(index.unique()), generator=generator)]
    coords = torch.stack([torch.zeros_like(index), index // (height * width), index // width % height, index % width], 1)
    features = torch.randn(len(index), 4, generator=generator)
    return SparseVoxels(features=features, coords=coords.int(), shape=SHAPE, batch_size=1)


@pytest.mark.parametrize("count", [1, 2, 40, 2000])
@torch.no_grad()
def test_every_stage_has_the_cells_and_the_features_of_the_kernels(backbone, count):
    given = voxels(count)
    found = PlainBackbone(backbone, SHAPE, every_stage=True)(given.features, given.coords[:, 1:].long())
    stages = backbone.stages(given)
    assert len(found) == 2 * len(stages)
    for cells, features, stage in zip(found[::2], found[1::2], stages):
        wanted = stage.sorted()
        assert torch.equal(cells, wanted.coords[:, 1:].long())
        torch.testing.assert_close(features, wanted.features, rtol=1e-5, atol=1e-5)
    if count > 2:
        assert float(found[-1].abs().max()) > 0.01


@torch.no_grad()
def test_the_cut_alone_is_the_last_of_all_stages(backbone):
    given = voxels(300)
    inputs = (given.features, given.coords[:, 1:].long())
    alone = PlainBackbone(backbone, SHAPE, every_stage=False)(*inputs)
    for one, other in zip(alone, PlainBackbone(backbone, SHAPE, every_stage=True)(*inputs)[-2:], strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_it_serves_an_encoder_at_its_own_grid():
    encoder = tiny.second_iou().eval().encoder
    assert isinstance(encoder, SecondEncoder)
    given = encoder.voxelize([tiny.scan_with_car()])
    plain = PlainBackbone(encoder.sparse_backbone, encoder.sparse_shape, every_stage=False)
    cells, features = plain(given.features, given.coords[:, 1:].long())
    wanted = encoder.sparse_backbone(given).sorted()
    assert torch.equal(cells, wanted.coords[:, 1:].long())
    torch.testing.assert_close(features, wanted.features)
