"""Rotated IoU against shapely (float64 polygons) on ordinary and nasty pairs, and the guarantees around it."""

import math

import numpy as np
import pytest
import shapely
import shapely.affinity
import torch
from torch import Tensor

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.ops import iou3d

NAMES = ("intersection_bev", "iou_bev", "iou_3d")
MATRICES = [getattr(iou3d, name + end) for name in NAMES for end in ("", "_reference")]
ALIGNED = [getattr(iou3d, name + "_aligned" + end) for name in NAMES[1:] for end in ("", "_reference")]
CAR = (10.0, -3.0, -1.0, 4.0, 2.0, 1.5, 0.3)

# name: (box, box)
PAIRS = {
    "identical": (CAR, CAR),
    "half turn apart": (CAR, (*CAR[:6], CAR[6] + math.pi)),
    "quarter turn apart": (CAR, (*CAR[:6], CAR[6] + math.pi / 2)),
    "nearly parallel": (CAR, (*CAR[:6], CAR[6] + 1e-6)),
    "nested": (CAR, (10.1, -3.1, -1.0, 1.0, 0.5, 1.0, 1.1)),
    "touching sides": ((0, 0, 0, 4, 2, 1, 0), (4, 0, 0, 4, 2, 1, 0)),
    "touching corners": ((0, 0, 0, 4, 2, 1, 0), (4, 2, 0, 4, 2, 1, 0)),
    "shared edge, one inside": ((0, 0, 0, 4, 2, 1, 0), (1, 0, 0, 2, 2, 1, 0)),
    "corner on an edge": ((0, 0, 0, 2, 2, 2, 0), (1 + math.sqrt(2), 0, 0, 2, 2, 2, math.pi / 4)),
    "octagon": ((0, 0, 0, 2, 2, 2, 0), (0, 0, 0, 2, 2, 2, math.pi / 4)),
    "cross": ((0, 0, 0, 10, 1, 2, 0.7), (0, 0, 0.5, 10, 1, 2, 0.7 + math.pi / 2)),
    "slanted cross": ((0, 0, 0, 20, 0.1, 2, 0.7), (0, 0, 0.5, 20, 0.1, 2, 0.8)),
    "tiny": ((5, 5, 0, 1e-3, 2e-3, 1e-3, 0.4), (5.0005, 5, 0, 2e-3, 1e-3, 1e-3, 0.9)),
    "tiny in huge": ((0, 0, 0, 1e4, 1e4, 10, 0.4), (3, 4, 0, 1e-2, 1e-2, 1e-2, 0.9)),
    "far from the origin": ((5e4, -5e4, 0, 4, 2, 2, 0.4), (5e4 + 1, -5e4 + 0.5, 0.3, 4, 2, 2, 0.9)),
    "circles meet, boxes do not": ((0, 0, 0, 10, 1, 1, 0), (0, 3, 0, 10, 1, 1, 0.1)),
    "above one another": ((0, 0, 0, 4, 2, 1, 0), (0, 0, 1, 4, 2, 1, 0)),
}


def polygon(box: np.ndarray) -> shapely.Polygon:
    x, y, _, dx, dy, _, yaw = (float(value) for value in box)
    outline = shapely.affinity.rotate(shapely.box(-dx / 2, -dy / 2, dx / 2, dy / 2), yaw, origin=(0, 0), use_radians=True)
    return shapely.affinity.translate(outline, x, y)


def oracle(name: str, a: Tensor, b: Tensor) -> np.ndarray:
    out = np.zeros((len(a), len(b)))
    for i, p in enumerate(a.double().numpy()):
        for j, q in enumerate(b.double().numpy()):
            common = polygon(p).intersection(polygon(q)).area
            union = p[3] * p[4] + q[3] * q[4] - common
            if name == "iou_3d":
                height = min(p[2] + p[5] / 2, q[2] + q[5] / 2) - max(p[2] - p[5] / 2, q[2] - q[5] / 2)
                common *= max(height, 0.0)
                union = p[3] * p[4] * p[5] + q[3] * q[4] * q[5] - common
            out[i, j] = common if name == "intersection_bev" else common / union
    return out


def random_boxes(count: int, seed: int, extent: float = 8.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 7, generator=generator)
    return boxes * torch.tensor([extent, extent, 2, 5, 3, 2, 12]) + torch.tensor([0, 0, 0, 0.1, 0.1, 0.1, -6])


@pytest.mark.parametrize("function", MATRICES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("pair", PAIRS)
def test_special_pairs_agree_with_shapely(function, pair):
    a, b = (torch.tensor([box], dtype=torch.float32) for box in PAIRS[pair])
    expected = oracle(function.__name__.removesuffix("_reference"), a, b)
    np.testing.assert_allclose(function(a, b).numpy(), expected, rtol=2e-6, atol=1e-9)
    np.testing.assert_allclose(function(b, a).numpy(), expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("function", MATRICES, ids=lambda f: f.__name__)
def test_random_boxes_agree_with_shapely(function):
    a, b = random_boxes(40, seed=1), random_boxes(30, seed=2)
    expected = oracle(function.__name__.removesuffix("_reference"), a, b)
    assert (expected > 0).mean() > 0.1
    np.testing.assert_allclose(function(a, b).numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_kernel_agrees_with_reference_on_many_nearly_equal_boxes(name):
    a = torch.tensor(CAR).repeat(120, 1) + 1e-3 * random_boxes(120, seed=3)
    torch.testing.assert_close(getattr(iou3d, name)(a, a), getattr(iou3d, name + "_reference")(a, a), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("function", ALIGNED, ids=lambda f: f.__name__)
def test_aligned_is_the_diagonal_of_the_matrix(function):
    a, b = random_boxes(300, seed=4, extent=3), random_boxes(300, seed=5, extent=3)
    matrix = getattr(iou3d, function.__name__.split("_aligned")[0])(a, b)
    torch.testing.assert_close(function(a, b), matrix.diagonal(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_one_and_two_threads_give_the_same_bits(name):
    a, b = random_boxes(600, seed=6), random_boxes(600, seed=7)
    assert torch.equal(*tiny.for_thread_counts(lambda: getattr(iou3d, name)(a, b)))


@pytest.mark.parametrize("function", MATRICES, ids=lambda f: f.__name__)
def test_boxes_apart_or_touching_have_exactly_zero(function):
    yaw = torch.linspace(-3, 3, 50)
    a = torch.tensor(CAR).repeat(50, 1)
    a[:, 6] = yaw
    b = a.clone()
    b[:, 0] += 4.01 * yaw.cos()
    b[:, 1] += 4.01 * yaw.sin()
    assert function(a, b).diagonal().eq(0).all()
    touching = (torch.tensor([PAIRS["touching sides"][k]], dtype=torch.float32) for k in range(2))
    assert function(*touching).item() == 0


@pytest.mark.parametrize("function", MATRICES + ALIGNED, ids=lambda f: f.__name__)
def test_boxes_without_extent_overlap_with_nothing(function):
    a = torch.tensor([CAR, CAR, CAR, CAR, CAR])
    a[0, 3], a[1, 4], a[2, 3:6], a[3, 3] = 0, 0, 0, -4
    if "bev" not in function.__name__:
        a[4, 5] = 0
    else:
        a[4, 3:5] = 1e-30  # the area underflows float32
    result = function(a, a)
    assert torch.isfinite(result).all()
    flat = result if result.ndim == 1 else result.diagonal()
    assert flat[:4].eq(0).all()
    assert function(a[:4], torch.tensor([CAR]).repeat(4, 1)).eq(0).all()


@pytest.mark.parametrize("name", ["iou_bev", "iou_3d"])
def test_a_box_has_overlap_one_with_itself_and_never_more(name):
    boxes = random_boxes(500, seed=8)
    iou = getattr(iou3d, name)(boxes, boxes)
    assert iou.max() <= 1
    torch.testing.assert_close(iou.diagonal(), torch.ones(500), rtol=0, atol=1e-6)


@pytest.mark.parametrize("function", MATRICES, ids=lambda f: f.__name__)
def test_no_boxes(function):
    some, none = random_boxes(3, seed=9), torch.empty(0, 7)
    assert function(some, none).shape == (3, 0)
    assert function(none, some).shape == (0, 3)
    assert function(none, none).shape == (0, 0)
    assert iou3d.iou_bev_nearest(some, none).shape == (3, 0)
    assert iou3d.iou_bev_nearest(none, some).shape == (0, 3)


def test_results_are_float32_and_without_gradient():
    boxes = random_boxes(3, seed=10).double().requires_grad_()
    for function in [*MATRICES, *ALIGNED, iou3d.iou_bev_nearest]:
        result = function(boxes, boxes)
        assert result.dtype == torch.float32
        assert not result.requires_grad


@pytest.mark.parametrize("function", [*MATRICES, *ALIGNED, iou3d.iou_bev_nearest], ids=lambda f: f.__name__)
def test_bad_boxes_are_refused_with_their_number(function):
    good, bad = random_boxes(4, seed=11), random_boxes(4, seed=12)
    bad[1, 6], bad[3, 0] = float("nan"), float("inf")
    with pytest.raises(InvalidInput, match="2 of 4 boxes"):
        function(good, bad)
    with pytest.raises(InvalidInput, match=r"\(N, 7\)"):
        function(good[:, :6], good)


def test_aligned_refuses_different_numbers():
    with pytest.raises(InvalidInput, match="3 and 2"):
        iou3d.iou_3d_aligned(random_boxes(3, seed=0), random_boxes(2, seed=0))


def test_nearest_is_the_iou_of_boxes_turned_to_the_nearest_right_angle():
    a, b = random_boxes(50, seed=13), random_boxes(40, seed=14)
    snapped = [boxes.clone() for boxes in (a, b)]
    for boxes in snapped:
        boxes[:, 6] = (boxes[:, 6] / (math.pi / 2)).round() * (math.pi / 2)
    torch.testing.assert_close(iou3d.iou_bev_nearest(a, b), iou3d.iou_bev(*snapped), rtol=1e-5, atol=1e-6)


def test_nearest_by_hand():
    a = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0.7], [0, 0, 0, 4, 2, 1, 0.9], [0, 0, 0, 0, 0, 1, 0]])
    b = torch.tensor([[0.0, 0, 5, 4, 2, 1, math.pi]])
    torch.testing.assert_close(iou3d.iou_bev_nearest(a, b), torch.tensor([[1.0], [4 / 12], [0.0]]))


@pytest.mark.parametrize("function", [iou3d.iou_bev, iou3d.iou_bev_reference], ids=lambda f: f.__name__)
def test_stored_overlaps_of_the_reference(function):
    stored = tiny.golden("second_iou_kitti.npz", "our BEV IoU of 100 proposals is that of OpenPCDet")
    boxes = torch.from_numpy(stored["top_anchor_boxes"][:100])
    np.testing.assert_allclose(function(boxes, boxes).numpy(), stored["bev_iou_top100"], rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_cuda_tensors_give_the_same(name):
    a, b = random_boxes(50, seed=1), random_boxes(60, seed=2)
    result = getattr(iou3d, name)(a.to("cuda"), b.to("cuda"))
    torch.testing.assert_close(result.cpu(), getattr(iou3d, name)(a, b), rtol=1e-5, atol=1e-6)
