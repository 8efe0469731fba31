"""What an adaptation of a detector found: numbers for machines and an HTML page for people.

Read next: `adapt_detector.py`, which writes both.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from ....core.provenance import provenance_of_process
from ...viz.html import Block, Section, figure_svg, key_numbers, page, paragraph, table
from ..glc.plots import embedding_plot, score_histogram
from .adaptation import AdaptedProposals
from .measure import AdaptationMeasurement
from .open_set import ClassifiedProposals
from .proposal_classifier import ProposalClassifier
from .proposals import DetectorProposals


def _label_counts(classified: ClassifiedProposals) -> dict[str, int]:
    counts = torch.bincount(classified.ids, minlength=len(classified.classes) + 1).tolist()
    return dict(zip((*classified.classes, "unknown"), counts, strict=True))


def adaptation_result(
    classifier: ProposalClassifier,
    target: DetectorProposals,
    adapted: AdaptedProposals,
    measured: AdaptationMeasurement | None,
) -> dict[str, object]:
    """Collect the numbers of the result file.

    Args:
        classifier: The source's classifier.
        target: The target's proposals.
        adapted: The adaptation.
        measured: Measurements, or None without labels; then `metrics` and `detector_ap` are empty.

    Returns:
        Plain values.
    """
    classified, model = adapted.classified, adapted.model
    return {
        "source": {"data": classifier.source, "trained_on": dict(zip(classifier.classes, classifier.counts, strict=True))},
        "target": {"data": target.data, "frames": len(target.frame_ids), "proposals": len(target)},
        "class_number": model.class_number,
        "threshold": classified.threshold,
        "labels": _label_counts(classified),
        "background": int((classified.probabilities.argmax(1) == len(classified.classes)).sum()),
        "epochs": [asdict(epoch) for epoch in model.history],
        "detector_ap": {} if measured is None else dict(measured.detector_ap),
        "metrics": {} if measured is None else {name: asdict(report) for name, report in measured.reports.items()},
    }


def adaptation_page(
    name: str, target: DetectorProposals, adapted: AdaptedProposals, measured: AdaptationMeasurement | None
) -> str:
    """Draw the HTML page: key numbers, embedding, histogram with the threshold, and metrics where there are labels.

    Args:
        name: Name of the result, for the title.
        target: The target's proposals.
        adapted: The adaptation.
        measured: Measurements, or None without labels.

    Returns:
        The whole page.
    """
    classified = adapted.classified
    sections = [_summary(target, classified), _pictures(classified)]
    if measured is not None:
        sections.append(Section("Against the target's labels", _measured(measured)))
    subtitle = f"{len(target)} proposals of {target.data}; known classes {', '.join(classified.classes)}"
    return page(
        f"Adapted detector: {name}",
        sections,
        subtitle=subtitle,
        made_by=provenance_of_process(),
        next_steps=[
            ("Prepare labeled frames of your source domain and frames of your target.", "upcycle3d prepare --help"),
            (
                "Adapt a detector of yours.",
                "upcycle3d adapt detector --detector RUN --source DIR:train --target DIR:val --out adapted",
            ),
            ("Read the labels and unknown scores of every detection in the folder `detections`.", ""),
        ],
    )


def _summary(target: DetectorProposals, classified: ClassifiedProposals) -> Section:
    counts = _label_counts(classified)
    return Section(
        "Summary",
        [
            key_numbers(
                [
                    ("proposals", len(target), "", f"on {len(target.frame_ids)} frames"),
                    ("called unknown", 100 * counts["unknown"] / max(1, len(classified)), "%", "of all proposals"),
                    ("threshold", classified.threshold, "", "of the unknown score, chosen without labels"),
                ]
            ),
            paragraph(
                "Boxes and scores are the detector's; labels are new. Most proposals lie on nothing: each record also holds the "
                "probability of background."
            ),
            table(("label", "proposals"), list(counts.items()), "New labels."),
        ],
    )


def _pictures(classified: ClassifiedProposals) -> Section:
    embedding = embedding_plot(classified.features, classified.ids, classified.classes, "Target proposals by new label")
    histogram = score_histogram(
        classified.unknown_scores, classified.threshold, "Target proposals by unknown score", "unknown score"
    )
    return Section("Pictures", [figure_svg(embedding, "Embedding."), figure_svg(histogram, "Histogram.")])


def _measured(measured: AdaptationMeasurement) -> list[Block]:
    blocks = [_matched_table(measured)]
    adapted = measured.adapted
    if adapted.private:
        blocks.append(
            table(
                ("private class", "objects", "proposed", "proposals", "called unknown"),
                [(n, p.objects, p.proposed, p.proposals, _cell(p.unknown)) for n, p in adapted.private.items()],
                "After adaptation. An object without a proposal cannot be called unknown.",
            )
        )
    blocks.append(
        table(
            ("distance", "known", "private", "OS*", "UNK", "H"),
            [(n, m.known, m.unknown, _cell(m.os_star), _cell(m.unk), _cell(m.h)) for n, m in adapted.ranges.items()],
            "After adaptation, by distance.",
        )
    )
    names = list(dict.fromkeys([*measured.detector_ap, *adapted.known_ap]))
    columns = {"detector": measured.detector_ap, **{name: report.known_ap for name, report in measured.reports.items()}}
    blocks.append(
        table(
            ("AP R40", *columns),
            [(n, *(f"{c[n]:.1f}" if n in c else "" for c in columns.values())) for n in names],
            "Known classes, with the detector's labels and without what is called unknown.",
        )
    )
    return blocks


def _matched_table(measured: AdaptationMeasurement) -> Block:
    rows = [
        (name, *(_cell(v) for v in (m.os_star, m.unk, m.h, m.auroc, m.fpr95, m.closed_accuracy)), f"{r.threshold:.3f}")
        for name, r in measured.reports.items()
        for m in (r.matched,)
    ]
    return table(
        ("classified by", "OS*", "UNK", "H", "AUROC", "FPR95", "accuracy without rejection", "threshold"),
        rows,
        "Proposals that lie on a labeled object. The labels were not used above.",
    )


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
