"""What PV-RCNN's keypoints and regions are told to learn, by hand, and who may teach: labels, pasted objects, a teacher."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from upcycle3d.core.features import Keypoints
from upcycle3d.core.structures import Labels
from upcycle3d.ops.iou3d import iou_3d
from upcycle3d.perception.models.decoders.pv_rcnn_loss import corner_loss, keypoint_loss, keypoint_targets, region_loss
from upcycle3d.perception.models.decoders.regions import sample_regions
from upcycle3d.perception.models.post_processing import Proposals
from upcycle3d.perception.models.targets import RoiSampling, encode_regions

# ---- what keypoints learn

# x of points on the axis of a box of length 4 at 0: inside, on the face, in the rim of 0.1 m, beyond.
STRAIGHT = torch.tensor([[0.0, 0, 0, 4, 2, 2, 0]])
PLACES = torch.tensor(
    [[0.0, 0, 0], [1.99, 0, 0], [2.05, 0, 0], [0, 1.09, 0], [0, 0, -1.05], [2.15, 0, 0], [0, 1.15, 0], [9, 9, 0]]
)


def targets_of(labels: Labels) -> tuple[list[float], list[float]]:
    target, weight = keypoint_targets(PLACES, labels)
    return target.tolist(), weight.tolist()


def label(*boxes: Tensor, **options) -> Labels:
    data = torch.cat(boxes)
    return Labels.make(data, torch.zeros(len(data), dtype=torch.int64), **options)


def test_keypoints_in_a_box_are_objects_those_in_its_rim_nothing_and_the_rest_background():
    assert targets_of(label(STRAIGHT)) == ([1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1, 1, 1])
    turned = STRAIGHT + torch.tensor([0, 0, 0, 0, 0, 0, math.pi / 2])
    assert targets_of(label(turned)) == ([1, 0, 0, 1, 0, 0, 1, 0], [1, 1, 1, 1, 0, 1, 1, 1])


def test_keypoints_of_an_ignored_object_are_nothing():
    assert targets_of(label(STRAIGHT, weight=torch.zeros(1))) == ([0] * 8, [0, 0, 0, 0, 0, 1, 1, 1])
    both = label(STRAIGHT, STRAIGHT + torch.tensor([9.0, 9, 0, 0, 0, 0, 0]), weight=torch.tensor([0.0, 1]))
    assert targets_of(both) == ([0] * 7 + [1], [0, 0, 0, 0, 0, 1, 1, 1])


def test_in_an_incomplete_scene_only_keypoints_in_exact_boxes_teach():
    far = STRAIGHT + torch.tensor([9.0, 9, 0, 0, 0, 0, 0])
    mixed = label(STRAIGHT, far, exact=torch.tensor([False, True]), complete=False)
    assert targets_of(mixed)[1] == [0] * 7 + [1]
    assert targets_of(mixed)[0][7] == 1
    pasted_ignored = label(STRAIGHT, weight=torch.zeros(1), complete=False)
    assert targets_of(pasted_ignored)[1] == [0] * 8


@pytest.mark.parametrize("complete", [True, False])
def test_without_labels_keypoints_are_background_only_if_the_scene_is_complete(complete):
    assert targets_of(Labels.empty(complete=complete)) == ([0] * 8, [float(complete)] * 8)
    nowhere = keypoint_targets(torch.zeros(0, 3), label(STRAIGHT))
    assert [t.shape for t in nowhere] == [(0,), (0,)]


def test_the_keypoint_loss_is_over_the_objects_keypoints_of_the_whole_batch():
    xyz = torch.cat([PLACES, PLACES])
    keypoints = Keypoints(xyz=xyz, features=torch.zeros(16, 1), starts=(0, 8, 16))
    logits = torch.linspace(-2, 2, 16)
    loss = keypoint_loss(keypoints, logits, [label(STRAIGHT), Labels.empty(complete=False)]).terms["keypoint"]
    p = torch.sigmoid(logits[:8])
    focal = [-0.25 * (1 - q) ** 2 * math.log(q) if i < 2 else -0.75 * q**2 * math.log(1 - q) for i, q in enumerate(p.tolist())]
    assert loss.item() == pytest.approx(sum(focal[i] for i in (0, 1, 5, 6, 7)) / 2, rel=1e-4)
    nothing = keypoint_loss(keypoints, logits, [Labels.empty(complete=False)] * 2).terms["keypoint"]
    assert nothing.item() == 0


# ---- what regions learn


def test_corners_do_not_tell_opposite_headings_apart():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(20, 7, generator=generator) * torch.tensor([60.0, 40, 2, 4, 2, 2, 12]) + torch.tensor(
        [0, -20, -1, 1, 0.5, 0.5, -6]
    )
    turned = boxes + torch.tensor([0, 0, 0, 0, 0, 0, math.pi])
    assert corner_loss(boxes, boxes).max() < 1e-6
    assert corner_loss(turned, boxes).max() < 1e-6
    assert torch.allclose(corner_loss(boxes + 0.1, boxes), corner_loss(boxes + 0.1, turned), atol=1e-5)
    assert corner_loss(boxes + torch.tensor([0, 0, 0, 0, 0, 0, math.pi / 2]), boxes).min() > 0.01
    # Every corner of a box moved by 3 m is 3 m away: 3 - 1/2.
    assert torch.allclose(corner_loss(boxes + torch.tensor([0, 0, 3.0, 0, 0, 0, 0]), boxes), torch.full((20,), 2.5), atol=1e-4)
    same = boxes.clone().requires_grad_()
    corner_loss(same, boxes).sum().backward()
    assert torch.isfinite(same.grad).all()


SHIFTS = torch.tensor([0.0, 0.3, 1.5, 30.0])  # m along x: overlap 1, high, below 0.55 but there, none


def shifted_regions(batch: int = 1) -> Proposals:
    boxes = STRAIGHT.repeat(4, 1)
    boxes[:, 0] += SHIFTS
    return Proposals(
        boxes=boxes.expand(batch, 4, 7).clone(),
        classes=torch.zeros(batch, 4, dtype=torch.int64),
        logits=torch.zeros(batch, 4),
        valid=torch.ones(batch, 4, dtype=torch.bool),
    )


def region_terms(labels: list[Labels], proposals: Proposals | None = None) -> tuple[dict[str, float], Tensor, Tensor]:
    """Terms with their gradients to quality logits (B, 4) and box codes (B, 4, 7)."""
    proposals = proposals or shifted_regions(len(labels))
    quality, codes = (
        torch.full((len(labels), 4), 0.3, requires_grad=True),
        torch.full((len(labels), 4, 7), 0.2, requires_grad=True),
    )
    loss = region_loss(proposals, quality, codes, labels, (0.0, 1.0))
    loss.total().backward()
    return loss.floats(), quality.grad, codes.grad


def test_regions_on_a_labeled_object_learn_quality_and_those_that_overlap_enough_its_box():
    terms, quality, codes = region_terms([label(STRAIGHT)])
    assert all(v > 0 for v in terms.values())
    assert (quality[0] != 0).all()
    assert (codes[0] != 0).any(1).tolist() == [True, True, False, False]
    p = torch.sigmoid(torch.tensor(0.3))
    iou = iou_3d(shifted_regions().boxes[0], STRAIGHT)[:, 0]
    assert torch.allclose(quality[0], (p - iou) / 4, atol=1e-5)
    on_it = shifted_regions().boxes[0, :2]
    difference = 0.2 - encode_regions(STRAIGHT.expand(2, 7), on_it)
    size = difference.abs()
    by_hand = torch.where(size < 1 / 9, 4.5 * size**2, size - 1 / 18).sum() / 2
    assert terms["roi_box"] == pytest.approx(by_hand.item(), rel=1e-5)


def test_a_teachers_box_is_refined_but_judges_nothing():
    terms, quality, codes = region_terms([label(STRAIGHT, exact=False, complete=False)])
    assert terms["roi_quality"] == 0
    assert not quality.any()
    assert terms["roi_box"] > 0
    assert terms["roi_corner"] > 0
    assert (codes[0] != 0).any(1).tolist() == [True, True, False, False]


def test_box_weight_says_how_much_a_box_is_worth_to_the_box_branch():
    full, half, none = (
        region_terms([label(STRAIGHT, exact=False, complete=False, box_weight=torch.tensor([w]))])[0] for w in (1.0, 0.5, 0.0)
    )
    assert half["roi_box"] == pytest.approx(full["roi_box"] / 2)
    assert half["roi_corner"] == pytest.approx(full["roi_corner"] / 2)
    assert none["roi_box"] == none["roi_corner"] == 0


def test_a_pasted_object_teaches_quality_and_box_in_an_incomplete_scene():
    terms, quality, codes = region_terms([label(STRAIGHT, exact=True, complete=False)])
    assert all(v > 0 for v in terms.values())
    assert (quality[0] != 0).tolist() == [True, True, True, False]  # where nobody labeled is no background
    assert (codes[0] != 0).any(1).tolist() == [True, True, False, False]


def test_ignored_objects_padding_and_empty_scenes_teach_no_box():
    terms, quality, codes = region_terms([label(STRAIGHT, weight=torch.zeros(1))])
    assert terms["roi_box"] == terms["roi_corner"] == 0
    assert (quality[0] != 0).tolist() == [False, False, False, True]
    padded = shifted_regions()
    padded = replace(padded, valid=torch.zeros_like(padded.valid))
    assert region_terms([label(STRAIGHT)], padded)[0] == {"roi_quality": 0, "roi_box": 0, "roi_corner": 0}
    terms, _, codes = region_terms([Labels.empty(complete=False), label(STRAIGHT)])
    assert not codes[0].any()
    assert terms["roi_box"] == pytest.approx(region_terms([label(STRAIGHT)])[0]["roi_box"])


def test_regions_are_sampled_where_one_of_the_branches_learns():
    proposals, sampling = shifted_regions(3), RoiSampling(count=8)
    guess = label(STRAIGHT, exact=False, complete=False)
    scenes = [guess, replace(guess, box_weight=torch.zeros(1)), label(STRAIGHT)]
    torch.manual_seed(0)
    for_boxes = sample_regions(proposals, scenes, sampling, refine=True)
    assert for_boxes.boxes.shape == (3, 8, 7)
    assert for_boxes.valid.any(1).tolist() == [True, False, True]
    assert set(for_boxes.boxes[0, for_boxes.valid[0], 0].tolist()) <= set(SHIFTS[:2].tolist())
    judged = sample_regions(proposals, scenes, sampling, refine=False)
    assert judged.valid.any(1).tolist() == [False, False, True]
