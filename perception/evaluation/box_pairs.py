"""Which detection overlaps which object, over all frames at once: the first step of every protocol that matches boxes in space.

Frames hold few boxes and most are far apart. Only pairs whose circles in BEV meet are stored, detection by detection (compressed rows), so
memory follows the number of overlaps and not of all pairs, and whole validation splits fit. Read next: `waymo.py`, `lyft.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ...core.compiled import compiled
from ...core.errors import InvalidInput
from ...ops.iou3d import iou_3d_aligned

_Floats = NDArray[np.float64]
_Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class BoxPairs:
    """Overlapping pairs of detections and objects."""

    start: _Indices
    """(N + 1,) int64; the pairs of detection i are start[i]:start[i + 1]."""
    truth: _Indices
    """(P,) int64, the object, ascending within a detection."""
    iou: NDArray[np.float32]
    """(P,) float32 IoU of the volumes, above 0."""

    def at_least(self, minimum: float) -> BoxPairs:
        """The pairs with enough overlap.

        Args:
            minimum: Smallest IoU, compared as float32.

        Returns:
            Those pairs.
        """
        keep = self.iou >= np.float32(minimum)
        start = np.concatenate([[0], np.cumsum(keep)])[self.start].astype(np.int64)
        return BoxPairs(start=start, truth=self.truth[keep], iou=self.iou[keep])


def box_pairs(detections: _Floats, detection_frames: _Indices, truths: _Floats, truth_frames: _Indices) -> BoxPairs:
    """Find the overlapping pairs of boxes of the same frame.

    Args:
        detections: (N, 7) boxes, float64; see `core/boxes.py`.
        detection_frames: (N,) frame numbers from 0, in any order.
        truths: (M, 7) boxes, float64.
        truth_frames: (M,) frame numbers.

    Returns:
        The pairs.

    Raises:
        InvalidInput: A box holds NaN or infinity.
    """
    for what, boxes in (("detection", detections), ("ground-truth", truths)):
        bad = int((~np.isfinite(boxes).all(axis=1)).sum())
        if bad:
            raise InvalidInput(f"{bad} of {len(boxes)} {what} boxes have a NaN or infinite value; remove them first")
    frames = 1 + max(int(detection_frames.max(initial=-1)), int(truth_frames.max(initial=-1)))
    by_frame = np.argsort(truth_frames, kind="stable")
    frame_start = np.searchsorted(truth_frames[by_frame], np.arange(frames + 1)).astype(np.int64)
    sorted_truths = truths[by_frame]
    start, column = _near(_discs(detections), detection_frames, _discs(sorted_truths), frame_start)
    row = np.repeat(np.arange(len(detections)), np.diff(start))
    iou = iou_3d_aligned(torch.from_numpy(detections[row]), torch.from_numpy(sorted_truths[column])).numpy()
    pairs = BoxPairs(start=start, truth=by_frame[column], iou=iou)
    return pairs.at_least(float(np.finfo(np.float32).tiny))


def _discs(boxes: _Floats) -> _Floats:
    """(N, 3): center x, y and radius of the circle around a box in BEV."""
    return np.stack([boxes[:, 0], boxes[:, 1], np.hypot(boxes[:, 3], boxes[:, 4]) / 2], axis=1)


@compiled()
def _near(disc, frame, other, frame_start):  # type: ignore[no-untyped-def]
    """Rows (N + 1,) and columns (P,): for each disc the discs of its frame that it meets; counted first, then filled."""
    start = np.zeros(len(disc) + 1, np.int64)
    column = np.empty(0, np.int64)
    for filling in range(2):
        count = 0
        for i in range(len(disc)):
            for j in range(frame_start[frame[i]], frame_start[frame[i] + 1]):
                dx, dy, reach = disc[i, 0] - other[j, 0], disc[i, 1] - other[j, 1], disc[i, 2] + other[j, 2]
                if dx * dx + dy * dy < reach * reach:
                    if filling:
                        column[count] = j
                    count += 1
            start[i + 1] = count
        if not filling:
            column = np.empty(count, np.int64)
    return start, column
