"""Waymo's protocol on hand-made cases, each worked out on paper. Random data and the official program: test_waymo_against_reference."""

import math

import numpy as np
import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.structures import Boxes3D, Labels, Predictions
from upcycle3d.perception.evaluation.waymo import (
    SCORE_CUTOFFS,
    WaymoResult,
    WaymoScore,
    WaymoTruth,
    average_precision,
    evaluate_waymo,
    overlaps_zones,
)

CLASSES = ("Vehicle", "Pedestrian", "Cyclist")
Row = tuple[float, ...]


def _box(x: float, y: float = 0, *, yaw: float = 0, length: float = 4) -> Row:
    return (x, y, 0, length, 2, 1.5, yaw)


def _truth(*objects: tuple[Row, int], kind: int = 0) -> WaymoTruth:
    """One frame of (box, level)."""
    boxes = torch.tensor([b for b, _ in objects]).float().reshape(-1, 7)
    levels = torch.tensor([level for _, level in objects]).long()
    return WaymoTruth(boxes=Boxes3D(data=boxes), classes=torch.full((len(objects),), kind), levels=levels)


def _found(*detections: tuple[Row, float], kind: int = 0) -> Predictions:
    """One frame of (box, score)."""
    boxes = torch.tensor([b for b, _ in detections]).float().reshape(-1, 7)
    scores = torch.tensor([s for _, s in detections]).float()
    classes = torch.full((len(detections),), kind)
    return Predictions(boxes=Boxes3D(data=boxes), classes=classes, scores=scores, class_scores=scores, iou_scores=scores)


def _score(truth: WaymoTruth, found: Predictions, level: int = 1, range_: str = "all") -> WaymoScore:
    return evaluate_waymo([truth], [found], classes=CLASSES).classes["Vehicle"][range_][f"LEVEL_{level}"]


def test_everything_found_is_100_and_a_class_without_objects_has_no_ap() -> None:
    row = [_box(5), _box(35), _box(60)]
    result = evaluate_waymo([_truth(*[(b, 1) for b in row])], [_found(*[(b, 0.9) for b in row])], classes=CLASSES)
    vehicle = result.classes["Vehicle"]
    for label, objects in (("all", 3), ("[0, 30)", 1), ("[30, 50)", 1), ("[50, inf)", 1)):
        for level in ("LEVEL_1", "LEVEL_2"):
            assert vehicle[label][level] == WaymoScore(ap=pytest.approx(100), aph=pytest.approx(100), ground_truths=objects)
    assert result.classes["Cyclist"]["all"]["LEVEL_1"] == WaymoScore(ap=None, aph=None, ground_truths=0)
    assert result.to_json()["Vehicle"]["all"]["LEVEL_1"] == {
        "ap": pytest.approx(100),
        "aph": pytest.approx(100),
        "ground_truths": 3,
    }


def test_one_found_one_missed_is_50() -> None:
    assert _score(_truth((_box(5), 1), (_box(15), 1)), _found((_box(5), 0.5))).ap == pytest.approx(50)


def test_a_better_scored_false_positive_halves_the_precision() -> None:
    """Cutoffs up to 0.5: precision 1/2 at recall 1. Above: recall 0, whose precision is that of the sample next to it."""
    found = _found((_box(15), 0.9), (_box(5), 0.5))
    assert _score(_truth((_box(5), 1)), found).ap == pytest.approx(50)
    assert _score(_truth((_box(5), 1)), _found((_box(5), 0.9), (_box(15), 0.5))).ap == pytest.approx(100)


def test_the_curve_is_filled_in_by_steps_and_closed_by_a_trapezoid() -> None:
    """Two objects: (recall 1/2, precision 1), and a false positive before the second is found (1, 2/3). From 1 down, 2/3 every
    0.05 to recall 0.55, then a trapezoid to (0.5, 1): 0.45 * 2/3 + 0.05 * (2/3 + 1) / 2 + 0.5."""
    truth = _truth((_box(5), 1), (_box(15), 1))
    found = _found((_box(5), 0.9), (_box(25), 0.6), (_box(15), 0.3))
    assert _score(truth, found).ap == pytest.approx(100 * (0.45 * 2 / 3 + 0.05 * 5 / 6 + 0.5))
    assert average_precision(np.zeros(3), np.ones(3)) == 0


def test_a_turned_box_has_the_same_ap_and_its_share_of_aph() -> None:
    truth = _truth((_box(5), 1))
    flipped = _score(truth, _found((_box(5, yaw=math.pi), 0.9)))
    assert (flipped.ap, flipped.aph) == (pytest.approx(100), pytest.approx(0, abs=1e-4))
    both_ways = _truth((_box(5, yaw=3.1), 1))
    assert _score(both_ways, _found((_box(5, yaw=3.1 - 2 * math.pi), 0.9))).aph == pytest.approx(100)
    assert _score(both_ways, _found((_box(5, yaw=-3.1), 0.9))).aph == pytest.approx(
        100 * (1 - (2 * math.pi - 6.2) / math.pi), abs=1e-3
    )


def test_levels_share_a_matching_and_a_found_level_2_object_counts_at_level_1() -> None:
    """As the official program counts, though not as it is often described."""
    easy, hard, missed = _box(5), _box(15), _box(25)
    truth, found = _truth((easy, 1), (hard, 2), (missed, 1)), _found((easy, 0.9), (hard, 0.5))
    assert _score(truth, found, 1).ap == pytest.approx(100 * 2 / 3)  # 2 found of 2 + 1 missed
    assert _score(truth, found, 2).ap == pytest.approx(100 * 2 / 3)
    assert (_score(truth, found, 1).ground_truths, _score(truth, found, 2).ground_truths) == (2, 3)


def test_a_missed_level_2_object_counts_at_level_2_only() -> None:
    truth, found = _truth((_box(5), 1), (_box(15), 2)), _found((_box(5), 0.9))
    assert (_score(truth, found, 1).ap, _score(truth, found, 2).ap) == (pytest.approx(100), pytest.approx(50))
    only_hard = _truth((_box(5), 2))
    assert _score(only_hard, found, 1) == WaymoScore(ap=None, aph=None, ground_truths=0)
    assert _score(only_hard, found, 2).ap == pytest.approx(100)


def test_ranges_are_cut_at_their_lower_edge_and_before_matching() -> None:
    at_edge = _truth((_box(30), 1))
    assert _score(at_edge, _found((_box(30), 0.9)), range_="[0, 30)").ap is None
    assert _score(at_edge, _found((_box(30), 0.9)), range_="[30, 50)").ap == pytest.approx(100)
    assert _score(_truth((_box(50), 1)), _found((_box(50), 0.9)), range_="[50, inf)").ap == pytest.approx(100)
    across = _found((_box(29.95), 0.9))  # overlaps by 0.975, but is another range's detection
    assert _score(at_edge, across).ap == pytest.approx(100)
    assert _score(at_edge, across, range_="[30, 50)").ap == 0


def test_range_includes_height() -> None:
    high = (29.9, 0, 5, 4, 2, 1.5, 0)  # 30.3 m from the origin
    assert _score(_truth((high, 1)), _found((high, 0.9)), range_="[30, 50)").ground_truths == 1


def test_the_matching_has_the_largest_sum_of_overlaps_not_the_best_scored_first() -> None:
    """Two objects 0.5 m apart and two detections. The better scored lies between them, nearer to the first (0.90), which the other
    can only have (0.82): alone it takes the first; with the other, both are matched, 0.86 + 0.82, by taking the second."""
    truth = _truth((_box(10), 1), (_box(10.5), 1))
    found = _found((_box(10.2), 0.9), (_box(9.6), 0.5))
    assert _score(truth, found).ap == pytest.approx(100)


def test_a_better_overlap_takes_the_object_from_the_better_scored() -> None:
    """At every cutoff there is one true and, from 0.5 down, one false positive; APH shows which of the two is matched."""
    truth = _truth((_box(10), 1))
    better = _found((_box(10.3, yaw=math.pi), 0.9), (_box(10), 0.5))
    assert _score(truth, better).ap == pytest.approx(100)
    # Cutoffs above 0.5: precision 0 of the flipped one at recall 1; from 0.5 down heading 1 of two detections: 1/2.
    assert _score(truth, better).aph == pytest.approx(50)


def test_equal_overlaps_go_to_the_better_score_then_to_the_first() -> None:
    truth = _truth((_box(10), 1))
    right, turned = _box(10), _box(10, yaw=math.pi)
    for first, second in ((0.9, 0.5), (0.5, 0.5)):
        assert _score(truth, _found((right, first), (turned, second))).aph == pytest.approx(100 if first > second else 50)
        assert _score(truth, _found((turned, first), (right, second))).aph == pytest.approx(0, abs=1e-4)


def test_a_score_on_a_cutoff_takes_part_there() -> None:
    """0.07 as float32 is the cutoff 0.07: at it there is one right detection and no wrong one."""
    truth = _truth((_box(5), 1))
    assert _score(truth, _found((_box(5), 0.07), (_box(15), 0.0699))).ap == pytest.approx(100)
    assert _score(truth, _found((_box(5), 0.0699), (_box(15), 0.0600))).ap == pytest.approx(50)  # both from 0.06 down
    assert len(SCORE_CUTOFFS) == 101
    assert _score(truth, _found((_box(5), 1.0))).ap == pytest.approx(100)


def test_classes_do_not_meet_and_each_has_its_least_overlap() -> None:
    """A shift by a third of the length overlaps by 1/2: enough for a pedestrian, not for a vehicle."""
    shifted = _box(5 + 3 / 3, length=3)
    assert _score(_truth((_box(5, length=3), 1)), _found((shifted, 0.9))).ap == 0
    walks, sees = _truth((_box(5, length=3), 1), kind=1), _found((_box(5.99, length=3), 0.9), kind=1)
    assert evaluate_waymo([walks], [sees], classes=CLASSES).classes["Pedestrian"]["all"]["LEVEL_1"].ap == pytest.approx(100)
    other = evaluate_waymo([_truth((_box(5), 1))], [_found((_box(5), 0.9), kind=1)], classes=CLASSES)
    assert other.classes["Vehicle"]["all"]["LEVEL_1"].ap == 0


def test_the_least_overlap_itself_is_enough() -> None:
    """Lengths 4 and 2 overlap by exactly 1/2."""
    walks, sees = _truth((_box(5), 1), kind=1), _found((_box(5, length=2), 0.9), kind=1)
    assert evaluate_waymo([walks], [sees], classes=CLASSES).classes["Pedestrian"]["all"]["LEVEL_1"].ap == pytest.approx(100)


def test_a_side_of_a_centimetre_overlaps_nothing() -> None:
    thin = (5, 0, 0, 4, 0.01, 1.5, 0)
    assert _score(_truth((thin, 1)), _found((thin, 0.9))).ap == 0


def test_empty_frames_and_frames_that_do_not_mix() -> None:
    a, b, nothing = _truth((_box(5), 1)), _truth(), _found()
    result = evaluate_waymo([a, b, b], [_found((_box(5), 0.9)), _found((_box(5), 0.95)), nothing], classes=CLASSES)
    assert result.classes["Vehicle"]["all"]["LEVEL_1"].ap == pytest.approx(50)  # the second frame's is wrong, and better scored
    assert result.frames == 3
    assert evaluate_waymo([], [], classes=CLASSES).classes["Vehicle"]["all"]["LEVEL_1"].ap is None
    assert _score(a, nothing).ap == 0


def test_a_detection_in_a_no_label_zone_is_never_wrong_and_may_be_right() -> None:
    truth, found = _truth((_box(5), 1)), _found((_box(15), 0.9), (_box(5), 0.5))

    def ap(*in_zone: bool) -> WaymoResult:
        return evaluate_waymo([truth], [found], classes=CLASSES, ignored=[torch.tensor(in_zone)])

    for zones, expected in (((False, False), 50), ((True, False), 100), ((True, True), 100)):
        assert ap(*zones).classes["Vehicle"]["all"]["LEVEL_1"].ap == pytest.approx(expected)


def test_boxes_meet_zones_of_any_shape() -> None:
    horseshoe = torch.tensor([[0.0, 0], [10, 0], [10, 10], [6, 10], [6, 4], [4, 4], [4, 10], [0, 10]])
    boxes = [
        (5, 8, 0, 1, 1, 1, 0.3),  # in the opening
        (5, 8, 0, 3, 1, 1, 0.0),  # reaches into both arms
        (2, 2, 0, 1, 1, 1, 1.0),  # inside
        (5, 5, 0, 50, 50, 1, 0.4),  # around it all
        (12, 5, 0, 3, 1, 1, math.pi / 2),  # beside it, along it
        (12, 5, 0, 4.2, 1, 1, math.pi),  # touches the side
    ]
    expected = [False, True, True, True, False, True]
    assert overlaps_zones(torch.tensor(boxes), [horseshoe]).tolist() == expected
    assert overlaps_zones(torch.tensor(boxes), [horseshoe.flip(0)]).tolist() == expected
    assert overlaps_zones(torch.tensor(boxes), []).tolist() == [False] * 6
    assert overlaps_zones(torch.zeros(0, 7), [horseshoe]).tolist() == []


def test_levels_follow_from_the_points_unless_the_labels_say() -> None:
    boxes = torch.tensor([_box(5 * i) for i in range(5)])
    points, given = torch.tensor([0, 5, 6, 3, 100]), torch.tensor([1, -1, -1, 1, 2])
    labels = Labels.make(boxes, torch.zeros(5), num_points=points, difficulty=given)
    assert WaymoTruth.from_labels(labels).levels.tolist() == [2, 1, 2, 1]
    assert WaymoTruth.from_labels(labels, difficulty_is_level=True).levels.tolist() == [2, 1, 1, 2]
    with pytest.raises(InvalidInput, match="prepare the dataset with point counts"):
        WaymoTruth.from_labels(Labels.make(boxes, torch.zeros(5)))


def test_what_cannot_be_scored_is_refused() -> None:
    truth, found = _truth((_box(5), 1)), _found((_box(5), 0.9))
    with pytest.raises(InvalidInput, match="1 frames of labels, 2 of detections"):
        evaluate_waymo([truth], [found, found], classes=CLASSES)
    with pytest.raises(InvalidInput, match=r"no minimum overlap for \['Car'\]; Waymo's classes are Vehicle"):
        evaluate_waymo([truth], [found], classes=("Car",))
    with pytest.raises(InvalidInput, match="frame number 0 has 1 detections"):
        evaluate_waymo([truth], [found], classes=CLASSES, ignored=[torch.zeros(2, dtype=torch.bool)])
    with pytest.raises(InvalidInput, match="1 of 1 detection boxes have a NaN"):
        evaluate_waymo([truth], [_found((_box(5, yaw=math.nan), 0.9))], classes=CLASSES)
    with pytest.raises(InvalidInput, match="a score that is not a finite number"):
        evaluate_waymo([truth], [_found((_box(5), math.nan))], classes=CLASSES)
    with pytest.raises(InvalidInput, match="levels must be 1 or 2"):
        _truth((_box(5), 3))
