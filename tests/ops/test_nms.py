"""Rotated NMS against the plain reference and stored results; order, ties and limits."""

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.ops.iou3d import iou_bev
from upcycle3d.ops.nms import nms_rotated, nms_rotated_reference

both = pytest.mark.parametrize("nms", [nms_rotated, nms_rotated_reference])


def clusters(count: int, objects: int, seed: int, extent: float = 40.0) -> tuple[Tensor, Tensor]:
    """Boxes scattered around `objects` cars, and scores in steps of 0.05, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    cars = torch.rand(objects, 7, generator=generator) * torch.tensor([extent, extent, 1, 2, 1, 1, 6.3])
    cars[:, 3:6] += 1
    boxes = cars[torch.randint(objects, (count,), generator=generator)] + 0.2 * torch.randn(count, 7, generator=generator)
    boxes[:, 3:6].clamp_min_(0.2)
    return boxes, (torch.rand(count, generator=generator) * 20).round() / 20


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.1, 0.5, 0.7, 0.95, 1.0])
def test_kernel_agrees_with_reference(threshold):
    for seed, objects in enumerate([1, 10, 200]):
        boxes, scores = clusters(300, objects, seed)
        assert torch.equal(nms_rotated(boxes, scores, threshold), nms_rotated_reference(boxes, scores, threshold))


@pytest.mark.parametrize(
    "odd", [(500.0, 20.0, 0.0, 3.0, 2.0, 1.0, 0.0), (0, 0, 0, 300, 0.5, 1, 0.8), (1e20, -1e20, 0, 4, 2, 1, 0)]
)
def test_search_grid_survives_far_and_huge_boxes(odd):
    boxes, scores = clusters(200, 20, seed=1)
    boxes[::50] = torch.tensor(odd)
    assert torch.equal(nms_rotated(boxes, scores, 0.02), nms_rotated_reference(boxes, scores, 0.02))


@both
def test_hand_example(nms):
    car = torch.tensor([0.0, 0, 0, 4, 2, 1.5, 0.2])
    boxes = car.repeat(5, 1)
    boxes[1, 0] += 0.5  # much the same car
    boxes[2, 0] += 10  # another
    boxes[3, 2] += 50  # far above the first: the same in BEV
    boxes[4, 6] += torch.pi  # looks back: the same footprint
    kept = nms(boxes, torch.tensor([0.5, 0.9, 0.1, 0.8, 0.3]), 0.3)
    assert kept.tolist() == [1, 2]
    assert kept.dtype == torch.int64


@both
def test_overlap_equal_to_the_threshold_is_kept(nms):
    boxes = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0], [1, 0, 0, 2, 2, 1, 0]])  # IoU exactly 0.5
    scores = torch.tensor([2.0, 1.0])
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert nms(boxes, scores, 0.499).tolist() == [0]


@both
def test_equal_scores_come_in_row_order(nms):
    boxes = torch.zeros(6, 7)
    boxes[:, 3:6] = 1
    boxes[:, 0] = torch.tensor([0.0, 10, 20, 0, 10, 30])
    assert nms(boxes, torch.ones(6), 0.5).tolist() == [0, 1, 2, 5]


@both
def test_limits(nms):
    boxes, scores = clusters(300, 40, seed=3)
    everything = nms(boxes, scores, 0.3)
    assert nms(boxes, scores, 0.3, post_max=5).tolist() == everything[:5].tolist()
    assert nms(boxes, scores, 0.3, post_max=0).tolist() == []
    assert nms(boxes, scores, 0.3, pre_max=0).tolist() == []
    best = scores.sort(descending=True, stable=True).indices[:50]
    assert nms(boxes, scores, 0.3, pre_max=50).tolist() == best[nms(boxes[best], scores[best], 0.3)].tolist()
    assert nms(boxes, scores, 0.3, pre_max=10**6, post_max=10**6).tolist() == everything.tolist()


@both
def test_no_box_one_box_and_boxes_without_extent(nms):
    assert nms(torch.empty(0, 7), torch.empty(0), 0.5).tolist() == []
    assert nms(torch.zeros(1, 7), torch.zeros(1), 0.5).tolist() == [0]
    assert nms(torch.zeros(3, 7), torch.tensor([1.0, 3.0, 2.0]), 0.5).tolist() == [1, 2, 0]  # they overlap with nothing


@both
def test_survivors_do_not_overlap_and_the_dropped_do(nms):
    boxes, scores = clusters(300, 15, seed=4)
    kept = nms(boxes, scores, 0.2)
    assert (scores[kept].diff() <= 0).all()
    assert iou_bev(boxes[kept], boxes[kept]).fill_diagonal_(0).max() <= 0.2
    dropped = torch.ones(300, dtype=torch.bool)
    dropped[kept] = False
    assert (iou_bev(boxes[dropped], boxes[kept]).amax(1) > 0.2).all()


@both
def test_bad_input_is_refused(nms):
    boxes, scores = clusters(10, 3, seed=6)
    with pytest.raises(InvalidInput, match="must be"):
        nms(boxes, scores[:5], 0.5)
    with pytest.raises(InvalidInput, match="iou_threshold"):
        nms(boxes, scores, 1.5)
    with pytest.raises(InvalidInput, match="negative"):
        nms(boxes, scores, 0.5, pre_max=-1)
    boxes[2, 3], scores[5] = float("inf"), float("nan")
    with pytest.raises(InvalidInput, match="2 of 10"):
        nms(boxes, scores, 0.5)


@both
@pytest.mark.parametrize("threshold", ["0.7", "0.3", "0.1", "0.01"])
def test_stored_results_of_the_reference(nms, threshold):
    stored = tiny.golden("second_iou_kitti.npz", "our NMS keeps the proposals that OpenPCDet keeps")
    kept = nms(torch.from_numpy(stored["top_anchor_boxes"]), torch.arange(300, 0, -1).float(), float(threshold))
    np.testing.assert_array_equal(kept.numpy(), stored[f"nms_keep_top300_at_{threshold}"])
