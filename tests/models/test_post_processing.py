"""From raw outputs to boxes: headings from two half turns, padded proposals, final detections."""

import math

import pytest
import torch

from upcycle3d.core.boxes import encode_residuals
from upcycle3d.perception.models.post_processing import FinalNms, ProposalNms, decode_boxes, propose, select_detections
from upcycle3d.perception.models.targets import DIRECTION_OFFSET, direction_bin

ANCHOR = torch.tensor([10.0, 0, 1, 4, 3, 2, 0])  # BEV diagonal 5


def logits_of(bins: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(bins, 2).float() * 4 - 2


def test_decoded_hand_values():
    code = torch.tensor([0.5, -0.2, 0.5, math.log(2), 0, math.log(0.5), 1.0])
    expected = torch.tensor([12.5, -1.0, 2.0, 8, 3, 1])
    first, second = decode_boxes(code.expand(2, 7), torch.tensor([[1.0, 0], [0, 1.0]]), ANCHOR.expand(2, 7))
    assert torch.allclose(first[:6], expected)
    assert torch.allclose(second[:6], expected)
    assert first[6].item() == pytest.approx(1.0, abs=1e-6)  # 1 rad lies in the first half turn, from 0.785
    assert second[6].item() == pytest.approx(1.0 + math.pi, abs=1e-6)


def test_the_direction_classifier_decides_and_the_regressed_half_does_not():
    for yaw in (0.9, 0.9 + math.pi, 0.9 - math.pi):  # the same line, whatever way the residual points
        code = torch.tensor([0.0, 0, 0, 0, 0, 0, yaw])
        boxes = decode_boxes(code.expand(2, 7), logits_of(torch.tensor([0, 1])), ANCHOR.expand(2, 7))
        assert torch.allclose(boxes[:, 6], torch.tensor([0.9, 0.9 + math.pi]), atol=1e-5)


def test_true_codes_and_true_direction_give_back_every_heading():
    yaw = torch.linspace(-math.pi, math.pi, 181)[:-1]
    yaw = yaw[(torch.remainder(yaw - DIRECTION_OFFSET, math.pi) - math.pi).abs() > 1e-3]  # at a bin's edge rounding decides
    boxes = ANCHOR.repeat(len(yaw), 1)
    boxes[:, 6] = yaw
    for anchor_yaw in (0.0, 1.57):
        anchors = ANCHOR.repeat(len(yaw), 1)
        anchors[:, 6] = anchor_yaw
        decoded = decode_boxes(encode_residuals(boxes, anchors), logits_of(direction_bin(yaw)), anchors)
        assert torch.allclose(decoded[:, 6].sin(), yaw.sin(), atol=1e-5)
        assert torch.allclose(decoded[:, 6].cos(), yaw.cos(), atol=1e-5)


def test_proposals_are_the_best_anchors_after_nms_padded_and_marked():
    # Anchors 0 and 1 on one spot, 2 and 3 alone; scene 1 prefers the other one of the pair and has no good score anywhere.
    anchors = ANCHOR.repeat(4, 1)
    anchors[:, 0] = torch.tensor([0.0, 0.1, 20, 40])
    class_logits = torch.tensor([[[3.0, -5], [2, -5], [-5, 1], [-5, -4]], [[-9.0, -9], [-8, -9], [-9, -9], [-9, -7]]])
    codes, directions = torch.zeros(2, 4, 7), torch.zeros(2, 4, 2)
    found = propose(class_logits, codes, directions, anchors, ProposalNms(pre=4, iou=0.5, post=5))
    assert found.valid.tolist() == [[True] * 3 + [False] * 2] * 2
    assert found.boxes[0, :3, 0].tolist() == [0, 20, 40]
    assert torch.allclose(found.boxes[1, :3, 0], torch.tensor([40, 0.1, 20]))
    assert found.classes[0].tolist() == [0, 1, 1, 0, 0]
    assert found.classes[1, :2].tolist() == [1, 0]
    assert found.logits[0, :3].tolist() == [3, 1, -4]
    assert bool((found.logits[:, 3:] == -torch.inf).all())
    assert not found.boxes[:, 3:].any()


def test_proposals_keep_within_their_limits():
    anchors = ANCHOR.repeat(6, 1)
    anchors[:, 0] = torch.arange(6.0) * 10
    logits = torch.arange(6.0).view(1, 6, 1)
    empty = torch.zeros(1, 6, 7), torch.zeros(1, 6, 2)
    assert propose(logits, *empty, anchors, ProposalNms(pre=3, iou=0.5, post=8)).valid.sum() == 3
    few = propose(logits, *empty, anchors, ProposalNms(pre=100, iou=0.5, post=2))
    assert few.boxes[0, :, 0].tolist() == [50, 40]


def test_detections_reach_the_threshold_survive_nms_and_are_wrapped():
    boxes = ANCHOR.repeat(5, 1)
    boxes[:, 0] = torch.tensor([0.0, 0.5, 20, 40, 60])
    boxes[:, 6] = torch.tensor([0.1 + 2 * math.pi, 0, -3.5, 1.5 * math.pi, 0])
    scores, class_scores = torch.tensor([0.5, 0.4, 0.1, 0.9, 0.09]), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    found = select_detections(boxes, torch.tensor([0, 1, 2, 1, 0]), scores, class_scores, FinalNms(score=0.1, iou=0.01))
    assert found.boxes.data[:, 0].tolist() == [40, 0, 20]  # best first; 0.09 is too weak, 0.5 m away is the same object
    assert found.classes.tolist() == [1, 0, 2]
    assert torch.equal(found.scores, torch.tensor([0.9, 0.5, 0.1]))
    assert torch.equal(found.iou_scores, found.scores)
    assert torch.equal(found.class_scores, torch.tensor([0.4, 0.1, 0.3]))
    assert torch.allclose(found.boxes.data[:, 6], torch.tensor([-math.pi / 2, 0.1, 2 * math.pi - 3.5]), atol=1e-5)


def test_no_detection_is_legal():
    none = torch.zeros(0)
    found = select_detections(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), none, none, FinalNms())
    assert len(found) == 0
    weak = select_detections(ANCHOR[None], torch.zeros(1, dtype=torch.int64), torch.zeros(1), torch.zeros(1), FinalNms())
    assert weak.boxes.data.shape == (0, 7)
