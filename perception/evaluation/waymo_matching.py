"""The inner loop of Waymo's protocol: the best matching of detections to objects, for every score cutoff at once.

For each cutoff the protocol wants the matching, among the detections at or above it, whose overlaps add up to the most. Solving
that anew for 101 cutoffs is what makes the official program slow. But a best matching of a set of detections stays almost best
when one detection is added: a single alternating path, from the new detection, repairs it (Kuhn and Munkres). So detections are
added one by one, best scored first, and what each path changes is booked at its detection's cutoff: it holds for that cutoff and
all below. Summing the bookings from the highest cutoff down gives the counts.
"""

from __future__ import annotations

import numpy as np

from ...core.compiled import compiled

TP, HEADING, TP_LEVEL_1, FP = range(4)


@compiled()
def count_by_cutoff(last_cutoff, cutoffs, start, truth, weight, accuracy, easy, ignored):  # type: ignore[no-untyped-def]
    """Count matches for every score cutoff. Detections come best first.

    Args:
        last_cutoff: (N,) the highest cutoff that a detection passes, -1 for none.
        cutoffs: Number of cutoffs.
        start: (N + 1,) where the pairs of each detection begin; see `BoxPairs`.
        truth: (P,) the object of each pair.
        weight: (P,) int64, the gain of each pair.
        accuracy: (P,) float64, heading accuracy of each pair.
        easy: (M,) bool, objects of LEVEL_1.
        ignored: (N,) bool, detections that are never wrong.

    Returns:
        (cutoffs, 4): true positives, their summed heading accuracy, those on LEVEL_1 objects, and false positives.
    """
    counts = np.zeros((cutoffs, 4))
    owner = np.full(len(easy), -1)  # of an object: the detection that has it
    held = np.full(len(ignored), -1)  # of a detection: the pair that matches it
    # Of an object on the frontier: the best gain of a path that ends by taking it, the pair and detection that take it, and the
    # object that detection leaves (-1: it is the new one).
    gain = np.full(len(easy), -1)
    pair_to = np.zeros(len(easy), np.int64)
    taker = np.zeros(len(easy), np.int64)
    left = np.zeros(len(easy), np.int64)
    for new in range(len(ignored)):
        k = last_cutoff[new]
        if k < 0:
            continue
        queue = [np.int64(-1)]  # so that numba knows the type
        queue.clear()
        seen = queue.copy()
        for p in range(start[new], start[new + 1]):
            j = truth[p]
            gain[j], pair_to[j], taker[j], left[j] = weight[p], p, new, -1
            queue.append(j)
            seen.append(j)
        at = 0
        while at < len(queue):
            j = queue[at]
            at += 1
            d = owner[j]
            if d < 0:
                continue
            for p in range(start[d], start[d + 1]):
                to = truth[p]
                value = gain[j] - weight[held[d]] + weight[p]
                if to != j and value > gain[to]:
                    if gain[to] < 0:
                        seen.append(to)
                    gain[to], pair_to[to], taker[to], left[to] = value, p, d, j
                    queue.append(to)
        best = np.int64(-1)
        best_value = 0
        for j in seen:
            value = gain[j] if owner[j] < 0 else gain[j] - weight[held[owner[j]]]
            if value > best_value:  # a tie leaves things as they are: the better scored keeps its object
                best, best_value = j, value
        if best < 0:
            counts[k, FP] += not ignored[new]
        elif owner[best] >= 0:
            loser = owner[best]
            _book(counts[k], held[loser], -1, truth, accuracy, easy)
            held[loser] = -1
            counts[k, FP] += not ignored[loser]
        while best >= 0:
            d = taker[best]
            if held[d] >= 0:
                _book(counts[k], held[d], -1, truth, accuracy, easy)
            owner[best], held[d] = d, pair_to[best]
            _book(counts[k], held[d], 1, truth, accuracy, easy)
            best = left[best]
        for j in seen:
            gain[j] = -1
    for k in range(cutoffs - 2, -1, -1):
        counts[k] += counts[k + 1]
    return counts


@compiled()
def _book(row, pair, sign, truth, accuracy, easy):  # type: ignore[no-untyped-def]
    row[TP] += sign
    row[HEADING] += sign * accuracy[pair]
    row[TP_LEVEL_1] += sign * easy[truth[pair]]
