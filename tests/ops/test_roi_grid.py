"""Sampling of the BEV map under regions: against one affine_grid per region, by hand on ramps, and the gradient."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.ops.roi_grid import roi_grid_sample, roi_grid_sample_reference

PLACE = {"origin": (0.0, -4.0), "cell": (0.4, 0.5)}
faithful_or_not = pytest.mark.parametrize("faithful", [True, False])


def ramps(height: int = 16, width: int = 20) -> Tensor:
    """A map (1, 2, H, W) whose channels hold x and y of each cell in meters: sampling it gives sample positions."""
    x = PLACE["origin"][0] + PLACE["cell"][0] * torch.arange(width)
    y = PLACE["origin"][1] + PLACE["cell"][1] * torch.arange(height)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])[None]


def scene(batch: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random map and regions, some of which stand out over its border."""
    generator = torch.Generator().manual_seed(seed)
    rois = torch.rand(batch, count, 7, generator=generator) * torch.tensor([8.0, 8, 1, 4, 2, 2, 12]) - torch.tensor(
        [0, 4.0, 0, 0, 0, 0, 6]
    )
    return torch.randn(batch, 5, 16, 20, generator=generator), rois


@faithful_or_not
@pytest.mark.parametrize("grid_size", [2, 7])
def test_agrees_with_one_affine_grid_per_region(faithful, grid_size):
    bev, rois = scene(2, 9)
    options = {"grid_size": grid_size, "faithful": faithful, **PLACE}
    expected = roi_grid_sample_reference(bev, rois, **options)
    assert expected.shape == (2, 9, 5, grid_size, grid_size)
    torch.testing.assert_close(roi_grid_sample(bev, rois, **options), expected, rtol=1e-4, atol=1e-4)


@faithful_or_not
def test_heading_zero_samples_columns_along_the_length_and_rows_across(faithful):
    roi = torch.tensor([[[4.0, 0.0, 0, 3.0, 1.0, 1, 0]]])
    patch = roi_grid_sample(ramps(), roi, grid_size=3, faithful=faithful, **PLACE)[0, 0]
    torch.testing.assert_close(patch[0], torch.tensor([[2.5, 4.0, 5.5]]).expand(3, 3))
    torch.testing.assert_close(patch[1], torch.tensor([[-0.5], [0.0], [0.5]]).expand(3, 3))


@faithful_or_not
def test_a_grid_of_one_cell_is_the_center(faithful):
    roi = torch.tensor([[[4.1, 0.3, 0, 3.0, 1.0, 1, 0.7]]])
    patch = roi_grid_sample(ramps(), roi, grid_size=1, faithful=faithful, **PLACE)
    torch.testing.assert_close(patch.flatten(), torch.tensor([4.1, 0.3]))


def test_footprint_turns_with_the_box_and_faithful_keeps_the_extent_along_the_axes():
    roi = torch.tensor([[[4.0, 0.0, 0, 3.0, 1.0, 1, math.pi / 2]]])  # looks along +y
    footprint = roi_grid_sample(ramps(), roi, faithful=False, **PLACE)[0, 0]
    faithful = roi_grid_sample(ramps(), roi, faithful=True, **PLACE)[0, 0]
    x, y = footprint
    torch.testing.assert_close(torch.stack([x.min(), x.max(), y.min(), y.max()]), torch.tensor([3.5, 4.5, -1.5, 1.5]))
    x, y = faithful
    torch.testing.assert_close(torch.stack([x.min(), x.max(), y.min(), y.max()]), torch.tensor([2.5, 5.5, -0.5, 0.5]))
    for x, y in (footprint, faithful):  # columns run along the heading in both
        assert (y.diff(dim=1) > 0).all()
        assert (x.diff(dim=0) < 0).all()


def test_faithful_positions_follow_the_published_formula():
    """OpenPCDet's `roi_grid_pool`: turn the unit square by the heading, then stretch it by half the length and half the width."""
    x, y, length, width, heading = 4.0, 0.3, 3.0, 1.4, 0.6
    patch = roi_grid_sample(ramps(), torch.tensor([[[x, y, 0, length, width, 1, heading]]]), **PLACE)[0, 0]
    for row in range(7):
        for column in range(7):
            u, v = -1 + column / 3, -1 + row / 3
            expected_x = x + length / 2 * (u * math.cos(heading) - v * math.sin(heading))
            expected_y = y + width / 2 * (u * math.sin(heading) + v * math.cos(heading))
            assert patch[:, row, column].tolist() == pytest.approx([expected_x, expected_y], abs=1e-4)


@faithful_or_not
def test_zero_outside_the_map(faithful):
    rois = torch.tensor([[[100.0, 0, 0, 4, 2, 1, 0.3], [-50.0, 80, 0, 4, 2, 1, 0.3]]])
    assert roi_grid_sample(torch.ones(1, 3, 16, 20), rois, faithful=faithful, **PLACE).eq(0).all()


@faithful_or_not
def test_works_on_a_map_of_one_row(faithful):
    roi = torch.tensor([[[1.0, -4.0, 0, 0.8, 1e-6, 1, 0]]])
    patch = roi_grid_sample(ramps(height=1), roi, grid_size=3, faithful=faithful, **PLACE)[0, 0, 0]
    torch.testing.assert_close(patch[1], torch.tensor([0.6, 1.0, 1.4]))


def test_scenes_of_a_batch_do_not_mix():
    bev, rois = scene(3, 4)
    together = roi_grid_sample(bev, rois, **PLACE)
    for k in range(3):
        assert torch.equal(together[k : k + 1], roi_grid_sample(bev[k : k + 1], rois[k : k + 1], **PLACE))


def test_the_same_region_twice_gives_the_same_patch():
    bev, rois = scene(1, 1)
    patches = roi_grid_sample(bev, rois.expand(1, 2, 7), **PLACE)
    assert torch.equal(patches[:, 0], patches[:, 1])


@pytest.mark.parametrize(("batch", "count"), [(2, 0), (0, 3), (0, 0)])
def test_no_region_and_no_scene(batch, count):
    bev, rois = scene(batch, count)
    assert roi_grid_sample(bev, rois, **PLACE).shape == (batch, count, 5, 7, 7)


@faithful_or_not
def test_gradient_of_the_map(faithful):
    bev, rois = scene(1, 3)
    bev = bev[:, :2, :6, :6].double().requires_grad_()
    rois[..., :2] *= 0.2
    assert torch.autograd.gradcheck(lambda m: roi_grid_sample(m, rois.double(), grid_size=3, faithful=faithful, **PLACE), bev)


def test_regions_get_no_gradient_and_half_precision_keeps_its_type():
    bev, rois = scene(1, 3)
    assert not roi_grid_sample(bev, rois.requires_grad_(), **PLACE).requires_grad
    half = roi_grid_sample(bev.bfloat16(), rois, **PLACE)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), roi_grid_sample(bev, rois, **PLACE), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("bev", "rois"), [((2, 3, 4, 4), (1, 5, 7)), ((3, 4, 4), (3, 5, 7)), ((2, 3, 4, 4), (2, 5, 6)), ((2, 3, 4, 4), (5, 7))]
)
def test_shapes_that_do_not_fit_are_refused(bev, rois):
    with pytest.raises(InvalidInput, match="must be"):
        roi_grid_sample(torch.zeros(bev), torch.zeros(rois), **PLACE)


def test_one_and_two_threads_give_the_same_bits():
    bev, rois = scene(2, 60)
    assert torch.equal(*tiny.for_thread_counts(lambda: roi_grid_sample(bev, rois, **PLACE)))


def test_stored_patches_of_the_reference_where_the_stored_cells_cover_them():
    """Only 2000 cells of the map are stored: a sample may be off by the weight of the cells it lacks times their largest value."""
    stored = tiny.golden("second_iou_kitti.npz", "our patches of the BEV map of a KITTI scan are those of OpenPCDet")
    y, x = stored["bev_cells_yx"].astype(np.int64).T
    bev, known = torch.zeros(1, 512, 200, 176), torch.zeros(1, 1, 200, 176)
    bev[0][:, y, x] = torch.from_numpy(stored["spatial_features_2d_cells"].astype(np.float32).T)
    known[..., y, x] = 1
    rois = torch.from_numpy(stored["rois"][stored["roi_pooled_rows"]])[None]
    place = {"origin": (0.0, -40.0), "cell": (0.4, 0.4)}
    covered = roi_grid_sample(known, rois, **place)[0]  # (4, 1, 7, 7)
    error = (roi_grid_sample(bev, rois, **place)[0] - torch.from_numpy(stored["roi_pooled"])).abs()
    assert (covered > 0.9).sum() >= 10
    assert (error <= (1 - covered) * 6.5 + 4e-3).all()
