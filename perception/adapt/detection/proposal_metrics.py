"""How well proposals are classified where the target has labels. For measurement only: nothing here reaches adaptation.

    on matched proposals        per-class accuracy, OS*, UNK, H; AUROC and FPR95 of the unknown score; the same by distance
    on private objects          how many were proposed at all, and how many called unknown, by class: H says nothing about objects
                                that are never proposed
    on what is called unknown   how much of it lies on private objects, on known ones, on background
    on detections               AP of the known classes, with the detector's own classes and with the new ones without the unknown

Read next: `measure.py`, which measures an adaptation and its baselines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....core.errors import InvalidInput
from ....core.structures import Labels
from ...evaluation.cross_dataset import evaluate_cross_dataset
from ...evaluation.kitti import LOOSE, OFFICIAL
from ...evaluation.score import Scores, kitti_scores
from ...models.detector import Detector
from ..glc.metrics import accuracy, auroc, class_accuracy, fpr_at_tpr, novel_category_accuracy, open_set_scores
from .class_map import ClassMap
from .open_set import ClassifiedProposals, known_detections
from .proposal_matching import BACKGROUND, Matches
from .proposals import DetectorProposals

_DISTANCE_BINS = ((0.0, 20.0), (20.0, 35.0), (35.0, float("inf")))  # m; the small detectors see 51 m


@dataclass(frozen=True, kw_only=True)
class OpenSetReport:
    """Scores of proposals that lie on objects, each 0 to 1.

    `os_star`, `unk`, `h`, `auroc` and `fpr95` are None where one kind is missing: a closed or partial target has no private object.
    """

    known: int
    """Number of proposals on known objects."""

    unknown: int
    """Number of proposals on private objects."""

    accuracy: float
    """Share of all of them with the correct class or unknown."""

    closed_accuracy: float
    """Mean accuracy over the shared classes without rejection."""

    known_accuracy: Mapping[str, float]
    """Accuracy of each shared class with rejection."""

    os_star: float | None
    """OS*, the mean of `known_accuracy`."""

    unk: float | None
    """UNK, the share of proposals on private objects that are called unknown."""

    h: float | None
    """H, the harmonic mean of OS* and UNK."""

    auroc: float | None
    """AUROC of the unknown score."""

    fpr95: float | None
    """Share of private objects accepted where 95 % of the known ones are."""


@dataclass(frozen=True, kw_only=True)
class PrivateClassReport:
    """One class that the source does not know."""

    objects: int
    """Number of labeled objects."""

    proposed: int
    """Number of these with a proposal on them."""

    proposals: int
    """Number of proposals on them."""

    unknown: float | None
    """Share of these proposals that are called unknown, or None without a proposal."""


@dataclass(frozen=True, kw_only=True)
class CalledUnknown:
    """What the proposals that are called unknown lie on; ignored ones are left out."""

    private: int
    """Number on private objects."""

    known: int
    """Number on known objects."""

    background: int
    """Number on background."""


@dataclass(frozen=True, kw_only=True)
class ProposalReport:
    """Everything that is measured about one way of classifying proposals."""

    matched: OpenSetReport
    """Proposals on objects."""

    ranges: Mapping[str, OpenSetReport]
    """The same by distance: "0-20 m", "20-35 m", "35+ m"."""

    private: Mapping[str, PrivateClassReport]
    """Private classes by name."""

    called_unknown: CalledUnknown
    """What is called unknown."""

    novel_category_accuracy: float | None
    """How well clusters of private proposals match their classes; None with fewer than two private classes."""

    known_ap: Scores
    """AP in percent of the known classes without what is called unknown; see `known_ap`."""

    threshold: float
    """Threshold of the unknown score that was used."""


def open_set_report(classified: ClassifiedProposals, ids: Tensor, rows: Tensor, shared: Sequence[int]) -> OpenSetReport | None:
    """Measure the proposals that lie on known or private objects.

    Args:
        classified: Decisions on N proposals.
        ids: (N,) int64, `Matches.ids`.
        rows: (N,) bool, which proposals are counted.
        shared: Source classes that the target has.

    Returns:
        The scores, or None if no counted proposal lies on an object.
    """
    chosen = rows & (ids >= 0)
    if not chosen.any():
        return None
    unknown = len(classified.classes)
    truth, predicted, nearest = (t[chosen].numpy() for t in (ids, classified.ids, classified.nearest))
    scores, private = classified.unknown_scores[chosen].numpy(), truth == unknown
    own = [c for c in shared if bool((truth == c).any())]
    both = bool(own) and bool(private.any())
    open_set = open_set_scores(predicted, truth, own, unknown) if both else None
    return OpenSetReport(
        known=int((~private).sum()),
        unknown=int(private.sum()),
        accuracy=accuracy(predicted, truth),
        closed_accuracy=float(class_accuracy(nearest, truth, own).mean()) if own else 0.0,
        known_accuracy={classified.classes[c]: float(class_accuracy(predicted, truth, [c])[0]) for c in own},
        os_star=None if open_set is None else open_set.os_star,
        unk=None if open_set is None else open_set.unk,
        h=None if open_set is None else open_set.h,
        auroc=auroc(scores, private) if both else None,
        fpr95=fpr_at_tpr(scores, private) if both else None,
    )


def private_class_reports(classified: ClassifiedProposals, matches: Matches) -> dict[str, PrivateClassReport]:
    """Measure each private class: how many objects were proposed at all, and how many proposals called unknown.

    Args:
        classified: Decisions on N proposals.
        matches: What they lie on.

    Returns:
        Reports by class name.
    """
    unknown, found = len(classified.classes), {}
    for name in matches.private_names(unknown):
        objects = (matches.label_classes == matches.label_names.index(name)) & (matches.label_ids == unknown)
        on = (matches.objects >= 0) & (matches.ids == unknown)
        on &= torch.cat([objects, torch.zeros(1, dtype=torch.bool)])[matches.objects]
        found[name] = PrivateClassReport(
            objects=int(objects.sum()),
            proposed=len(matches.objects[on].unique()),
            proposals=int(on.sum()),
            unknown=float(classified.unknown[on].float().mean()) if on.any() else None,
        )
    return found


def _novel_categories(classified: ClassifiedProposals, matches: Matches) -> float | None:
    on = matches.ids == len(classified.classes)
    classes = matches.label_classes[matches.objects[on]].numpy()
    if len(set(classes.tolist())) < 2:
        return None
    return novel_category_accuracy(classified.features[on].numpy(), classes)


def known_ap(
    proposals: DetectorProposals,
    classified: ClassifiedProposals | None,
    labels: Sequence[Labels | None],
    label_names: tuple[str, ...],
    class_map: ClassMap,
    *,
    limits: tuple[float, ...] | None = None,
) -> Scores:
    """Compute the AP of the known classes by KITTI's rules without a camera (`evaluate_cross_dataset`).

    Private objects take no part: a box on one is a false positive of its class.

    Args:
        proposals: All proposals.
        classified: Decisions on them, or None for the detector's own classes.
        labels: Labels of each frame, in order.
        label_names: The classes of the labels.
        class_map: What these classes mean to the detector.
        limits: Lowest x, y, z and highest x, y, z in m of what is scored, or None for everything.

    Returns:
        AP R40 in percent by names like "Car 3D 0.7", where 0.7 is the minimum overlap. A class without an object is left out.

    Raises:
        InvalidInput: A frame has no labels.
    """
    names, meaning = class_map.source, torch.from_numpy(class_map.ids(label_names))
    truths = []
    for index, scene in enumerate(labels):
        if scene is None:
            raise InvalidInput(f"frame {proposals.frame_ids[index]} has no labels to measure against")
        kept = scene.select((meaning[scene.classes] >= 0) & (meaning[scene.classes] < len(names)))
        truths.append(Labels.make(kept.boxes.data, meaning[kept.classes], weight=kept.weight, num_points=kept.num_points))
    found = [known_detections(proposals, classified, index) for index in range(len(labels))]
    official, loose = (
        evaluate_cross_dataset(truths, found, label_classes=names, detector_classes=names, limits=limits, min_overlaps=overlaps)
        for overlaps in (OFFICIAL, LOOSE)
    )
    return kitti_scores(official, loose)


def scored_limits(detector: Detector) -> tuple[float, ...]:
    """Give the limits within which objects are scored: what the detector can see, with room in height.

    Args:
        detector: The detector.

    Returns:
        Lowest x, y, z and highest x, y, z in m.
    """
    x0, y0, _, x1, y1, _ = detector.spec.grid.range
    return (x0, y0, -10.0, x1, y1, 10.0)


def proposal_report(
    proposals: DetectorProposals,
    classified: ClassifiedProposals,
    matches: Matches,
    labels: Sequence[Labels | None],
    class_map: ClassMap,
    *,
    limits: tuple[float, ...] | None = None,
) -> ProposalReport:
    """Measure one way of classifying proposals.

    Args:
        proposals: All proposals.
        classified: Decisions on them.
        matches: What they lie on.
        labels: Labels of each frame, in order.
        class_map: What the classes of the labels mean to the detector.
        limits: See `known_ap`.

    Returns:
        All metrics.

    Raises:
        InvalidInput: No proposal lies on an object.
    """
    shared, everything = class_map.shared, torch.ones(len(proposals), dtype=torch.bool)
    matched = open_set_report(classified, matches.ids, everything, shared)
    if matched is None:
        raise InvalidInput(f"no proposal of {proposals.data} lies on a labeled object, so nothing can be measured")
    ranges = {}
    for low, high in _DISTANCE_BINS:
        name = f"{low:g}-{high:g} m" if high < float("inf") else f"{low:g}+ m"
        part = open_set_report(classified, matches.ids, (proposals.ranges >= low) & (proposals.ranges < high), shared)
        if part is not None:
            ranges[name] = part
    called = matches.ids[classified.unknown]
    unknown = len(classified.classes)
    return ProposalReport(
        matched=matched,
        ranges=ranges,
        private=private_class_reports(classified, matches),
        called_unknown=CalledUnknown(
            private=int((called == unknown).sum()),
            known=int(((called >= 0) & (called < unknown)).sum()),
            background=int((called == BACKGROUND).sum()),
        ),
        novel_category_accuracy=_novel_categories(classified, matches),
        known_ap=known_ap(proposals, classified, labels, matches.label_names, class_map, limits=limits),
        threshold=classified.threshold,
    )
