"""How long KITTI's evaluation takes: 3,769 frames as in the val split, with about 4 cars and 10 to 30 detections in each.

    python benchmarks/speed/kitti_evaluation.py [--frames 3769]

Prints the first run, which includes numba's compilation unless a cache is there, the second run, and the same with text files to read.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from upcycle3d.datasets.kitti_text import KittiObjects, write_objects
from upcycle3d.perception.evaluation.kitti import evaluate_kitti, evaluate_kitti_folders


def simulate_frame(rng: np.random.Generator) -> tuple[KittiObjects, KittiObjects]:
    """Labels of 1 to 7 cars, and 10 to 30 detections: one near each car, the others anywhere."""
    cars, detections = int(rng.integers(1, 8)), int(rng.integers(10, 31))
    location = rng.uniform([-20, 1.4, 5], [20, 1.8, 60], (cars, 3))
    left, top = rng.uniform(0, 1100, cars), rng.uniform(150, 200, cars)
    bbox = np.stack([left, top, left + 90, top + rng.uniform(20, 80, cars)], 1)
    size = rng.normal([1.5, 1.6, 3.9], [0.1, 0.1, 0.4], (cars, 3)).clip(1)
    yaw = rng.uniform(-np.pi, np.pi, cars)

    near = np.arange(detections) % cars
    away = (np.arange(detections) >= cars)[:, None]
    found_location = location[near] + np.where(away, rng.uniform(-15, 15, (detections, 3)), rng.normal(0, 0.1, (detections, 3)))
    found_bbox = bbox[near] + np.where(away, rng.uniform(-200, 200, (detections, 1)), rng.normal(0, 2, (detections, 4)))
    labels = _objects(location, size, yaw, bbox, rng.integers(0, 3, cars), None)
    score = np.where(away[:, 0], rng.beta(2, 5, detections), rng.beta(5, 2, detections))
    return labels, _objects(found_location, size[near], yaw[near], found_bbox, np.zeros(detections, np.int64), score)


def _objects(
    location: np.ndarray, size: np.ndarray, yaw: np.ndarray, bbox: np.ndarray, occluded: np.ndarray, score: np.ndarray | None
) -> KittiObjects:
    return KittiObjects(
        types=("Car",) * len(yaw),
        truncated=torch.zeros(len(yaw), dtype=torch.float64),
        occluded=torch.from_numpy(occluded),
        alpha=torch.from_numpy(yaw),
        bbox=torch.from_numpy(bbox),
        dimensions=torch.from_numpy(size),
        location=torch.from_numpy(location),
        rotation_y=torch.from_numpy(yaw),
        scores=None if score is None else torch.from_numpy(score),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=3769)
    frames = parser.parse_args().frames
    rng = np.random.default_rng(0)
    labels, detections = zip(*(simulate_frame(rng) for _ in range(frames)))
    print(
        f"{frames} frames, {sum(map(len, labels))} objects, {sum(map(len, detections))} detections, {torch.get_num_threads()} threads"
    )
    for run in ("first", "second"):
        start = time.perf_counter()
        result = evaluate_kitti(labels, detections, classes=("Car",))
        easy, moderate, hard = result.classes["Car"].box_3d.r40
        print(f"{run} run: {time.perf_counter() - start:.2f} s   Car 3D AP R40 {easy:.2f} {moderate:.2f} {hard:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        ids = [f"{i:06d}" for i in range(frames)]
        for i, truth, found in zip(ids, labels, detections):
            write_objects(Path(folder) / "labels" / f"{i}.txt", truth)
            write_objects(Path(folder) / "detections" / f"{i}.txt", found)
        start = time.perf_counter()
        evaluate_kitti_folders(Path(folder) / "labels", Path(folder) / "detections", ids, classes=("Car",))
        print(f"with reading {2 * frames} text files: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
