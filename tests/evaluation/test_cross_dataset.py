"""KITTI's AP without a camera, ST3D's protocol: what is dropped, what is renamed, and that the rest is KITTI's code."""

import math

import pytest
import torch

from upcycle3d.core.boxes import corners_3d, kitti_camera_to_lidar
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.structures import Boxes3D, Labels, Predictions
from upcycle3d.datasets.kitti_text import KittiObjects
from upcycle3d.perception.evaluation.cross_dataset import cross_dataset_objects, evaluate_cross_dataset
from upcycle3d.perception.evaluation.kitti import LOOSE, KittiResult, evaluate_kitti

AHEAD = torch.tensor([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])


def _row(count: int, *, x: float = 10, shift: float = 0) -> torch.Tensor:
    """``count`` cars side by side that do not touch, all around the vehicle."""
    boxes = torch.tensor([[x, 0, 0, 4, 2, 1.5, 0.3]]).repeat(count, 1)
    boxes[:, 1] = torch.linspace(-70, 70, count) + shift
    return boxes


def _labels(boxes: torch.Tensor, kind: int = 0, **options: torch.Tensor) -> Labels:
    return Labels.make(boxes, torch.full((len(boxes),), kind), **options)  # type: ignore[arg-type]


def _found(boxes: torch.Tensor, kind: int = 0) -> Predictions:
    scores = 1 - torch.arange(len(boxes)) / 1000
    classes = torch.full((len(boxes),), kind)
    return Predictions(boxes=Boxes3D(data=boxes), classes=classes, scores=scores, class_scores=scores, iou_scores=scores)


def _evaluate(labels: Labels, found: Predictions, **options: object) -> KittiResult:
    names = {"label_classes": ("Vehicle", "Pedestrian"), "detector_classes": ("Car",)}
    return evaluate_cross_dataset([labels], [found], **(names | options))  # type: ignore[arg-type]


def test_everything_found_is_100_at_every_difficulty() -> None:
    boxes = _row(41)
    car = _evaluate(_labels(boxes), _found(boxes)).classes["Car"]
    assert car.ground_truths == (41, 41, 41)
    assert car.box_3d.r40 == car.bev.r40 == pytest.approx((100, 100, 100))


def test_a_miss_shortens_the_curve_as_in_kittis_program() -> None:
    """40 of 50 found: recall ends at 32 of 40 samples. With a shift of 1 m of 2 m width nothing is found."""
    boxes = _row(50)
    assert _evaluate(_labels(boxes), _found(boxes[:40])).classes["Car"].box_3d.r40 == pytest.approx((80,) * 3)
    assert _evaluate(_labels(boxes), _found(_row(50, shift=1))).classes["Car"].box_3d.r40 == (0, 0, 0)


def test_boxes_come_back_from_the_camera_that_is_not_there() -> None:
    boxes = torch.tensor([[10.0, -3, 0.5, 4, 2, 1.5, 0.7], [-20, 5, 1, 5, 2.2, 1.8, -3]])
    objects = cross_dataset_objects(boxes, ["Car", "Car"])
    torch.testing.assert_close(kitti_camera_to_lidar(objects.location, objects.dimensions, objects.rotation_y, AHEAD), boxes)
    assert objects.location[0].tolist() == pytest.approx([3, 0.25, 10])  # right, down to the bottom face, ahead
    assert objects.bbox.tolist() == [[0, 0, 50, 50]] * 2
    assert objects.difficulty().tolist() == [0, 0]
    bearing = math.atan2(3, 10)
    assert float(objects.alpha[0]) == pytest.approx(-math.pi / 2 - 0.7 - bearing)


def test_what_has_no_corner_in_range_is_dropped_on_both_sides() -> None:
    """Length 4: at x = 77.1 the rear corners lie at 75.1, at 77.3 at 75.3."""
    edge = torch.tensor(
        [[77.1, 0, 0, 4, 2, 1.5, 0], [77.3, 0, 0, 4, 2, 1.5, 0], [0, -76.3, 0, 4, 2, 1.5, 0], [5, 5, 11, 4, 2, 1.5, 0]]
    )
    assert len(cross_dataset_objects(edge, ["Car"] * 4)) == 1
    assert float(corners_3d(edge)[1, :, 0].min()) > 75.2
    assert len(cross_dataset_objects(edge, ["Car"] * 4, limits=None)) == 4
    near = _row(41)
    labels, found = _labels(torch.cat([near, edge[1:]])), _found(torch.cat([edge[1:], near]))
    result = _evaluate(labels, found).classes["Car"]
    assert result.ground_truths == (41, 41, 41)
    assert result.box_3d.r40 == pytest.approx((100,) * 3)
    assert _evaluate(labels, found, limits=None).classes["Car"].ground_truths == (44, 44, 44)


def test_classes_are_renamed_and_others_take_no_part() -> None:
    boxes = _row(41)
    labels = Labels.concatenate([_labels(boxes, 1), _labels(_row(41, x=-10), 0)])
    found = _found(boxes, 1)
    lyft = _evaluate(labels, found, label_classes=("bus", "car"), detector_classes=("Pedestrian", "Vehicle"))
    assert list(lyft.classes) == ["Car"]  # the labels know no pedestrian
    assert lyft.classes["Car"].ground_truths == (41, 41, 41)
    assert lyft.classes["Car"].box_3d.r40 == pytest.approx((100,) * 3)


def test_an_ignored_label_is_neither_right_nor_wrong() -> None:
    boxes = _row(42)
    weight = torch.ones(42)
    weight[0] = 0
    for found in (boxes, boxes[1:]):
        car = _evaluate(_labels(boxes, weight=weight), _found(found)).classes["Car"]
        assert car.ground_truths == (41, 41, 41)
        assert car.box_3d.r40 == pytest.approx((100,) * 3)


def test_the_numbers_are_those_of_kittis_code() -> None:
    """The same frames, as label and detection files of a camera that stands in the LiDAR, through ``evaluate_kitti``."""
    g = torch.Generator().manual_seed(0)
    labels, found, truths, detections = [], [], [], []
    for _ in range(8):
        boxes = _row(12)
        boxes[:, 6] = 6 * torch.rand(12, generator=g) - 3
        moved = boxes[torch.rand(12, generator=g) < 0.8]
        moved = moved + 0.5 * (torch.rand(len(moved), 7, generator=g) - 0.5)
        scores = torch.rand(len(moved), generator=g)
        labels.append(_labels(boxes))
        one = _found(moved)
        found.append(Predictions(boxes=one.boxes, classes=one.classes, scores=scores, class_scores=scores, iou_scores=scores))
        for out, rows, s in ((truths, boxes, None), (detections, moved, scores.double())):
            n, b = len(rows), rows.double()
            out.append(
                KittiObjects(
                    types=("Car",) * n,
                    truncated=torch.zeros(n).double(),
                    occluded=torch.zeros(n).long(),
                    alpha=torch.zeros(n).double(),
                    bbox=torch.tensor([[0.0, 0, 50, 50]]).double().repeat(n, 1),
                    dimensions=b[:, [5, 4, 3]],
                    location=torch.stack([-b[:, 1], b[:, 5] / 2 - b[:, 2], b[:, 0]], 1),
                    rotation_y=-b[:, 6] - math.pi / 2,
                    scores=s,
                )
            )
    ours = evaluate_cross_dataset(labels, found, label_classes=("car",), detector_classes=("car",))
    theirs = evaluate_kitti(truths, detections, classes=("Car",))
    for metric in ("box_3d", "bev"):
        mine, its = (getattr(r.classes["Car"], metric) for r in (ours, theirs))
        assert mine.samples.tolist() == its.samples.tolist()
        assert 5 < mine.r40[1] < 95
    loose = evaluate_cross_dataset(labels, found, label_classes=("car",), detector_classes=("car",), min_overlaps=LOOSE)
    assert loose.classes["Car"].box_3d.r40[1] > ours.classes["Car"].box_3d.r40[1]


def test_empty_frames() -> None:
    boxes = _row(41)
    nothing = (Labels.empty(), Predictions.empty())
    result = evaluate_cross_dataset(
        [nothing[0], _labels(boxes)], [nothing[1], _found(boxes)], label_classes=("car",), detector_classes=("Car",)
    )
    assert result.classes["Car"].box_3d.r40 == pytest.approx((100,) * 3)
    assert result.frames == 2


def test_classes_without_a_common_name_and_uneven_frames_are_refused() -> None:
    with pytest.raises(InvalidInput, match="share none with a minimum overlap"):
        _evaluate(_labels(_row(1)), _found(_row(1)), detector_classes=("Tram",))
    with pytest.raises(InvalidInput, match="2 frames of labels, 1 of detections"):
        evaluate_cross_dataset([_labels(_row(1))] * 2, [_found(_row(1))], label_classes=("car",), detector_classes=("Car",))
