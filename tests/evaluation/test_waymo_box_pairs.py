"""Pairs of overlapping boxes over many frames: those of every frame by itself, whatever the order."""

import numpy as np
import pytest
import torch

from upcycle3d.ops.iou3d import iou_3d
from upcycle3d.perception.evaluation.box_pairs import BoxPairs, box_pairs


def _crowd(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in a small place and their frames, mixed up."""
    random = np.random.default_rng(seed).random
    boxes = random((count, 7)) * [12, 12, 1, 3, 1, 1, 6] + [0, 0, 0, 2, 1, 1, -3]
    return boxes, (random(count) * 5).astype(np.int64)


def test_pairs_are_those_of_each_frame() -> None:
    (a, frame_a), (b, frame_b) = _crowd(40, 0), _crowd(50, 1)
    pairs = box_pairs(a, frame_a, b, frame_b)
    overlap = iou_3d(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    overlap[frame_a[:, None] != frame_b] = 0
    rows, columns = overlap.nonzero()
    assert len(rows) > 20
    assert np.repeat(np.arange(40), np.diff(pairs.start)).tolist() == rows.tolist()
    assert sorted(zip(rows, pairs.truth)) == list(zip(rows, columns))
    assert pairs.iou.tolist() == overlap[rows, pairs.truth].tolist()


def test_the_least_overlap_itself_is_enough_as_float32() -> None:
    pairs = BoxPairs(
        start=np.array([0, 2, 2, 3]), truth=np.array([4, 5, 6]), iou=np.array([0.7, 0.69999, 0.9], dtype=np.float32)
    ).at_least(0.7)
    assert (pairs.start.tolist(), pairs.truth.tolist()) == ([0, 1, 1, 2], [4, 6])


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_few_boxes(n: int, m: int) -> None:
    (a, frame_a), (b, frame_b) = _crowd(n, 0), _crowd(m, 0)
    pairs = box_pairs(a, frame_a, b, frame_b)
    assert len(pairs.start) == n + 1
    assert pairs.start[-1] == len(pairs.truth) == len(pairs.iou) == min(n, m, 1) * (n == m)
