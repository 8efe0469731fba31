"""Attack on people: can pedestrians be found in what left a vehicle, and their height be estimated?

A small network reads the BEV map of an upload, or of a scan that another attack rebuilt, and marks where people stand; a fit on the
surroundings of each answers how tall they are. Both learn from frames of the attacker's own.

Read next: `scene_views.py` for what the attacker sees, `attributes.py` for attributes of objects whose place is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.errors import require
from ..frames import AuditFrame, RebuildAttack
from .attributes import correlation, objects_of
from .fits import fit_best
from .person_finder import FOUND_WITHIN, Answers, Sight, train_finder
from .scene_views import SceneView, view_of_coordinates, view_of_nothing, view_of_points, view_of_upload


@dataclass(frozen=True, kw_only=True)
class PeopleScore:
    """How well people were found in one kind of view, and what was said of their height."""

    average_precision: float
    """Area under the curve of precision over recall, answers ranked by score; needs no threshold."""

    recall: float
    """Share of the people that were found within 0.5 m, at the threshold that was best on the attacker's frames."""

    precision: float
    """Share of the answers that are right at this threshold; 0 where there is no answer."""

    found: int
    """People that were found at this threshold. The heights below are theirs."""

    height_error: float
    """Mean absolute error of their height in centimeters; NaN where nobody was found."""

    height_guess: float
    """The same error of the mean height of the attacker's people: the no-information baseline."""

    height_correlation: float
    """Correlation of answers and true heights; 0 where fewer than three people were found."""


@dataclass(frozen=True, kw_only=True)
class PeopleLeak:
    """People in one kind of upload."""

    nothing: PeopleScore
    """The no-information baseline: where people usually stand."""

    coordinates: PeopleScore
    """From cells and keypoints without their features."""

    upload: PeopleScore
    """From the upload, directly."""

    rebuilt: PeopleScore | None
    """From the scan that another attack rebuilt; None where none was given."""

    raw: PeopleScore
    """From the raw scan at the encoder's input grid: the upper bound of finding. Heights may be told better from an upload, whose features
    describe a body better than this attacker's description of points."""

    people: int
    """People in the unseen frames with at least 5 points. Others are neither missed nor wrong answers."""

    frames: int
    """Unseen frames."""

    height_spread: float
    """Standard deviation of the true heights in centimeters. Where it is small there is no attribute to find."""


def attack_people(
    known: Sequence[AuditFrame],
    unseen: Sequence[AuditFrame],
    *,
    person: int,
    rebuild: RebuildAttack | None = None,
    seed: int = 0,
    steps: int = 300,
) -> PeopleLeak:
    """Learn to find people and to tell their height, and score the answers on unseen frames.

    Args:
        known: Labeled frames of the attacker's own.
        unseen: Labeled frames to score.
        person: Class number of pedestrians in the labels.
        rebuild: A trained attack whose rebuilt scans are searched too. It should have been trained on other frames than `known`, or its
            scans are better there than on the unseen frames. None leaves it out.
        seed: Decides the network's start and its batches.
        steps: Training steps of the network.

    Returns:
        The scores of every row.

    Raises:
        InvalidInput: A frame has no labels, or there are fewer than 10 people to learn from or none to find.
    """
    truth = [[_people_of(f, person) for f in part] for part in (known, unseen)]
    learned, asked = (sum(len(people) for people, _ in part) for part in truth)
    require(
        learned >= 10 and asked > 0,
        f"an attack on people needs at least 10 people to learn from and one to find, found {learned} and {asked}; use more frames",
    )

    def score(see: list[list[SceneView]]) -> PeopleScore:
        sights = [
            [Sight(view=view, people=people, ignored=thin) for view, (people, thin) in zip(views, part)]
            for views, part in zip(see, truth)
        ]
        return _score_view(sights[0], sights[1], seed=seed, steps=steps)

    parts = (known, unseen)
    rebuilt = None
    if rebuild is not None:
        scans = [[rebuild.rebuild(f.upload) for f in part] for part in parts]
        # The rebuilt scans may hold thousands of unlikely points: as many are kept as a scan of the attacker usually has voxels.
        most = round(1.5 * sum(_voxels(f) for f in known) / len(known))
        views = [
            [
                view_of_points(s.xyz[s.score.argsort(descending=True, stable=True)[:most]], f.upload.spec.grid)
                for s, f in zip(scan, part)
            ]
            for scan, part in zip(scans, parts)
        ]
        rebuilt = score(views)
    heights = torch.cat([people[:, 5] for people, _ in truth[1]])
    return PeopleLeak(
        nothing=score([[view_of_nothing(f.upload.spec) for f in part] for part in parts]),
        coordinates=score([[view_of_coordinates(f.upload) for f in part] for part in parts]),
        upload=score([[view_of_upload(f.upload) for f in part] for part in parts]),
        rebuilt=rebuilt,
        raw=score([[view_of_points(f.scan.xyz, f.upload.spec.grid) for f in part] for part in parts]),
        people=len(heights),
        frames=len(unseen),
        height_spread=100 * float(heights.std(correction=0)),
    )


def _voxels(frame: AuditFrame) -> int:
    points = view_of_points(frame.scan.xyz, frame.upload.spec.grid).points
    return 0 if points is None else len(points)


def _people_of(frame: AuditFrame, person: int) -> tuple[Tensor, Tensor]:
    """(P, 7) boxes of the people that count, and (Q, 2) places of the others."""
    objects = objects_of(frame)
    people = objects.boxes.data[objects.classes == person]
    labels = frame.labels
    every = labels.boxes.data[labels.classes == person] if labels is not None else people
    thin = every[~(every[:, None] == people[None]).all(2).any(1)]
    return people, thin[:, :2]


def _score_view(known: Sequence[Sight], unseen: Sequence[Sight], *, seed: int, steps: int) -> PeopleScore:
    generator = torch.Generator().manual_seed(seed)
    held = max(1, len(known) // 5)  # the attacker's last frames choose the threshold
    find = train_finder(known[:-held] or known, generator, steps)
    threshold = _best_threshold([find(s) for s in known[-held:]], known[-held:])
    answers = [find(s) for s in unseen]
    total = sum(len(s.people) for s in unseen)
    scores, right, hits = _match_all(answers, unseen)
    chosen = scores >= threshold
    matched = [(i, a, p) for (i, a, p), keep in zip(hits, chosen[right].tolist()) if keep]
    return PeopleScore(
        average_precision=_average_precision(right, total),
        recall=len(matched) / total,
        precision=float(right[chosen].double().mean()) if bool(chosen.any()) else 0.0,
        found=len(matched),
        **_heights(known, unseen, answers, matched, seed),
    )


def _match(answers: Answers, sight: Sight) -> tuple[Tensor, Tensor]:
    """(A,) row of the person that each answer finds, -1 for a wrong answer, -2 for one at a person that does not count; best answers first."""
    owner = torch.full((len(answers.xy),), -1)
    free = torch.ones(len(sight.people), dtype=torch.bool)
    distance = torch.cdist(answers.xy, sight.people[:, :2])
    for a in answers.score.argsort(descending=True, stable=True).tolist():
        if len(sight.people):
            d = torch.where(free, distance[a], torch.inf)
            if float(d.min()) <= FOUND_WITHIN:
                owner[a] = int(d.argmin())
                free[owner[a]] = False
                continue
        if len(sight.ignored) and float(torch.cdist(answers.xy[a : a + 1], sight.ignored).min()) <= 2 * FOUND_WITHIN:
            owner[a] = -2
    return owner, free


def _match_all(answers: Sequence[Answers], sights: Sequence[Sight]) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
    """Scores of all answers that count, best first; which are right; and (frame, answer, person) of the right ones in that order."""
    rows: list[tuple[float, int, int, int]] = []
    for i, (answer, sight) in enumerate(zip(answers, sights)):
        owner, _ = _match(answer, sight)
        rows += [(s, i, a, o) for a, (s, o) in enumerate(zip(answer.score.tolist(), owner.tolist())) if o != -2]
    rows.sort(key=lambda r: -r[0])
    scores = torch.tensor([r[0] for r in rows], dtype=torch.float64)
    right = torch.tensor([r[3] >= 0 for r in rows], dtype=torch.bool)
    return scores, right, [(i, a, o) for _, i, a, o in rows if o >= 0]


def _best_threshold(answers: Sequence[Answers], sights: Sequence[Sight]) -> float:
    """The score from which F1 is best; above every score where nothing is right."""
    scores, right, hits = _match_all(answers, sights)
    if not hits:
        return 2.0
    total = sum(len(s.people) for s in sights)
    correct = right.double().cumsum(0)
    f1 = 2 * correct / (torch.arange(1, len(right) + 1) + total)
    return float(scores[int(f1.argmax())])


def _average_precision(right: Tensor, total: int) -> float:
    """Area under the precision that is reached at each recall or above."""
    if not bool(right.any()):
        return 0.0
    precision = right.double().cumsum(0) / torch.arange(1, len(right) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)
    return float(best[right].sum() / total)


def _heights(
    known: Sequence[Sight],
    unseen: Sequence[Sight],
    answers: Sequence[Answers],
    matched: Sequence[tuple[int, int, int]],
    seed: int,
) -> dict[str, float]:
    """Errors of the heights of the people that were found, in centimeters."""
    people = torch.cat([s.people for s in known])
    if not matched:
        return {"height_error": math.nan, "height_guess": math.nan, "height_correlation": 0.0}
    inputs = torch.cat([s.view.around(F.pad(s.people[:, :2], (0, 1))) for s in known])
    frames = torch.cat([torch.full((len(s.people),), i) for i, s in enumerate(known)])
    fit = fit_best(inputs, people[:, 5:6], seed=seed, groups=frames)
    asked = torch.cat([unseen[i].view.around(F.pad(answers[i].xy[a : a + 1], (0, 1))) for i, a, _ in matched])
    truth = torch.stack([unseen[i].people[p, 5] for i, _, p in matched])
    said = fit.predict(asked)[:, 0]
    return {
        "height_error": 100 * float((said - truth).abs().mean()),
        "height_guess": 100 * float((people[:, 5].mean() - truth).abs().mean()),
        "height_correlation": correlation(said, truth) if len(truth) >= 3 else 0.0,
    }
