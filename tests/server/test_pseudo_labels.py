"""The label rules: a teacher's boxes become labels, ignored boxes or nothing."""

import pytest
import torch

import tiny
from upcycle3d.core.cut import VoxelGrid
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.structures import Boxes3D, Labels, Predictions
from upcycle3d.perception.server.pseudo_labels import hybrid_labels, labels_in_range, trusted_labels
from upcycle3d.perception.server.upcycle_config import ScoreThresholds, UpcycleConfig

CAR = ScoreThresholds(iou_score=0.6, class_score=0.4, ignore=0.2)
PEDESTRIAN = ScoreThresholds(iou_score=0.3, class_score=0.0, ignore=0.3)  # no band


def settings(*thresholds: ScoreThresholds, box_weight: float = 1.0) -> UpcycleConfig:
    return tiny.upcycle_config(thresholds=thresholds, teacher_box_weight=box_weight)


def box(x: float) -> list[float]:
    return [x, 0.0, 0.0, 4.0, 2.0, 1.5, 0.0]


def detections(iou: list[float], cls: list[float], classes: list[int] | None = None) -> Predictions:
    return Predictions(
        boxes=Boxes3D(data=torch.tensor([box(10.0 * i) for i in range(len(iou))]).view(-1, 7)),
        classes=torch.tensor(classes or [0] * len(iou), dtype=torch.int64),
        scores=torch.tensor(iou),
        class_scores=torch.tensor(cls),
        iou_scores=torch.tensor(iou),
    )


def labels(*xs: float, **options) -> Labels:
    return Labels.make(torch.tensor([box(x) for x in xs]).view(-1, 7), torch.zeros(len(xs), dtype=torch.int64), **options)


# ---- thresholds


def test_both_scores_make_a_label_and_one_of_them_only_an_ignored_box():
    found = detections([0.6, 0.9, 0.59, 0.2, 0.19, 0.9], [0.4, 0.39, 0.9, 0.9, 0.9, 0.9])
    made = hybrid_labels(found, settings(CAR))
    assert made.boxes.data[:, 0].tolist() == [0, 10, 20, 30, 50]
    assert made.weight.tolist() == [1, 0, 0, 0, 1]


def test_every_class_has_its_own_thresholds():
    found = detections([0.35, 0.35, 0.25, 0.25], [0.9, 0.9, 0.9, 0.9], classes=[0, 1, 0, 1])
    made = hybrid_labels(found, settings(CAR, PEDESTRIAN))
    assert list(zip(made.classes.tolist(), made.weight.tolist(), strict=True)) == [(0, 0.0), (1, 1.0), (0, 0.0)]


def test_hybrid_labels_are_inexact_and_incomplete_and_trusted_ones_the_truth():
    found = detections([0.9, 0.3], [0.9, 0.9])
    hybrid, trusted = hybrid_labels(found, settings(CAR, box_weight=0.3)), trusted_labels(found, settings(CAR, box_weight=0.3))
    assert not hybrid.complete
    assert not hybrid.exact.any()
    assert hybrid.box_weight.tolist() == pytest.approx([0.3, 0.3])
    assert trusted.complete
    assert trusted.exact.all()
    assert trusted.box_weight.tolist() == [1, 1]
    assert torch.equal(hybrid.boxes.data, trusted.boxes.data)
    assert torch.equal(hybrid.weight, trusted.weight)


@pytest.mark.parametrize("rule", [hybrid_labels, trusted_labels])
def test_no_detection_makes_no_label(rule):
    for found in (Predictions.empty(), detections([0.1], [0.9])):
        made = rule(found, settings(CAR))
        assert len(made) == 0
        assert made.complete is (rule is trusted_labels)


@pytest.mark.parametrize("values", [(0.5, 0.4, 0.6), (1.1, 0.4, 0.2), (0.5, 0.4, -0.1)])
def test_thresholds_out_of_order_are_refused(values):
    with pytest.raises(InvalidInput, match="0 <= ignore <= iou_score <= 1"):
        ScoreThresholds(iou_score=values[0], class_score=values[1], ignore=values[2])


def test_objects_outside_the_range_are_not_asked_for():
    grid = VoxelGrid(range=(0.0, -4.0, -2.0, 20.0, 4.0, 2.0), voxel_size=(1.0, 1.0, 1.0))
    assert labels_in_range(labels(-0.1, 0.0, 19.9, 20.0), grid).boxes.data[:, 0].tolist() == pytest.approx([0.0, 19.9])
