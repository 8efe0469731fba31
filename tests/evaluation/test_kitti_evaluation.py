"""The KITTI protocol on hand-made cases, the form of its result, and what it refuses. Random data: test_kitti_against_reference."""

import math
from pathlib import Path

import numpy as np
import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.kitti_text import parse_objects, write_objects
from upcycle3d.perception.evaluation.kitti import KittiResult, MinOverlap, evaluate_kitti, evaluate_kitti_folders
from upcycle3d.perception.evaluation.kitti_matching import recall_thresholds

LEVELS = ("easy", "moderate", "hard")


def _car(
    k: int,
    *,
    score: float | None = None,
    kind: str = "Car",
    height: float = 50,
    occluded: int = 0,
    truncated: float = 0,
    alpha: float = 0.3,
    shift: float = 0,
) -> str:
    """Car number k of a row of cars that do not touch; ``shift`` m to the side moves both its boxes."""
    left, x = 100 + 150 * (k % 6) + 20 * shift, -30 + 6 * (k % 6) + shift
    tail = "" if score is None else f" {score}"
    return f"{kind} {truncated} {occluded} {alpha} {left} 100 {left + 80} {100 + height} 1.5 1.6 4.0 {x} 1.6 20 0.0{tail}\n"


def _evaluate(gt: list[str], det: list[str], **options: object) -> KittiResult:
    return evaluate_kitti([parse_objects(t, "gt") for t in gt], [parse_objects(t, "det") for t in det], **options)  # type: ignore[arg-type]


def _many(count: int = 40) -> tuple[list[str], list[str]]:
    """``count`` frames with one easy car each, each found with a score of its own, best first."""
    return [_car(k) for k in range(count)], [_car(k, score=1 - k / 1000) for k in range(count)]


def test_everything_found_is_100() -> None:
    result = _evaluate(*_many(41), classes=("Car",))
    car = result.classes["Car"]
    for curve in (car.box_3d, car.bev, car.bbox, car.aos):
        assert curve is not None
        assert curve.r40 == pytest.approx((100, 100, 100))
        assert curve.r11 == pytest.approx((100, 100, 100))
    assert car.ground_truths == (41, 41, 41)


def test_a_single_object_fills_only_the_first_recall_sample() -> None:
    """As in the official program: one true positive gives one threshold, so R40, which leaves sample 0 out, is 0."""
    car = _evaluate(*_many(1), classes=("Car",)).classes["Car"]
    assert car.box_3d.samples[1].tolist() == [1.0] + [0.0] * 40
    assert car.box_3d.r40 == (0, 0, 0)
    assert car.box_3d.r11 == pytest.approx((100 / 11,) * 3)


def test_a_false_positive_lowers_precision_from_its_score_on() -> None:
    gt, det = _many()
    det[0] += _car(3, score=0.9815)  # between the scores of true positives 18 and 19
    samples = _evaluate(gt, det, classes=("Car",)).classes["Car"].box_3d.samples[0]
    expected = [1.0] * 19 + [40 / 41] * 21 + [0.0]  # precision rises towards 40 / 41, and is made monotone
    np.testing.assert_allclose(samples, expected)


def test_a_duplicate_is_a_false_positive() -> None:
    gt, det = _many()
    det = [d + _car(k, score=0.5 - k / 1000, shift=0.05) for k, d in enumerate(det)]
    car = _evaluate(gt, det, classes=("Car",)).classes["Car"]
    assert car.box_3d.r40 == pytest.approx((97.5,) * 3)  # duplicates score below every true positive; sample 40 stays empty
    ahead = [_car(k, score=0.9 - k / 1000, shift=0.3) + _car(k, score=0.5 - k / 1000) for k in range(40)]
    worse = _evaluate(gt, ahead, classes=("Car",)).classes["Car"]
    assert worse.box_3d.r40 == pytest.approx((97.5,) * 3)  # thresholds are the scores of the first, best scored, match
    assert worse.ground_truths == (40, 40, 40)


def test_missed_objects_end_the_curve() -> None:
    gt, det = _many(80)
    det = [d if k % 2 else "" for k, d in enumerate(det)]
    samples = _evaluate(gt, det, classes=("Car",)).classes["Car"].bev.samples[0]
    assert int((samples == 1).sum()) == 21  # recall 0 .. 0.5
    assert int((samples == 0).sum()) == 20


def test_overlap_must_exceed_the_minimum() -> None:
    gt, det = _many()
    half = {"Car": MinOverlap(bbox=0.5, bev=0.5, box_3d=0.5)}
    # 4 m long cars in a row along x, moved by 4/3 m: overlap exactly (4 - 4/3) / (4 + 4/3) = 1/2 up to rounding
    for shift, right in ((4 / 3 - 1e-3, True), (4 / 3 + 1e-3, False)):
        moved = [_car(k, score=1 - k / 1000, shift=shift) for k in range(40)]
        assert (_evaluate(gt, moved, classes=("Car",), min_overlaps=half).classes["Car"].box_3d.r40[0] > 0) is right
    assert (
        _evaluate(gt, det, classes=("Car",), min_overlaps={"Car": MinOverlap(bbox=1, bev=1, box_3d=1)}).classes["Car"].bbox.r40[0]
        == 0
    )


def test_dont_care_forgives_2d_only() -> None:
    gt, det = _many()
    det = [d + _car(k + 3, score=0.9999 - k / 1000) for k, d in enumerate(det)]
    plain = _evaluate(gt, det, classes=("Car",)).classes["Car"]
    region = "DontCare -1 -1 -10 0 90 1200 160 -1 -1 -1 -1000 -1000 -1000 -10\n"
    forgiven = _evaluate([g + region for g in gt], det, classes=("Car",)).classes["Car"]
    assert plain.bbox.r40[0] < 55
    assert forgiven.bbox.r40 == pytest.approx((97.5,) * 3)
    assert forgiven.bev.r40 == plain.bev.r40
    assert forgiven.box_3d.r40 == plain.box_3d.r40


@pytest.mark.parametrize(("name", "neighbor"), [("Car", "Van"), ("Pedestrian", "Person_sitting")])
def test_neighboring_classes_are_neither_right_nor_wrong(name: str, neighbor: str) -> None:
    gt, det = ([t.replace("Car", name) for t in part] for part in _many())
    gt = [g + _car(k + 3, kind=neighbor) for k, g in enumerate(gt)]
    det = [d + _car(k + 3, kind=name, score=0.9999) for k, d in enumerate(det)]
    found = _evaluate(gt, det, classes=(name,)).classes[name]
    assert found.ground_truths == (40, 40, 40)
    assert found.box_3d.r40 == pytest.approx((97.5,) * 3)
    other = _evaluate([g.replace(neighbor, "Tram") for g in gt], det, classes=(name,)).classes[name]
    assert other.box_3d.r40[0] < 55


def test_difficulties_ignore_small_hidden_and_cut_objects() -> None:
    gt = [_car(0) + _car(1, height=30) + _car(2, occluded=1) + _car(3, occluded=2, truncated=0.4) + _car(4, truncated=0.6)]
    assert _evaluate(gt, [""], classes=("Car",)).classes["Car"].ground_truths == (1, 3, 4)


def test_an_object_exactly_at_the_height_limit_does_not_count_and_a_detection_does() -> None:
    assert _evaluate([_car(0, height=40) + _car(1, height=25)], [""], classes=("Car",)).classes["Car"].ground_truths == (0, 1, 1)
    gt, det = _many()
    low = [d + _car(k + 3, height=39.9, score=0.9999) for k, d in enumerate(det)]
    exact = [d + _car(k + 3, height=40, score=0.9999) for k, d in enumerate(det)]
    assert _evaluate(gt, low, classes=("Car",)).classes["Car"].box_3d.r40[0] == pytest.approx(97.5)
    assert _evaluate(gt, low, classes=("Car",)).classes["Car"].box_3d.r40[1] < 55
    assert _evaluate(gt, exact, classes=("Car",)).classes["Car"].box_3d.r40[0] < 55


def test_orientation_similarity_falls_when_cars_are_turned() -> None:
    gt, det = _many(41)
    for turn, similarity in ((0.0, 100), (math.pi / 2, 50), (math.pi, 0)):
        turned = [_car(k, score=1 - k / 1000, alpha=0.3 + turn) for k in range(41)]
        car = _evaluate(gt, turned, classes=("Car",)).classes["Car"]
        assert car.aos is not None
        assert car.aos.r40 == pytest.approx((similarity,) * 3, abs=1e-9)
        assert car.bbox.r40 == pytest.approx((100,) * 3)
    unknown = _evaluate(gt, [det[0].replace("0.3", "-10", 1), *det[1:]], classes=("Car",))
    assert unknown.classes["Car"].aos is None
    assert unknown.to_json()["Car"]["aos"] is None


def test_no_detection_and_no_object_give_zero_with_the_count() -> None:
    for gt, det, count in ((*_many(3), 3), (["", ""], [_car(0, score=0.5), ""], 0), ([], [], 0), (_many(3)[0], ["", "", ""], 3)):
        result = _evaluate(gt, det)
        assert result.frames == len(gt)
        assert result.classes["Car"].ground_truths == (count,) * 3
        assert result.classes["Cyclist"].box_3d.r40 == (0, 0, 0)
        if not any(det):
            assert result.classes["Car"].bbox.r11 == (0, 0, 0)


def test_detections_without_a_3d_box_count_in_2d_only() -> None:
    gt, det = _many(41)
    flat = [d.replace("1.5 1.6 4.0", "-1 -1 -1") for d in det]
    car = _evaluate(gt, flat, classes=("Car",)).classes["Car"]
    assert car.bbox.r40 == pytest.approx((100,) * 3)
    assert car.bev.r40 == car.box_3d.r40 == (0, 0, 0)


def test_thresholds_sample_recall_evenly() -> None:
    scores = np.linspace(1, 0, 4000)
    thresholds = recall_thresholds(scores, 4000)
    assert len(thresholds) == 41
    np.testing.assert_allclose(1 - thresholds, np.linspace(0, 1, 41), atol=1e-3)
    assert len(recall_thresholds(scores[:1000], 4000)) in (11, 12)
    assert recall_thresholds(np.zeros(0), 5).tolist() == []


def test_json_has_exactly_the_agreed_form() -> None:
    found = _evaluate(*_many(3)).to_json()
    assert list(found) == ["Car", "Pedestrian", "Cyclist"]
    for c in found.values():
        assert set(c) == {"3d", "bev", "bbox", "aos"}
        for metric in c.values():
            assert metric is not None
            assert set(metric) == {"R40", "R11"}
            kind = float if c is found["Car"] else type(None)  # nothing counts, so there is no AP
            assert all(tuple(levels) == LEVELS and all(type(v) is kind for v in levels.values()) for levels in metric.values())


def test_folders_are_read_by_id_and_missing_files_named(tmp_path: Path) -> None:
    gt, det = _many(41)
    ids = [f"{k:06d}" for k in range(41)]
    for k, i in enumerate(ids):
        write_objects(tmp_path / "gt" / f"{i}.txt", parse_objects(gt[k], "gt"))
        write_objects(tmp_path / "det" / f"{i}.txt", parse_objects(det[k], "det"))
    result = evaluate_kitti_folders(tmp_path / "gt", tmp_path / "det", ids, classes=("Car",))
    assert result.classes["Car"].box_3d.r40 == pytest.approx((100,) * 3)
    (tmp_path / "det" / "000005.txt").write_text("")
    assert evaluate_kitti_folders(tmp_path / "gt", tmp_path / "det", ids, classes=("Car",)).classes["Car"].box_3d.r40[0] < 100
    (tmp_path / "det" / "000006.txt").unlink()
    with pytest.raises(InvalidInput, match=r"frame 000006: no detections .*000006\.txt \(1 of 41 missing\); write an empty file"):
        evaluate_kitti_folders(tmp_path / "gt", tmp_path / "det", ids)
    write_objects(tmp_path / "det" / "000006.txt", parse_objects(gt[6], "gt"))
    with pytest.raises(InvalidInput, match=r"frame 000006: .* has no scores"):
        evaluate_kitti_folders(tmp_path / "gt", tmp_path / "det", ids)


def test_wrong_calls_are_refused() -> None:
    gt, det = _many(2)
    with pytest.raises(InvalidInput, match="2 frames of labels, 1 of detections"):
        _evaluate(gt, det[:1])
    with pytest.raises(InvalidInput, match="frame number 0 have no scores"):
        _evaluate(gt, gt)
    with pytest.raises(InvalidInput, match=r"no minimum overlap for Tram; KITTI's rules have one for Car, .* --overlap Tram 0.7"):
        _evaluate(gt, det, classes=("Car", "Tram"))
