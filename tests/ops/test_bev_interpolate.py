"""Samples of the height-compressed map from sparse voxels: against the dense map, by hand, and stored samples of the reference."""

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.ops.bev_interpolate import bev_interpolate, bev_interpolate_reference

both = pytest.mark.parametrize("function", [bev_interpolate, bev_interpolate_reference])
SHAPE = (2, 7, 9)
STARTS = (0, 150, 150, 400)


def scene(channels: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Features and coordinates of a third of the voxels of three scenes in mixed order, and positions on the map and around it."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.cartesian_prod(*(torch.arange(n) for n in (3, *SHAPE))).int()
    coords = cells[torch.randperm(len(cells), generator=generator)[: len(cells) // 3]]
    positions = torch.rand(400, 2, generator=generator) * torch.tensor([14.0, 12]) - 3
    positions[::4] = positions[::4].round()  # on cells, on the first and last row and column too
    return torch.randn(len(coords), channels, generator=generator), coords, positions


def test_agrees_with_the_dense_map():
    features, coords, positions = scene()
    out = bev_interpolate(features, coords, SHAPE, positions, STARTS, 3)
    assert out.shape == (400, 10)
    expected = bev_interpolate_reference(features, coords, SHAPE, positions, STARTS, 3)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-5)
    assert (out != 0).float().mean() > 0.1


@both
def test_by_hand(function):
    """Channel c * Z + z; x counts columns, y rows; a sample in the last row or column, or outside, is 0."""
    coords = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2], [0, 1, 2, 2], [0, 0, 6, 8], [1, 1, 1, 1]])
    features = torch.tensor([[1.0, 10], [2, 20], [4, 40], [1000, 1000], [7, 70]])
    positions = torch.tensor([[1.0, 1], [1.25, 1.5], [7.5, 5.5], [8.0, 6], [7.5, 6.0], [-0.5, 1], [9.5, 6.5], [1, 1], [3, 3]])
    out = function(features, coords, SHAPE, positions, (0, 7, 9), 2)
    expected = torch.zeros(9, 4)
    expected[0] = torch.tensor([1.0, 0, 10, 0])
    expected[1] = torch.tensor([0.375, 0.125 * 2 + 0.125 * 4, 3.75, 0.125 * 20 + 0.125 * 40])
    expected[2] = torch.tensor([250.0, 0, 250, 0])
    expected[7] = torch.tensor([0, 7.0, 0, 70])
    torch.testing.assert_close(out, expected)


def test_gradient_of_the_features():
    features, coords, positions = scene(channels=2)
    one, two = (features.double().requires_grad_() for _ in range(2))
    grad = torch.randn(400, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bev_interpolate(one, coords, SHAPE, positions.double(), STARTS, 3).backward(grad)
    bev_interpolate_reference(two, coords, SHAPE, positions.double(), STARTS, 3).backward(grad)
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda f: bev_interpolate(f, coords[:20], SHAPE, positions[:30], (0, 20, 20, 30), 3),
        features[:20].double().requires_grad_(),
    )


def test_positions_get_no_gradient_and_half_precision_keeps_its_type():
    features, coords, positions = scene()
    out = bev_interpolate(features, coords, SHAPE, positions.requires_grad_(), STARTS, 3)
    assert not out.requires_grad
    half = bev_interpolate(features.bfloat16(), coords, SHAPE, positions, STARTS, 3)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), out, rtol=0.02, atol=0.02)


@both
def test_no_voxel_no_position_no_scene(function):
    features, coords, positions = scene()
    assert torch.equal(function(features[:0], coords[:0], SHAPE, positions, STARTS, 3), torch.zeros(400, 10))
    assert function(features, coords, SHAPE, positions[:0], (0, 0, 0, 0), 3).shape == (0, 10)
    assert function(features[:0], coords[:0], SHAPE, positions[:0], (0,), 0).shape == (0, 10)
    nowhere = torch.full((4, 2), 100.0)
    torch.testing.assert_close(function(features, coords, SHAPE, nowhere, (0, 1, 1, 4), 3), torch.zeros(4, 10), atol=0.05, rtol=0)


def test_map_of_one_row_has_no_sample():
    out = bev_interpolate(
        torch.ones(4, 1), torch.tensor([[0, 0, 0, x] for x in range(4)]), (1, 1, 4), torch.zeros(2, 2), (0, 2), 1
    )
    assert torch.equal(out, torch.zeros(2, 1))


def test_one_and_two_threads_give_the_same_bits():
    features, coords, positions = scene()
    features.requires_grad_()

    def forward_and_gradient() -> tuple[Tensor, Tensor]:
        out = bev_interpolate(features, coords, SHAPE, positions, STARTS, 3)
        return out, *torch.autograd.grad(out.square().sum(), features)

    assert all(torch.equal(a, b) for a, b in zip(*tiny.for_thread_counts(forward_and_gradient)))


@both
def test_bad_input_is_refused(function):
    features, coords, positions = scene()
    good = {"features": features, "coords": coords, "shape": SHAPE, "positions": positions, "starts": STARTS, "batch_size": 3}
    outside = coords.clone()
    outside[0, 3] = 9
    nan = positions.clone()
    nan[3, 0] = torch.nan
    for change, message in [
        ({"features": features[0]}, r"\(M, C\)"),
        ({"coords": coords[:-1]}, r"\(M, 4\)"),
        ({"coords": coords.float()}, "integer"),
        ({"coords": outside}, "outside"),
        ({"positions": torch.zeros(400, 3)}, r"\(N, 2\)"),
        ({"positions": nan}, "NaN"),
        ({"starts": (0, 150, 400)}, "batch of 3"),
        ({"starts": (0, 150, 150, 399)}, "bounds"),
        ({"batch_size": 2, "starts": (0, 150, 400)}, "outside"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            function(**{**good, **change})


def test_stored_samples_of_the_reference():
    what = "our samples of the BEV map of a KITTI scan are those of OpenPCDet"
    sparse, golden = tiny.golden("second_iou_kitti.npz", what), tiny.golden("pv_rcnn_kitti.npz", what)
    zyx = torch.from_numpy(sparse["conv_out_coords_zyx"].astype(np.int32))
    coords = torch.cat([torch.zeros_like(zyx[:, :1]), zyx], 1)
    keypoints = torch.from_numpy(golden["keypoints"])
    positions = torch.stack([keypoints[:, 0] / 0.4, (keypoints[:, 1] + 40) / 0.4], 1)
    out = bev_interpolate(torch.from_numpy(sparse["conv_out_features"]), coords, (2, 200, 176), positions, (0, 2048), 1)
    expected = torch.from_numpy(golden["point_features_before_fusion"][:, :256])
    torch.testing.assert_close(out[golden["before_fusion_rows"]], expected, rtol=0, atol=2e-5)
