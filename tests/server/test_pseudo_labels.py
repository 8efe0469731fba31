"""Teacher boxes become labels, ignored boxes or nothing; and how good they are is counted as one would by hand."""

import pytest
import torch

from upcycle3d.core.cut import VoxelGrid
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.structures import Boxes3D, Labels, Predictions
from upcycle3d.perception.server.pseudo_labels import labels_in_range, pseudo_label_quality, teacher_labels
from upcycle3d.perception.server.upcycle_config import ScoreThresholds

CAR = ScoreThresholds(iou_score=0.6, class_score=0.4, ignore=0.2)
PEDESTRIAN = ScoreThresholds(iou_score=0.3, class_score=0.0, ignore=0.3)  # no band


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
    made = teacher_labels(found, [CAR], trusted=False)
    assert made.boxes.data[:, 0].tolist() == [0, 10, 20, 30, 50]
    assert made.weight.tolist() == [1, 0, 0, 0, 1]


def test_every_class_has_its_own_thresholds():
    found = detections([0.35, 0.35, 0.25, 0.25], [0.9, 0.9, 0.9, 0.9], classes=[0, 1, 0, 1])
    made = teacher_labels(found, [CAR, PEDESTRIAN], trusted=False)
    assert list(zip(made.classes.tolist(), made.weight.tolist(), strict=True)) == [(0, 0.0), (1, 1.0), (0, 0.0)]


def test_hybrid_labels_are_inexact_and_incomplete_and_trusted_ones_the_truth():
    found = detections([0.9, 0.3], [0.9, 0.9])
    hybrid, trusted = (teacher_labels(found, [CAR], trusted=t) for t in (False, True))
    assert not hybrid.complete
    assert not hybrid.exact.any()
    assert trusted.complete
    assert trusted.exact.all()
    assert torch.equal(hybrid.boxes.data, trusted.boxes.data)
    assert torch.equal(hybrid.weight, trusted.weight)


@pytest.mark.parametrize("trusted", [False, True])
def test_no_detection_makes_no_label(trusted):
    for found in (Predictions.empty(), detections([0.1], [0.9])):
        made = teacher_labels(found, [CAR], trusted=trusted)
        assert len(made) == 0
        assert made.complete is trusted


@pytest.mark.parametrize("values", [(0.5, 0.4, 0.6), (1.1, 0.4, 0.2), (0.5, 0.4, -0.1)])
def test_thresholds_out_of_order_are_refused(values):
    with pytest.raises(InvalidInput, match="0 <= ignore <= iou_score <= 1"):
        ScoreThresholds(iou_score=values[0], class_score=values[1], ignore=values[2])


def test_objects_outside_the_range_are_not_asked_for():
    grid = VoxelGrid(range=(0.0, -4.0, -2.0, 20.0, 4.0, 2.0), voxel_size=(1.0, 1.0, 1.0))
    assert labels_in_range(labels(-0.1, 0.0, 19.9, 20.0), grid).boxes.data[:, 0].tolist() == pytest.approx([0.0, 19.9])


# ---- quality


def points(*counts: int) -> torch.Tensor:
    return torch.tensor(counts, dtype=torch.int64)


def test_quality_of_a_hand_made_round():
    # Boxes of 4 m shifted by s along x overlap by (4 - s) / (4 + s): 1 m -> 0.6, 0.5 m -> 0.778.
    truth = labels(0.0, 20.0, 40.0, 60.0, num_points=points(50, 50, 50, 50))
    pseudo = labels(0.0, 21.0, 40.5, 100.0, 60.0, weight=torch.tensor([1.0, 1, 1, 1, 0]))
    quality = pseudo_label_quality([pseudo], [truth])
    assert (quality.labels, quality.ignored, quality.truth) == (4, 1, 4)
    assert quality.precision_50 == pytest.approx(3 / 4)  # exact, 0.6 and 0.78; one is on nothing
    assert quality.precision_70 == pytest.approx(2 / 4)
    assert quality.recall_50 == pytest.approx(3 / 4)  # the object under the ignored box is not found
    assert quality.recall_70 == pytest.approx(2 / 4)
    assert quality.mean_iou == pytest.approx((1 + 0.6 + 3.5 / 4.5 + 0) / 4, abs=1e-5)


def test_a_label_on_an_object_that_does_not_count_is_neutral():
    # Too few points, and ignored by people: nobody can expect the teacher to find them, nor blame it for it.
    truth = labels(0.0, 20.0, 40.0, num_points=points(4, 50, 50), weight=torch.tensor([1.0, 0, 1]))
    quality = pseudo_label_quality([labels(0.0, 20.5, 40.0)], [truth])
    assert (quality.labels, quality.truth) == (1, 1)
    assert quality.precision_70 == quality.recall_70 == quality.mean_iou == 1
    # Barely touching such an object is no excuse.
    assert pseudo_label_quality([labels(23.5, 40.0)], [truth]).precision_50 == 0.5


def test_classes_do_not_match_each_other():
    pedestrian = Labels.make(torch.tensor([box(0.0)]), torch.ones(1, dtype=torch.int64))
    quality = pseudo_label_quality([pedestrian], [labels(0.0, num_points=points(50))])
    assert (quality.precision_50, quality.recall_50) == (0, 0)


def test_scenes_are_compared_one_by_one_and_may_be_empty():
    truth = [labels(0.0, num_points=points(9)), labels(), labels(20.0, num_points=points(9)), labels()]
    pseudo = [labels(0.0), labels(20.0), labels(), labels()]
    quality = pseudo_label_quality(pseudo, truth)
    assert (quality.labels, quality.truth) == (2, 2)
    assert (quality.precision_50, quality.recall_50) == (0.5, 0.5)
    nothing = pseudo_label_quality([labels()], [labels()])
    assert (nothing.labels, nothing.truth, nothing.precision_50, nothing.mean_iou) == (0, 0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        pseudo_label_quality(pseudo, truth[:2])
