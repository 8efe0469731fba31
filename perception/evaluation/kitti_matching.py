"""The inner loops of the KITTI protocol: which detection is matched to which object, and the counts that follow.

The objects of all frames lie one after the other. Frame f owns the ground truths `gt_start[f]:gt_start[f + 1]`, the detections
`det_start[f]:det_start[f + 1]`, and, from `pair_start[f]` on, the overlaps of each of its ground truths with each of its
detections, row by row. `ignored` is 0 counts, 1 neither right nor wrong; -1 (detections) does not take part.
File order decides ties, here as in the official program.
"""

from __future__ import annotations

import math

import numpy as np

from ...core.compiled import compiled

SAMPLES = 41  # recall positions 0, 1/40, .., 1


@compiled()
def true_positive_scores(gt_start, det_start, pair_start, overlap, min_overlap, score, gt_ignored, det_ignored):  # type: ignore[no-untyped-def]
    """Pass 1: the scores of all true positives when every detection counts. An object takes the *best scored* overlapping detection.

    Args:
        gt_start: (F + 1,) where the objects of each frame begin.
        det_start: (F + 1,) where its detections begin.
        pair_start: (F + 1,) where its overlaps begin.
        overlap: (P,) overlaps.
        min_overlap: An overlap must be above it.
        score: (N,) scores of the detections.
        gt_ignored: (M,) 0 counts, 1 ignored.
        det_ignored: (N,) 0 counts, 1 ignored, -1 takes no part.

    Returns:
        The scores, in the order of the objects.
    """
    found = np.empty(len(gt_ignored))
    count = 0
    taken = np.zeros(len(score), np.bool_)
    for f in range(len(gt_start) - 1):
        width = det_start[f + 1] - det_start[f]
        for i in range(gt_start[f], gt_start[f + 1]):
            row = pair_start[f] + (i - gt_start[f]) * width - det_start[f]
            best = -1
            for j in range(det_start[f], det_start[f + 1]):
                if det_ignored[j] < 0 or taken[j] or not overlap[row + j] > min_overlap:
                    continue
                if best < 0 or score[j] > score[best]:
                    best = j
            if best >= 0:
                taken[best] = True
                if gt_ignored[i] == 0 and det_ignored[best] == 0:
                    found[count] = score[best]
                    count += 1
    return found[:count]


@compiled()
def count_matches(  # type: ignore[no-untyped-def]
    gt_start,
    det_start,
    pair_start,
    overlap,
    min_overlap,
    score,
    gt_ignored,
    det_ignored,
    in_dont_care,
    gt_alpha,
    det_alpha,
    thresholds,
):
    """Pass 2: counts of the detections at or above each threshold.

    Here an object takes the *best overlapping* detection that counts, and an ignored one only if there is no other. A detection that is left over is
    a false positive unless it is ignored or lies in a DontCare region.

    Args:
        gt_start: As in pass 1.
        det_start: As in pass 1.
        pair_start: As in pass 1.
        overlap: As in pass 1.
        min_overlap: As in pass 1.
        score: As in pass 1.
        gt_ignored: As in pass 1.
        det_ignored: As in pass 1.
        in_dont_care: (N,) bool, detections in a DontCare region.
        gt_alpha: (M,) observation angles in rad.
        det_alpha: (N,) observation angles in rad.
        thresholds: (T,) score thresholds.

    Returns:
        (T, 3) true positives, false positives and summed orientation similarity.
    """
    counts = np.zeros((len(thresholds), 3))
    taken = np.zeros(len(score), np.bool_)
    for t in range(len(thresholds)):
        taken[:] = False
        for f in range(len(gt_start) - 1):
            width = det_start[f + 1] - det_start[f]
            for i in range(gt_start[f], gt_start[f + 1]):
                row = pair_start[f] + (i - gt_start[f]) * width - det_start[f]
                best = -1
                best_overlap = 0.0
                for j in range(det_start[f], det_start[f + 1]):
                    if det_ignored[j] < 0 or taken[j] or score[j] < thresholds[t] or not overlap[row + j] > min_overlap:
                        continue
                    if det_ignored[j] == 0:
                        if best < 0 or det_ignored[best] == 1 or overlap[row + j] > best_overlap:
                            best = j
                            best_overlap = overlap[row + j]
                    elif best < 0:
                        best = j
                if best >= 0:
                    taken[best] = True
                    if gt_ignored[i] == 0 and det_ignored[best] == 0:
                        counts[t, 0] += 1
                        counts[t, 2] += (1.0 + math.cos(gt_alpha[i] - det_alpha[best])) / 2.0
        for j in range(len(score)):
            if not taken[j] and det_ignored[j] == 0 and score[j] >= thresholds[t] and not in_dont_care[j]:
                counts[t, 1] += 1
    return counts


def recall_thresholds(scores: np.ndarray, ground_truths: int) -> np.ndarray:
    """Find the score thresholds, at most 41, at which recall comes nearest to 0, 1/40, 2/40 and so on.

    With fewer than 40 true positives each score is a threshold of its own, so the curve ends early and the rest counts as 0. The official program does
    the same: AP needs about 40 objects to mean anything.

    Args:
        scores: Scores of the true positives.
        ground_truths: Number of objects that count.

    Returns:
        Thresholds, descending.
    """
    thresholds = []
    recall = 0.0
    descending = np.sort(scores)[::-1].tolist()
    last = len(descending) - 1
    for i, score in enumerate(descending):
        left = (i + 1) / ground_truths
        right = (i + 2) / ground_truths if i < last else left
        if i < last and right - recall < recall - left:
            continue  # the next score comes nearer to the wanted recall
        thresholds.append(score)
        recall += 1 / (SAMPLES - 1)
    return np.array(thresholds, dtype=np.float64)
