"""One frame with everything that a viewer draws, for the tests of the viewers: `viewers_scene.frame()`."""

import os
import shutil

import numpy as np
import torch

import tiny
from upcycle3d.core.features import CutFeatures, SparseVoxels
from upcycle3d.core.structures import Boxes3D, Labels, PointCloud, Predictions
from upcycle3d.perception.viewers.drawn_frame import DrawnFrame

CAR = [[10.0, 2.0, 0.0, 4.0, 2.0, 1.5, 0.5]]


def predictions(boxes: list[list[float]], scores: list[float], classes: list[int] | None = None) -> Predictions:
    """Detections with these scores, of class 0 unless said otherwise."""
    score = torch.tensor(scores)
    kinds = torch.tensor(classes or [0] * len(boxes), dtype=torch.int64)
    data = Boxes3D(data=torch.tensor(boxes).reshape(-1, 7))
    return Predictions(boxes=data, classes=kinds, scores=score, class_scores=score, iou_scores=score)


def labels(boxes: list[list[float]], **columns: object) -> Labels:
    return Labels.make(Boxes3D.from_array(boxes), [0] * len(boxes), **columns)


def features(cells: list[list[int]], values: list[list[float]]) -> CutFeatures:
    """Features of one scene at `tiny.CUT`; cells are z, y, x."""
    coords = torch.nn.functional.pad(torch.tensor(cells, dtype=torch.int32).reshape(-1, 3), (1, 0))
    voxels = SparseVoxels(features=torch.tensor(values).reshape(-1, 4), coords=coords, shape=tiny.CUT.shape, batch_size=1)
    return CutFeatures(voxels=voxels, spec=tiny.CUT)


def frame(name: str = "a", points: int = 200) -> DrawnFrame:
    """A road of `points` points, two cells, and a box in each layer."""
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.uniform([0, -8, -0.1], [16, 8, 0.1], (points, 3)), rng.random((points, 1))], 1)
    return DrawnFrame(
        id=name,
        class_names=("Car", "Van"),
        points=PointCloud.from_array(rows),
        features=features([[0, 1, 2], [1, 30, 31]], [[1.0, 0, 0, 0], [0.0, 2, 0, 0]]),
        truth=labels(CAR),
        detections=predictions([[10.1, 2.0, 0.0, 4.0, 2.0, 1.5, 0.4], [5.0, -3.0, 0.0, 4.0, 2.0, 1.5, 0.0]], [0.9, 0.4], [0, 1]),
        teacher=labels(CAR, weight=[0.0]),
        pasted=labels([[6.0, 5.0, 0.0, 4.0, 2.0, 1.5, 0.0]]),
    )


def chromium() -> str | None:
    """The program of a Chromium on this machine: the environment variable CHROMIUM, or one that is installed."""
    names = ("chromium", "chromium-headless-shell", "google-chrome", "chromium-browser")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
