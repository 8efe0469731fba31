"""Lyft's mAP: hand-made cases, the SDK's own sample files, and a slow reference that follows the SDK's rules with shapely in float64."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from shapely.geometry import Polygon

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.evaluation.lyft import MIN_OVERLAPS, LyftBoxes, LyftResult, evaluate_lyft, read_lyft_boxes

SAMPLES = "data/lyft/map_test_jsons"
Item = tuple[str, str, float, float]  # frame, class, x, score


def _boxes(*items: Item, length: float = 4, scored: bool = True) -> LyftBoxes:
    return LyftBoxes(
        frames=tuple(i[0] for i in items),
        names=tuple(i[1] for i in items),
        boxes=torch.tensor([[i[2], 0, 0, length, 2, 1.5, 0] for i in items]).reshape(-1, 7),
        scores=torch.tensor([i[3] for i in items]) if scored else None,
    )


def _evaluate(truths: list[Item], found: list[Item], **options: object) -> LyftResult:
    return evaluate_lyft(_boxes(*truths, scored=False), _boxes(*found), **options)  # type: ignore[arg-type]


def test_everything_found_is_100() -> None:
    items = [("a", "car", 0, 0.9), ("a", "car", 9, 0.8), ("b", "bus", 0, 0.1)]
    result = _evaluate(items, items)
    assert result.min_overlaps == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    assert result.classes == {"bus": (100.0,) * 10, "car": (100.0,) * 10}
    assert (result.mean_ap, dict(result.ground_truths)) == (100, {"bus": 1, "car": 2})


def test_ap_ends_at_the_least_overlap_the_detection_reaches() -> None:
    """A shift of 0.8 m of 4 overlaps by 3.2 / 4.8 = 2/3: enough for 0.5, 0.55, 0.6 and 0.65."""
    result = _evaluate([("a", "car", 0, 0)], [("a", "car", 0.8, 0.5)])
    assert result.classes["car"] == (100.0,) * 4 + (0.0,) * 6
    assert result.mean_ap == pytest.approx(40)


def test_a_false_positive_and_a_miss() -> None:
    truths = [("a", "car", 0, 0), ("a", "car", 10, 0)]
    assert _evaluate(truths, [("a", "car", 0, 0.9)]).mean_ap == pytest.approx(50)
    assert _evaluate(truths, [("a", "car", 0, 0.9), ("a", "car", 20, 0.8)]).mean_ap == pytest.approx(50)
    assert _evaluate(truths, [("a", "car", 0, 0.8), ("a", "car", 20, 0.9)]).mean_ap == pytest.approx(25)
    # Right, wrong, right: precision 1 up to recall 1/2, then 2/3.
    both = [("a", "car", 0, 0.9), ("a", "car", 20, 0.8), ("a", "car", 10, 0.7)]
    assert _evaluate(truths, both).mean_ap == pytest.approx(50 + 100 / 3)


def test_a_detection_does_not_try_its_second_best() -> None:
    """Two objects 1 m apart. Both detections overlap the first most; the other object stays unfound, though the second would do."""
    truths = [("a", "car", 0, 0), ("a", "car", 1, 0)]
    found = [("a", "car", 0, 0.9), ("a", "car", 0.4, 0.8)]
    assert _evaluate(truths, found, min_overlaps=(0.5,)).classes["car"] == (50.0,)


def test_equal_scores_go_by_file_order() -> None:
    truths = [("a", "car", 0, 0)]
    right, wrong = ("a", "car", 0.0, 0.5), ("a", "car", 20.0, 0.5)
    assert _evaluate(truths, [right, wrong]).mean_ap == pytest.approx(100)
    assert _evaluate(truths, [wrong, right]).mean_ap == pytest.approx(50)


def test_equal_overlaps_go_to_the_first_object() -> None:
    """Between two objects, equally far: the first is taken; a second detection of the first comes too late."""
    truths = [("a", "car", 0, 0), ("a", "car", 1, 0)]
    found = [("a", "car", 0.5, 0.9), ("a", "car", 0, 0.8)]
    assert _evaluate(truths, found, min_overlaps=(0.5,)).classes["car"] == (50.0,)
    assert _evaluate(truths[::-1], found, min_overlaps=(0.5,)).classes["car"] == (100.0,)


def test_the_least_overlap_must_be_passed() -> None:
    """Lengths 4 and 2 overlap by exactly 1/2."""
    result = evaluate_lyft(
        _boxes(("a", "car", 0, 0), scored=False), _boxes(("a", "car", 0, 0.9), length=2), min_overlaps=(0.5, 0.49)
    )
    assert result.classes["car"] == (0.0, 100.0)


def test_frames_and_classes_do_not_mix() -> None:
    truths = [("a", "car", 0, 0), ("b", "bus", 0, 0)]
    found = [("b", "car", 0, 0.9), ("a", "bus", 0, 0.9), ("c", "truck", 0, 0.9)]
    assert _evaluate(truths, found).classes == {"bus": (0.0,) * 10, "car": (0.0,) * 10}


def test_a_class_without_detections_has_0_and_one_without_objects_none() -> None:
    result = _evaluate([("a", "car", 0, 0), ("a", "bus", 9, 0)], [("a", "car", 0, 0.9)], classes=("car", "bus", "animal"))
    assert (result.class_ap("bus"), result.class_ap("animal")) == (0, None)
    assert result.mean_ap == pytest.approx(50)
    assert result.to_json()["classes"]["animal"] == {"AP": None, "by_overlap": None, "ground_truths": 0}  # type: ignore[index]
    empty = _evaluate([], [], classes=("car",))
    assert (empty.mean_ap, empty.classes) == (None, {"car": None})
    assert _evaluate([("a", "car", 0, 0)], []).mean_ap == 0


def test_unscored_or_broken_detections_are_refused() -> None:
    truths = _boxes(("a", "car", 0, 0), scored=False)
    with pytest.raises(InvalidInput, match="no scores"):
        evaluate_lyft(truths, truths)
    with pytest.raises(InvalidInput, match="not a finite number"):
        evaluate_lyft(truths, _boxes(("a", "car", 0, math.nan)))
    with pytest.raises(InvalidInput, match="1 of 1 ground-truth boxes"):
        evaluate_lyft(_boxes(("a", "car", math.inf, 0), scored=False), _boxes(("a", "car", 0, 0.5)))


RECORD = {
    "sample_token": "t",
    "translation": [1, 2, 3],
    "size": [2, 4, 1.5],
    "rotation": [2, 0, 0, 2],
    "name": "car",
    "score": 0.5,
}


def test_a_record_is_read_in_the_sdks_conventions(tmp_path: Path) -> None:
    """Size is width, length, height; the rotation, of any length, is w x y z: here a quarter turn to the left."""
    (tmp_path / "f.json").write_text(json.dumps([RECORD]))
    boxes = read_lyft_boxes(tmp_path / "f.json", scored=True)
    assert boxes.boxes.tolist() == [[1, 2, 3, 4, 2, 1.5, pytest.approx(math.pi / 2)]]
    assert (boxes.frames, boxes.names) == (("t",), ("car",))
    assert boxes.boxes.dtype == torch.float64
    assert read_lyft_boxes(tmp_path / "f.json", scored=False).scores is None


@pytest.mark.parametrize(
    "change",
    [
        {"score": None},
        {"score": math.nan},
        {"size": [2, 0, 1]},
        {"size": [2, 4]},
        {"rotation": [0, 0, 0, 0]},
        {"translation": "here"},
        {"translation": [1, 2, "x"]},
        {"name": 3},
        {"sample_token": None},
    ],
)
def test_a_broken_record_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    (tmp_path / "f.json").write_text(json.dumps([RECORD, RECORD | change]))
    with pytest.raises(InvalidInput, match=r"f\.json, record 1: expected sample_token"):
        read_lyft_boxes(tmp_path / "f.json", scored=True)


@pytest.mark.parametrize(
    ("text", "message"), [("[", "not valid JSON"), ("{}", "a list of boxes"), ("[3]", "record 0"), (None, "there is no")]
)
def test_a_broken_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "f.json").write_text(text)
    with pytest.raises(InvalidInput, match=message):
        read_lyft_boxes(tmp_path / "f.json", scored=True)


def _polygon(box: list[float]) -> Polygon:
    x, y, _, length, width, _, yaw = box
    c, s = math.cos(yaw), math.sin(yaw)
    corners = [(length / 2, width / 2), (length / 2, -width / 2), (-length / 2, -width / 2), (-length / 2, width / 2)]
    return Polygon([(x + c * a - s * b, y + s * a + c * b) for a, b in corners])


def _iou(a: list[float], b: list[float]) -> float:
    height = min(a[2] + a[5] / 2, b[2] + b[5] / 2) - max(a[2] - a[5] / 2, b[2] - b[5] / 2)
    common = _polygon(a).intersection(_polygon(b)).area * max(height, 0.0)
    return common / (a[3] * a[4] * a[5] + b[3] * b[4] * b[5] - common)


def _reference(truths: LyftBoxes, found: LyftBoxes, name: str, minimum: float) -> float:
    """AP in 0..1."""
    objects = [(f, b) for f, n, b in zip(truths.frames, truths.names, truths.boxes.tolist()) if n == name]
    assert found.scores is not None
    rows = zip(found.frames, found.names, found.boxes.tolist(), found.scores.tolist())
    detections = sorted(((f, b, s) for f, n, b, s in rows if n == name), key=lambda r: r[2], reverse=True)
    taken: set[int] = set()
    curve = []
    for frame, box, _ in detections:
        overlaps = [_iou(b, box) if f == frame else -1.0 for f, b in objects]
        best = int(np.argmax(overlaps))
        if overlaps[best] > minimum:
            taken.add(best)
        curve.append((len(taken) / len(objects), len(taken) / (len(curve) + 1)))
    area, last = 0.0, 0.0
    for recall in sorted({r for r, _ in curve}):
        area += (recall - last) * max(p for r, p in curve if r >= recall)
        last = recall
    return area


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_boxes_score_as_the_rules_say(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n = 60
    low, span = torch.tensor([2000.0, 700, -20, 4, 1.8, 1.5, -4]), torch.tensor([25.0, 25, 0.5, 1, 0.4, 0.3, 8])
    boxes = (low + span * torch.rand(n, 7, generator=g)).double()
    frames = tuple(f"f{int(k)}" for k in torch.randint(0, 6, (n,), generator=g))
    names = tuple(("car", "bus")[int(k)] for k in torch.randint(0, 2, (n,), generator=g))
    truths = LyftBoxes(frames=frames, names=names, boxes=boxes)
    copies = [k for k in range(n) for _ in range(k % 3)]
    moved = boxes[copies] + 0.3 * (torch.rand(len(copies), 7, generator=g) - 0.5)
    scores = (torch.rand(len(copies), generator=g) * 20).round() / 20  # many ties
    found = LyftBoxes(
        frames=tuple(frames[k] for k in copies), names=tuple(names[k] for k in copies), boxes=moved.double(), scores=scores
    )
    result = evaluate_lyft(truths, found)
    for name, values in result.classes.items():
        assert values == tuple(pytest.approx(100 * _reference(truths, found, name, m)) for m in MIN_OVERLAPS)
    assert 1 < result.mean_ap < 99  # type: ignore[operator]


@pytest.mark.parametrize(
    ("truths", "found"),
    [("true_gt", "test_file_for_true_result"), ("all_class_gt", "test_file_with_all_classes")],
)
def test_the_sdks_sample_files_score_100(truths: str, found: str) -> None:
    """The SDK's tests expect mAP 1 for each pair of files at every overlap from 0.05 to 0.95."""
    samples = tiny.shared(SAMPLES, "the sample files of Lyft's SDK get the scores that its tests expect")
    objects = read_lyft_boxes(samples / f"{truths}.json", scored=False)
    result = evaluate_lyft(
        objects,
        read_lyft_boxes(samples / f"{found}.json", scored=True),
        min_overlaps=tuple(0.05 * i for i in range(1, 20)),
    )
    assert set(result.classes) == set(objects.names)
    assert all(values == (100.0,) * 19 for values in result.classes.values())


def test_the_sdks_merged_samples_against_themselves_and_worse() -> None:
    """Against themselves the SDK's tests expect AP 1. Moved, thinned out and renamed, the reference says what to expect."""
    samples = tiny.shared(SAMPLES, "the merged samples of Lyft's SDK get the scores that its tests expect")
    truths = read_lyft_boxes(samples / "samples_merged.json", scored=False)
    n = len(truths.frames)
    itself = LyftBoxes(frames=truths.frames, names=truths.names, boxes=truths.boxes, scores=torch.ones(n))
    assert evaluate_lyft(truths, itself).mean_ap == 100
    g = torch.Generator().manual_seed(0)
    moved = truths.boxes + 0.6 * (torch.rand(n, 7, generator=g).double() - 0.5)
    keep = [k for k in range(n) if k % 5]
    worse = LyftBoxes(
        frames=tuple(truths.frames[k] for k in keep),
        names=tuple("car" if k % 11 == 0 else truths.names[k] for k in keep),
        boxes=moved[keep],
        scores=torch.rand(len(keep), generator=g),
    )
    result = evaluate_lyft(truths, worse)
    for name, values in result.classes.items():
        if name in worse.names:
            assert values == tuple(pytest.approx(100 * _reference(truths, worse, name, m)) for m in MIN_OVERLAPS)
