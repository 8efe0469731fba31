"""The KITTI protocol against a slow reference that follows the rules one by one, in plain Python with shapely."""

import math

import numpy as np
import pytest
import torch
from shapely.geometry import Polygon

import tiny
from upcycle3d.datasets.kitti import read_ids
from upcycle3d.datasets.kitti_text import KittiObjects, parse_objects, read_objects
from upcycle3d.perception.evaluation.kitti import LOOSE, OFFICIAL, evaluate_kitti


def _ground_polygon(o: KittiObjects, i: int) -> Polygon:
    (x, _, z), (_, w, length), r = o.location[i].tolist(), o.dimensions[i].tolist(), float(o.rotation_y[i])
    corners = [(length / 2, w / 2), (length / 2, -w / 2), (-length / 2, -w / 2), (-length / 2, w / 2)]
    return Polygon([(x + math.cos(r) * a + math.sin(r) * b, z - math.sin(r) * a + math.cos(r) * b) for a, b in corners])


def _overlap(metric: str, g: KittiObjects, i: int, d: KittiObjects, j: int, *, over_detection: bool = False) -> float:
    if metric == "bbox":
        a, b = g.bbox[i].tolist(), d.bbox[j].tolist()
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        if w <= 0 or h <= 0:
            return 0.0
        area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
        return w * h / (area_b if over_detection else area_a + area_b - w * h)
    if min(g.dimensions[i].tolist() + d.dimensions[j].tolist()) <= 0:
        return 0.0
    p, q = _ground_polygon(g, i), _ground_polygon(d, j)
    common = p.intersection(q).area
    if metric == "bev":
        return common / (p.area + q.area - common)
    (_, y1, _), h1, (_, y2, _), h2 = (
        g.location[i].tolist(),
        float(g.dimensions[i, 0]),
        d.location[j].tolist(),
        float(d.dimensions[j, 0]),
    )
    common *= max(0.0, min(y1, y2) - max(y1 - h1, y2 - h2))
    return common / (p.area * h1 + q.area * h2 - common)


def _match(metric, name, level, threshold, g, d, cache, minimum):  # type: ignore[no-untyped-def]
    """One frame: scores of true positives, number of false positives, orientation similarity."""
    neighbor = {"car": "van", "pedestrian": "person_sitting"}.get(name)
    height, occlusion, truncation = (40, 25, 25)[level], level, (0.15, 0.3, 0.5)[level]
    state = []  # of detections: None does not take part, True ignored, False counts
    for j, t in enumerate(d.types):
        if int(abs(d.bbox[j, 3] - d.bbox[j, 1])) < height:
            state.append(True)
        else:
            state.append(False if t.lower() == name else None)
    free = {j for j in range(len(d)) if state[j] is not None and (threshold is None or d.scores[j] >= threshold)}
    true_scores, similarity = [], 0.0
    for i, t in enumerate(g.types):
        if t.lower() not in (name, neighbor):
            continue
        too_small = g.bbox[i, 3] - g.bbox[i, 1] <= height
        ignored = t.lower() == neighbor or too_small or g.occluded[i] > occlusion or g.truncated[i] > truncation
        candidates = [j for j in sorted(free) if cache(metric, i, j) > minimum]
        if not candidates:
            continue
        if threshold is None:
            best = max(candidates, key=lambda j: float(d.scores[j]))
        else:
            counting = [j for j in candidates if not state[j]]
            best = max(counting, key=lambda j: cache(metric, i, j)) if counting else candidates[0]
        free.remove(best)
        if not ignored and not state[best]:
            true_scores.append(float(d.scores[best]))
            similarity += (1 + math.cos(float(g.alpha[i] - d.alpha[best]))) / 2
    left = [j for j in free if not state[j]]
    if metric == "bbox":
        regions = [i for i, t in enumerate(g.types) if t.lower() == "dontcare"]
        left = [j for j in left if not any(_overlap("bbox", g, i, d, j, over_detection=True) > minimum for i in regions)]
    return true_scores, len(left), similarity


def _thresholds(scores: list[float], total: int) -> list[float]:
    found, recall, ordered = [], 0.0, sorted(scores, reverse=True)
    for k, s in enumerate(ordered):
        is_last = k == len(ordered) - 1
        if not is_last and (k + 2) / total - recall < recall - (k + 1) / total:
            continue
        found.append(s)
        recall += 1 / 40
    return found


def _reference(
    gts: list[KittiObjects], dets: list[KittiObjects], name: str, metric: str, level: int, minimum: float
) -> tuple[list, list, int]:
    """Precision and orientation samples (41 each), number of ground truths."""
    name = name.lower()
    caches = []
    for g, d in zip(gts, dets):
        memory: dict = {}

        def cached(m, i, j, g=g, d=d, memory=memory):  # type: ignore[no-untyped-def]
            if (m, i, j) not in memory:
                memory[m, i, j] = _overlap(m, g, i, d, j)
            return memory[m, i, j]

        caches.append(cached)
    frames = list(zip(gts, dets, caches))
    total = 0
    for g in gts:
        for i, t in enumerate(g.types):
            total += int(
                t.lower() == name
                and g.bbox[i, 3] - g.bbox[i, 1] > (40, 25, 25)[level]
                and g.occluded[i] <= level
                and g.truncated[i] <= (0.15, 0.3, 0.5)[level]
            )
    scores = [s for f in frames for s in _match(metric, name, level, None, *f, minimum)[0]]
    precision, orientation = [0.0] * 41, [0.0] * 41
    for k, threshold in enumerate(_thresholds(scores, total)):
        parts = [_match(metric, name, level, threshold, *f, minimum) for f in frames]
        tp, fp = sum(len(p[0]) for p in parts), sum(p[1] for p in parts)
        precision[k] = tp / (tp + fp) if tp + fp else 0.0
        orientation[k] = sum(p[2] for p in parts) / (tp + fp) if tp + fp else 0.0
    monotone = [[max(c[k:]) for k in range(41)] for c in (precision, orientation)]
    return monotone[0], monotone[1], total


def _objects(rows: list[tuple]) -> KittiObjects:
    return parse_objects("".join(" ".join(map(str, r)) + "\n" for r in rows), "random")


def _random_frame(rng: np.random.Generator) -> tuple[KittiObjects, KittiObjects]:
    """A frame with every difficulty of the protocol, and detections near and far from its objects."""
    gts, dets = [], []
    for _ in range(rng.integers(0, 7)):
        kinds = {
            "Car": 0.35,
            "car": 0.05,
            "Van": 0.1,
            "Pedestrian": 0.15,
            "Person_sitting": 0.05,
            "Cyclist": 0.15,
            "Truck": 0.05,
            "DontCare": 0.1,
        }
        kind = str(rng.choice(list(kinds), p=list(kinds.values())))
        left, top = rng.uniform(0, 900), rng.uniform(0, 200)
        height = float(rng.choice([20.0, 25.0, 30.0, 40.0, 60.0, 90.0]))
        bbox = [left, top, left + rng.uniform(30, 150), top + height]
        if kind == "DontCare":
            gts.append((kind, -1, -1, -10, *bbox, -1, -1, -1, -1000, -1000, -1000, -10))
        else:
            size = [1.7, 0.6, 0.8] if kind[0] == "P" else [1.6, 1.7, 4.0]
            place = [rng.uniform(-20, 20), rng.uniform(1, 2), rng.uniform(5, 60)]
            angle = rng.uniform(-3.1, 3.1)
            gts.append(
                (kind, rng.choice([0, 0, 0.2, 0.4, 0.6]), rng.choice([0, 0, 0, 1, 2, 3]), angle, *bbox, *size, *place, angle)
            )
    for g in gts:
        for _ in range(rng.choice([0, 1, 1, 1, 2])):
            kind = str(rng.choice([g[0], "Car", "Pedestrian", "Cyclist"], p=[0.7, 0.1, 0.1, 0.1]))
            if g[0] == "DontCare":
                kind, size, place = "Car", [1.6, 1.7, 4.0], [rng.uniform(-20, 20), 1.5, rng.uniform(5, 60)]
            else:
                size = [s * rng.uniform(0.92, 1.08) for s in g[8:11]]
                place = [p + rng.normal(0, 0.12) for p in g[11:14]]
            bbox = [b + rng.normal(0, 2) for b in g[4:8]]
            score = rng.choice([0.25, 0.5, 0.75, rng.uniform()])  # equal scores happen
            alpha = max(g[3], -math.pi) + rng.choice([0, 0.1, math.pi])  # -10, unknown, would switch orientation off
            dets.append((kind, -1, -1, alpha, *bbox, *size, *place, g[14] + rng.normal(0, 0.05), score))
    for _ in range(rng.integers(0, 3)):
        left, top = rng.uniform(0, 900), rng.uniform(0, 200)
        place = [rng.uniform(-20, 20), 1.5, rng.uniform(5, 60)]
        dets.append(
            ("Car", -1, -1, 0.5, left, top, left + 60, top + rng.uniform(15, 60), 1.6, 1.7, 4.0, *place, 0.5, rng.uniform())
        )
    order = rng.permutation(len(dets))
    return _objects(gts), _objects([dets[k] for k in order])


@pytest.mark.parametrize("seed", range(4))
def test_random_datasets_agree_with_the_slow_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames = [_random_frame(rng) for _ in range(25 if seed else 60)]
    gts, dets = [f[0] for f in frames], [f[1] for f in frames]
    minimum = LOOSE if seed % 2 else OFFICIAL
    result = evaluate_kitti(gts, dets, min_overlaps=minimum)
    for name, c in result.classes.items():
        for metric, curve in (("bbox", c.bbox), ("bev", c.bev), ("3d", c.box_3d)):
            for level in range(3):
                precision, orientation, total = _reference(gts, dets, name, metric, level, minimum[name].of(metric))
                assert c.ground_truths[level] == total
                np.testing.assert_allclose(curve.samples[level], precision, atol=1e-12, err_msg=f"{name} {metric} {level}")
                if metric == "bbox":
                    assert c.aos is not None
                    np.testing.assert_allclose(c.aos.samples[level], orientation, atol=1e-12)
    assert any(0 < v < 100 for v in result.classes["Car"].box_3d.r40)


def test_real_labels_with_noise_agree_with_the_slow_reference() -> None:
    root = tiny.shared("data/kitti", "real KITTI labels with noise are scored like a slow reference scores them")
    rng = np.random.default_rng(0)
    gts = [read_objects(root / "training" / "label_2" / f"{i}.txt") for i in read_ids(root / "ImageSets" / "train.txt")[:45]]
    dets = []
    for g in gts:
        kept = g.select(torch.tensor([t not in ("DontCare", "Misc") for t in g.types], dtype=torch.bool))
        n = len(kept)
        noise = lambda *shape, scale: torch.from_numpy(rng.normal(0, scale, shape))  # noqa: E731
        dets.append(
            KittiObjects(
                types=tuple("Car" if t in ("Van", "Truck") else t for t in kept.types),
                truncated=kept.truncated,
                occluded=kept.occluded,
                alpha=kept.alpha + noise(n, scale=0.3),
                bbox=kept.bbox + noise(n, 4, scale=3),
                dimensions=kept.dimensions * (1 + noise(n, 3, scale=0.05)).clamp(0.5, 1.5),
                location=kept.location + noise(n, 3, scale=0.1),
                rotation_y=kept.rotation_y + noise(n, scale=0.05),
                scores=torch.from_numpy(rng.uniform(size=n)),
            )
        )
    car = evaluate_kitti(gts, dets, classes=("Car",)).classes["Car"]
    for metric, curve in (("bbox", car.bbox), ("bev", car.bev), ("3d", car.box_3d)):
        precision, _, total = _reference(gts, dets, "Car", metric, 1, 0.7)
        assert car.ground_truths[1] == total
        np.testing.assert_allclose(curve.samples[1], precision, atol=1e-12)
