"""How well a detector's proposals are judged where the target has labels. For measurement only: nothing here reaches adaptation.

on matched proposals   per-class accuracy, OS*, UNK, H; AUROC and FPR95 of the unknown score; the same by distance
on private objects     how many were proposed at all, and called unknown, class by class: H says nothing about what is never proposed
on what is called unknown   how much of it lies on private objects, on known ones, on background
on detections          AP of the known classes, with the detector's own labels and with the new ones without the unknown
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....core.errors import InvalidInput
from ....core.structures import Labels
from ...evaluation.cross_dataset import evaluate_cross_dataset
from ...evaluation.headline import Scores, kitti_scores
from ...evaluation.kitti import LOOSE, OFFICIAL
from ...models.detector import Detector
from ..glc.class_map import ClassMap
from ..glc.metrics import accuracy, auroc, class_accuracy, fpr_at_tpr, novel_category_accuracy, open_set_scores
from .open_set import ClassifiedProposals, known_detections
from .proposal_matching import BACKGROUND, Matches
from .proposals import DetectorProposals

RANGES = ((0.0, 20.0), (20.0, 35.0), (35.0, float("inf")))  # m; the small detectors see 51 m


@dataclass(frozen=True, kw_only=True)
class OpenSetReport:
    """Of matched proposals. known, unknown: how many lie on known and on private objects. accuracy: of all of them.

    os_star, unk, h: None where one kind is missing (closed and partial scenarios have no private object). closed_accuracy: mean over
    the shared classes without rejection. known_accuracy: the same with it, class by class. auroc, fpr95: of the unknown score.
    """

    known: int
    unknown: int
    accuracy: float
    closed_accuracy: float
    known_accuracy: Mapping[str, float]
    os_star: float | None
    unk: float | None
    h: float | None
    auroc: float | None
    fpr95: float | None


@dataclass(frozen=True, kw_only=True)
class PrivateClass:
    """objects: labelled. proposed: of these with a proposal on them. proposals: on them. unknown: share of these called unknown."""

    objects: int
    proposed: int
    proposals: int
    unknown: float | None


@dataclass(frozen=True, kw_only=True)
class CalledUnknown:
    """What the proposals called unknown lie on, as numbers; ignored ones are left out."""

    private: int
    known: int
    background: int


@dataclass(frozen=True, kw_only=True)
class ProposalReport:
    """Everything that is measured about one way of judging. ranges: by "0-20 m" and so on. private: by class name.

    known_ap: metric -> percent of the judged detections (``known_ap``). novel_category_accuracy: None with fewer than two private
    classes or fewer proposals on them than classes. threshold: that was used.
    """

    matched: OpenSetReport
    ranges: Mapping[str, OpenSetReport]
    private: Mapping[str, PrivateClass]
    called_unknown: CalledUnknown
    novel_category_accuracy: float | None
    known_ap: Scores
    threshold: float


def open_set_report(judged: ClassifiedProposals, ids: Tensor, rows: Tensor, shared: Sequence[int]) -> OpenSetReport | None:
    """Of the proposals in the mask ``rows`` (N,) that lie on known or private objects; None if there is none. ids: ``Matches.ids``."""
    chosen = rows & (ids >= 0)
    if not chosen.any():
        return None
    unknown = len(judged.classes)
    truth, predicted, nearest = (t[chosen].numpy() for t in (ids, judged.ids, judged.nearest))
    scores, private = judged.unknown_scores[chosen].numpy(), truth == unknown
    own = [c for c in shared if bool((truth == c).any())]
    both = bool(own) and bool(private.any())
    open_set = open_set_scores(predicted, truth, own, unknown) if both else None
    return OpenSetReport(
        known=int((~private).sum()),
        unknown=int(private.sum()),
        accuracy=accuracy(predicted, truth),
        closed_accuracy=float(class_accuracy(nearest, truth, own).mean()) if own else 0.0,
        known_accuracy={judged.classes[c]: float(class_accuracy(predicted, truth, [c])[0]) for c in own},
        os_star=None if open_set is None else open_set.os_star,
        unk=None if open_set is None else open_set.unk,
        h=None if open_set is None else open_set.h,
        auroc=auroc(scores, private) if both else None,
        fpr95=fpr_at_tpr(scores, private) if both else None,
    )


def private_classes(judged: ClassifiedProposals, matches: Matches) -> dict[str, PrivateClass]:
    """Each private class by name: proposed at all, and called unknown."""
    unknown, found = len(judged.classes), {}
    for name in matches.private_classes(unknown):
        objects = (matches.label_classes == matches.label_names.index(name)) & (matches.label_ids == unknown)
        on = (matches.objects >= 0) & (matches.ids == unknown)
        on &= torch.cat([objects, torch.zeros(1, dtype=torch.bool)])[matches.objects]
        found[name] = PrivateClass(
            objects=int(objects.sum()),
            proposed=len(matches.objects[on].unique()),
            proposals=int(on.sum()),
            unknown=float(judged.unknown[on].float().mean()) if on.any() else None,
        )
    return found


def _novel_categories(judged: ClassifiedProposals, matches: Matches) -> float | None:
    on = matches.ids == len(judged.classes)
    classes = matches.label_classes[matches.objects[on]].numpy()
    if len(set(classes.tolist())) < 2:
        return None
    return novel_category_accuracy(judged.features[on].numpy(), classes)


def known_ap(
    proposals: DetectorProposals,
    judged: ClassifiedProposals | None,
    labels: Sequence[Labels | None],
    label_names: tuple[str, ...],
    class_map: ClassMap,
    *,
    limits: tuple[float, ...] | None = None,
) -> Scores:
    """ "Car 3D 0.7" -> AP R40 in percent of the known classes, by KITTI's rules without a camera (``evaluate_cross_dataset``).

    judged: None for the detector's own labels. Private objects take no part: a box on one is a false positive of its class. limits:
    low x y z, high x y z m of what is scored. A class without an object is left out.
    """
    names, meaning = class_map.source, torch.from_numpy(class_map.ids(label_names))
    truths = []
    for index, scene in enumerate(labels):
        if scene is None:
            raise InvalidInput(f"frame {proposals.frame_ids[index]} has no labels to score against")
        kept = scene.select((meaning[scene.classes] >= 0) & (meaning[scene.classes] < len(names)))
        truths.append(Labels.make(kept.boxes.data, meaning[kept.classes], weight=kept.weight, num_points=kept.num_points))
    found = [known_detections(proposals, judged, index) for index in range(len(labels))]
    official, loose = (
        evaluate_cross_dataset(truths, found, label_classes=names, detector_classes=names, limits=limits, min_overlaps=overlaps)
        for overlaps in (OFFICIAL, LOOSE)
    )
    return kitti_scores(official, loose)


def seen_region(detector: Detector) -> tuple[float, ...]:
    """Low x y z, high x y z m of what the detector can see, with room in height: the limits within which objects are scored."""
    x0, y0, _, x1, y1, _ = detector.spec.grid.range
    return (x0, y0, -10.0, x1, y1, 10.0)


def proposal_report(
    proposals: DetectorProposals,
    judged: ClassifiedProposals,
    matches: Matches,
    labels: Sequence[Labels | None],
    class_map: ClassMap,
    *,
    limits: tuple[float, ...] | None = None,
) -> ProposalReport:
    """All metrics of one way of judging. Raises InvalidInput if no proposal lies on an object."""
    shared, everything = class_map.shared, torch.ones(len(proposals), dtype=torch.bool)
    matched = open_set_report(judged, matches.ids, everything, shared)
    if matched is None:
        raise InvalidInput(f"no proposal of {proposals.data} lies on a labelled object, so nothing can be measured")
    ranges = {}
    for low, high in RANGES:
        name = f"{low:g}-{high:g} m" if high < float("inf") else f"{low:g}+ m"
        part = open_set_report(judged, matches.ids, (proposals.ranges >= low) & (proposals.ranges < high), shared)
        if part is not None:
            ranges[name] = part
    called = matches.ids[judged.unknown]
    unknown = len(judged.classes)
    return ProposalReport(
        matched=matched,
        ranges=ranges,
        private=private_classes(judged, matches),
        called_unknown=CalledUnknown(
            private=int((called == unknown).sum()),
            known=int(((called >= 0) & (called < unknown)).sum()),
            background=int((called == BACKGROUND).sum()),
        ),
        novel_category_accuracy=_novel_categories(judged, matches),
        known_ap=known_ap(proposals, judged, labels, matches.label_names, class_map, limits=limits),
        threshold=judged.threshold,
    )
