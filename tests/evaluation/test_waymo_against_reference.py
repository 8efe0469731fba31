"""Waymo's protocol on random frames: against numbers of the official program, and against a slow reference that follows its rules
one by one, with scipy's assignment for every cutoff and shapely in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from shapely.geometry import Polygon

from upcycle3d.core.boxes import corners_bev
from upcycle3d.core.structures import Boxes3D, Predictions
from upcycle3d.perception.evaluation.waymo import WAYMO_MIN_OVERLAPS, WAYMO_RANGES, WaymoTruth, evaluate_waymo

CLASSES = ("Vehicle", "Pedestrian", "Sign", "Cyclist")
SIZES = {0: (4.5, 2.0, 1.6), 1: (0.8, 0.8, 1.7), 3: (1.8, 0.8, 1.7)}
# AP and APH at LEVEL_1 and LEVEL_2 of ``_scene(seed=7, frames=40)``: waymo-open-dataset-tf-2-12-0 1.6.7 with TensorFlow 2.13,
# WODDetectionEvaluator with its default configuration.
OFFICIAL_RESULTS: dict[tuple[str, str], tuple[float, float, float, float]] = {
    ("Vehicle", "all"): (0.189012, 0.125723, 0.130674, 0.087111),
    ("Vehicle", "[0, 30)"): (0.281246, 0.258421, 0.212530, 0.193076),
    ("Vehicle", "[30, 50)"): (0.216073, 0.083003, 0.155298, 0.061416),
    ("Vehicle", "[50, inf)"): (0.178102, 0.161324, 0.118690, 0.106505),
    ("Pedestrian", "all"): (0.736471, 0.499811, 0.611407, 0.413603),
    ("Pedestrian", "[0, 30)"): (0.899524, 0.575462, 0.778030, 0.492158),
    ("Pedestrian", "[30, 50)"): (0.802962, 0.716590, 0.708208, 0.624157),
    ("Pedestrian", "[50, inf)"): (0.677395, 0.424879, 0.530622, 0.327761),
    ("Cyclist", "all"): (0.562684, 0.412821, 0.481044, 0.346246),
    ("Cyclist", "[0, 30)"): (0.657990, 0.488626, 0.550700, 0.412231),
    ("Cyclist", "[30, 50)"): (0.526231, 0.405192, 0.496975, 0.373611),
    ("Cyclist", "[50, inf)"): (0.669235, 0.529662, 0.525663, 0.405742),
}


def _scene(seed: int, frames: int) -> tuple[list[WaymoTruth], list[Predictions], list[torch.Tensor]]:
    """Crowded frames: objects that overlap, several detections of each, some turned round, scores with ties, no-label zones."""
    random = np.random.default_rng(seed).random
    truths, predictions, zones = [], [], []
    for _ in range(frames):
        objects, kinds, levels, found, found_kinds, scores = [], [], [], [], [], []
        for _ in range(int(random() * 14)):
            kind = (0, 0, 0, 1, 1, 3)[int(random() * 6)]
            center = random(3) * [120, 120, 1] - [60, 60, 0]
            if objects and random() < 0.4:
                center = objects[-1][:3] + (random(3) - 0.5) * [2, 2, 0.2]
            size = np.array(SIZES[kind]) * (0.8 + 0.4 * random(3))
            box = np.concatenate([center, size, [8 * random() - 4]])
            objects.append(box)
            kinds.append(kind)
            levels.append(1 + int(random() < 0.4))
            for _ in range((0, 1, 1, 2, 3)[int(random() * 5)]):
                turn = math.pi if random() < 0.3 else 0.4 * (random() - 0.5)
                moved = np.concatenate([(random(3) - 0.5) * 0.25 * size, (random(3) - 0.5) * 0.15 * size, [turn]])
                found.append(box + moved)
                found_kinds.append(kind if random() < 0.95 else 3)
                scores.append(round(random(), 2) if random() < 0.3 else random())
        for _ in range(int(random() * 5)):
            kind = (0, 1, 3)[int(random() * 3)]
            found.append(np.concatenate([random(3) * [120, 120, 1] - [60, 60, 0], SIZES[kind], [0]]))
            found_kinds.append(kind)
            scores.append(0.6 * random())
        boxes = torch.tensor(np.array(objects).reshape(-1, 7)).float()
        truths.append(
            WaymoTruth(boxes=Boxes3D(data=boxes), classes=torch.tensor(kinds).long(), levels=torch.tensor(levels).long())
        )
        values = torch.tensor(scores).float()
        predictions.append(
            Predictions(
                boxes=Boxes3D(data=torch.tensor(np.array(found).reshape(-1, 7)).float()),
                classes=torch.tensor(found_kinds).long(),
                scores=values,
                class_scores=values,
                iou_scores=values,
            )
        )
        zones.append(torch.from_numpy(random(len(found)) < 0.1))
    return truths, predictions, zones


def _iou(a: torch.Tensor, b: torch.Tensor) -> float:
    p, q = (Polygon(corners_bev(box.double()[None])[0].tolist()) for box in (a, b))
    low, high = (
        max(float(v[2] - v[5] / 2) for v in (a.double(), b.double())),
        min(float(v[2] + v[5] / 2) for v in (a.double(), b.double())),
    )
    common = p.intersection(q).area * max(0.0, high - low)
    return common / (p.area * float(a[5]) + q.area * float(b[5]) - common)


def _reference(scene, kind, nearest, farthest, minimum, level):  # type: ignore[no-untyped-def]
    """(AP, APH) in 0..1 or None, of one class, range and level."""
    frames, objects = [], 0
    for truth, found, zone in zip(*scene, strict=True):
        near_t, near_d = (
            (nearest <= b.data[:, :3].double().norm(dim=1)) & (b.data[:, :3].double().norm(dim=1) < farthest)
            for b in (truth.boxes, found.boxes)
        )
        t = ((truth.classes == kind) & near_t).nonzero()[:, 0].tolist()
        d = ((found.classes == kind) & near_d).nonzero()[:, 0].tolist()
        overlaps = np.array([[_iou(found.boxes.data[j], truth.boxes.data[i]) for i in t] for j in d]).reshape(len(d), len(t))
        objects += int((truth.levels[t] <= level).sum())
        frames.append((truth, found, zone, t, d, np.where(overlaps >= minimum, overlaps, 0)))
    if not objects:
        return None
    points = []
    for cutoff in [i * 0.01 for i in range(100)] + [1.0]:
        right = heading = wrong = missed = 0.0
        for truth, found, zone, t, d, overlaps in frames:
            here = [k for k, j in enumerate(d) if float(found.scores[j]) >= np.float32(cutoff)]
            rows, columns = linear_sum_assignment(overlaps[here], maximize=True)
            pairs = {here[r]: c for r, c in zip(rows, columns) if overlaps[here[r], c] > 0}
            for k in here:
                if k in pairs:
                    turn = float(found.boxes.data[d[k], 6] - truth.boxes.data[t[pairs[k]], 6])
                    right += 1
                    heading += 1 - abs(math.atan2(math.sin(turn), math.cos(turn))) / math.pi
                else:
                    wrong += not zone[d[k]]
            missed += sum(int(truth.levels[i]) <= level for c, i in enumerate(t) if c not in pairs.values())
        recall = right / (right + missed) if right + missed else 0.0
        points.append((recall, *((1.0, 1.0) if recall == 0 else (right / (right + wrong), heading / (right + wrong)))))
    return tuple(_area([(p[0], p[column]) for p in points]) for column in (1, 2))


def _area(points: list[tuple[float, float]]) -> float:
    """Walks down from the highest recall in steps of at most 0.05, with the best precision at or beyond each."""
    recalls = sorted({0.0, *(r for r, _ in points)}, reverse=True)
    walk = [recalls[0]]
    for r in recalls[1:]:
        while walk[-1] - r > 0.05 + 1e-6:
            walk.append(walk[-1] - 0.05)
        walk.append(r)
    best = [max(p for r, p in points if r >= w - 1e-12) for w in walk]
    if len(walk) > 1:
        best[-1] = best[-2]
    return sum((walk[i] - walk[i + 1]) * (best[i] + best[i + 1]) / 2 for i in range(len(walk) - 1))


@pytest.mark.parametrize("seed", [1, 2])
def test_random_frames_score_as_the_rules_say(seed: int) -> None:
    scene = _scene(seed, frames=6)
    truths, predictions, zones = scene
    result = evaluate_waymo(truths, predictions, classes=CLASSES, ignored=zones)
    for kind, name in enumerate(CLASSES):
        for label, (nearest, farthest) in WAYMO_RANGES.items():
            for level in (1, 2):
                score = result.classes[name][label][f"LEVEL_{level}"]
                expected = _reference(scene, kind, nearest, farthest, WAYMO_MIN_OVERLAPS[name], level)
                if expected is None:
                    assert score.ap is None
                else:
                    assert (score.ap, score.aph) == tuple(pytest.approx(100 * e, abs=1e-5) for e in expected)


def test_random_frames_score_as_the_official_program_scores_them() -> None:
    truths, predictions, zones = _scene(seed=7, frames=40)
    result = evaluate_waymo(truths, predictions, classes=CLASSES, ignored=zones)
    for (name, label), expected in OFFICIAL_RESULTS.items():
        first, second = (result.classes[name][label][level] for level in ("LEVEL_1", "LEVEL_2"))
        found = (first.ap, first.aph, second.ap, second.aph)
        assert found == tuple(pytest.approx(100 * e, abs=1e-4) for e in expected), (name, label)


def test_the_order_of_frames_and_boxes_does_not_matter() -> None:
    """Scores without ties: with ties, file order decides."""
    truths, predictions, zones = _scene(seed=5, frames=8)
    total = sum(len(p) for p in predictions)
    spread = torch.randperm(total, generator=torch.Generator().manual_seed(0)).float() / total
    shuffled: tuple[list, list, list] = ([], [], [])
    distinct = []
    for truth, found, zone in zip(truths, predictions, zones, strict=True):
        scores, spread = spread[: len(found)], spread[len(found) :]
        same = Predictions(boxes=found.boxes, classes=found.classes, scores=scores, class_scores=scores, iou_scores=scores)
        distinct.append(same)
        t, d = torch.arange(len(truth.classes)).flip(0), torch.arange(len(found)).flip(0)
        boxes = Boxes3D(data=truth.boxes.data[t])
        shuffled[0].append(WaymoTruth(boxes=boxes, classes=truth.classes[t], levels=truth.levels[t]))
        shuffled[1].append(same.select(d))
        shuffled[2].append(zone[d])
    one = evaluate_waymo(truths, distinct, classes=CLASSES, ignored=zones)
    other = evaluate_waymo(*(part[::-1] for part in shuffled[:2]), classes=CLASSES, ignored=shuffled[2][::-1])
    for name in CLASSES:
        for level in ("LEVEL_1", "LEVEL_2"):
            assert one.classes[name]["all"][level] == other.classes[name]["all"][level]
